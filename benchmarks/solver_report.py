"""The solver table in words: attempts counted into one row per method, for the terminal and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.problems import Problem
from benchmarks.solver_claim import FALSE_ABOVE, OUTCOMES, TOLERANCE, Attempt

SETS = {
    "classical": "classical",
    "MGH ×1": "mgh-x1",
    "MGH ×10": "mgh-x10",
    "MGH ×100": "mgh-x100",
    "large": "large",
    "NaN or overflow": "domain",
}
"""Heading and tag of the columns that count solved problems."""


@dataclass(frozen=True)
class Row:
    """The counts of one method.

    Attributes:
        method: its name.
        solved: for each tag of `SETS`, problems solved.
        nearly: of the classical problems, those with a residual of at most 1e-4, which is what others count.
        refused: rootless problems of which the method said that it found no root.
        false: successes claimed wrongly.
        false_at_infinity: those of them where F tends to zero at infinity.
        raised: exceptions.
        late: time limits exceeded.
        total: problems solved.
        unavailable: why the method could not be tried, or "".
    """

    method: str
    solved: dict[str, int]
    nearly: int
    refused: int
    false: int
    false_at_infinity: int
    raised: int
    late: int
    total: int
    unavailable: str


def rows(attempts: Sequence[Attempt], problems: Sequence[Problem]) -> list[Row]:
    """Count, in the order of the attempts."""
    tags = {problem.name: problem.tags for problem in problems}
    found = []
    for method in dict.fromkeys(made.method for made in attempts):
        mine = [made for made in attempts if made.method == method]

        def count(outcome: str, tag: str | None = None, mine: list[Attempt] = mine) -> int:
            return sum(made.outcome == outcome and (tag is None or tag in tags[made.problem]) for made in mine)

        near = [m for m in mine if "classical" in tags[m.problem] and m.residual is not None]
        found.append(
            Row(
                method=method,
                solved={tag: count("solved", tag) for tag in SETS.values()},
                nearly=sum(m.residual is not None and m.residual <= FALSE_ABOVE for m in near),
                refused=count("reported", "rootless"),
                false=count("false success"),
                false_at_infinity=count("false success", "asymptotic"),
                raised=count("raised"),
                late=count("timeout"),
                total=count("solved"),
                unavailable=next((m.detail for m in mine if m.outcome == "unavailable"), ""),
            )
        )
    return found


def _sizes(problems: Sequence[Problem]) -> dict[str, int]:
    return {tag: sum(tag in problem.tags for problem in problems) for tag in (*SETS.values(), "rootless")}


def _headings(problems: Sequence[Problem]) -> list[str]:
    """Name the columns with the number of problems in each; sets of which no problem was tried have none."""
    sizes = _sizes(problems)
    return [
        "method",
        *(f"{heading} ({sizes[tag]})" for heading, tag in SETS.items() if sizes[tag]),
        *([f"no root, says so ({sizes['rootless']})"] if sizes["rootless"] else []),
        "false successes",
        "raised",
        "timeouts",
        f"total solved ({sum(problem.has_root for problem in problems)})",
    ]


def _cells(row: Row, problems: Sequence[Problem]) -> list[str]:
    sizes = _sizes(problems)
    solved = [
        f"{count} [{row.nearly}]" if tag == "classical" else str(count)
        for tag, count in row.solved.items()
        if sizes[tag]
    ]
    refused = [str(row.refused)] if sizes["rootless"] else []
    false = f"{row.false} ({row.false_at_infinity})" if row.false_at_infinity else str(row.false)
    cells = [*solved, *refused, false, str(row.raised), str(row.late), str(row.total)]
    if row.unavailable:
        cells = [*["–"] * (len(cells) - 1), "not available"]
    return [row.method, *cells]


def print_table(attempts: Sequence[Attempt], problems: Sequence[Problem], console: Console) -> None:
    """Print a row per method."""
    table = Table(title=f"problems solved: max|F| ≤ {TOLERANCE:g} in float64")
    for heading in _headings(problems):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=heading == "method")
    for row in rows(attempts, problems):
        table.add_row(*_cells(row, problems))
    console.print(table)


def markdown(attempts: Sequence[Attempt], problems: Sequence[Problem], told: dict[str, Any]) -> str:
    """Write the table, what the columns mean, and which problems each method did not solve."""
    headings, counted = _headings(problems), rows(attempts, problems)
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    lines = [
        "# Solvers on test problems",
        "",
        f"Written by `{told['command']}` on {told['date']}; Python {told['python']}, {versions}; "
        f"{told['processor']}, one thread. Every attempt is in `solvers.json`.",
        "",
        "| " + " | ".join(headings) + " |",
        "|" + "|".join([" --- "] + [" ---: "] * (len(headings) - 1)) + "|",
        *("| " + " | ".join(_cells(row, problems)) + " |" for row in counted),
        "",
        f"A problem is solved where the returned point is finite and `max|F| ≤ {TOLERANCE:g}` there, recomputed in "
        "float64 for all methods alike. In brackets, of the classical problems: those where it is at most "
        f"{FALSE_ABOVE:g}, the criterion of NonlinearSolve.jl's published counts. A success is false where the method "
        f"claims one and `max|F| > {FALSE_ABOVE:g}`, or where there is no root; in parentheses, those of them where "
        f"F tends to zero at infinity. An attempt ends after {told['limit_seconds']:g} s. All methods are asked for "
        "this tolerance as far as they have an option for it, except `ti`, which is our default as it is; "
        "`ti-strict` is the same with the option.",
        "",
        "## Not solved",
        "",
        *(_failures(row, attempts, problems) for row in counted if not row.unavailable),
        *(f"- `{row.method}` cannot be imported: {row.unavailable}" for row in counted if row.unavailable),
        "",
        "## False successes",
        "",
        *_false(counted, attempts),
        "",
    ]
    return "\n".join(lines)


def _failures(row: Row, attempts: Sequence[Attempt], problems: Sequence[Problem]) -> str:
    solvable = {problem.name for problem in problems if problem.has_root}
    groups: dict[str, list[str]] = {outcome: [] for outcome in OUTCOMES if outcome != "solved"}
    for made in attempts:
        if made.method == row.method and made.problem in solvable and made.outcome in groups:
            groups[made.outcome].append(made.problem)
    words = [f"{outcome}: {', '.join(names)}" for outcome, names in groups.items() if names]
    return f"- `{row.method}`: " + ("; ".join(words) or "none")


def _false(counted: Sequence[Row], attempts: Sequence[Attempt]) -> list[str]:
    lines = []
    for row in counted:
        wrong = [made for made in attempts if made.method == row.method and made.outcome == "false success"]
        shown = [f"{m.problem} ({'not finite' if m.residual is None else format(m.residual, '.1e')})" for m in wrong]
        if wrong:
            lines.append(f"- `{row.method}`: {', '.join(shown)}")
    return lines or ["None."]
