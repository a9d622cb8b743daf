"""Results of a benchmark as lines, tables, JSON and a plot."""

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
from structvit_jax.runtime.processes import available_cores
from structvit_jax.utils.tables import markdown_table

PHASES = ("forward", "train")


@dataclasses.dataclass(frozen=True)
class Row:
    """Times of a model or of a part, in one phase and on one device."""

    name: str  # of the model, or of the part, as "blocks1.mlp"
    phase: str  # "forward", or "train": with gradients; the step of a model also updates the weights
    ours: Times
    operations: float  # lower bound
    bytes: float  # lower bound for a part; what the program of a model moves, 0 if it cannot be counted
    peers: dict[str, Times]  # of PyTorch, by variant
    times: int = 1  # how often the model contains the part
    # Only for models:
    samples: int = 0  # per batch
    memory: float = 0.0  # bytes
    compiling: float = 0.0  # seconds
    first: float = 0.0  # seconds of the first call

    @property
    def peer(self) -> str | None:
        """The fastest variant of PyTorch."""
        return min(self.peers, key=lambda variant: self.peers[variant].median, default=None)

    @property
    def speedup(self) -> float | None:
        """Speed relative to the fastest variant of PyTorch."""
        return self.peers[self.peer].ratio_to(self.ours) if self.peer else None

    def floors(self, rates: Rates) -> tuple[float, float]:
        """Return the seconds that operations, and bytes, take at peak rates."""
        return self.operations / rates.operations, self.bytes / rates.bytes

    def efficiency(self, rates: Rates) -> float:
        """Return the higher floor as a fraction of the measured time; for a model that of operations."""
        return max(self.floors(rates)[: 1 if self.samples else 2]) / self.ours.median


def machine(*, with_torch: bool) -> str:
    """Return the device and the versions of packages, as one line."""
    device = jax.devices()[0]
    kind = f"{len(jax.devices())} x {device.device_kind}"
    if device.platform == "cpu":
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        kind = f"{available_cores()} cores of {model[1] if model else platform.processor() or 'a CPU'}"
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "flax", *["torch"] * with_torch)]
    return ", ".join([kind, f"Python {platform.python_version()}", *versions])


def line(row: Row, rates: Rates) -> str:
    """Return the main results of a row as one line."""
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
        "compiled in, first call": f"{row.compiling:.0f} s, {row.first:.1f} s",
    }
    if row.peer:
        cells["PyTorch samples/s"] = f"{row.samples / row.peers[row.peer].median:.4g} ({row.peer})"
        cells["times as fast"] = f"{row.speedup:.2f}"
    return cells


def _part_cells(row: Row, rates: Rates) -> dict[str, str]:
    cells = {
        "part": row.name,
        "times": str(row.times),
        "phase": row.phase,
        "time": _ms(row.ours),
        "spread": row.ours.spread,
        "floors: operations, bytes": ", ".join(f"{1e3 * floor:.3g} ms" for floor in row.floors(rates)),
        "of peak": f"{row.efficiency(rates):.0%}",
    }
    if row.peer:
        cells["PyTorch"] = f"{_ms(row.peers[row.peer])} ({row.peer})"
        cells["times as fast"] = f"{row.speedup:.2f}"
    return cells


def write(rows: Sequence[Row], rates: Rates, header: str, workdir: epath.Path) -> None:
    """Write WORKDIR/bench.md, bench.json with every round and, if parts were timed, bench.png."""
    workdir.mkdir(parents=True, exist_ok=True)
    parts = [row for row in rows if not row.samples]
    model_cells = [_model_cells(row, rates) for row in rows if row.samples]
    part_cells = [_part_cells(row, rates) for row in parts]
    tables = [markdown_table(cells) for cells in (model_cells, part_cells) if cells]
    (workdir / "bench.md").write_text("\n\n".join([header, *tables]) + "\n")
    results = {"header": header, "rates": dataclasses.asdict(rates), "rows": [*map(dataclasses.asdict, rows)]}
    (workdir / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    if parts:
        (workdir / "bench.png").write_bytes(plot(parts, rates, header))


def plot(rows: Sequence[Row], rates: Rates, title: str) -> bytes:
    """Return a PNG with the time and the floor of each part, for each phase."""
    from matplotlib.figure import Figure  # takes half a second to import

    phases = [phase for phase in PHASES if any(row.phase == phase for row in rows)]
    figure = Figure(figsize=(12, 1.5 + 0.4 * len(rows) / len(phases)), layout="constrained")
    figure.suptitle(title, fontsize=8, wrap=True)
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        chosen = [row for row in rows if row.phase == phase]
        positions = range(len(chosen))
        ours = [1e3 * row.times * row.ours.median for row in chosen]
        floors = [1e3 * row.times * max(row.floors(rates)) for row in chosen]
        peers = [1e3 * row.times * row.peers[row.peer].median for row in chosen if row.peer]
        offset = 0.2 if peers else 0.0  # beside the bars of PyTorch
        if peers:
            axes.barh([y + offset for y in positions], peers, 0.35, color="#d9a441", label="PyTorch's best")
        axes.barh([y - offset for y in positions], ours, 0.35, color="#31688e", label="structvit_jax")
        axes.scatter(floors, [y - offset for y in positions], marker="|", s=90, color="black", label="floor")
        axes.set_yticks(positions, [f"{row.name} x {row.times}" for row in chosen], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"{phase}: ms in one step, all blocks of a stage")
        axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _ms(times: Times) -> str:
    return f"{1e3 * times.median:.3g} ms"
