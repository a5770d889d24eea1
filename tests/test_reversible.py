"""The reversible solve: its gradient is backpropagation's, its memory does not grow, and rounding cannot spoil it."""

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.nn import Reversible


def plain(cell: object, z0: Tensor, x: Tensor, steps: int, beta: float) -> Tensor:
    y = z = z0
    for _ in range(steps):
        y = (1 - beta) * y + beta * cell(z, x)  # type: ignore[operator]
        z = (1 - beta) * z + beta * cell(y, x)  # type: ignore[operator]
    return z


class Cell(nn.Module):
    def __init__(self, size: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        W = torch.randn(6, 6, dtype=dtype)
        self.W = nn.Parameter(size * W / torch.linalg.matrix_norm(W, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.mT + x)


@pytest.mark.parametrize("beta", [0.3, 0.8, 1.5])
@pytest.mark.parametrize("steps", [1, 6, 40])
def test_the_gradient_is_that_of_backpropagation_converged_or_not(beta: float, steps: int) -> None:
    """Forty steps cannot be undone in float64 with β = 0.8: the states are then computed again."""
    cell = Cell(0.8)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    z0 = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 6, dtype=torch.float64)
    layer = Reversible(cell, steps=steps, beta=beta, init=lambda _: z0)
    found = []
    for value in (layer(x), plain(cell, z0, x, steps, beta)):
        found.append([value, *torch.autograd.grad((weight * value).sum(), [x, z0, cell.W])])
    for mine, exact in zip(*found, strict=True):
        assert (mine - exact).abs().max() <= 1e-6 * exact.abs().max()
    if steps <= 6:
        assert all((a - b).abs().max() <= 1e-9 * b.abs().max() for a, b in zip(*found, strict=True))


def test_a_start_that_is_not_recovered_is_noticed_and_costs_evaluations_only() -> None:
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    for steps, twice in ((4, False), (40, True)):
        solution = Reversible(Cell(0.8), steps=steps).solve(x)
        solution.value.sum().backward()
        assert int(solution.adjoint.steps) == steps * (2 if twice else 1)  # type: ignore[arg-type]
        assert (float(solution.adjoint.residual) > 1e-6) is twice  # type: ignore[arg-type]


def test_float32_cells_have_float32_gradients_as_exact_as_backpropagations() -> None:
    cell = Cell(0.8, torch.float32)
    x = torch.randn(5, 6, requires_grad=True)
    for steps in (8, 30):
        (mine,) = torch.autograd.grad(Reversible(cell, steps=steps)(x).sum(), cell.W)
        (exact,) = torch.autograd.grad(plain(cell, torch.zeros_like(x), x, steps, 0.8).sum(), cell.W)
        assert mine.dtype == torch.float32
        assert (mine - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_what_is_saved_does_not_depend_on_the_steps() -> None:
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    sizes = []
    for steps in (2, 50):
        kept: list[int] = []
        cell = Cell(0.8)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            Reversible(cell, steps=steps)(x)
        sizes.append(sum(kept))
    assert sizes[0] == sizes[1] > 0


def test_it_converges_at_least_as_fast_as_promised() -> None:
    for seed in range(50):
        torch.manual_seed(seed)
        kappa, beta = 0.8, float(torch.empty(()).uniform_(0.1, 1.0))
        cell = Cell(kappa)
        x = torch.randn(5, 6, dtype=torch.float64)
        exact = ti.fixed_point(cell, torch.zeros_like(x), x, batch_dims=1, solver=ti.Newton(rtol=1e-14)).value
        for steps in (1, 3, 10):
            error = (Reversible(cell, steps=steps, beta=beta)(x) - exact).norm(dim=1)
            assert (error <= (1 - beta + beta * kappa) ** steps * exact.norm(dim=1) + 1e-12).all()


def test_the_residual_is_that_of_what_is_returned() -> None:
    cell, x = Cell(0.8), torch.randn(5, 6, dtype=torch.float64)
    for steps, converged in ((3, False), (200, True)):
        solution = Reversible(cell, steps=steps).solve(x)
        again = (cell(solution.value, x) - solution.value).square().mean(1).sqrt()
        assert (solution.residual - again).abs().max() < 1e-15
        assert bool(solution.converged.all()) is converged and bool(solution.converged.any()) is converged


def test_what_could_not_be_undone_or_would_be_wrong_is_refused() -> None:
    cell, x = Cell(0.8), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="draws random numbers"):
        Reversible(lambda z, x: nn.functional.dropout(z + x))(x)
    with pytest.raises(ValueError, match="other than 1"):
        Reversible(cell, beta=1.0)
    with pytest.raises(TypeError, match="did you mean 'steps'"):
        Reversible(cell, step=3)  # type: ignore[call-arg]
    with pytest.raises(RuntimeError, match="not supported"):
        torch.func.vmap(Reversible(cell))(x[:, None])
    (grad,) = torch.autograd.grad(Reversible(cell)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
