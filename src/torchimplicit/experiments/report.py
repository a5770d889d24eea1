"""`report.html`: one self-contained page about one run, or several runs over one another."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np

from torchimplicit.experiments import analysis, run_folder
from torchimplicit.experiments.console import COLUMNS, NONE, cells, number, percent
from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.files import write_atomically
from torchimplicit.experiments.metrics import outcome
from torchimplicit.experiments.plots import Series, line_figure

CURVES = (  # title, unit, the keys of metrics.jsonl with their labels, logarithmic
    ("Error", "%", (("train_error", "train"), ("test_error", "test")), False),
    ("Loss", "cross-entropy", (("train_loss", "train"), ("test_loss", "test")), False),
    ("Iterations", "steps", (("iterations", "slowest sample of a batch"), ("steps", "mean sample")), False),
    (
        "Converged",
        "% of samples",
        (("converged", "all batches"), ("worst_batch_converged", "worst batch")),
        False,
    ),
    (
        "Evaluations of the cell",
        "calls per epoch",
        (("evaluations_forward", "forward"), ("evaluations_backward", "backward")),
        False,
    ),
    ("Time", "seconds per epoch", (("seconds", "training"),), False),
)


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    analysis: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        """Whether every epoch is there."""
        return len(self.rows) >= self.config["options"]["epochs"]


def read_run(folder: Path) -> Run:
    """Read the folder of one run; one that is still under way may lack its last epochs."""
    if not folder.is_dir():
        raise ExperimentError(f"RUN: no such folder '{folder}'; name one that `torchimplicit train` wrote")
    config = run_folder.read_config(folder)
    rows = run_folder.read_lines(folder, run_folder.METRICS)
    if not rows:
        raise ExperimentError(f"'{folder}' has no finished epoch yet; train on with --resume")
    return Run(folder.resolve().name, config, rows, analysis.read(folder))


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write one page about the runs in `folders` to `out`."""
    runs = _distinct([read_run(folder) for folder in folders])
    write_atomically(out, render(runs).encode())


def _distinct(runs: list[Run]) -> list[Run]:
    """Number the runs whose folders share a name."""
    names = [run.name for run in runs]
    return [
        Run(f"{run.name} ({i + 1})", run.config, run.rows, run.analysis) if names.count(run.name) > 1 else run
        for i, run in enumerate(runs)
    ]


def render(runs: Sequence[Run]) -> str:
    """The page about `runs`, which needs nothing from outside itself."""
    title = f"{runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    style = resources.files("torchimplicit.experiments").joinpath("report.css").read_text(encoding="utf-8")
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="muted">{escape(_subtitle(runs))}</p>',
        _cards(runs[0]) if len(runs) == 1 else _comparison(runs),
        *(_notes(run, len(runs) > 1) for run in runs),
        "<h2>Per epoch</h2>",
        _curves(runs),
        *(_epoch_table(run, len(runs) > 1) for run in runs),
        _decays(runs),
        *(_digits(run, len(runs) > 1) for run in runs),
        "<h2>Options and environment</h2>",
        _facts(runs),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _subtitle(runs: Sequence[Run]) -> str:
    sources = dict.fromkeys(
        f"{data['source']} ({data['train']:,} + {data['test']:,} images)"
        for data in (run.config["data"] for run in runs)
    )
    return "MNIST with an implicit layer, z = tanh(W z + x). Data: " + "; ".join(sources) + "."


def _cards(run: Run) -> str:
    last, options = run.rows[-1], run.config["options"]
    facts = (
        (f"{last['test_error']:.2f} %", f"test error after epoch {last['epoch']}"),
        (number(last["test_loss"], ".4f"), "test loss"),
        (number(last["iterations"], ".1f"), f"iterations per batch, {options['layer']}"),
        (f"{percent(last['converged'])} %" if last["converged"] is not None else NONE, "samples converged"),
        (f"{sum(sum(row['skipped'].values()) for row in run.rows):,}", "skipped steps"),
        (
            f"{sum(row['seconds'] for row in run.rows):.0f} s",
            f"training, threads: {run.config['environment']['threads']}",
        ),
    )
    return '<div class="cards">' + "".join(_card(*fact) for fact in facts) + "</div>"


def _card(value: str, label: str) -> str:
    return f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _comparison(runs: Sequence[Run]) -> str:
    """The last epoch of each run."""
    return _table(
        [("run", ""), *COLUMNS],
        [[run.name, *cells(run.rows[-1])] for run in runs],
        "The last epoch of each run",
    )


