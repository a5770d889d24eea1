"""`ResidualEquilibrium` and `MultiscaleEquilibrium`: they solve the equations they name, with exact gradients."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchimplicit as ti

TIGHT = ti.Anderson(rtol=1e-11)


def residual_layer(**options: Any) -> ti.nn.ResidualEquilibrium:
    layer = ti.nn.ResidualEquilibrium(4, 6, groups=2, solver=TIGHT, dtype=torch.float64, **options)
    return perturbed(layer)


def multiscale_layer(**options: Any) -> ti.nn.MultiscaleEquilibrium:
    return perturbed(ti.nn.MultiscaleEquilibrium((4, 6), groups=2, solver=TIGHT, dtype=torch.float64, **options))


def perturbed(layer: Any) -> Any:
    """Away from the initial values, at which scales of 1 and shifts of 0 hide mistakes."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name or name.endswith((".1.weight", "bias")):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return layer


LAYERS = {"residual": residual_layer, "multiscale": multiscale_layer}
EVERY_LAYER = pytest.mark.parametrize("name", list(LAYERS))


def images(batch: int = 3, channels: int = 4, size: int = 5) -> Tensor:
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def start(layer: Any, x: Tensor) -> Any:
    if isinstance(layer, ti.nn.ResidualEquilibrium):
        return torch.zeros_like(x)
    return (torch.zeros_like(x), x.new_zeros(x.shape[0], 6, 3, 3))


