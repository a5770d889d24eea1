"""What a cell must supply to be solved by operator splitting, and the check that it is the cell's own equation."""

from typing import Any, Protocol, Self

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._norms import two
from .._problem import Problem
from ..linear import MonotoneOperator

_AGREEMENT = 1e3
"""Rounding units, relative to the size of what is added, by which the cell's value may differ from its split form's."""


class SplitForm(Protocol):
    """`z = prox_f(W z + c)` of a batch, in the parts that splitting methods handle one by one.

    A cell supplies it by a method `splitting(*args)`. States are `(B, n)`.
    """

    @property
    def operator(self) -> MonotoneOperator:
        """W."""
        ...

    @property
    def offset(self) -> Tensor:
        """c, `(B, n)`."""
        ...

    def prox(self, p: Tensor, step_size: Tensor | float) -> Tensor:
        """`prox_{αf}(p) = argmin_q ½‖q − p‖² + α f(q)`; α is a number, or `(B, 1)`. The activation itself for α = 1."""
        ...

    def select(self, samples: Tensor) -> Self:
        """The form of some samples, by their indices."""
        ...


def split_form(problem: Problem, solver: Any, z: Tensor, evaluation: Evaluation) -> tuple[SplitForm, Tensor]:
    """The split form of a problem's cell, and `W z + c` at the start.

    Raises:
        TypeError: the cell supplies none, or the problem is not a fixed point.
        ValueError: the cell's value is not that of its split form.
    """
    name = type(solver).__name__
    if problem.kind != "fixed_point" or not hasattr(problem.fn, "splitting") or not problem.has_closed_form:
        raise TypeError(
            f"{name} solves z = prox_f(W z + c) of cells that supply its parts by a method `splitting`, such as those "
            f"of torchimplicit.nn.MonotoneLinear; of this {problem.kind} use Anderson(), Newton() or another solver."
        )
    form = problem.fn.splitting(*problem.args)
    affine = form.offset
    if bool(z.any()):  # the usual start is zero
        affine = form.operator.mv(z) + affine
        problem.count(1)
    error = two(form.prox(affine, 1.0) - evaluation.value)
    size = two(affine) + two(form.offset) + two(z)
    if bool((error > _AGREEMENT * problem.epsilon * size).any()):
        raise ValueError(
            f"{name}: prox(W z + c, 1) of the cell's `splitting` differs from what the cell returns by "
            f"{float(torch.nan_to_num(error).max()):.2g}; the two must be the same equation."
        )
    return form, affine