def _notes(run: Run, several: bool) -> str:
    name = f"{run.name}: " if several else ""
    lines = outcome(run.rows)
    if not run.finished:
        lines.insert(0, f"{len(run.rows)} of {run.config['options']['epochs']} epochs are done.")
    return "".join(f'<p class="note">{escape(name + line)}</p>' for line in lines)


def _curves(runs: Sequence[Run]) -> str:
    figures = []
    for title, unit, keys, log in CURVES:
        series = [
            Series(
                f"{run.name}, {label}" if len(runs) > 1 else label,
                [row["epoch"] for row in run.rows],
                [_scaled(row[key], unit) for row in run.rows],
                color=i if len(runs) > 1 else j,
                dash=j,
            )
            for i, run in enumerate(runs)
            for j, (key, label) in enumerate(keys)
            if any(row[key] for row in run.rows)
        ]
        if series:
            figures.append(line_figure(title, "epoch", unit, series, log=log))
    return _figures(figures)


def _scaled(value: float | None, unit: str) -> float | None:
    return 100.0 * value if unit.startswith("% of") and value is not None else value


def _figures(figures: Sequence[str], kind: str = "") -> str:
    return f'<div class="figures {kind}">' + "".join(f"<figure>{figure}</figure>" for figure in figures) + "</div>"


def _epoch_table(run: Run, several: bool) -> str:
    return _table(COLUMNS, [cells(row) for row in run.rows], run.name if several else "")


def _decays(runs: Sequence[Run]) -> str:
    figures = []
    for run in runs:
        decays = run.analysis["decay"] if run.analysis else []
        series = [
            Series(
                _decay_label(decay),
                decay["evaluations"],
                decay["residuals"],
                color=i,
            )
            for i, decay in enumerate(decays)
        ]
        if series:
            tolerance = run.config["options"]["tolerance"]
            figures.append(
                line_figure(
                    run.name if len(runs) > 1 else "Residual on one test batch",
                    "evaluations of the cell",
                    "‖f(z) − z‖ over the batch",
                    series,
                    log=True,
                    level=(tolerance, f"tolerance {tolerance:g}"),
                )
            )
    text = (
        "The same equation, with the trained weights, for the first batch of the test set, solved by "
        "each solver. Products with the Jacobian count as evaluations."
        if figures
        else "No equation was solved: the explicit twin applies the cell once."
        if all(run.config["options"]["layer"] == "explicit" for run in runs)
        else "Made when a run has come to its end."
    )
    return f"<h2>Decay of the residual</h2><p>{text}</p>" + _figures(figures, "wide")


def _decay_label(decay: dict[str, Any]) -> str:
    text = f"{decay['solver']}, {decay['iterations']} iterations"
    return text if decay["converged"] == 1.0 else f"{text}, {percent(decay['converged'])} % converged"


def _digits(run: Run, several: bool) -> str:
    if run.analysis is None:
        return ""
    digits = run.analysis["digits"]
    name = f", {run.name}" if several else ""
    head = f"<h2>Misclassified digits{escape(name)}</h2>"
    if not digits["shown"]:
        return head + f"<p>None of the {digits['of']:,} test images.</p>"
    text = (
        f"{digits['wrong']:,} of {digits['of']:,} test images are misclassified; "
        f"these are the {len(digits['shown'])} the network is most certain about."
    )
    return f'{head}<p>{text}</p><div class="digits">' + "".join(map(_digit, digits["shown"])) + "</div>"


def _digit(digit: dict[str, Any]) -> str:
    pixels = np.frombuffer(base64.b64decode(digit["pixels"]), np.uint8).reshape(28, 28)
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels, cmap="gray", vmin=0, vmax=255, format="png")
    picture = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="test image {digit["index"]}, a {digit["true"]}" '
        f'src="data:image/png;base64,{picture}">'
        f"<figcaption>true <b>{digit['true']}</b>, said <b>{digit['predicted']}</b><br>"
        f"{100 * digit['certainty']:.0f} % certain</figcaption></figure>"
    )


def _facts(runs: Sequence[Run]) -> str:
    rows = []
    for part in ("options", "data", "environment"):
        for key in dict.fromkeys(key for run in runs for key in run.config[part]):
            values = [run.config[part].get(key) for run in runs]
            rows.append([key.replace("_", " "), *("default" if value is None else f"{value}" for value in values)])
    return _table([("", ""), *((run.name, "") for run in runs)], rows, "", kind="facts")


def _table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], title: str, kind: str = "") -> str:
    head = "".join(f"<th>{escape(name)}<small>{escape(unit)}</small></th>" for name, unit in columns)
    lines = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    caption = f"<h3>{escape(title)}</h3>" if title else ""
    return (
        f'{caption}<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
