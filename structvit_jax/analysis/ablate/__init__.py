"""Ablations with paired statistics: train a grid of arms and seeds and compare the arms."""
