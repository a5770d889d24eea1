"""The options of one training run, validated, and the learning-rate schedule's little language."""

import difflib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from torchimplicit.experiments.errors import ExperimentError

LAYERS = ("picard", "anderson", "newton", "explicit")
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast computes in; None is no autocast."""
DEFAULT_EPOCHS = {"picard": 10, "anderson": 10, "newton": 8, "explicit": 10}


def check_layer(name: str) -> str:
    """Return `name` if it is a layer of the recipe; otherwise name the valid ones and the nearest."""
    if name in LAYERS:
        return name
    nearest = difflib.get_close_matches(name.lower(), LAYERS, n=1, cutoff=0.4)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    raise ExperimentError(f"--layer: unknown layer '{name}', valid ones are {', '.join(LAYERS)}{hint}")


def check_precision(name: str) -> None:
    """Raise unless `name` is a precision, naming the valid ones and the nearest."""
    if name not in PRECISIONS:
        nearest = difflib.get_close_matches(name.lower(), PRECISIONS, n=1, cutoff=0.4)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
        raise ExperimentError(f"--precision: unknown '{name}', valid ones are {', '.join(PRECISIONS)}{hint}")


def parse_schedule(text: str) -> tuple[tuple[int, float], ...]:
    """Read `"5:0.01,8:0.001"`: from epoch 5 on rate 0.01, ... (epochs count from 0); `"constant"`: no "
    "change."""
    if text.strip().lower() == "constant":
        return ()
    steps: list[tuple[int, float]] = []
    for part in text.split(","):
        epoch_text, colon, rate_text = part.partition(":")
        try:
            epoch, rate = int(epoch_text), float(rate_text)
        except ValueError:
            colon = ""
            epoch, rate = 0, 0.0
        if not colon:
            raise ExperimentError(
                f"--lr-schedule: cannot read '{part.strip()}' in '{text}', write EPOCH:RATE pairs "
                "such as '5:0.01,8:0.001', or 'constant'"
            )
        if epoch < 0 or not (math.isfinite(rate) and rate > 0):
            raise ExperimentError(
                f"--lr-schedule: '{part.strip()}' needs an epoch of at least 0 and a finite rate above 0"
            )
        if steps and epoch <= steps[-1][0]:
            raise ExperimentError(
                f"--lr-schedule: epochs must increase, but '{text}' has {steps[-1][0]} before {epoch}"
            )
        steps.append((epoch, rate))
    return tuple(steps)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's numbers; a resumed run must agree with it in every field.

    `tolerance` is the notebook's: the Frobenius norm of `f(z) - z` over one batch.
    `max_steps=None` leaves the limit to the library, `threads=None` to torch. `jacobian_penalty` is the weight of
    `ti.jacobian_penalty` in the loss, `compiled` that of `TanhEquilibrium`.
    """

    layer: str = "picard"
    epochs: int = 10
    batch_size: int = 100
    width: int = 100
    lr: float = 0.1
    lr_schedule: str = "5:0.01"
    tolerance: float = 1e-4
    max_steps: int | None = None
    jacobian_penalty: float = 0.0
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    precision: str = "float32"
    compiled: bool = False

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_precision(self.precision)
        parse_schedule(self.lr_schedule)
        for name in ("epochs", "batch_size", "width", "max_steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ExperimentError(f"{option(name)}: must be at least 1, not {value}")
        for name in ("lr", "tolerance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ExperimentError(f"{option(name)}: must be a finite number above 0, not {value}")
        if not (math.isfinite(self.jacobian_penalty) and self.jacobian_penalty >= 0):
            raise ExperimentError(
                f"--jacobian-penalty: must be a finite number of at least 0, not {self.jacobian_penalty}"
            )
        if self.jacobian_penalty and self.layer == "explicit":
            raise ExperimentError("--jacobian-penalty: the explicit twin solves nothing; leave it out")
        if self.compiled and self.layer not in ("picard", "newton"):
            raise ExperimentError(
                f"--compiled: there are compiled loops for picard and newton, not for {self.layer}; leave it out"
            )
        if self.compiled and (self.precision != "float32" or self.device != "cpu"):
            raise ExperimentError(
                f"--compiled: the loops compute in float32 on the cpu, not in {self.precision} on {self.device}; "
                "leave it out"
            )
        if not 0 <= self.seed < 2**31:
            raise ExperimentError(f"--seed: must be between 0 and {2**31 - 1}, not {self.seed}")

    def learning_rate(self, epoch: int) -> float:
        """The rate of `epoch` (counted from 0)."""
        rate = self.lr
        for start, value in parse_schedule(self.lr_schedule):
            if epoch >= start:
                rate = value
        return rate

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def option(field: str) -> str:
    """The command-line spelling of a field: `batch_size` is `--batch-size`."""
    return "--" + field.replace("_", "-")
