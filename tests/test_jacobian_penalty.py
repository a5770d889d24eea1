"""`jacobian_penalty`: unbiased, differentiable in weights, inputs and z, the same for every kind of state."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti

F64 = torch.float64


class Cell(nn.Module):
    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n, dtype=F64)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) * (1 + 0.3 * x))


def _exact(fn: Any, z: Tensor, *inputs: Any) -> Tensor:
    """`‖J‖²_F / n` by the whole matrix."""
    J: Any = torch.autograd.functional.jacobian(lambda z: fn(z, *inputs), z, create_graph=True)
    return J.square().sum() / z.numel()


def _probes(n: int) -> Tensor:
    """All 2ⁿ vectors of ±1: the exact mean over them is the expectation."""
    bits = torch.arange(2**n)[:, None] >> torch.arange(n)
    return (bits % 2 * 2 - 1).to(F64)


@pytest.fixture
def every_probe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the random vectors run through all there are."""

    def recite(n: int) -> int:
        rows = iter(((_probes(n) + 1) / 2).long())
        monkeypatch.setattr(torch, "randint", lambda *_, **__: next(rows)[None])
        return 2**n

    return recite


def test_mean_over_all_probes_is_the_frobenius_norm(every_probe: Any) -> None:
    cell = Cell(4)
    z, x = torch.randn(2, 4, dtype=F64), torch.randn(2, 4, dtype=F64)
    count = every_probe(8)
    penalty = ti.jacobian_penalty(cell, z, x, probes=count)
    torch.testing.assert_close(penalty, _exact(cell, z, x), rtol=1e-12, atol=0)


