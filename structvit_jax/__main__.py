"""`python -m structvit_jax` is `structvit`."""

from structvit_jax.cli import main

if __name__ == "__main__":
    main()
