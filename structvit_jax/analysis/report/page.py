"""The page: what runs came to beside each other, and then each run's classes and hardest examples."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from etils import epath

from structvit_jax.analysis.report.charts import QUANTITIES, SMOOTHING, curves, style
from structvit_jax.analysis.report.classes import class_sections
from structvit_jax.analysis.report.hardest import hardest_section
from structvit_jax.analysis.report.markup import Markup, joined, table, tag
from structvit_jax.analysis.report.record import Record, read_records
from structvit_jax.runtime.goodput import ACTIVITIES
from structvit_jax.runtime.storage import io_errors_as_user_error, write
from structvit_jax.training.card import as_json, differences
from structvit_jax.utils.paths import parse_path, write_errors_as_user_error

FILE = "report.html"  # in the first workdir
NOTHING = "–"  # in the place of what is not known
# Of Okabe and Ito, in the order of ACTIVITIES.
_ACTIVITY_COLOURS = ("#999999", "#cc79a7", "#e69f00", "#56b4e9", "#0072b2", "#009e73", "#f0e442", "#d55e00")
_STYLE = Path(__file__).with_name("page.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # asks nothing of any network


def write_report(workdirs: Sequence[str], out: str | None = None, hardest: int = 24) -> epath.Path:
    """Writes the page and returns where: `out`, or report.html in the first workdir.

    Args:
      workdirs: of one run or more; they may be in a bucket, as `out` may.
      hardest: how many examples of each run to show.

    Raises:
      UserError: a workdir that holds no run, a damaged file, or an `out` that cannot be written.
    """
    with io_errors_as_user_error(parse_path(workdirs[0])):
        records = read_records(workdirs)
        path = parse_path(out) if out else records[0].workdir / FILE
        content = page(records, hardest)
        with write_errors_as_user_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, content)
    return path


def page(records: Sequence[Record], hardest: int) -> str:
    """The whole page; `hardest` is how many examples of each run to show."""
    names = ", ".join(record.name for record in records)
    sections = [*_together(records)]
    sections += [
        (f"run-{number}", record.name, _run(record, number, hardest)) for number, record in enumerate(records)
    ]
    links = tag("ul", *(tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in sections))
    written = (
        f"Written {datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by structvit_jax.analysis.report."
    )
    body = [
        tag("header", tag("h1", f"Report: {names}"), tag("p", written, class_="quiet")),
        tag("nav", links, aria_label="sections"),
        tag("main", *(_section(*section) for section in sections)),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"Report: {names}"),
        tag("style", Markup(_STYLE.read_text())),
    ]
    return "<!doctype html>\n" + tag("html", tag("head", *head), "\n", tag("body", *body), lang="en") + "\n"


def _together(records: Sequence[Record]) -> Iterator[tuple[str, str, Markup]]:
    """Sections about all runs: their names in links, titles and contents."""
    yield "summary", "Summary", joined([_summary(records), _differences(records)])
    yield "curves", "Curves", _curves(records)
    yield "goodput", "Goodput", _goodput(records)


def _section(name: str, title: str, content: Markup) -> Markup:
    return tag(
        "section", tag("h2", title, id=f"{name}-title"), content, id=name, aria_labelledby=f"{name}-title"
    )


def _key(number: int) -> Markup:
    """The line that a run has in figures."""
    colour, dashes = style(number)
    dash = " ".join(str(3 * length) for length in dashes) or None
    line = tag("line", x1=0, y1=6, x2=34, y2=6, stroke=colour, stroke_width=4, stroke_dasharray=dash)
    return tag("svg", line, class_="key", viewBox="0 0 34 12", aria_hidden="true")


def _named(records: Sequence[Record]) -> list[Markup]:
    """The runs' names with their lines."""
    return [joined([_key(number), record.name]) for number, record in enumerate(records)]


def _summary(records: Sequence[Record]) -> Markup:
    facts = [_facts(record) for record in records]
    rows = [(name, *(fact[name] for fact in facts)) for name in facts[0]]
    return table("summary of the runs", ["", *_named(records)], rows, id="facts", class_="byrun")


