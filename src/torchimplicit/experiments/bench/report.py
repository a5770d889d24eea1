"""RESULTS.md: every row with its bar, its value and its verdict; a miss is shown as a miss."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchimplicit.experiments.bench.registry import SUMMARIES
from torchimplicit.experiments.bench.results import Record, summary_measurement
from torchimplicit.experiments.bench.row import Measurement

REPORT = "RESULTS.md"

INTRODUCTION = """\
# Benchmark results

Written by `torchimplicit bench` from `results.json`; do not edit. A value is the median over interleaved runs, ours
over theirs unless a unit is given, with the range of the runs in brackets. Each row was measured in a process of its
own on one core with one thread. What is compared was verified to be equally accurate by the benchmark itself: see the
last column, and the evidence in `results.json`.
"""

_VERDICTS = ("met", "MISSED", "NOT VERIFIED", "FAILED", "not measured", "no bar")


def with_summaries(records: Mapping[str, Record]) -> dict[str, Record]:
    """The records, and behind the last of its rows each summary that can be computed."""
    found = dict(records)
    for summary in SUMMARIES:
        found.pop(summary.name, None)
        measurement = summary_measurement(found, summary.rows)
        if measurement is None:
            continue
        record = Record(summary.name, summary.title, summary.bar, "ratio", "measured", measurement)
        members = [i for i, name in enumerate(found) if name in summary.rows]
        entries = list(found.items())
        entries.insert(max(members) + 1, (summary.name, record))
        found = dict(entries)
    return found


def make_report(records: Mapping[str, Record], plots: Sequence[Path] = ()) -> str:
    """The page, in Markdown.

    Args:
        records: in the order of the rows, summaries included.
        plots: relative to the page.
    """
    counts = Counter(record.verdict for record in records.values())
    parts = [
        INTRODUCTION,
        ", ".join(f"{counts[verdict]} {verdict}" for verdict in _VERDICTS if counts[verdict]) + ".\n",
    ]
    parts += ["| row | bar | value | verdict | runs | evidence |", "|---|---|---|---|---|---|"]
    parts += [_line(record) for record in records.values()]
    parts += _circumstances(list(records.values()))
    if plots:
        parts += ["\n## Plots\n", *(f"![{plot.stem.replace('-', ' ')}]({plot.as_posix()})\n" for plot in plots)]
    return "\n".join(parts).rstrip() + "\n"


def _line(record: Record) -> str:
    bar = "" if record.bar is None else f"≤ {record.bar:g}"
    verdict = record.verdict
    shown = f"**{verdict}**" if verdict in ("MISSED", "NOT VERIFIED", "FAILED") else verdict
    m = record.measurement
    if m is None:
        cells = [f"`{record.name}`", bar, "", shown, "", record.detail]
    else:
        unit = "" if record.unit == "ratio" else f" {record.unit}"
        value = f"{_short(m.value)} ({_short(m.low)}–{_short(m.high)}){unit}"
        cells = [f"`{record.name}`", bar, value, shown, str(m.runs), summarise(m)]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def summarise(measurement: Measurement) -> str:
    """One line of evidence: the times, and the method, residual and gradient error of each side where there are any."""
    parts = []
    if measurement.ours is not None and measurement.theirs is not None:
        parts.append(f"{_short(measurement.ours)} against {_short(measurement.theirs)}")
    evidence = measurement.evidence
    layer = evidence.get("measured_as") == "layer"
    for side, key in (("ours", "layer" if layer else "ours"), ("theirs", "theirs")):
        if isinstance(evidence.get(key), dict):
            parts.append(f"{side}: {_contender(evidence[key])}")
    ratios = {"same_solver_ratio": "same solver", "closed_form_ratio": "closed form"}
    for key, label in (ratios | {"plain_cell_ratio": "plain cell"} if layer else ratios).items():
        if isinstance(evidence.get(key), float):
            parts.append(f"{label} {evidence[key]:.3g}")
    if not parts or (len(parts) == 1 and measurement.ours is not None):
        plain = {key: value for key, value in evidence.items() if isinstance(value, int | float | str)}
        parts += [f"{key.replace('_', ' ')} {_plain(value)}" for key, value in list(plain.items())[:6]]
    return "; ".join(parts)


def _plain(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _contender(told: dict[str, Any]) -> str:
    if "residual" not in told:
        return str(told.get("method", ""))
    products = told.get("products_backward")
    steps = f"{told['evaluations_forward']}+{products}" if products is not None else f"{told['evaluations_forward']}"
    return (
        f"{told['method']} ({steps} evaluations, residual {told['residual']:.0e}, "
        f"gradient error {told['gradient_error']:.0e})"
    )


def _circumstances(records: Sequence[Record]) -> list[str]:
    """When, where and with what: once for each set of circumstances that the rows share."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record.date:
            versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
            groups.setdefault((record.date[:10], record.processor, versions), []).append(record)
    lines = ["\n## Circumstances\n"]
    for (day, processor, versions), members in groups.items():
        lines.append(f"- {day}, {processor}, {members[0].threads} thread; {versions}:")
        lines += [f"  - `{record.command}`, {record.took:.0f} s" for record in members]
    return lines if groups else []
