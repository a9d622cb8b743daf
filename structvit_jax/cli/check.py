"""`structvit check`: compare the kernels of this machine with their definitions."""

from __future__ import annotations

import click

from structvit_jax.cli import options

_COLUMNS = "{:<24} {:<18} {:<9} {:<30} {:>9} {:>9} {:>11} {:>11}  {}"
_TITLES = ("kernel", "operation", "type", "shape", "output", "gradients", "kernel", "definition", "verdict")


@click.command(cls=options.Command)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "gpu", "tpu"]), default="auto", help="Device to check."
)
def command(device: str) -> int:
    """Compare every kernel for this machine's platform with its definition in plain JAX.

    Output and gradients are compared and timed at the shapes of StructViT-S. On GPUs and TPUs a kernel that
    fails is replaced by its definition in later programs. `--config.model.kernels=reference` turns all
    kernels off. The exit code is 1 if a kernel fails.

    \b
    Example:
      structvit check
    """
    from structvit_jax.ops.kernels import selfcheck
    from structvit_jax.ops.kernels.target import current_device
    from structvit_jax.runtime import devices

    devices.select_devices(device)
    kind = current_device()
    print(f"kernels for {kind.platform} on {devices.describe_devices()}")
    print("errors are relative to the largest value; times are of the output and all gradients")
    print(_COLUMNS.format(*_TITLES))
    failed = 0
    for row in selfcheck.compare_all(kind):
        failed += bool(row.problem)
        shape = " ".join("x".join(map(str, shape)) for shape in row.example.shapes[:2])
        seconds = (f"{1e3 * s:.3f} ms" for s in (row.seconds, row.definition_seconds))
        errors = (f"{error:.1e}" for error in (row.output_error, row.gradient_error))
        names, verdict = (row.kernel.name, row.kernel.operation, row.dtype), row.problem or "ok"
        print(_COLUMNS.format(*names, shape, *errors, *seconds, verdict), flush=True)
    print(f"{failed} kernels fail; the definitions replace them" if failed else "all kernels agree")
    return int(failed > 0)
