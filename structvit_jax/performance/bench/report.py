"""What a benchmark found: rows, told as lines and written as bench.md, bench.json and a plot."""

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


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that was timed, on one device."""

    name: str  # of the model, or of a part, as "blocks1.mlp"
    phase: str  # "forward", or "train": forward and backward, of a model with the update of weights
    ours: Times
    operations: float  # that it must compute
    bytes: float  # of a part: that it must move; of a model: that its program moves, 0 where that is unknown
    peers: dict[str, Times]  # by variant
    times: int = 1  # in a model
    samples: int = 0  # of a model: in its batch
    memory: float = 0.0  # of a model: bytes that its program needs
    compiling: float = 0.0  # of a model: seconds
    first: float = 0.0  # of a model: seconds of its first call

    @property
    def peer(self) -> str | None:
        """The peer's fastest variant."""
        return min(self.peers, key=lambda variant: self.peers[variant].median, default=None)

    @property
    def speedup(self) -> float | None:
        """How many times as fast as that."""
        return self.peers[self.peer].over(self.ours) if self.peer else None

    def floors(self, rates: Rates) -> tuple[float, float]:
        """Seconds that operations take, and bytes."""
        return self.operations / rates.operations, self.bytes / rates.bytes

    def share(self, rates: Rates) -> float:
        """What the higher floor is of the time taken; of a model's time what its operations take."""
        return max(self.floors(rates)[: 1 if self.samples else 2]) / self.ours.median


def machine(with_torch: bool) -> str:
    """Devices and versions, in a line."""
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


def tell(row: Row, rates: Rates) -> str:
    """A row as a line."""
    rate = f"{row.samples / row.ours.median:.4g} samples/s" if row.samples else _ms(row.ours.median)
    line = f"{row.name} {row.phase}: {rate} ({row.ours.spread}), floor {row.share(rates):.0%} of it"
    if row.samples:
        line += f", memory {row.memory / 1e9:.2f} GB"
        line += f", compiled in {row.compiling:.0f} s, first call {row.first:.1f} s"
    if row.peer:
        others = ", ".join(f"{variant} {_ms(times.median)}" for variant, times in row.peers.items())
        line += f"; PyTorch {others}: {row.speedup:.2f} times as fast"
    return line


def write(rows: Sequence[Row], rates: Rates, header: str, workdir: epath.Path) -> None:
    """WORKDIR/bench.md, bench.png and, with every turn, bench.json."""
    workdir.mkdir(parents=True, exist_ok=True)
    wholes, parts = ([row for row in rows if bool(row.samples) is whole] for whole in (True, False))
    tables = [
        _table(table(chosen, rates)) for table, chosen in ((_wholes, wholes), (_parts, parts)) if chosen
    ]
    (workdir / "bench.md").write_text("\n\n".join([header, *tables]) + "\n")
    found = {
        "header": header,
        "rates": dataclasses.asdict(rates),
        "rows": list(map(dataclasses.asdict, rows)),
    }
    (workdir / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    if parts:
        (workdir / "bench.png").write_bytes(plot(parts, rates, header))


def _wholes(rows, rates):
    yield (
        *("", "samples/s", "spread", "operations/s, of products' rate", "moved a sample, of copies' rate"),
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


def _parts(rows, rates):
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
            f"{row.share(rates):.0%}",
            f"{1e3 * row.peers[row.peer].median:.3g} ({row.peer})" if row.peer else "",
            f"{row.speedup:.2f}" if row.peer else "",
        ]


def _table(rows) -> str:
    first, *others = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([first, "|" + " --- |" * (first.count("|") - 1), *others])


def plot(rows: Sequence[Row], rates: Rates, title: str) -> bytes:
    """Bars of all parts of a model, forward and train, with their floors; a PNG."""
    from matplotlib.figure import Figure  # here: half a second, for those who benchmark

    phases = [phase for phase in ("forward", "train") if any(row.phase == phase for row in rows)]
    figure = Figure(figsize=(12, 1.5 + 0.4 * len(rows) / len(phases)), layout="constrained")
    figure.suptitle(title, fontsize=8, wrap=True)
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        chosen = [row for row in rows if row.phase == phase]
        places = range(len(chosen))
        ours = [1e3 * row.times * row.ours.median for row in chosen]
        floors = [1e3 * row.times * max(row.floors(rates)) for row in chosen]
        peers = [1e3 * row.times * row.peers[row.peer].median if row.peer else 0.0 for row in chosen]
        offset = 0.2 if any(peers) else 0.0  # beside PyTorch's bars
        if any(peers):
            axes.barh([y + offset for y in places], peers, 0.35, color="#d9a441", label="PyTorch's best")
        axes.barh([y - offset for y in places], ours, 0.35, color="#31688e", label="structvit_jax")
        axes.scatter(floors, [y - offset for y in places], marker="|", s=90, color="black", label="floor")
        axes.set_yticks(places, [f"{row.name} x {row.times}" for row in chosen], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"{phase}: ms in one step, all blocks of a stage")
        axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
