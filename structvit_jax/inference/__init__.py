"""Use trained models: load them, predict, write label maps and export."""
