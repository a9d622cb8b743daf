"""Training and evaluation. Start reading at `structvit_jax.training.loop`."""
