"""`structvit check`: compare the fast kernels for this device with plain JAX."""

from __future__ import annotations

import click

from structvit_jax.cli import options

_COLUMNS = "{:<24} {:<18} {:<9} {:<30} {:>10} {:>9} {:>11} {:>11}  {}"
_TITLES = (
    *("kernel", "operation", "type", "shape"),
    *("output err", "grad err", "kernel time", "plain JAX", "verdict"),
)


@click.command(cls=options.Command)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "gpu", "tpu"]), default="auto", help="Device to check."
)
def command(device: str) -> int:
    """Compare every fast kernel for this device with its definition in plain JAX.

    Output and gradients are compared and timed at the shapes of StructViT-S. On GPUs and TPUs the results are
    saved, and later runs use the definition instead of a kernel that failed. To turn off all kernels of a
    run, set `--config.model.kernels=reference`. The exit code is 1 if a kernel fails.

    \b
    Example:
      structvit check
    """
    from structvit_jax.ops.kernels import selfcheck
    from structvit_jax.ops.kernels.target import current_device
    from structvit_jax.runtime import devices

    devices.select_devices(device)
    current = current_device()
    print(f"kernels for {current.platform} on {devices.describe_devices()}")
    print("errors are relative to the largest value; times are for the output and all gradients")
    print(_COLUMNS.format(*_TITLES))
    failed = 0
    for row in selfcheck.compare_all(current):
        failed += bool(row.problem)
        shape = " ".join("x".join(map(str, shape)) for shape in row.example.shapes[:2])
        seconds = (f"{1e3 * s:.3f} ms" for s in (row.seconds, row.definition_seconds))
        errors = (f"{error:.1e}" for error in (row.output_error, row.gradient_error))
        names, verdict = (row.kernel.name, row.kernel.operation, row.dtype), row.problem or "ok"
        print(_COLUMNS.format(*names, shape, *errors, *seconds, verdict), flush=True)
    if not failed:
        print("all kernels agree with their definitions")
    elif current.platform in selfcheck.CHECKED:
        print(f"{failed} comparisons failed; later runs use the definitions instead of these kernels")
    else:
        print(f"{failed} comparisons failed; --config.model.kernels=reference turns off all kernels")
    return int(failed > 0)
