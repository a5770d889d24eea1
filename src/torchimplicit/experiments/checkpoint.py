"""Checkpoints: written atomically, the previous one kept, loaded without running any code in them."""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.files import write_atomically

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.prev.pt"
FORMAT = 1


@dataclass
class Progress:
    """Where a run stands: `batch` is the next one to train on, `totals` what the epoch has gathered so far.

    `lengths` are the sizes in bytes of the run's growing files at this moment.
    """

    epoch: int = 0
    batch: int = 0
    totals: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """For people: epochs counted from 0, as everywhere."""
        return f"epoch {self.epoch}, batch {self.batch}"


def save(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    data_checksum: str,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Write `folder/checkpoint.pt`; the one before it becomes `checkpoint.prev.pt`."""
    content = {
        "format": FORMAT,
        "config": config,
        "data_checksum": data_checksum,
        "progress": vars(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": _random_state(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    write_atomically(folder / NAME, lambda file: torch.save(content, file), keep=folder / PREVIOUS)


def load(folder: Path) -> dict[str, Any] | None:
    """The content of `folder/checkpoint.pt`, or None if a run has not come to its first one yet.

    Raises `ExperimentError` if it is damaged, or gone although an earlier one is there; changes nothing.
    """
    path, previous = folder / NAME, folder / PREVIOUS
    content = _read(path) if path.exists() else None
    if content is not None or not (path.exists() or previous.exists()):
        return content
    what = f"damaged or cut short ({path.stat().st_size} bytes)" if path.exists() else "missing"
    older = _read(previous) if previous.exists() else None
    if older is None:
        remedy = "there is no earlier one to go back to, start again with another --out"
    else:
        at = Progress(**older["progress"]).describe()
        remedy = f"to go on from the one before ({at}): mv '{previous}' '{path}', then --resume again"
    raise ExperimentError(f"{path}: {what}, nothing was changed; {remedy}")


def _read(path: Path) -> dict[str, Any] | None:
    """The checkpoint in `path`, or None if it is not a whole one."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not compare the checksums
            if archive.testzip() is not None:
                return None
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error})") from error
    except Exception:  # torch.load names damage in many ways: RuntimeError, EOFError, UnpicklingError, KeyError, ...
        return None
    keys = {"format", "config", "data_checksum", "progress", "model", "optimizer", "rng"}
    if not isinstance(content, dict) or not keys <= content.keys():
        return None
    if content["format"] != FORMAT:
        raise ExperimentError(
            f"{path}: written in checkpoint format {content['format']}, this version reads {FORMAT}; "
            "resume with the version in the run's config.json"
        )
    return content


def restore(
    content: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> Progress:
    """Put weights, optimiser, scale of the loss and random generators back, and return where the run stood."""
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    if scaler is not None and content.get("scaler"):
        scaler.load_state_dict(content["scaler"])
    torch.set_rng_state(content["rng"]["cpu"])
    if torch.cuda.is_available() and content["rng"]["cuda"]:
        torch.cuda.set_rng_state_all(content["rng"]["cuda"])
    return Progress(**content["progress"])


def _random_state() -> dict[str, Any]:
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if in_use else []}
