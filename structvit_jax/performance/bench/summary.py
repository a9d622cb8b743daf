"""Write the results of a benchmark as lines, tables, JSON and a plot."""

from __future__ import annotations

import dataclasses
import io
import json
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax
from etils import epath

from structvit_jax.performance.bench.timing import Rates, Times
from structvit_jax.utils.cores import available_cores
from structvit_jax.utils.tables import markdown_table

PHASES = ("forward", "train")


@dataclasses.dataclass(frozen=True)
class Row:
    """Times of a model or of a part of it, in one phase and on one device."""

    name: str  # name of the model, or of a part, such as "blocks1.mlp"
    phase: str  # "forward", or "train" (forward and gradients; for a model also the update of the weights)
    ours: Times  # of structvit_jax
    operations: float  # lower bound
    bytes: float  # for a part a lower bound; for a model the traffic of its program, 0 if it is unknown
    peers: dict[str, Times]  # of PyTorch, by variant
    calls_per_step: int = 1  # how often a step of the model calls the part
    # Only for models:
    samples: int = 0  # batch size
    memory: float = 0.0  # bytes
    compiling: float = 0.0  # seconds
    first_call: float = 0.0  # seconds

    @property
    def fastest_peer(self) -> str | None:
        """Name of the fastest variant of PyTorch; None without PyTorch."""
        return min(self.peers, key=lambda variant: self.peers[variant].median, default=None)

    @property
    def speedup(self) -> float | None:
        """Speed relative to the fastest variant of PyTorch; None without PyTorch."""
        return self.peers[self.fastest_peer].ratio_to(self.ours) if self.fastest_peer else None

    def floors(self, rates: Rates) -> tuple[float, float]:
        """Return the seconds that the operations take at peak rates, and the seconds that the bytes take."""
        return self.operations / rates.operations, self.bytes / rates.bytes

    def efficiency(self, rates: Rates) -> float:
        """Return a floor as a fraction of the measured time.

        For a part it is the higher of its two floors, for a model always the floor of its operations.
        """
        return max(self.floors(rates)[: 1 if self.samples else 2]) / self.ours.median


def machine(*, with_torch: bool) -> str:
    """Return one line with the device and the versions of packages."""
    device = jax.devices()[0]
    kind = f"{len(jax.devices())} x {device.device_kind}"
    if device.platform == "cpu":
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        kind = f"{available_cores()} cores of {model[1] if model else platform.processor() or 'a CPU'}"
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "flax", *["torch"] * with_torch)]
    return ", ".join([kind, f"Python {platform.python_version()}", *versions])


def line(row: Row, rates: Rates) -> str:
    """Return one line with the main results of a row."""
    rate = f"{row.samples / row.ours.median:.4g} samples/s" if row.samples else _ms(row.ours)
    text = f"{row.name} {row.phase}: {rate} ({row.ours.spread}), {row.efficiency(rates):.0%} of peak"
    if row.peers:
        others = ", ".join(f"{variant} {_ms(times)}" for variant, times in row.peers.items())
        text += f"; PyTorch {others}: {row.speedup:.2f} times as fast"
    return text


def _model_cells(row: Row, rates: Rates) -> dict[str, str]:
    operations, moved = row.operations / row.ours.median / 1e9, row.bytes / row.samples / 1e9
    by_bytes = row.floors(rates)[1] / row.ours.median
    cells = {
        "model": f"{row.name}, {row.phase}",
        "samples/s": f"{row.samples / row.ours.median:.4g}",
        "spread": row.ours.spread,
        "G operations/s, of peak": f"{operations:.4g}, {row.efficiency(rates):.0%}",
        "GB moved per sample, of peak": f"{moved:.3g}, {by_bytes:.0%}" if row.bytes else "not counted",
        "memory": f"{row.memory / 1e9:.2f} GB",
        "compile time, first call": f"{row.compiling:.0f} s, {row.first_call:.1f} s",
    }
    if peer := row.fastest_peer:
        cells["PyTorch samples/s"] = f"{row.samples / row.peers[peer].median:.4g} ({peer})"
        cells["speedup"] = f"{row.speedup:.2f}"
    return cells


def _part_cells(row: Row, rates: Rates) -> dict[str, str]:
    cells = {
        "part": row.name,
        "calls per step": str(row.calls_per_step),
        "phase": row.phase,
        "time": _ms(row.ours),
        "spread": row.ours.spread,
        "floors: operations, bytes": ", ".join(f"{1e3 * floor:.3g} ms" for floor in row.floors(rates)),
        "of peak": f"{row.efficiency(rates):.0%}",
    }
    if peer := row.fastest_peer:
        cells["PyTorch"] = f"{_ms(row.peers[peer])} ({peer})"
        cells["speedup"] = f"{row.speedup:.2f}"
    return cells


def write(rows: Sequence[Row], rates: Rates, header: str, workdir: epath.Path) -> None:
    """Write bench.md, bench.json (with every round) and, if parts were timed, bench.png into the workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    parts = [row for row in rows if not row.samples]
    model_cells = [_model_cells(row, rates) for row in rows if row.samples]
    part_cells = [_part_cells(row, rates) for row in parts]
    tables = [
        markdown_table(list(cells[0]), [list(row.values()) for row in cells])
        for cells in (model_cells, part_cells)
        if cells
    ]
    (workdir / "bench.md").write_text("\n\n".join([header, *tables]) + "\n")
    results = {"header": header, "rates": dataclasses.asdict(rates), "rows": [*map(dataclasses.asdict, rows)]}
    (workdir / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    if parts:
        (workdir / "bench.png").write_bytes(plot(parts, rates, header))


def plot(rows: Sequence[Row], rates: Rates, title: str) -> bytes:
    """Return a PNG that shows the time and the higher floor of each part, for each phase."""
    from matplotlib.figure import Figure  # takes half a second to import

    phases = [phase for phase in PHASES if any(row.phase == phase for row in rows)]
    figure = Figure(figsize=(12, 1.5 + 0.4 * len(rows) / len(phases)), layout="constrained")
    figure.suptitle(title, fontsize=8, wrap=True)
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        chosen = [row for row in rows if row.phase == phase]
        positions = range(len(chosen))
        ours = [1e3 * row.calls_per_step * row.ours.median for row in chosen]
        floors = [1e3 * row.calls_per_step * max(row.floors(rates)) for row in chosen]
        peers = [1e3 * row.calls_per_step * row.peers[p].median for row in chosen if (p := row.fastest_peer)]
        offset = 0.2 if peers else 0.0  # so that bars of PyTorch and of structvit_jax do not overlap
        if peers:
            axes.barh([y + offset for y in positions], peers, 0.35, color="#d9a441", label="PyTorch's best")
        axes.barh([y - offset for y in positions], ours, 0.35, color="#31688e", label="structvit_jax")
        axes.scatter(floors, [y - offset for y in positions], marker="|", s=90, color="black", label="floor")
        axes.set_yticks(positions, [f"{row.name} x {row.calls_per_step}" for row in chosen], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"{phase}: ms per step, summed over the blocks of a stage")
        axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _ms(times: Times) -> str:
    return f"{1e3 * times.median:.3g} ms"
