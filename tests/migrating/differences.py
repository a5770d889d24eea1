"""Where a peer and we differ: each function asserts what the note of its row says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from tests.migrating.problems import Names

Run = Callable[[], object]
"""A side of the row, to be evaluated."""


def _gradient(value: object, leaf: Tensor) -> Tensor:
    assert isinstance(value, Tensor)
    return torch.autograd.grad(value.square().sum(), leaf)[0]


def no_gradient_in_eval(theirs: Run, ours: Run, names: Names) -> None:
    their, our = theirs(), ours()
    torch.testing.assert_close(their, our.detach(), atol=1e-8, rtol=0)
    assert not their.requires_grad
    assert _gradient(our, names["x"]).abs().min() > 1e-6


def backward_report(theirs: Run, ours: Run, names: Names) -> None:
    theirs().sum().backward()
    assert names["seen"] == []  # of a one-step gradient, their default, nothing is reported
    solution = ti.fixed_point(names["f"], names["z0"], batch_dims=1)
    assert type(ours()) is type(solution.adjoint)
    solution.value.sum().backward()
    assert solution.adjoint.status.tolist() == [0] * 4
    assert solution.adjoint.residual.max() < 1e-9


def no_reset(theirs: Run, ours: Run, names: Names) -> None:
    theirs()
    dropped = torch.nn.Dropout(0.5)
    solution = ti.fixed_point(lambda z: 0.25 * dropped(z) + 1, torch.zeros(50), solver=ti.Picard())
    assert solution.converged
    assert {round(v, 4) for v in solution.value.tolist()} == {1.0, 2.0}  # one mask for all evaluations


def spectral_radius(theirs: Run, ours: Run, names: Names) -> None:
    torch.testing.assert_close(theirs(), ours(), atol=1e-6, rtol=0)
    from torchdeq.loss import power_method

    rotation = 0.9 * torch.tensor([[0.455, -0.8905], [0.8905, 0.455]], dtype=torch.float64)
    z = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    _, found = power_method(z @ rotation.T, z)
    assert abs(found.item() - 0.41) < 0.01
    assert abs(torch.linalg.eigvals(rotation).abs().max().item() - 0.9) < 1e-3


def same_weight(theirs: Run, ours: Run, names: Names) -> None:
    linear = names["normed"].linear
    before = linear.weight.detach().clone()
    theirs()
    torch.testing.assert_close(linear.weight.detach(), before, atol=1e-12, rtol=0)
    names["normed"].linear = linear = torch.nn.Linear(3, 3, bias=False, dtype=torch.float64)
    before = linear.weight.detach().clone()
    ours()
    torch.testing.assert_close(linear.weight.detach(), before, atol=1e-12, rtol=0)


def spectral_norm_is_one(theirs: Run, ours: Run, names: Names) -> None:
    linear = names["normed"].linear
    with torch.no_grad():
        linear.weight.mul_(4)
    norm = torch.linalg.matrix_norm(linear.weight.detach(), 2)
    assert abs(norm - 1) > 0.3
    theirs()
    assert len(list(names["normed"].parameters())) == 2  # the weight and its scale
    names["normed"].linear = torch.nn.Linear(3, 3, bias=False, dtype=torch.float64)
    ours()
    names["normed"].eval()
    torch.testing.assert_close(
        torch.linalg.matrix_norm(names["normed"].linear.weight, 2).detach(), torch.ones_like(norm), atol=1e-3, rtol=0
    )


def simple_backward_fails(theirs: Run, ours: Run, names: Names) -> None:
    value = theirs()
    with pytest.raises(TypeError):
        _gradient(value, names["x"])
    assert _gradient(ours(), names["x"]).abs().min() > 1e-6


def absolute_backward_tolerance(theirs: Run, ours: Run, names: Names) -> None:
    """The gradient of a loss, and that of a loss a millionth as large, a million times as large."""

    def error(run: Run) -> float:
        one, small = run(), run()
        assert isinstance(one, Tensor)
        assert isinstance(small, Tensor)
        x = names["x"]
        (exact,) = torch.autograd.grad(one.square().sum(), x)
        (scaled,) = torch.autograd.grad(1e-6 * small.square().sum(), x)
        return ((1e6 * scaled - exact).norm() / exact.norm()).item()

    assert error(theirs) > 0.01
    assert error(ours) < 1e-9


def evaluation(theirs: Run, ours: Run, names: Names) -> None:
    names["model"].eval()
    deq = theirs  # in training
    torch.testing.assert_close(deq(), ours(), atol=1e-7, rtol=0)
    from torchdeq import get_deq

    assert get_deq(eval_factor=2.0).eval_f_max_iter == get_deq(eval_f_max_iter=80).eval_f_max_iter == 80


def unknown_option(theirs: Run, ours: Run, names: Names) -> None:
    theirs()
    with pytest.raises(TypeError, match="nonsense"):
        ours()


def unknown_option_xitorch(theirs: Run, ours: Run, names: Names) -> None:
    theirs()
    with pytest.raises(TypeError, match=r"max_setps.*max_steps"):
        ours()


def inexact_gmres(theirs: Run, ours: Run, names: Names) -> None:
    z, W = names["z0"], names["W"]
    for _ in range(100):
        z = names["h"](z, W, names["x"])
    truth = _gradient(z, W)
    assert (_gradient(theirs(), W) - truth).norm() > 1e-4 * truth.norm()
    assert (_gradient(ours(), W) - truth).norm() < 1e-8 * truth.norm()


def closures(theirs: Run, ours: Run, names: Names) -> None:
    their, our = theirs(), ours()
    torch.testing.assert_close(their, our, atol=1e-7, rtol=0)
    assert not their.requires_grad
    assert _gradient(our, names["W"]).abs().max() > 1e-3


def second_derivative(theirs: Run, ours: Run, names: Names) -> None:
    z, W = names["z0"], names["W"]
    for _ in range(100):
        z = names["h"](z, W, names["x"])
    (first,) = torch.autograd.grad(z.square().sum(), W, create_graph=True)
    (truth,) = torch.autograd.grad(first.square().sum(), W)
    torch.testing.assert_close(ours(), truth, atol=1e-8, rtol=0)
    assert (theirs() - truth).norm() > 0.05 * truth.norm()
