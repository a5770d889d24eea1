"""A state in `channels_last` stays in it: in every evaluation, in the result and in its gradient."""

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Cell(nn.Module):
    """A contraction by convolution, which notes the memory format of its state."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        convolution = {4: nn.Conv2d, 5: nn.Conv3d}[dims]
        torch.manual_seed(0)
        self.conv = convolution(3, 3, 3, padding=1, dtype=torch.float64)
        with torch.no_grad():
            self.conv.weight *= 0.5
        self.last: list[bool] = []

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.last.append(z.is_contiguous(memory_format=FORMATS[z.ndim]))
        return torch.tanh(self.conv(z) + x)


def _input(dims: int) -> Tensor:
    shape = (4, 3, 6, 5) if dims == 4 else (4, 3, 4, 3, 5)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dims", [4, 5])
@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize(
    "solver", [ti.Picard(), ti.Anderson(), ti.Broyden(), ti.NewtonKrylov()], ids=lambda s: type(s).__name__
)
def test_results_and_gradients_are_those_of_the_usual_order(
    dims: int, batch_dims: int, solver: ti.solvers.Method
) -> None:
    results = []
    for memory_format in (torch.contiguous_format, FORMATS[dims]):
        cell = Cell(dims)
        x = _input(dims).to(memory_format=memory_format).requires_grad_()
        solution = ti.fixed_point(
            cell, torch.zeros_like(x, memory_format=torch.preserve_format), x, solver=solver, batch_dims=batch_dims
        )
        assert solution.converged.all()
        v = _input(dims).sin()
        solution.value.backward(v)
        assert solution.value.shape == x.shape
        results.append((solution.value.detach(), x.grad, cell.conv.weight.grad, cell.last, solution.value))
    usual, other = results
    for one, two in zip(usual[:3], other[:3], strict=True):
        assert one is not None and two is not None
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)
    assert all(other[3])
    assert not any(usual[3])
    assert other[4].is_contiguous(memory_format=FORMATS[dims])


def test_a_supplied_jacobian_is_not_asked_in_an_order_it_does_not_expect() -> None:
    """Its products are of states in the usual order: automatic differentiation takes its place."""

    class Scaled(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * torch.cos(z) * x[:, :1, :1, :1] + x

        def linearize(self, z: Tensor, value: Tensor, x: Tensor) -> object:
            raise AssertionError("asked")

    x = _input(4).to(memory_format=torch.channels_last).requires_grad_()
    solution = ti.fixed_point(Scaled(), torch.zeros_like(x), x, solver=ti.Picard(), batch_dims=1)
    solution.value.sum().backward()
    y = x.detach().clone().requires_grad_()
    z = torch.zeros_like(y)
    for _ in range(200):
        z = 0.5 * torch.cos(z) * y[:, :1, :1, :1] + y
    z.sum().backward()
    torch.testing.assert_close(solution.value, z, rtol=0, atol=1e-8)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-7)


def test_second_derivative_in_channels_last() -> None:
    x = (0.3 * _input(4)[:2, :, :2, :2]).to(memory_format=torch.channels_last).requires_grad_()
    cell = Cell(4)
    solve = lambda x: ti.fixed_point(cell, torch.zeros_like(x), x, solver=ti.Picard(rtol=1e-13), batch_dims=1).value  # noqa: E731
    assert torch.autograd.gradcheck(solve, (x,), atol=1e-6)
    assert torch.autograd.gradgradcheck(solve, (x,), atol=1e-5)
