"""Results of a benchmark, as lines, tables, JSON and a plot."""

from __future__ import annotations

import dataclasses
import io
import json
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import jax
from etils import epath

from structvit_jax.performance.bench.timing import Rates, Times
from structvit_jax.runtime.processes import available_cores

PHASES = ("forward", "train")


@dataclasses.dataclass(frozen=True)
class Row:
    """Results of one model or part on one device."""

    name: str  # of the model, or of a part, as "blocks1.mlp"
    phase: str  # "forward", or "train": forward and backward, of a model with the update of weights
    ours: Times
    operations: float  # at least
    bytes: float  # of a part: moved at least; of a model: moved by its program, 0 if unknown
    peers: dict[str, Times]  # by variant
    times: int = 1  # that a model contains the part
    # Only for whole models:
    samples: int = 0  # in a batch
    memory: float = 0.0  # bytes that the program needs
    compiling: float = 0.0  # seconds
    first: float = 0.0  # seconds of the first call

    @property
    def peer(self) -> str | None:
        """The fastest variant of the peer."""
        return min(self.peers, key=lambda variant: self.peers[variant].median, default=None)

    @property
    def speedup(self) -> float | None:
        """Speed relative to the fastest variant of the peer."""
        return self.peers[self.peer].ratio_to(self.ours) if self.peer else None

    def floors(self, rates: Rates) -> tuple[float, float]:
        """Return the seconds that operations take at least, and bytes."""
        return self.operations / rates.operations, self.bytes / rates.bytes

    def efficiency(self, rates: Rates) -> float:
        """Return the higher floor (for a model: that of operations) as a fraction of the measured time."""
        return max(self.floors(rates)[: 1 if self.samples else 2]) / self.ours.median


def machine(with_torch: bool) -> str:
    """Return the device and the versions of packages as one line."""
    device = jax.devices()[0]
    packages = ["jax", "flax", *["torch"] * with_torch]
    versions = [f"{name} {metadata.version(name)}" for name in packages]
    kind = _cpu() if device.platform == "cpu" else f"{len(jax.devices())} x {device.device_kind}"
    return ", ".join([kind, f"Python {platform.python_version()}", *versions])


def _cpu() -> str:
    try:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return f"{available_cores()} cores of {model[1] if model else platform.processor() or 'a CPU'}"


def line(row: Row, rates: Rates) -> str:
    """Return a row as one line."""
    rate = f"{row.samples / row.ours.median:.4g} samples/s" if row.samples else _ms(row.ours.median)
    line = f"{row.name} {row.phase}: {rate} ({row.ours.spread}), floor {row.efficiency(rates):.0%} of it"
    if row.samples:
        line += f", memory {row.memory / 1e9:.2f} GB"
        line += f", compiled in {row.compiling:.0f} s, first call {row.first:.1f} s"
    if row.peer:
        others = ", ".join(f"{variant} {_ms(times.median)}" for variant, times in row.peers.items())
        line += f"; PyTorch {others}: {row.speedup:.2f} times as fast"
    return line


def write(rows: Sequence[Row], rates: Rates, header: str, workdir: epath.Path) -> None:
    """Write WORKDIR/bench.md, bench.json with every round and, if parts were timed, bench.png."""
    workdir.mkdir(parents=True, exist_ok=True)
    models, parts = ([row for row in rows if bool(row.samples) is whole] for whole in (True, False))
    by_table = (_model_table, models), (_part_table, parts)
    tables = [_markdown(table(chosen, rates)) for table, chosen in by_table if chosen]
    (workdir / "bench.md").write_text("\n\n".join([header, *tables]) + "\n")
    results = {"header": header, "rates": dataclasses.asdict(rates), "rows": [*map(dataclasses.asdict, rows)]}
    (workdir / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    if parts:
        (workdir / "bench.png").write_bytes(plot(parts, rates, header))


def _model_table(rows: Sequence[Row], rates: Rates) -> Iterator[Sequence[str]]:
    yield (
        *("", "samples/s", "spread", "operations/s, of products' rate", "moved per sample, of copies' rate"),
        *("memory", "compiled in, first call", "PyTorch samples/s", "times as fast"),
    )
    for row in rows:
        computing, moving = (floor / row.ours.median for floor in row.floors(rates))
        yield [
            f"{row.name}, {row.phase}",
            f"{row.samples / row.ours.median:.4g}",
            row.ours.spread,
            f"{row.operations / row.ours.median / 1e9:.4g} G, {computing:.0%}",
            f"{row.bytes / row.samples / 1e9:.3g} GB, {moving:.0%}" if row.bytes else "not counted",
            f"{row.memory / 1e9:.2f} GB",
            f"{row.compiling:.0f} s, {row.first:.1f} s",
            f"{row.samples / row.peers[row.peer].median:.4g} ({row.peer})" if row.peer else "",
            f"{row.speedup:.2f}" if row.peer else "",
        ]


def _part_table(rows: Sequence[Row], rates: Rates) -> Iterator[Sequence[str]]:
    yield (
        *("part", "times", "phase", "ms", "spread", "floors: operations, bytes ms", "of the higher"),
        *("PyTorch ms", "times as fast"),
    )
    for row in rows:
        yield [
            row.name,
            str(row.times),
            row.phase,
            f"{1e3 * row.ours.median:.3g}",
            row.ours.spread,
            ", ".join(f"{1e3 * floor:.3g}" for floor in row.floors(rates)),
            f"{row.efficiency(rates):.0%}",
            f"{1e3 * row.peers[row.peer].median:.3g} ({row.peer})" if row.peer else "",
            f"{row.speedup:.2f}" if row.peer else "",
        ]


def _markdown(rows: Iterable[Sequence[str]]) -> str:
    first, *others = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([first, "|" + " --- |" * (first.count("|") - 1), *others])


def plot(rows: Sequence[Row], rates: Rates, title: str) -> bytes:
    """Return a PNG with a bar for each part, forward and train, and its floor."""
    from matplotlib.figure import Figure  # takes half a second to import

    phases = [phase for phase in PHASES if any(row.phase == phase for row in rows)]
    figure = Figure(figsize=(12, 1.5 + 0.4 * len(rows) / len(phases)), layout="constrained")
    figure.suptitle(title, fontsize=8, wrap=True)
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        chosen = [row for row in rows if row.phase == phase]
        positions = range(len(chosen))
        ours = [1e3 * row.times * row.ours.median for row in chosen]
        floors = [1e3 * row.times * max(row.floors(rates)) for row in chosen]
        peers = [1e3 * row.times * row.peers[row.peer].median if row.peer else 0.0 for row in chosen]
        offset = 0.2 if any(peers) else 0.0  # beside PyTorch's bars
        if any(peers):
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


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
