"""The solver table: our solvers and the peers on every test problem, all judged by the residual computed here.

Writes `solvers.json`, with every attempt, and `SOLVERS.md`, the table. Every attempt has a time limit; a method that
cannot be imported is listed as such.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.problems import PROBLEMS, Problem
from benchmarks.record import RESULTS, circumstances, write
from benchmarks.solver_claim import Attempt
from benchmarks.solver_report import markdown, print_table
from benchmarks.solver_worker import ONE_THREAD, NotStartedError, Worker, all_methods

DISTRIBUTIONS = ("torch", "numpy", "scipy", "jax", "optimistix", "xitorch")

QUICK_METHODS = ("ti*", "scipy-hybr", "scipy-lm", "scipy-broyden1", "xitorch-broyden1")
QUICK_PROBLEMS = ("classical", "rootless", "domain")


@dataclass(frozen=True)
class Settings:
    """The choices of one run; see `--help`."""

    methods: tuple[str, ...]
    problems: tuple[str, ...]
    limit: float
    jobs: int
    out: Path


def run(settings: Settings, told: Callable[[Attempt], None]) -> list[Attempt]:
    """Let each method try each problem, `settings.jobs` methods at a time; `told` hears of every attempt."""

    stop = Event()

    def row(method: str) -> list[Attempt]:
        attempts = []
        with Worker(method, settings.limit) as worker:
            for problem in settings.problems:
                if stop.is_set():
                    break
                if attempts and attempts[0].outcome == "unavailable":
                    made = Attempt(method, problem, "unavailable", detail=attempts[0].detail)
                else:
                    made = worker.attempt(problem)
                attempts.append(made)
                told(made)
        return attempts

    with ThreadPoolExecutor(settings.jobs) as pool:
        try:
            return [made for attempts in pool.map(row, settings.methods) for made in attempts]
        except BaseException:  # an interrupt must not wait for the methods that have not had their turn
            stop.set()
            raise


def run_with_progress(settings: Settings) -> list[Attempt]:
    """Run, with a bar on a terminal and a line per method elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        left = dict.fromkeys(settings.methods, len(settings.problems))

        def count(made: Attempt) -> None:
            left[made.method] -= 1
            if not left[made.method]:
                console.print(f"{made.method}: {len(settings.problems)} problems tried", highlight=False)

        return run(settings, count)
    columns = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=len(settings.methods) * len(settings.problems))
        return run(settings, lambda made: progress.update(task, advance=1, description=f"{made.method} {made.problem}"))


def versions() -> dict[str, str]:
    """Look up what is installed of the distributions compared."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _chosen(patterns: Sequence[str], names: dict[str, Sequence[str]]) -> tuple[str, ...]:
    """Select the names that match a pattern themselves, or one of whose tags does, in the order of `names`."""
    return tuple(
        name
        for name, tags in names.items()
        if any(fnmatchcase(word, pattern) for word in (name, *tags) for pattern in patterns)
    )


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solver_table", description=__doc__, allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="names, families or patterns such as 'scipy-*'")
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="names, tags (classical, mgh-x10, …) or patterns")
    parser.add_argument("--quick", action="store_true", help="a few methods, no large or far problems, 5 s each")
    parser.add_argument("--limit", type=float, help="seconds for one attempt (default: 20; 5 with --quick)")
    parser.add_argument("--jobs", type=int, default=1, help="methods that run at the same time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for solvers.json and SOLVERS.md")
    options = parser.parse_args(arguments)
    limit = options.limit if options.limit is not None else 5.0 if options.quick else 20.0
    if not limit > 0:
        parser.error(f"--limit {limit}: give a number of seconds above 0")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: give a number of at least 1")
    known = {
        "methods": {name: (method.family,) for name, method in all_methods().items()},
        "problems": {name: problem.tags for name, problem in PROBLEMS.items()},
    }
    quick = {"methods": QUICK_METHODS, "problems": QUICK_PROBLEMS}
    chosen = {}
    for what, names in known.items():
        patterns = getattr(options, what) or (quick[what] if options.quick else ["*"])
        for pattern in patterns:
            if not _chosen([pattern], names):
                parser.error(f"--{what} {pattern}: nothing has that name; there are {', '.join(names)}")
        chosen[what] = _chosen(patterns, names)
    return Settings(**chosen, limit=limit, jobs=options.jobs, out=options.out)


def main(arguments: Sequence[str]) -> int:
    """Run, print the table, write the figures and the table; the status is 1, and nothing written, if it cannot run."""
    settings = parse(arguments)
    for name, value in ONE_THREAD.items():
        os.environ.setdefault(name, value)
    try:
        attempts = run_with_progress(settings)
    except NotStartedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    problems: list[Problem] = [PROBLEMS[name] for name in settings.problems]
    result: dict[str, Any] = {
        **circumstances("benchmarks.solver_table", arguments),
        "versions": versions(),
        "limit_seconds": settings.limit,
        "problems": {p.name: {"n": p.n, "has_root": p.has_root, "tags": p.tags} for p in problems},
        "attempts": [asdict(made) for made in attempts],
    }
    print_table(attempts, problems, Console(width=None if sys.stdout.isatty() else 160))
    write(settings.out / "solvers.json", result)
    (settings.out / "SOLVERS.md").write_text(markdown(attempts, problems, result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
