"""What `torchimplicit bench` does: choose rows, measure them, keep and show the results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from torchimplicit.experiments.bench import plots, registry, report, results, runner
from torchimplicit.experiments.bench.results import Record
from torchimplicit.experiments.bench.row import Settings
from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.files import write_atomically

COLOURS = {"met": "green", "MISSED": "red", "NOT VERIFIED": "red", "FAILED": "red"}


@dataclass(frozen=True)
class Order:
    """What to do.

    Attributes:
        patterns: names and globs of rows; none for all.
        settings: of the run.
        out: the folder for results.json, RESULTS.md and plots.
        limit: seconds after which a row is given up.
    """

    patterns: Sequence[str]
    settings: Settings
    out: Path
    limit: float


def show_rows(patterns: Sequence[str], console: Console) -> None:
    """Print the rows, with their bars."""
    rows = registry.select(patterns)
    table = Table("row", "bar", "what is measured")
    for row in rows:
        table.add_row(row.name, "" if row.bar is None else f"≤ {row.bar:g}", row.title)
    names = {row.name for row in rows}
    for summary in registry.SUMMARIES:
        if names.issuperset(summary.rows):
            table.add_row(summary.name, f"≤ {summary.bar:g}", summary.title)
    console.print(table)


def run(order: Order, console: Console) -> bool:
    """Measure the rows that were asked for and write everything anew after each; returns whether none was missed."""
    rows = registry.select(order.patterns)
    if order.out.exists() and not order.out.is_dir():  # said before hours of measuring
        raise ExperimentError(f"--out: '{order.out}' is a file; name a folder")
    records = results.read(order.out / results.RESULTS)
    fresh: dict[str, Record] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(rows))
        for row in rows:
            progress.update(task, description=row.name)
            fresh[row.name] = runner.measure(row, order.settings, order.limit)
            console.print(_told(fresh[row.name]), highlight=False, soft_wrap=True)
            write(order.out, _merged(records, fresh))
            progress.advance(task)
    everything = _merged(records, fresh)
    drawn = plots.draw(everything, order.out)
    write(order.out, everything, drawn)
    for summary in registry.SUMMARIES:
        if summary.name in everything and set(summary.rows) & set(fresh):
            console.print(_told(everything[summary.name]), highlight=False)
    console.print(f"results: {order.out / report.REPORT}", highlight=False, markup=False, soft_wrap=True)
    return all(record.verdict in ("met", "no bar") for record in fresh.values())


def _merged(old: dict[str, Record], fresh: dict[str, Record]) -> dict[str, Record]:
    names = [row.name for row in registry.ROWS]
    return report.with_summaries(results.merge(old, fresh, names))


def write(out: Path, records: dict[str, Record], drawn: Sequence[Path] | None = None) -> None:
    """Write results.json and RESULTS.md; with the plots that are there already, unless others are named."""
    out.mkdir(parents=True, exist_ok=True)
    if drawn is None:
        drawn = [path.relative_to(out) for path in sorted((out / plots.FOLDER).glob("*.png"))]
    results.write(out / results.RESULTS, records)
    write_atomically(out / report.REPORT, report.make_report(records, drawn).encode())


def _told(record: Record) -> str:
    colour = COLOURS.get(record.verdict, "yellow")
    m = record.measurement
    found = escape(record.detail) if m is None else f"{m.value:.3g} ({m.low:.3g}-{m.high:.3g})"
    bar = "" if record.bar is None else f", bar {record.bar:g}"
    return f"[{colour}]{record.verdict}[/{colour}]  {record.name}: {found}{bar}"
