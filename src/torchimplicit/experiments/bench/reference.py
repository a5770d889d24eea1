"""What is verified: the residual of a returned solution and the error of its gradients, both against float64."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.experiments.bench.problems import Cell, Problem

RESIDUAL = 1e-5
"""Bound on the worst sample's `‖f(z) − z‖ / ‖f(z)‖`."""
GRADIENT = 1e-4
"""Bound on the relative error of the gradients in the weight and in x."""
_EXACT = 1e-9


@dataclass(frozen=True)
class Accuracy:
    """Of one forward and backward pass.

    Attributes:
        residual: worst sample's `‖f(z) − z‖ / ‖f(z)‖`, recomputed in float64 from the returned z.
        weight_error: `‖g − g_ref‖ / ‖g_ref‖` of the gradient in the weight.
        input_error: the same in x.
    """

    residual: float
    weight_error: float
    input_error: float

    @property
    def solved(self) -> bool:
        """Whether the residual is within its bound."""
        return self.residual <= RESIDUAL

    @property
    def gradient_error(self) -> float:
        """The larger of the two."""
        return max(self.weight_error, self.input_error)

    @property
    def good(self) -> bool:
        """Whether everything is within its bound (a NaN is not)."""
        return self.solved and self.gradient_error <= GRADIENT

    def __str__(self) -> str:
        """Show the three numbers."""
        return f"residual {self.residual:.1e}, weight error {self.weight_error:.1e}, input error {self.input_error:.1e}"


def worst_residual(cell: Cell, x: Tensor, z: Tensor) -> float:
    """The worst sample's `‖f(z) − z‖ / ‖f(z)‖` in the dtype of the cell."""
    with torch.no_grad():
        value = cell(z, x)
        left = torch.linalg.vector_norm((value - z).flatten(1), dim=1)
        return float((left / torch.linalg.vector_norm(value.flatten(1), dim=1)).max())


class Reference:
    """The solution and the gradients of a problem in float64, each to a relative residual below 1e-9.

    The library finds them, and what is checked here does not depend on it: the residual of the solution and that of
    the adjoint system `u = Jᵀu + v` are recomputed.
    """

    def __init__(self, problem: Problem) -> None:
        self.cell = copy.deepcopy(problem.cell).double()
        self.x = problem.x.detach().double()
        v = problem.cotangent.double()
        with torch.no_grad():
            solver = ti.Anderson(rtol=_EXACT / 10)
            z = ti.fixed_point(self.cell, torch.zeros_like(self.x), self.x, batch_dims=1, solver=solver).value
        z.requires_grad_()
        x = self.x.clone().requires_grad_()
        value = self.cell(z, x)

        def step(u: Tensor) -> Tensor:
            return torch.autograd.grad(value, z, u, retain_graph=True)[0] + v

        with torch.no_grad():
            u = ti.fixed_point(step, torch.zeros_like(v), batch_dims=1, solver=ti.Anderson(rtol=_EXACT / 10)).value
        left = torch.linalg.vector_norm((step(u) - u).flatten(1), dim=1) / torch.linalg.vector_norm(v.flatten(1), dim=1)
        residual = max(float(left.max()), worst_residual(self.cell, self.x, z))
        if not residual <= _EXACT:
            raise RuntimeError(f"the reference solution of {problem.name} has a residual of {residual:.1e}")
        self.weight_gradient, self.input_gradient = torch.autograd.grad(value, (self.cell.weight, x), u)

    def residual(self, z: Tensor) -> float:
        """The worst sample's residual of a solution, in float64."""
        return worst_residual(self.cell, self.x, z.double())

    def solves(self, z: Tensor) -> bool:
        """Whether it is within the bound."""
        return self.residual(z) <= RESIDUAL

    def judge(self, z: Tensor, weight_gradient: Tensor, input_gradient: Tensor) -> Accuracy:
        """How good a solution and its gradients are."""
        return Accuracy(
            self.residual(z),
            _error(weight_gradient, self.weight_gradient),
            _error(input_gradient, self.input_gradient),
        )


def _error(found: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))
