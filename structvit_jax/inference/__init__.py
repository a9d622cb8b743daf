"""Use a trained model: load it, predict, export, write label maps, convert its weights."""
