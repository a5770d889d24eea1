"""What the report shows beyond the metrics: the residual's decay per solver, and misclassified digits."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchimplicit.experiments.config import TrainConfig
from torchimplicit.experiments.data import Split
from torchimplicit.experiments.decay import layer_solve, residual_decay, start_residual
from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.files import to_json, write_atomically
from torchimplicit.experiments.recipe import SOLVERS, make_solver
from torchimplicit.experiments.run_folder import ANALYSIS

SHOWN_DIGITS = 24


def analyse(model: nn.Sequential, config: TrainConfig, test: Split) -> dict[str, Any]:
    """Each solver's decay on the first test batch with the trained weights, and some misclassified digits."""
    return {"decay": _decays(model, config, test), "digits": _misclassified(model, test)}


def write(folder: Path, analysis: dict[str, Any]) -> None:
    """Keep an analysis in the run's folder."""
    write_atomically(folder / ANALYSIS, to_json(analysis).encode())


def read(folder: Path) -> dict[str, Any] | None:
    """The analysis of a finished run; None if the run has not come so far."""
    path = folder / ANALYSIS
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExperimentError(f"{path}: damaged ({error}); make it anew with the run's command and --resume") from error


@torch.no_grad()
def _decays(model: nn.Sequential, config: TrainConfig, test: Split) -> list[dict[str, Any]]:
    """Empty for the explicit twin: its weights belong to no equation."""
    if config.layer == "explicit":
        return []
    images, _ = test.to(config.device).batch(slice(0, config.batch_size))
    linear = model[2].linear
    assert isinstance(linear, nn.Linear)
    x = model[1](model[0](images))
    decays = []
    for name in SOLVERS:
        solve = layer_solve(linear, x, make_solver(name, config.tolerance, len(images)))
        decays.append(residual_decay(name, solve, start_residual(x)).as_dict())
    return decays


@torch.no_grad()
def _misclassified(model: nn.Sequential, test: Split) -> dict[str, Any]:
    """The digits the network is most certain about, among those it gets wrong."""
    device = next(model.parameters()).device
    probabilities = torch.cat(
        [
            torch.softmax(model(images.to(device)), dim=1).cpu()
            for images, _ in (test.batch(slice(i, i + 1000)) for i in range(0, len(test), 1000))
        ]
    )
    certainty, predicted = probabilities.max(dim=1)
    wrong = torch.nonzero(predicted != test.labels).flatten()
    order = wrong[torch.argsort(certainty[wrong], descending=True, stable=True)][:SHOWN_DIGITS]
    shown = [
        {
            "index": i,
            "true": int(test.labels[i]),
            "predicted": int(predicted[i]),
            "certainty": float(certainty[i]),
            "pixels": base64.b64encode(test.images[i].numpy().tobytes()).decode(),
        }
        for i in order.tolist()
    ]
    return {"wrong": len(wrong), "of": len(test), "shown": shown}
