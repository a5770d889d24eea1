"""The recorded result of an example: one format, in which the runs of other seeds and models are kept.

`results/NAME.json` holds what was measured and what it stands beside, then the runs of each model, one for a seed, each
with its figures and with the command, date, versions and threads it was obtained with. Figures that have one meaning
in all examples: `parameters`, `evaluations_forward` and `evaluations_backward` (per batch), `converged` (a fraction),
`wall_s`, `processor_s`, `peak_memory_mb` (of the process up to then).
"""

import json
import platform
import re
import statistics
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchimplicit as ti
from examples._meter import peak_memory_mb
from examples._options import HERE, Options

STANDARD = (
    "parameters",
    "evaluations_forward",
    "evaluations_backward",
    "converged",
    "wall_s",
    "processor_s",
    "peak_memory_mb",
)
MADE = ("command", "date", "versions", "threads")


@dataclass(frozen=True)
class Experiment:
    """What an example measures, and the figures it stands beside.

    `models` names each model that is run and the literature's figure for it, if there is one. `bar` is what `metric`
    must reach; None where the literature has no figure that can be compared.
    """

    name: str
    title: str
    metric: str
    ours: str
    models: dict[str, str]
    twin: str | None = None
    unit: str = ""
    more_is_better: bool = True
    bar: float | None = None
    literature: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.ours, self.twin or self.ours):
            if name not in self.models:
                raise ValueError(f"'{name}' is not among the models: {', '.join(self.models)}")


@dataclass
class Record:
    """The result file of an experiment in one setting, written anew with each run."""

    experiment: Experiment
    out: Path
    settings: dict[str, Any]
    models: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, experiment: Experiment, chosen: Options, **settings: Any) -> "Record":
        """The record as it is, or an empty one where there is none in this setting."""
        made = cls(experiment, chosen.out, chosen.settings | settings)
        if made.path.exists():
            before = json.loads(made.path.read_text())
            if before["settings"] == made.settings:
                made.models = {name: model["runs"] for name, model in before["models"].items()}
                made.more = before.get("more", {})
            else:
                print(f"{made.path}: its runs had other settings and will be replaced")
        return made

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.out / "results" / f"{self.experiment.name}.json"

    def add(self, model: str, seed: int, **figures: Any) -> None:
        """Put a run in the place of the one of the same seed, write, and say how the model stands."""
        self.put(model, {"seed": seed, "peak_memory_mb": peak_memory_mb()} | figures | circumstances())
        values = [run[self.experiment.metric] for run in self.models[model]]
        spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
        print(f"{model}: {self.experiment.metric} {statistics.fmean(values):.5g}{spread}, {len(values)} seed(s)")
        self.write()

    def keep(self, model: nn.Module, seed: int) -> None:
        """Leave the parameters of a recorded run in `runs/examples`, which git ignores."""
        if self.out == HERE:
            folder = HERE.parent / "runs" / "examples"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), folder / f"{self.experiment.name}-{seed}.pt")

    def put(self, model: str, run: dict[str, Any]) -> None:
        """Put a run, which says all of itself, in the place of the one of the same seed."""
        if model not in self.experiment.models:
            raise ValueError(f"'{model}' is not among the models: {', '.join(self.experiment.models)}")
        run = {k: float(f"{v:.9g}") if isinstance(v, float) else v for k, v in run.items()}
        others = [r for r in self.models.get(model, []) if r["seed"] != run["seed"]]
        self.models[model] = sorted([*others, run], key=lambda r: r["seed"])

    def write(self) -> None:
        """Write `results/NAME.json`."""
        e = self.experiment
        content = {
            "name": e.name,
            "title": e.title,
            "metric": e.metric,
            "unit": e.unit,
            "more_is_better": e.more_is_better,
            "ours": e.ours,
            "twin": e.twin,
            "bar": e.bar,
            "literature": e.literature,
            "source": e.source,
            "notes": list(e.notes),
            "settings": self.settings,
            "models": {
                name: {"literature": literature, "runs": self.models[name]}
                for name, literature in e.models.items()
                if name in self.models
            },
        }
        content |= {"more": self.more} if self.more else {}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        # A list of numbers on one line.
        text = re.sub(r"\[\s+([-\d.,\se+]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text + "\n")


def circumstances() -> dict[str, Any]:
    """How to obtain this run again: command, date, versions, threads."""
    return {
        "command": " ".join(["python -m", f"examples.{Path(sys.argv[0]).stem}", *without_folders(sys.argv[1:])]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchimplicit": ti.__version__},
        "threads": torch.get_num_threads(),
    }


def without_folders(arguments: list[str]) -> list[str]:
    """The arguments of a command with FOLDER in the place of each folder of this machine."""
    shown: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, assigned, _ = argument.partition("=")
        if before in ("--data-dir", "--out"):
            argument = "FOLDER"
        elif assigned and name in ("--data-dir", "--out"):
            argument = f"{name}=FOLDER"
        shown.append(argument)
    return shown
