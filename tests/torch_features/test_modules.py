"""What is done with modules: copied, saved, frozen, put into one another, called often."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from tests.torch_features.cells import (
    EVERY_LAYER,
    LAYERS,
    agrees_with_unrolled,
    close,
    gradients,
    inputs,
    loss,
    unrolled,
)


def through_state_dict(layer: Any, make: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES: dict[str, Callable[[Any, Any], Any]] = {
    "deepcopy": lambda layer, make: copy.deepcopy(layer),
    "pickle": lambda layer, make: pickle.loads(pickle.dumps(layer)),
    "state_dict": through_state_dict,
    "double": lambda layer, make: copy.deepcopy(layer).float().double(),
}


@EVERY_LAYER
@pytest.mark.parametrize("remake", COPIES.values(), ids=COPIES.keys())
def test_a_copy_of_a_used_layer_is_a_layer_with_the_same_values_and_its_own_gradients(make: Any, remake: Any) -> None:
    layer, x = make(), inputs()
    layer(x).sum().backward()
    other = remake(layer, make)
    torch.testing.assert_close(other(x), layer(x), atol=1e-6, rtol=0)
    agrees_with_unrolled(other, x)
    for p, q in zip(other.parameters(), layer.parameters(), strict=True):
        assert p.data_ptr() != q.data_ptr()


@EVERY_LAYER
def test_a_copy_with_hooks_is_copied_with_them(make: Any) -> None:
    layer, x = make(), inputs()
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    torch.testing.assert_close(layer(x), 2 * unrolled(layer, x), atol=1e-10, rtol=0)


@EVERY_LAYER
@pytest.mark.parametrize("frozen", ["weights", "input", "all"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(make: Any, frozen: str) -> None:
    layer = make().requires_grad_(frozen == "input")
    x = inputs().requires_grad_(frozen == "weights")
    z = layer(x)
    assert z.requires_grad == (frozen != "all")
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    if wanted:
        close(gradients(z, wanted), gradients(unrolled(layer, x), wanted))
    assert all(t.grad is None for t in (x, *layer.parameters()))


def test_one_frozen_parameter_of_two() -> None:
    layer = LAYERS["autograd"]()
    layer.cell.linear.weight.requires_grad_(False)
    agrees_with_unrolled(layer, inputs())
    loss(layer(inputs())).backward()
    assert layer.cell.linear.weight.grad is None
    assert layer.cell.linear.bias.grad is not None


@EVERY_LAYER
def test_no_grad_and_inference_mode_have_the_value_and_no_graph(make: Any) -> None:
    layer, x = make(), inputs()
    expected = unrolled(layer, x).detach()
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        z = layer(x)
        assert z.is_inference()
        torch.testing.assert_close(z, expected, atol=1e-10, rtol=0)
    agrees_with_unrolled(layer, x)  # it takes no harm


class Tree(nn.Module):
    """Layers within modules: in a list, in a dict, one of them twice, and in a cell beside an ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([LAYERS["autograd"](), LAYERS["closed"]()])
        self.named = nn.ModuleDict({"root": LAYERS["root"](), "again": self.layers[0]})
        self.exact = False

    def call(self, layer: Any, x: Tensor) -> Tensor:
        return unrolled(layer, x, 120) if self.exact else layer(x)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *self.named.values(), self.layers[1]):
            x = self.call(layer, x) - 0.1 * x
        return x


def test_layers_in_a_tree_of_modules_called_several_times() -> None:
    model, x = Tree(), inputs().requires_grad_()
    wanted = [x, *model.parameters()]
    assert len(wanted) == 1 + 2 + 1 + 2
    z = model(x)
    model.exact = True
    truth = model(x)
    torch.testing.assert_close(z, truth, atol=1e-9, rtol=0)
    close(gradients(z, wanted), gradients(truth, wanted), 1e-8)


@EVERY_LAYER
def test_calls_with_batches_of_other_sizes_between_them_do_not_know_of_each_other(make: Any) -> None:
    layer = make()
    xs = [inputs(n).requires_grad_() for n in (4, 1, 7)]
    values = [layer(x) for x in xs]
    for x, z in reversed(list(zip(xs, values, strict=True))):
        wanted = [x, *layer.parameters()]
        close(gradients(z, wanted), gradients(unrolled(layer, x), wanted))


@pytest.mark.parametrize("training", [True, False])
def test_modes_reach_the_modules_of_the_cell(training: bool) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.25 * self.dropout(z) + x

    layer, x = ti.nn.FixedPoint(Dropping()).train(training), inputs(64)
    z = layer(x)
    # 4/3 of x without dropout; with it 2 or 1 times x, by the mask.
    factors = {round(v, 5) for v in (z / x).reshape(-1).tolist()}
    assert factors == ({1.0, 2.0} if training else {round(4 / 3, 5)})
