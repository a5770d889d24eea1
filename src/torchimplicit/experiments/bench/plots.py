"""The figures beside RESULTS.md, drawn from the evidence of the rows."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchimplicit.experiments.bench.results import Record
from torchimplicit.experiments.bench.rows_torchdeq import PROBLEMS, RADII, SOLVERS

FOLDER = "plots"

COLOURS = {"ours": "#1f6fb4", "picard": "#d1802b", "anderson": "#b23b3b", "broyden": "#7a5aa6"}


def draw(records: Mapping[str, Record], out: Path) -> list[Path]:
    """Draw what the records have evidence for; returns the files, relative to `out`."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    drawn = []
    for name, figure in FIGURES.items():
        path = Path(FOLDER) / f"{name}.png"
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        if figure(records, out / path):
            drawn.append(path)
    return drawn


def _evidence(records: Mapping[str, Record], name: str) -> dict[str, Any] | None:
    record = records.get(name)
    return record.measurement.evidence if record and record.measurement else None


def _time_to_residual(records: Mapping[str, Record], path: Path) -> bool:
    """A panel for each problem: the seconds of the forward pass against the residual that was reached."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(PROBLEMS), 6.5), layout="constrained")
    panels = figure.subplots(len(RADII), len(PROBLEMS), squeeze=False)
    anything = False
    for row, radius in enumerate(RADII):
        for column, problem in enumerate(PROBLEMS):
            axes = panels[row][column]
            for solver in SOLVERS:
                evidence = _evidence(records, f"torchdeq/{solver}/{problem}/{radius:g}")
                if evidence is None or not evidence["curves"]["ours"]:
                    continue
                anything = True
                for side, style, name in (("theirs", "o-", f"TorchDEQ {solver}"), ("ours", "s--", "ours, best")):
                    curve = evidence["curves"][side]
                    colour = COLOURS[solver if side == "theirs" else "ours"]
                    x, y = [p["residual"] for p in curve], [p["seconds"] for p in curve]
                    axes.loglog(x, y, style, markersize=3, color=colour, label=name)
            axes.set_title(f"{problem}, spectral radius {radius:g}", fontsize=9)
            axes.invert_xaxis()
            axes.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        unique = dict(zip(labels, handles, strict=True))
        panels[0][0].legend(unique.values(), unique.keys(), fontsize=8)
    figure.supxlabel("relative residual reached, worst sample")
    figure.supylabel("seconds, forward pass")
    if anything:
        figure.savefig(path, dpi=110)
    return anything


def _evaluations(records: Mapping[str, Record], path: Path) -> bool:
    """Bars for each row against TorchDEQ: evaluations forward and products backward, both sides."""
    from matplotlib.figure import Figure

    rows = {}
    for solver in SOLVERS:
        for problem in PROBLEMS:
            for radius in RADII:
                evidence = _evidence(records, f"torchdeq/{solver}/{problem}/{radius:g}")
                if evidence is not None:
                    rows[f"{solver}, {problem}, {radius:g}"] = evidence
    if not rows:
        return False
    figure = Figure(figsize=(9, 1.2 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for shift, side, colour in ((-0.2, "ours", COLOURS["ours"]), (0.2, "theirs", COLOURS["picard"])):
        places = [i + shift for i in range(len(rows))]
        forward = [e[side]["evaluations_forward"] for e in rows.values()]
        backward = [e[side]["products_backward"] for e in rows.values()]
        name = "ours" if side == "ours" else "TorchDEQ"
        axes.barh(places, forward, 0.36, color=colour, label=f"{name}, forward")
        axes.barh(places, backward, 0.36, left=forward, color=colour, alpha=0.5, label=f"{name}, backward")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("evaluations of the cell, and products with its transposed Jacobian")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return True


def _scaling(row: str, key: str, label: str) -> Callable[[Mapping[str, Record], Path], bool]:
    """Seconds of both sides against a size, and their ratio."""

    def figure_of(records: Mapping[str, Record], path: Path) -> bool:
        from matplotlib.figure import Figure

        evidence = _evidence(records, row)
        if evidence is None:
            return False
        points = evidence["points"]
        sizes = [point[key] for point in points]
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        times, ratios = figure.subplots(1, 2)
        for side, colour, name in (("ours", COLOURS["ours"], "ours"), ("theirs", COLOURS["picard"], "TorchDEQ's best")):
            times.loglog(sizes, [point["seconds"][side] for point in points], "o-", color=colour, label=name)
        times.set_ylabel("seconds, forward + backward")
        times.legend(fontsize=8)
        ratios.semilogx(sizes, [point["ratio"] for point in points], "o-", color=COLOURS["ours"])
        ratios.axhline(1.0, color="grey", linewidth=0.8)
        ratios.set_ylim(bottom=0)
        ratios.set_ylabel("ours / theirs")
        for axes in (times, ratios):
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=110)
        return True

    return figure_of


def _memory(records: Mapping[str, Record], path: Path) -> bool:
    """The most memory held at once against the number of steps, one line for each way to solve."""
    from matplotlib.figure import Figure

    evidence = _evidence(records, "memory/steps")
    if evidence is None:
        return False
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, peaks in evidence["peaks"].items():
        steps, size = [peak["steps"] for peak in peaks], [peak["both"] / 1e6 for peak in peaks]
        style = "o--" if name in ("notebook", "torchdeq") else "o-"
        axes.loglog(steps, size, style, markersize=4, color=COLOURS.get(name), label=name)
    axes.set_xlabel("solver steps")
    axes.set_ylabel("peak of forward and backward, MB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return True


FIGURES: dict[str, Callable[[Mapping[str, Record], Path], bool]] = {
    "time-to-residual": _time_to_residual,
    "evaluations": _evaluations,
    "memory": _memory,
    "scaling-features": _scaling("scaling/features", "features", "features"),
    "scaling-batch": _scaling("scaling/batch", "batch", "batch"),
}
"""A figure returns False if there is nothing to draw; one more is added here."""
