"""A progress bar, or twenty lines of text where the output is not a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Call what it gives once per step, with a text to show beside the bar."""
    if not sys.stdout.isatty():
        done = 0

        def print_some(text: str) -> None:
            nonlocal done
            done += 1
            if done % max(total // 20, 1) == 0:
                print(f"{what}: {done}/{total} {text}", flush=True)

        yield print_some
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[say]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=total, say="")
        yield lambda say: bar.update(task, advance=1, say=say)
