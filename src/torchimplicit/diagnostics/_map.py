"""The map whose Jacobian is looked at: a function of `(z, *inputs)`, or the cell of a fixed-point layer."""

from collections.abc import Callable
from typing import Any

from torch import nn

from .._solution import PyTree


def is_implicit(module: object) -> bool:
    """Whether it is an implicit layer: a module with the options `solver` and `adjoint`."""
    return isinstance(module, nn.Module) and {"solver", "adjoint"} <= vars(module).keys()


def map_of(caller: str, layer: Any) -> Callable[..., PyTree]:
    """`f` of `z = f(z, *inputs)`.

    Raises:
        TypeError: neither a function nor a layer with such a map.
    """
    if not callable(layer):
        raise TypeError(f"{caller}: layer must be a fixed-point layer or a function, but is {type(layer).__name__}.")
    if not is_implicit(layer):
        return layer
    if layer._kind != "fixed_point":
        raise TypeError(
            f"{caller}: {type(layer).__name__} solves cell(z) = 0 and has no map z ↦ f(z); give the map in question as "
            "a function, such as lambda z, *inputs: z − layer.cell(z, *inputs)."
        )
    return layer.cell
