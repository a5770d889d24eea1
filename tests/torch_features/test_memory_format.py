"""Images in channels_last: the same values and gradients as in the usual order of memory."""

import copy

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti


class Convolution(nn.Module):
    """`tanh(conv(z)/3 + x)`, and the memory formats that it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(z) / 3 + x)


SOLVERS = {"auto": ti.Auto(rtol=1e-12), "picard": ti.Picard(rtol=1e-12), "broyden": ti.Broyden(rtol=1e-12)}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_channels_last_has_the_values_and_gradients_of_the_usual_order(solver: ti.solvers.Method) -> None:
    layer = ti.nn.FixedPoint(Convolution(), solver=solver, adjoint=ti.Implicit(rtol=1e-12))
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    truth = torch.zeros_like(x)
    plain = x.clone().requires_grad_()
    for _ in range(80):
        truth = layer.cell(truth, plain)
    expected = torch.autograd.grad(truth.square().sum(), [plain, *layer.parameters()])

    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    image = x.to(memory_format=torch.channels_last).requires_grad_()
    assert last.cell.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not image.is_contiguous()
    z = last(image)
    torch.testing.assert_close(z, truth, atol=1e-10, rtol=0)
    found = torch.autograd.grad(z.square().sum(), [image, *last.parameters()])
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_a_start_in_channels_last_gives_the_same_value() -> None:
    cell, x = Convolution(), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    layer = ti.nn.FixedPoint(cell, solver=ti.Auto(rtol=1e-12), init=lambda x: x.to(memory_format=torch.channels_last))
    truth = torch.zeros_like(x)
    for _ in range(80):
        truth = cell(truth, x)
    torch.testing.assert_close(layer(x), truth, atol=1e-10, rtol=0)