# --- The equation


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """By its definition (Wu & He 2018, eq. 1–2)."""
    parts = x.reshape(x.shape[0], groups, -1)
    mean = parts.mean(2, keepdim=True)
    variance = (parts - mean).square().mean(2, keepdim=True)
    normal = ((parts - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    return normal * weight[:, None, None] + bias[:, None, None]


def block(p: dict[str, Tensor], prefix: str, z: Tensor, x: Tensor | float) -> Tensor:
    """The block's formula on its parameters."""

    def norm(number: int, value: Tensor) -> Tensor:
        return group_norm(value, 2, p[f"{prefix}norm{number}.weight"], p[f"{prefix}norm{number}.bias"])

    y = norm(1, functional.conv2d(z, p[f"{prefix}conv1.weight"], padding=1).clamp(min=0))
    y = norm(2, x + functional.conv2d(y, p[f"{prefix}conv2.weight"], padding=1))
    return norm(3, (z + y).clamp(min=0))


def two_scales(p: dict[str, Tensor], z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A step of two resolutions, 5 × 5 and 3 × 3, written out."""

    def unit(prefix: str, value: Tensor, stride: int = 1) -> Tensor:
        weight = p[f"{prefix}0.weight"]
        value = functional.conv2d(value, weight, stride=stride, padding=weight.shape[-1] // 2)
        return group_norm(value, 2, p[f"{prefix}1.weight"], p[f"{prefix}1.bias"])

    fine, coarse = block(p, "blocks.0.", z[0], x), block(p, "blocks.1.", z[1], 0.0)
    up = unit("passages.0.1.", coarse)
    nearest = torch.tensor([0, 0, 1, 1, 2])  # ⌊i · 3 / 5⌋
    total = fine + up[:, :, nearest][:, :, :, nearest]
    down = coarse + unit("passages.1.0.0.", fine, stride=2)
    return unit("out.0.", total.clamp(min=0)), unit("out.1.", down.clamp(min=0))


@EVERY_LAYER
def test_the_solution_satisfies_the_equation_written_out(name: str) -> None:
    layer, x = LAYERS[name](), images()
    solution = layer.solve(x)
    assert solution.converged.tolist() == [True] * 3
    parameters = dict(layer.cell.named_parameters())
    if name == "residual":
        again: Any = block(parameters, "", solution.value, x)
    else:
        again = two_scales(parameters, solution.value, x)
    for one, other in zip(leaves(again), leaves(solution.value), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
        assert other.abs().mean() > 0.1


@EVERY_LAYER
def test_two_starts_reach_the_same_point(name: str) -> None:
    layer, x = LAYERS[name](), images()
    one = leaves(layer.solve(x).value)
    generator = torch.Generator().manual_seed(5)
    zero = start(layer, x)
    moved = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves(zero)]
    layer.init = lambda _: moved[0] if name == "residual" else tuple(moved)
    other = layer.solve(x)
    assert other.converged.all()
    for a, b in zip(one, leaves(other.value), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


# --- Gradients


@EVERY_LAYER
def test_gradients_agree_with_finite_differences(name: str) -> None:
    check = ti.check_gradients(LAYERS[name](), images(1, size=4), directions=4)
    verdicts = [direction.verdict for direction in check.directions]
    # A direction may cross the kink of a relu, where finite differences say nothing.
    assert "differ" not in verdicts, str(check)
    assert verdicts.count("agree") >= 2, str(check)


@EVERY_LAYER
def test_gradients_agree_with_unrolled_steps(name: str) -> None:
    layer = LAYERS[name]()
    x = images().requires_grad_()
    inputs = [x, *layer.parameters()]
    weights = [torch.randn_like(leaf) for leaf in leaves(start(layer, x))]

    def gradient(value: Any) -> tuple[Tensor, ...]:
        loss = sum((w * leaf).sum() for w, leaf in zip(weights, leaves(value), strict=True))
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, inputs)

    z = start(layer, x)
    for _ in range(150):
        z = layer.cell(z, x)
    found = gradient(layer(x))
    for ours, reference in zip(found, gradient(z), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)
    assert all(part.abs().max() > 0 for part in found)


# --- Batches, shapes, options


@EVERY_LAYER
def test_a_sample_alone_is_what_it_is_in_a_batch(name: str) -> None:
    layer, x = LAYERS[name](), images(4)
    together = leaves(layer(x))
    alone = leaves(layer(x[2:3]))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[2:3], b, rtol=0, atol=1e-9)


def test_sizes_are_halved_and_rounded_up() -> None:
    layer = ti.nn.MultiscaleEquilibrium((2, 2, 4), groups=1, solver=ti.Anderson(rtol=1e-3), on_failure="ignore")
    assert layer.sizes(7, 10) == [(7, 10), (4, 5), (2, 3)]
    with torch.no_grad():
        shapes = [tuple(leaf.shape) for leaf in layer(torch.randn(2, 2, 7, 10))]
    assert shapes == [(2, 2, 7, 10), (2, 2, 4, 5), (2, 4, 2, 3)]


@pytest.mark.parametrize("seed", range(3))
def test_the_initial_multiscale_map_contracts(seed: int) -> None:
    torch.manual_seed(seed)
    layer = ti.nn.MultiscaleEquilibrium((4, 8), groups=2, solver=ti.Picard(rtol=1e-4), max_steps=60)
    solution = layer.solve(torch.randn(4, 4, 8, 8))
    assert solution.converged.all()
    assert solution.steps.max() <= 50


def test_a_copy_computes_the_same_and_shares_nothing() -> None:
    layer, x = multiscale_layer(), images(1)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer(x), twin(x), strict=True))
    with torch.no_grad():
        twin.cell.out[0][1].weight.add_(1.0)
    assert not torch.equal(layer(x)[0], twin(x)[0])


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: ti.nn.ResidualEquilibrium(0), "channels=0"),
        (lambda: ti.nn.ResidualEquilibrium(8, True), "hidden_channels=True"),
        (lambda: ti.nn.ResidualEquilibrium(8, kernel_size=4), "kernel_size=4"),
        (lambda: ti.nn.ResidualEquilibrium(8, 12), "must divide the 12 channels"),
        (lambda: ti.nn.ResidualEquilibrium(8, groups=0), "groups=0"),
        (lambda: ti.nn.MultiscaleEquilibrium((8,)), "two numbers at least"),
        (lambda: ti.nn.MultiscaleEquilibrium((8, 12)), "must divide the 12 channels"),
        (lambda: ti.nn.MultiscaleEquilibrium((8, 8.0)), "channels=8.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        make()


@pytest.mark.parametrize("kind", [ti.nn.ResidualEquilibrium, ti.nn.MultiscaleEquilibrium])
def test_an_unknown_option_names_the_nearest(kind: Any) -> None:
    with pytest.raises(TypeError, match="groups"):
        kind((8, 8), group=4)


@EVERY_LAYER
def test_an_input_of_another_shape_is_refused(name: str) -> None:
    layer = LAYERS[name]()
    for x in (images(channels=3), images()[0]):
        with pytest.raises(ValueError, match=r"must be \(B, 4, H, W\)"):
            layer(x)


def test_multiscale_starts_where_it_is_told_to() -> None:
    class Start(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.clone(), x.new_ones(x.shape[0], 6, 3, 3)

    layer, x = multiscale_layer(init=Start(), max_steps=1, on_failure="ignore"), images(2)
    layer.solver = ti.Picard()
    expected = layer.cell(Start()(x), x)
    for a, b in zip(layer(x), expected, strict=True):
        torch.testing.assert_close(a, b)
