"""Maps with everything a test needs: the parameters they close over, and the truth by unrolled differentiation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import torchimplicit as ti

TIGHT = 1e-13
"""Relative tolerance at which float64 results can be compared to 1e-9 and better."""

SOLVERS: dict[str, ti.solvers.Solver] = {
    "picard": ti.Picard(rtol=TIGHT),
    "picard_damped": ti.Picard(rtol=TIGHT, damping=0.9),
    "anderson": ti.Anderson(rtol=TIGHT),
    "newton": ti.Newton(rtol=TIGHT),
    "newton_gmres": ti.Newton(rtol=TIGHT, linear_solver=ti.GMRES()),
    "newton_krylov": ti.NewtonKrylov(rtol=TIGHT),
    "chord": ti.Chord(rtol=TIGHT),
    "broyden": ti.Broyden(rtol=TIGHT, update="good"),
    "broyden_bad": ti.Broyden(rtol=TIGHT, update="bad"),
    "dogleg": ti.Dogleg(rtol=TIGHT),
    "levenberg_marquardt": ti.LevenbergMarquardt(rtol=TIGHT),
    "auto": ti.Auto(rtol=TIGHT),
}
EXACT = ti.Implicit(rtol=TIGHT)


@dataclass
class TanhProblem:
    """`z = tanh(z Wᵀ + x + b)`, a contraction, with W, b and x as leaves that require gradients."""

    weight: Tensor
    bias: Tensor
    x: Tensor

    @classmethod
    def make(
        cls, batch: int = 4, n: int = 5, contraction: float = 0.7, dtype: torch.dtype = torch.float64
    ) -> "TanhProblem":
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(n, n, generator=generator, dtype=dtype)
        weight *= contraction / torch.linalg.matrix_norm(weight, 2)
        bias = 0.1 * torch.randn(n, generator=generator, dtype=dtype)
        x = torch.randn(batch, n, generator=generator, dtype=dtype)
        return cls(weight.requires_grad_(), bias.requires_grad_(), x.requires_grad_())

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.x)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.weight, self.bias, self.x]

    def map(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + self.x + self.bias)


def unrolled(fn: Callable[[Tensor], Tensor], z: Tensor, steps: int = 300) -> Tensor:
    """The fixed point of a contraction by plain iteration inside autograd."""
    for _ in range(steps):
        z = fn(z)
    return z


def gradients(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a scalar with every entry weighted differently, so that no symmetry hides an error."""
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return list(torch.autograd.grad((weights * value**2).sum(), list(leaves), retain_graph=True))