def test_gradient_over_all_probes_is_that_of_the_frobenius_norm(every_probe: Any) -> None:
    cell = Cell(3)
    z, x = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    leaves = [cell.linear.weight, cell.linear.bias, x.requires_grad_(), z.requires_grad_()]
    count = every_probe(6)
    found = torch.autograd.grad(ti.jacobian_penalty(cell, z, x, probes=count), leaves)
    for a, b in zip(found, torch.autograd.grad(_exact(cell, z, x), leaves), strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_random_probes_are_unbiased() -> None:
    cell = Cell(6)
    z, x = torch.randn(3, 6, dtype=F64), torch.randn(3, 6, dtype=F64)
    drawn = torch.stack([ti.jacobian_penalty(cell, z, x).detach() for _ in range(2000)])
    error = drawn.std() / len(drawn) ** 0.5
    assert 0 < error < 0.02 * drawn.mean()
    assert (drawn.mean() - _exact(cell, z, x)).abs() < 4 * error


def test_one_probe_suffices_where_the_rows_are_orthogonal() -> None:
    Q = torch.linalg.qr(torch.randn(5, 5, dtype=F64)).Q
    penalty = ti.jacobian_penalty(lambda z: 0.7 * z @ Q.T, torch.randn(10, 5, dtype=F64))
    torch.testing.assert_close(penalty, torch.tensor(0.49, dtype=F64), rtol=1e-12, atol=0)


def test_gradient_at_the_moving_solution_is_the_total_one() -> None:
    """By finite differences of solve and penalty together, which the gradient with z held fixed misses."""
    torch.manual_seed(1)
    layer = ti.nn.FixedPoint(Cell(4), solver=ti.Newton(rtol=1e-13), adjoint=ti.Implicit(rtol=1e-13))
    with torch.no_grad():
        layer.cell.linear.weight.mul_(0.8)
    x = torch.randn(5, 4, dtype=F64)
    weight = layer.cell.linear.weight
    direction = torch.randn_like(weight)

    def value(step: float, held: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            weight.copy_(before + step * direction)
        z = layer(x)
        return ti.jacobian_penalty(layer, z.detach() if held else z, x, generator=generator)

    before = weight.detach().clone()
    difference = (value(1e-5) - value(-1e-5)).item() / 2e-5
    (total,) = torch.autograd.grad(value(0.0), weight)
    (partial,) = torch.autograd.grad(value(0.0, held=True), weight)
    torch.testing.assert_close((total * direction).sum().item(), difference, rtol=1e-7, atol=1e-9)
    assert abs((partial * direction).sum().item() - difference) > 1e-3 * abs(difference)


def test_structured_and_complex_states_count_real_unknowns(every_probe: Any) -> None:
    A = torch.randn(3, 3, dtype=torch.complex128)

    def fn(z: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": A @ z["a"] + z["b"].sum(), "b": z["b"] * z["a"].real.sum()}

    z = {"a": torch.randn(3, dtype=torch.complex128), "b": torch.randn(1, dtype=F64)}

    def real(v: Tensor) -> Tensor:
        out = fn({"a": torch.view_as_complex(v[:6].reshape(3, 2)), "b": v[6:]})
        return torch.cat([torch.view_as_real(out["a"]).reshape(-1), out["b"]])

    flat = torch.cat([torch.view_as_real(z["a"]).reshape(-1), z["b"]])
    J: Any = torch.autograd.functional.jacobian(real, flat)
    expected = J.square().sum() / 7
    torch.testing.assert_close(ti.jacobian_penalty(fn, z, probes=every_probe(7)), expected, rtol=1e-12, atol=0)


def test_layer_and_its_cell_have_the_same_penalty() -> None:
    layer = ti.nn.TanhEquilibrium(6)
    x = torch.randn(4, 6)
    z = layer(x)
    values = [ti.jacobian_penalty(f, z, x, generator=torch.Generator().manual_seed(0)) for f in (layer, layer.cell)]
    assert torch.equal(*values)
    assert values[0] > 0.05


def test_map_that_does_not_depend_on_z_has_none() -> None:
    assert ti.jacobian_penalty(lambda z, x: x, torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)).item() == 0.0
    assert ti.jacobian_penalty(lambda z: torch.ones(2, 3), torch.ones(2, 3)).item() == 0.0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_it_is_a_number(mode: Any) -> None:
    layer = ti.nn.TanhEquilibrium(5)
    with mode():
        x = torch.randn(3, 5)
        z = layer(x)
        penalty = ti.jacobian_penalty(layer, z, x, generator=torch.Generator().manual_seed(0))
    assert not penalty.requires_grad
    other = ti.jacobian_penalty(layer, z.clone(), x.clone(), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(penalty.clone(), other.detach())


def test_training_with_it_makes_the_jacobian_smaller_and_the_solve_quicker() -> None:
    found = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        layer = ti.nn.TanhEquilibrium(10, solver=ti.Picard())
        with torch.no_grad():
            layer.linear.weight.copy_(0.9 * torch.linalg.qr(layer.linear.weight).Q)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        x = 0.3 * torch.randn(20, 10)
        for _ in range(20):
            z = layer(x)
            loss = (z - x).square().mean() + (weight * ti.jacobian_penalty(layer, z, x) if weight else 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[weight] = layer.solve(x).evaluations, ti.jacobian_penalty(layer, layer(x), x, probes=50).item()
    assert found[1.0][0] < 0.6 * found[0.0][0]
    assert found[1.0][1] < 0.6 * found[0.0][1]


def test_root_layer_is_refused_and_told_what_to_give() -> None:
    layer = ti.nn.Root(lambda z, x: z - x)
    with pytest.raises(TypeError, match="Root solves cell"):
        ti.jacobian_penalty(layer, torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize("probes", [0, -1, 1.5, True])
def test_probes_must_be_a_count(probes: Any) -> None:
    with pytest.raises(ValueError, match=f"probes={probes!r}"):
        ti.jacobian_penalty(lambda z: z, torch.ones(2), probes=probes)


def test_what_is_no_function_is_refused() -> None:
    bad: Any = 3
    with pytest.raises(TypeError, match="is int"):
        ti.jacobian_penalty(bad, torch.ones(2))


def test_map_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="must return the shape"):
        ti.jacobian_penalty(lambda z: z[:1], torch.ones(2))
