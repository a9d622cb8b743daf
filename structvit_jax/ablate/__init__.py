"""Ablations with honest statistics: a grid of arms and seeds, trained, compared, written down."""

from structvit_jax.ablate.grid import Arm, arms
from structvit_jax.ablate.statistics import Comparison, Summary, compare, summarize

__all__ = ["Arm", "Comparison", "Summary", "arms", "compare", "summarize"]