def _facts(record: Record) -> dict[str, str]:
    """What the summary says of a run, in words."""
    result, seconds = record.result, record.seconds

    def score(key):
        return f"{result[key]:.4f}" if isinstance(result.get(key), int | float) else NOTHING

    share = seconds.get("step", 0) / (sum(seconds.values()) or 1)
    return {
        "model": record.config.model.name,
        "parameters": f"{record.parameters:,}" if record.parameters else NOTHING,
        "step": str(record.step),
        "top-1": score("top1") if record.result else "not evaluated yet",
        "top-5": score("top5"),
        "mean over classes": score("mean_class"),
        "test examples": str(result.get("examples", NOTHING)),
        "of them unreadable": str(result.get("missing", NOTHING)),
        "speed": f"{record.rate:.1f} {record.unit}/s" if record.rate else NOTHING,
        "goodput": f"{share:.0%}" if seconds else NOTHING,
    }


def _differences(records: Sequence[Record]) -> Markup:
    """The keys in which the runs' configurations are not all equal."""
    if len(records) < 2:
        return Markup()
    first, *others = (as_json(record.config) for record in records)
    found = [
        {f"config.{d.key}": (d.before, d.after) for d in differences(first, other, portable=False)}
        for other in others
    ]
    values = {key: pair[0] for change in found for key, pair in change.items()}
    title = tag("h3", "What differs between their configurations")
    if not values:
        return joined([title, tag("p", "Nothing.")])
    rows = [
        (
            tag("code", joined(key.split("."), ".<wbr>")),
            repr(own),
            *(repr(c.get(key, (own, own))[1]) for c in found),
        )
        for key, own in sorted(values.items())
    ]
    return joined(
        [title, table("differences", ["key", *_named(records)], rows, id="differences", class_="byrun")]
    )


def _curves(records: Sequence[Record]) -> Markup:
    figures = [figure for figure in (curves(quantity, records) for quantity in QUANTITIES) if figure]
    if not figures:
        return tag("p", "No step has been told yet.", class_="note")
    names = tag("ul", *(tag("li", name) for name in _named(records)), class_="runs", aria_label="runs")
    charts = tag("div", *(tag("figure", figure) for figure in figures), class_="charts")
    return joined([names, charts, tag("p", SMOOTHING, class_="quiet")])


def _goodput(records: Sequence[Record]) -> Markup:
    told = [record for record in records if record.seconds]
    if not told:
        return tag("p", "No run has told yet where its time went.", class_="note")
    explained = (
        "Where the wall time went, over all restarts; goodput is the share in steps."
        " Lost are steps that a kill undid and that were taken again."
    )
    bars = [joined([tag("h3", record.name), _stack(record.seconds)]) for record in told]
    rows = []
    for activity, colour in zip(ACTIVITIES, _ACTIVITY_COLOURS, strict=True):
        swatch = tag("span", class_="swatch", style=f"background:{colour}")
        rows.append((joined([swatch, activity]), *(_time(record.seconds, activity) for record in told)))
    rows.append(("all", *(f"{sum(record.seconds.values()):.1f} s" for record in told)))
    shown = table(
        "seconds of each activity",
        ["", *(record.name for record in told)],
        rows,
        id="seconds",
        class_="byrun",
    )
    return joined([tag("p", explained), *bars, shown])


def _time(seconds: Mapping[str, float], activity: str) -> str:
    spent = seconds.get(activity, 0.0)
    return f"{spent:.1f} s, {spent / (sum(seconds.values()) or 1):.0%}"


def _stack(seconds: Mapping[str, float]) -> Markup:
    """A bar of all activities; the table below it says the same in numbers."""
    total = sum(seconds.values()) or 1
    parts = [
        tag(
            "span",
            style=f"width:{seconds.get(activity, 0) / total:.2%};background:{colour}",
            title=f"{activity}: {_time(seconds, activity)}",
        )
        for activity, colour in zip(ACTIVITIES, _ACTIVITY_COLOURS, strict=True)
    ]
    return tag("div", *parts, class_="stack", aria_hidden="true")


def _run(record: Record, number: int, hardest: int) -> Markup:
    """The section of one run."""
    about = tag("p", _key(number), tag("code", record.workdir), class_="quiet")
    notes = [tag("p", sentence, class_="note") for sentence in record.missing()]
    if not record.predictions:
        return joined([about, *notes])
    details = [*class_sections(record.predictions), hardest_section(record, record.predictions, hardest)]
    return joined([about, *notes, *details])
