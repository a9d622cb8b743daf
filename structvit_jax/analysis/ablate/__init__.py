"""Ablations with paired statistics: train a grid of arms and seeds and compare the arms."""

from structvit_jax.analysis.ablate.grid import Arm, Study, parse_arms
from structvit_jax.analysis.ablate.statistics import Comparison, Summary, compare, summarize

__all__ = ["Arm", "Comparison", "Study", "Summary", "compare", "parse_arms", "summarize"]
