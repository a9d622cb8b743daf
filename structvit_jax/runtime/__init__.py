"""Devices, processes, signals, locks and files: what a run needs besides its model."""
