"""The equilibrium transformer: causal, one equilibrium found jointly or token by token, exact gradients of both."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import torchimplicit as ti
from torchimplicit.nn import EquilibriumTransformer


def make(attend: str, **options: object) -> tuple[EquilibriumTransformer, Tensor]:
    layer = EquilibriumTransformer(8, heads=2, span=5, attend=attend, dtype=torch.float64, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer, torch.randn(3, 12, 8, dtype=torch.float64)


@pytest.mark.parametrize("attend", ["past", "upto"])
def test_the_joint_solve_and_that_token_by_token_agree_in_value_and_gradient(attend: str) -> None:
    layer, x = make(attend)
    x.requires_grad_()
    weight = torch.randn_like(x)
    found = []
    for solution in (layer.solve(x), layer.by_token(x)):
        assert solution.converged.all()
        grads = torch.autograd.grad((weight * solution.value).sum(), [x, *layer.parameters()])
        found.append([solution.value, *grads])
    for joint, single in zip(*found, strict=True):
        assert (joint - single).abs().max() <= 1e-7 * joint.abs().max()


def test_by_hand() -> None:
    """The map of one position is that of a reference written with loops."""
    layer, x = make("past")
    cell = layer.cell
    z = torch.randn_like(x)
    out = cell(z, x)
    b, t = 1, 7
    mixed = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q = cell.query(x[b, t])[part]
        scores, values = [cell.nothing[head]], [torch.zeros(4, dtype=torch.float64)]
        for distance in range(5):
            kv = cell.key_value(z[b, t - 1 - distance])
            scores.append(q @ kv[:8][part] / 2 + cell.bias[head, distance])
            values.append(kv[8:][part])
        mixed.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(values))
    h = x[b, t] + cell.mix(torch.cat(mixed))
    h = h / (h.square().mean() + 1e-5).sqrt()
    y = h + cell.narrow(functional.gelu(cell.widen(h)))
    y = y / (y.square().mean() + 1e-5).sqrt()
    assert (out[b, t] - y).abs().max() < 1e-12


@pytest.mark.parametrize("attend", ["past", "upto"])
def test_nothing_is_seen_of_the_future_nor_beyond_the_span(attend: str) -> None:
    layer, x = make(attend)
    z = torch.randn_like(x)

    def at_8(z: Tensor) -> Tensor:
        return layer.cell(z, x)[:, 8].sum()

    reach = torch.autograd.functional.jacobian(at_8, z).abs().sum((0, 2)) > 0
    seen = range(3, 8) if attend == "past" else range(4, 9)
    assert reach.nonzero()[:, 0].tolist() == list(seen)
    later = x.clone()
    later[:, 8:] += 1.0
    assert (layer(later)[:, :8] - layer(x)[:, :8]).abs().max() < 1e-8


def test_past_is_exact_after_as_many_steps_as_positions_however_large_the_weights() -> None:
    layer, x = make("past")
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(20.0)
    certificate = layer.certificate()
    assert certificate.unique and certificate.steps == 1
    ends = []
    for start in (torch.zeros_like(x), 100 * torch.randn_like(x)):
        z = start
        for _ in range(x.shape[1]):
            z = layer.cell(z, x)
        ends.append(z)
        assert (layer.cell(z, x) - z).abs().max() == 0.0
    assert (ends[0] - ends[1]).abs().max() <= 1e-12
    assert (layer.solve(x).value - ends[0]).abs().max() <= 1e-8
    assert ends[0].norm(dim=2).max() <= certificate.radius


def test_the_gradient_of_a_long_dependency_agrees_with_finite_differences() -> None:
    """With large weights the adjoint's series grows before it ends: it must be given the time."""
    layer, x = make("past")
    with torch.no_grad():
        layer.cell.mix.weight.mul_(4.0)
        layer.cell.nothing.fill_(-5.0)
    x = x[:1].repeat(1, 4, 1).requires_grad_()
    solution = layer.solve(x)
    solution.value[:, -1].sum().backward()
    assert solution.adjoint.status is not None
    assert (solution.adjoint.status == int(ti.Status.CONVERGED)).all()
    direction = torch.randn_like(x)
    with torch.no_grad():
        ends = [layer.by_token(x + s * 1e-6 * direction).value[:, -1].sum() for s in (1, -1)]
    assert x.grad is not None
    assert abs((x.grad * direction).sum() - (ends[0] - ends[1]) / 2e-6) < 1e-5 * (1 + abs(ends[0] - ends[1]) / 2e-6)


def test_upto_says_what_is_not_known() -> None:
    certificate = make("upto")[0].certificate()
    assert certificate.exists and not certificate.unique and certificate.steps is None


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"heads": 3}, ValueError, "divisor of features=8"),
        ({"span": 0}, ValueError, "span=0"),
        ({"attend": "pats"}, ValueError, "did you mean 'past'"),
        ({"hiden": 3}, TypeError, "did you mean 'hidden'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EquilibriumTransformer(8, **{"heads": 2, "span": 4, **options})  # type: ignore[arg-type]


def test_an_input_of_another_width_is_refused() -> None:
    layer, _ = make("past")
    with pytest.raises(ValueError, match=r"\(B, T, 8\)"):
        layer(torch.zeros(3, 12, 7, dtype=torch.float64))


def test_the_monitor_sees_it() -> None:
    layer, x = make("past")
    with ti.monitor(layer) as log:
        layer(x)
    assert len(log.records) == 1 and log.records[0].solution.converged.all()
