"""What a training run shows: live bars and a growing table in a terminal, plain lines anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from torchimplicit.experiments.metrics import EpochTotals

COLUMNS = (
    ("epoch", ""),
    ("error %", "train / test"),
    ("loss", "train / test"),
    ("iterations", "batch / sample"),
    ("converged %", "all / worst"),
    ("evaluations", "forward / backward"),
    ("skipped", "steps"),
    ("seconds", "train + test"),
)
NONE = "–"
WIDE = 105  # characters that the whole table needs
LESS_WANTED = ("evaluations", "skipped")  # left out in a narrow terminal; the report has them


class Reporter(Protocol):
    """What the training loop tells while it runs."""

    def say(self, text: str) -> None:
        """A remark."""
        ...

    def begin_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None:
        """An epoch begins with `done` of its `batches` already behind it."""
        ...

    def batch(self, totals: EpochTotals) -> None:
        """A batch is done."""
        ...

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done; `row` is its line in `metrics.jsonl`."""
        ...


def cells(row: dict[str, Any]) -> list[str]:
    """A line of `metrics.jsonl` as the cells of the table whose columns are `COLUMNS`."""
    return [
        str(row["epoch"]),
        f"{number(row['train_error'], '.2f')} / {number(row['test_error'], '.2f')}",
        f"{number(row['train_loss'], '.4f')} / {number(row['test_loss'], '.4f')}",
        f"{number(row['iterations'], '.1f')} / {number(row['steps'], '.1f')}",
        f"{percent(row['converged'])} / {percent(row['worst_batch_converged'])}",
        f"{row['evaluations_forward']:,} / {row['evaluations_backward']:,}",
        f"{sum(row['skipped'].values()):,}",
        f"{row['seconds']:.1f} + {row['test_seconds']:.1f}",
    ]


def number(value: float | None, form: str) -> str:
    """`value` in the given format, or a dash."""
    return NONE if value is None else format(value, form)


def percent(fraction: float | None) -> str:
    """A fraction in percent; 100 only if nothing is missing."""
    if fraction is None:
        return NONE
    return "100" if fraction == 1.0 else f"{min(100.0 * fraction, 99.99):.2f}"


def plain_line(texts: list[str]) -> str:
    """One line of the table without a frame."""
    widths = [max(len(name), len(unit)) for name, unit in COLUMNS]
    return "  ".join(text.rjust(width) for text, width in zip(texts, widths, strict=True))


class PlainReporter:
    """One line per epoch, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = False

    def __enter__(self) -> PlainReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def say(self, text: str) -> None:
        """Print a remark."""
        self._print(text)

    def begin_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None:
        """Print the table's head before the first epoch."""
        if not self._begun:
            self._print(plain_line([name for name, _ in COLUMNS]))
            self._print(plain_line([unit for _, unit in COLUMNS]))
        self._begun = True

    def batch(self, totals: EpochTotals) -> None:
        """Nothing: a log wants no bars."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Print the epoch's line."""
        self._print(plain_line(cells(row)))

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


class LiveReporter:
    """A table that grows by a row per epoch, above one bar for the epochs and one for the batches."""

    def __init__(self, console: Console) -> None:
        self._table = Table(box=None, header_style="bold", pad_edge=False)
        self._shown = [i for i, (name, _) in enumerate(COLUMNS) if console.width >= WIDE or name not in LESS_WANTED]
        for name, unit in (COLUMNS[i] for i in self._shown):
            self._table.add_column(f"{name}\n[dim]{unit}[/dim]", justify="right", no_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}", justify="right"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[running]}", style="dim"),
            console=console,
        )
        self._epochs = self._progress.add_task("epochs", total=None, running="")
        self._batches = self._progress.add_task("batches", total=None, running="")
        self._live = Live(Group(self._table, self._progress), console=console, refresh_per_second=4)

    def __enter__(self) -> LiveReporter:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in (self._epochs, self._batches):
            self._progress.update(task, visible=False)
        self._live.stop()

    def say(self, text: str) -> None:
        """Print a remark above the table."""
        self._live.console.print(text, highlight=False, markup=False)

    def begin_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None:
        """Set both bars."""
        self._progress.update(self._epochs, total=epochs, completed=epoch)
        self._progress.reset(self._batches, total=batches, completed=done, running="")

    def batch(self, totals: EpochTotals) -> None:
        """Move the bar of the batches; loss, error and iterations are the epoch's means so far."""
        row = totals.summary()
        running = f"loss {number(row['train_loss'], '.4f')}  error {row['train_error']:.2f} %"
        if row["iterations"] is not None:
            running += f"  iterations {row['iterations']:.1f}"
        self._progress.update(self._batches, completed=totals.batches, running=running)

    def epoch(self, row: dict[str, Any]) -> None:
        """Add the epoch's row."""
        texts = cells(row)
        self._table.add_row(*(texts[i] for i in self._shown))
        self._progress.update(self._epochs, advance=1)


def make_reporter(console: Console) -> PlainReporter | LiveReporter:
    """The reporter that suits where `console` writes to."""
    return LiveReporter(console) if console.is_terminal else PlainReporter(console)
