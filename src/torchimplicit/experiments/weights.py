"""The weights alone, as a safetensors file: for programs that are to read nothing but numbers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch import nn

from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.files import write_atomically

NAME = "model.safetensors"


def check_safetensors() -> None:
    """Raise if the package is not there."""
    if find_spec("safetensors") is None:
        raise ExperimentError("--safetensors: needs a package, pip install safetensors")


def write_safetensors(folder: Path, model: nn.Module, epoch: int) -> None:
    """Write `folder/model.safetensors`, the names and tensors of `model.state_dict()`, after `epoch`."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    write_atomically(folder / NAME, save(tensors, metadata={"epoch": str(epoch)}))
