"""`torch.func` on modules: ensembles by stacked parameters, per-sample gradients, parameters given from outside."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from tests.torch_features.cells import EVERY_LAYER, FEATURES, close, inputs, loss, unrolled


def model(make: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, FEATURES, dtype=torch.float64), make())


def exact(net: nn.Sequential, x: Tensor) -> Tensor:
    return unrolled(net[1], net[0](x), 150)


@EVERY_LAYER
def test_an_ensemble_by_stacked_parameters_has_the_values_and_gradients_of_its_members(make: Any) -> None:
    members = [model(make) for _ in range(3)]
    params, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    x = inputs(5)

    def call(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, (p, b), (x,))

    values = vmap(call, (0, 0, None))(params, buffers, x)
    sum(loss(v) for v in values).backward()
    for i, member in enumerate(members):
        truth = exact(member, x)
        torch.testing.assert_close(values[i], truth, atol=1e-10, rtol=0)
        names = [name for name, _ in member.named_parameters()]
        close((params[name].grad[i] for name in names), torch.autograd.grad(loss(truth), list(member.parameters())))


@EVERY_LAYER
def test_an_ensemble_gives_each_member_a_batch_of_its_own(make: Any) -> None:
    members, x = [model(make) for _ in range(2)], inputs(6).reshape(2, 3, FEATURES)
    params, buffers = stack_module_state(members)
    values = vmap(lambda p, b, x: functional_call(members[0], (p, b), (x,)))(params, buffers, x)
    for value, member, part in zip(values, members, x, strict=True):
        torch.testing.assert_close(value, exact(member, part), atol=1e-10, rtol=0)


@EVERY_LAYER
def test_per_sample_gradients_are_those_of_the_samples_alone(make: Any) -> None:
    net, x = model(make), inputs()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def of_sample(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return loss(functional_call(net, p, (sample[None],)))

    found = vmap(grad(of_sample), (None, 0))(params, x)
    for i in range(len(x)):
        expected = torch.autograd.grad(loss(exact(net, x[i : i + 1])), list(net.parameters()))
        close((found[name][i] for name in params), expected)


@EVERY_LAYER
def test_parameters_given_from_outside_are_trained_and_the_modules_own_are_not(make: Any) -> None:
    """One step of gradient descent inside, as in meta-learning, with the derivative by the start of it."""
    net, x = model(make), inputs()
    start = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}

    def after_a_step(call: Any) -> Tensor:
        inner = torch.autograd.grad(loss(call(start)), list(start.values()), create_graph=True)
        moved = {name: p - 0.1 * g for (name, p), g in zip(start.items(), inner, strict=True)}
        return loss(call(moved))

    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return unrolled(self.net[1], self.net[0](x), 60)

    found = torch.autograd.grad(after_a_step(lambda p: functional_call(net, p, (x,))), list(start.values()))
    by_name = Exact()
    truth = after_a_step(lambda p: functional_call(by_name, {f"net.{k}": v for k, v in p.items()}, (x,)))
    close(found, torch.autograd.grad(truth, list(start.values())))
    assert all(p.grad is None for p in net.parameters())
