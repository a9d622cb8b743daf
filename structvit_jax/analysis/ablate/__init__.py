"""Ablations with honest statistics: a grid of arms and seeds, trained, compared, written down."""

from structvit_jax.analysis.ablate.grid import Arm, Study, arms
from structvit_jax.analysis.ablate.statistics import Comparison, Summary, compare, summarize

__all__ = ["Arm", "Comparison", "Study", "Summary", "arms", "compare", "summarize"]
