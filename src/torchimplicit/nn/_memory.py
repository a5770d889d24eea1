"""`Memory`: what `init=` may be beside a function: something that sees the solutions and knows where to begin."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from .._solution import PyTree, Solution
from .._system import transformed
from ..solvers import Method


class Memory(ABC):
    """Base class: asked before each solve of its layer, and told of what came out."""

    @abstractmethod
    def begin(self, start: PyTree, solver: Method | None) -> tuple[PyTree, Method | None]:
        """The start and the solver of a solve that would begin at `start` if nothing were known."""

    @abstractmethod
    def keep(self, solution: Solution) -> None:
        """What came out."""


def is_transformed() -> bool:
    """Whether tensors may be wrapped, which must not outlive the transform."""
    return transformed() or forward_ad._current_level >= 0


def choose(samples: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`one` for some samples, a bool tensor of the batch shape, and `other` for the rest."""
    return torch.where(samples.reshape(*samples.shape, *[1] * (one.ndim - samples.ndim)), one, other)


def alike(one: PyTree, other: PyTree) -> bool:
    """Whether two states have the same structure, shapes, dtypes and devices."""
    (mine, my_spec), (others, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return my_spec == other_spec and all(
        isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        for a, b in zip(mine, others, strict=True)
    )
