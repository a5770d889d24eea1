"""The layers by number: how an operator of torch, which takes tensors and numbers, is told which layer is meant."""

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count()


def enroll(layer: nn.Module) -> int:
    """A number for a layer."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def enrolled(number: int) -> Any:
    """The layer of a number."""
    return _layers[number]
