"""`spectral_radius` against the eigenvalues of the whole matrix, and what it says when it has not converged."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti

F64 = torch.float64


def _exact(fn: Any, z: Tensor, *inputs: Any) -> Tensor:
    """`ρ(J)` of each row, by the whole matrices."""
    radii = []
    for i in range(len(z)):
        J: Any = torch.autograd.functional.jacobian(
            lambda row, i=i: fn(row[None], *(t[i : i + 1] for t in inputs))[0], z[i]
        )
        radii.append(torch.linalg.eigvals(J).abs().max())
    return torch.stack(radii)


def _weight(kind: str, n: int, generator: torch.Generator) -> Tensor:
    G = torch.randn(n, n, generator=generator, dtype=F64) / n**0.5
    if kind == "rotation":  # every eigenvalue on a circle, in pairs
        return torch.linalg.qr(G).Q
    if kind == "skew":  # all imaginary
        return G - G.T
    if kind == "triangular":  # far from normal
        return G.triu() + 0.3 * torch.randn(n, n, generator=generator, dtype=F64) / n**0.5
    return G


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_radius_of_random_layers_is_right_to_one_percent(seed: int, dtype: torch.dtype) -> None:
    """The acceptance: rotation-like layers among them, with more unknowns than the subspace has dimensions."""
    kind, n = ("plain", "rotation", "skew", "triangular")[seed % 4], (80, 100, 120)[seed % 3]
    generator = torch.Generator().manual_seed(seed)
    layer = ti.nn.TanhEquilibrium(n, dtype=dtype, on_failure="ignore")
    with torch.no_grad():
        layer.linear.weight.copy_(0.9 * _weight(kind, n, generator))
    x = 0.5 * torch.randn(3, n, generator=generator, dtype=F64).to(dtype)
    z = layer(x).detach()
    found = ti.spectral_radius(layer, z, x)
    exact = _exact(layer.cell.double(), z.double(), x.double())
    assert ((found.value - exact).abs() <= 0.01 * exact).all()
    # On a circle no eigenvalue stands out, and the radius is known long before any of them is.
    assert kind == "rotation" or (bool(found.converged.all()) and found.products < n)


def test_whole_subspace_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    for kind in ("plain", "rotation", "skew", "triangular"):
        W = _weight(kind, 30, generator)
        found = ti.spectral_radius(lambda z, W=W: z @ W.T, torch.randn(2, 30, dtype=F64), batch_dims=1, rtol=1e-8)
        exact = torch.linalg.eigvals(W).abs().max()
        torch.testing.assert_close(found.value, exact.expand(2), rtol=1e-8, atol=0)
        assert found.converged.all()
        assert found.residual.max() < 1e-8


def test_rotation_in_the_plane_has_its_pair() -> None:
    angle = torch.tensor(0.7, dtype=F64)
    W = 0.95 * torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    found = ti.spectral_radius(lambda z: z @ W.T, torch.zeros(3, 2, dtype=F64), batch_dims=1)
    expected = torch.polar(torch.tensor(0.95, dtype=F64), angle)
    torch.testing.assert_close(found.eigenvalue, expected.expand(3))
    torch.testing.assert_close(found.value, torch.full((3,), 0.95, dtype=F64))


def test_each_sample_has_its_own_and_the_same_alone() -> None:
    n = 90
    Q = torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q
    spectrum = torch.linspace(0.0, 1.0, n, dtype=F64) ** 3
    scale = torch.tensor([[0.5], [-0.9], [2.0]], dtype=F64)
    z = torch.zeros(3, n, dtype=F64)

    def fn(z: Tensor, scale: Tensor) -> Tensor:
        return scale * ((z @ Q) * spectrum) @ Q.T

    found = ti.spectral_radius(fn, z, scale, batch_dims=1)
    torch.testing.assert_close(found.value, scale[:, 0].abs(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.eigenvalue.real, scale[:, 0], rtol=1e-5, atol=0)
    for i in range(3):
        alone = ti.spectral_radius(fn, z[i : i + 1], scale[i : i + 1], batch_dims=1)
        torch.testing.assert_close(alone.value, found.value[i : i + 1], rtol=1e-10, atol=0)


def test_no_promise_of_batches_is_one_matrix() -> None:
    """Rows that depend on each other, which a promise of independence would miss."""
    mix = torch.tensor([[0.0, 0.6], [0.6, 0.0]], dtype=F64)
    found = ti.spectral_radius(lambda z: mix @ z, torch.zeros(2, 3, dtype=F64))
    assert found.value.shape == ()
    torch.testing.assert_close(found.value, torch.tensor(0.6, dtype=F64))


def test_restarts_find_what_one_subspace_does_not() -> None:
    n = 400
    spectrum = torch.linspace(-1.0, 1.0, n, dtype=F64)
    spectrum[-1] = 1.01
    z = torch.zeros(1, n, dtype=F64)
    short = ti.spectral_radius(lambda z: z * spectrum, z, batch_dims=1, basis=20, max_products=20, rtol=1e-6)
    assert not short.converged.any()
    assert short.residual.max() > 1e-3
    assert short.products <= 21
    long = ti.spectral_radius(lambda z: z * spectrum, z, batch_dims=1, basis=20, max_products=1000, rtol=1e-6)
    assert long.converged.all()
    assert (long.value - 1.01).abs().max() < 1e-6
    assert 20 < long.products < 500


def test_not_converged_is_said_and_the_residual_is_true() -> None:
    W = torch.linalg.qr(torch.randn(150, 150, dtype=F64)).Q
    found = ti.spectral_radius(lambda z: z @ W.T, torch.zeros(1, 150, dtype=F64), batch_dims=1, max_products=30)
    assert not found.converged.any()
    assert found.residual.max() > 1e-3
    # An orthogonal matrix is normal: θ is as near to an eigenvalue as the residual is small.
    distance = (torch.linalg.eigvals(W) - found.eigenvalue).abs().min()
    assert distance <= found.residual.max() * found.value.max()


def test_zero_and_nilpotent_jacobians() -> None:
    zero = ti.spectral_radius(lambda z: torch.ones_like(z), torch.ones(2, 5), batch_dims=1)
    assert zero.value.tolist() == [0.0, 0.0]
    assert zero.converged.all()
    mask = torch.tensor([0.0, 1.0], dtype=F64)
    shift = ti.spectral_radius(lambda z: torch.roll(z, 1, 1) * mask, torch.ones(1, 2, dtype=F64), batch_dims=1)
    assert shift.value.max() < 1e-7
    assert shift.converged.all()


def test_jacobian_that_is_not_finite_is_nan_and_spares_the_others() -> None:
    found = ti.spectral_radius(lambda z: 0.5 * z.abs().sqrt(), torch.tensor([[1.0, 1.0], [0.0, 1.0]]), batch_dims=1)
    torch.testing.assert_close(found.value[0], torch.tensor(0.25))
    assert found.value[1].isnan()
    assert found.converged.tolist() == [True, False]


def test_structured_states_and_layers_of_several_batch_dims() -> None:
    cell = lambda z, x: {"a": 0.3 * z["b"] + x, "b": 0.3 * z["a"]}  # noqa: E731
    found = ti.spectral_radius(cell, {"a": torch.ones(4, 2), "b": torch.ones(4, 2)}, torch.ones(4, 2), batch_dims=1)
    torch.testing.assert_close(found.value, torch.full((4,), 0.3))
    layer, x = ti.nn.TanhEquilibrium(5), torch.randn(2, 3, 5)
    assert ti.spectral_radius(layer, layer(x), x).value.shape == (2, 3)


def test_complex_states_have_the_eigenvalues_of_the_complex_matrix() -> None:
    A = torch.randn(6, 6, dtype=torch.complex128)
    found = ti.spectral_radius(lambda z: z @ A.T, torch.zeros(1, 6, dtype=torch.complex128), batch_dims=1)
    torch.testing.assert_close(found.value[0], torch.linalg.eigvals(A).abs().max(), rtol=1e-8, atol=0)


class Stateful(nn.Module):
    """With dropout and batch norm in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.3 * torch.tanh(nn.functional.dropout(self.linear(z), 0.5) + self.norm(x))


def test_nothing_is_left_behind() -> None:
    """No gradient of a parameter, no random number drawn, no statistics changed, no graph on the result."""
    layer, x = ti.nn.FixedPoint(Stateful(), batch_dims=0), torch.randn(6, 4)
    z = layer(x)
    before, mean = torch.get_rng_state(), layer.cell.norm.running_mean.clone()
    found = ti.spectral_radius(layer, z, x)
    assert 0 < found.value < 0.5 and found.converged
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(layer.cell.norm.running_mean, mean) and layer.cell.norm.num_batches_tracked == 1
    assert not found.value.requires_grad
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize(
    "options", [{"rtol": 0.0}, {"rtol": 1.0}, {"rtol": True}, {"basis": 3}, {"basis": 4.0}, {"max_products": 0}]
)
def test_options_are_validated(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}={options[name]!r}"):
        ti.spectral_radius(lambda z: z, torch.ones(2, 2), **options)


def test_root_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="no map"):
        ti.spectral_radius(ti.nn.Root(lambda z, x: z - x), torch.ones(2, 3), torch.ones(2, 3))
