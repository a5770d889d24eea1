"""Derivatives however fn is written; what cannot be seen, or is not supported by torch, is refused and never wrong."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

import torchimplicit as ti
from tests.modes import (
    FORMS,
    MODES,
    OTHERS,
    STACK,
    TANGENT,
    TANGENTS,
    THETA,
    Function,
    Map,
    X,
    assert_near,
    case_of,
    check,
    loss,
)
from tests.problems import EXACT, SOLVERS, unrolled

NEWTON = SOLVERS["newton"]


# --- how fn is written -----------------------------------------------------------------------------------------------


def in_place(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    y = z @ W.T
    y = y + x
    y.mul_(0.9)
    y += 0.1 * x
    return torch.tanh(y)


def assigned_by_index(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    y = torch.zeros_like(z)
    y[:, 0] = torch.tanh(z @ W[0] + x[:, 0])
    y[:, 1] = torch.tanh(z @ W[1] + x[:, 1])
    return y


def through_views(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    y = (z @ W.T + x).clone()
    y[:, 0].mul_(0.5)
    return torch.tanh(y)


def constants(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W.T + x * torch.tensor(0.8) + torch.tensor([0.1, 0.2], dtype=torch.float64))


def many_outputs(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    first, second = W.unbind(0)
    rows = [torch.tanh(z @ first + x[:, 0]), torch.tanh(z @ second + x[:, 1])]
    return torch.stack(rows, dim=1) + 0.1 * z.max(dim=1, keepdim=True).values + 0.05 * torch.sort(z, dim=1)[0]


def lists(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    columns = torch.stack([torch.tanh(z @ W[0] + x[:, 0]), torch.tanh(z @ W[1] + x[:, 1])])
    return torch.cat((columns[:1], columns[1:])).T


def keywords(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(input=z, weight=W, bias=None).add(x, alpha=0.9).tanh()


def held_constant(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W.T * (1 + torch.sin(W).sum()).detach() + x)


def algebra(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(torch.linalg.solve(2 * torch.eye(2, dtype=torch.float64) + W, (z + x).T).T)


def its_own_input(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return x


def twice_the_same(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W.T + W + torch.addmm(x, W, W))


STYLES = (
    in_place,
    assigned_by_index,
    through_views,
    constants,
    many_outputs,
    lists,
    keywords,
    held_constant,
    algebra,
    its_own_input,
    twice_the_same,
)
FEW = ("reverse_for_more", "reverse_twice", "forward", "grad", "jvp", "jvp_of_grad", "jacrev", "hessian")


@pytest.mark.parametrize("mode", FEW)
@pytest.mark.parametrize("fn", STYLES, ids=lambda fn: fn.__name__)
def test_any_style_of_fn(fn: Map, mode: str) -> None:
    check(case_of(fn), mode)


@pytest.mark.parametrize("mode", ["reverse", "reverse_for_more", "reverse_twice", "grad", "jvp_of_vjp", *FEW[2:7]])
def test_branches_on_values(mode: str) -> None:
    """Without vmap, which has no branches in torch either."""

    def fn(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        if z.detach().abs().max().item() == 0:  # at the start
            return torch.tanh(x @ W)
        return torch.tanh(z @ W.T + x) if z[0, 0] < 5 else z

    check(case_of(fn, lambda z, W, x: torch.tanh(z @ W.T + x)), mode)


@pytest.mark.parametrize("mode", ["reverse", "reverse_for_more", "reverse_twice", "grad", "jacrev"])
def test_what_is_written_in_place_without_a_graph(mode: str) -> None:
    def fn(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        y = z @ W.T + x
        with torch.no_grad():
            y += x
        return torch.tanh(y)

    check(case_of(fn), mode)


@pytest.mark.parametrize("mode", ["forward", "grad", "jvp"])
def test_tensors_that_are_read_at_the_solution_only_are_refused(mode: str) -> None:
    def fn(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        at_start = z.detach().abs().max().item() == 0
        return torch.tanh(x) if at_start else torch.tanh(0.1 * z @ X + 0.1 * W + x)

    with pytest.raises(RuntimeError, match="differ from call to call"):
        MODES[mode](case_of(fn).solved(NEWTON))


@pytest.mark.parametrize("mode", ["reverse", "reverse_for_more", "reverse_twice"])
def test_data_written_past_autograd(mode: str) -> None:
    def fn(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        y = torch.zeros(2, 2, dtype=torch.float64)
        y.data = 0.5 * x.detach()
        return torch.tanh(z @ W.T + x + y)

    check(case_of(fn), mode)


@pytest.mark.xfail(
    reason="several tangents at once: the rule of _Solve runs before the tape is known, and calls fn under vmap",
    raises=RuntimeError,
)
@pytest.mark.parametrize("mode", ["jacfwd", "hessian", "vmap_of_tangents"])
def test_branches_on_values_with_several_tangents(mode: str) -> None:
    def fn(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ W.T + x) if z[0, 0] < 5 else z

    check(case_of(fn), mode)


@pytest.mark.xfail(
    reason="torch has no rule for writing a batch into a tensor made without one, and cotangents come as a batch",
    raises=RuntimeError,
)
@pytest.mark.parametrize("mode", ["jacrev", "hessian", "jacobian_in_one_batch"])
def test_assignment_into_a_constant_with_several_cotangents(mode: str) -> None:
    def fn(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        y = torch.zeros(2, 2, dtype=torch.float64)
        y[:, 0] = torch.tanh(z @ W[0] + x[:, 0])
        y[:, 1] = torch.tanh(z @ W[1] + x[:, 1])
        return y

    check(case_of(fn), mode)


@pytest.mark.parametrize("mode", FEW)
def test_what_is_computed_without_a_graph_is_constant_in_every_mode(mode: str) -> None:
    """Also in forward mode, which in torch itself looks through `no_grad`."""

    def fn(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 1 + torch.sin(W).sum()
        return torch.tanh(z @ W.T * scale + x)

    check(case_of(fn, held_constant), mode)


@pytest.mark.parametrize("mode", FEW)
def test_tensors_read_in_another_order_at_the_solution(mode: str) -> None:
    a, b = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    turn = [0]

    def plain(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(a * z @ W.T + b * x + x)

    def fn(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        turn[0] += 1
        if turn[0] == 1:
            return torch.tanh(b * x + x + a * z @ W.T)
        return plain(z, W, x)

    check(case_of(fn, plain), mode)


def test_an_energy_differentiated_inside_fn() -> None:
    """`z = ½ ∂E/∂z` by `torch.autograd.grad` inside: eager derivatives of any order."""

    def fn(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            energy = torch.log(torch.cosh(z @ W.T + x)).sum()
            return 0.5 * torch.autograd.grad(energy, z, create_graph=True)[0]

    case = case_of(fn, lambda z, W, x: 0.5 * torch.tanh(z @ W.T + x) @ W)
    for mode in ("reverse", "reverse_for_more", "reverse_twice", "reverse_thrice", "hessian_row_by_row"):
        check(case, mode)


# --- what cannot be seen is refused, never wrong ---------------------------------------------------------------------


class ByNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        out = torch.from_numpy(np.tanh(y.detach().numpy()))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return grads[0] * (1 - out * out)


class HalfSlope(torch.autograd.Function):
    """tanh with half its slope: a replay of the operations inside would have another derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return torch.tanh(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return 0.5 * grads[0] * (1 - out * out)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return 0.5 * tangents[0] * (1 - out * out)


def inner_solve(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    inner = lambda w: 0.3 * torch.sin(w) + 0.5 * torch.tanh(z @ W.T) + x  # noqa: E731
    w = ti.fixed_point(inner, torch.zeros_like(z), solver=NEWTON, adjoint=EXACT, batch_dims=1).value
    return 0.5 * torch.tanh(w)


def inner_unrolled(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    w = unrolled(lambda w: 0.3 * torch.sin(w) + 0.5 * torch.tanh(z @ W.T) + x, torch.zeros_like(z), 40)
    return 0.5 * torch.tanh(w)


HIDDEN: dict[str, tuple[Map, Map | None]] = {
    "function by numpy": (lambda z, W, x: ByNumpy.apply(z @ W.T + x), None),
    "function of a parameter by numpy": (lambda z, W, x: torch.tanh(z @ ByNumpy.apply(W).T + x), None),
    "function of a parameter": (lambda z, W, x: torch.tanh(z @ HalfSlope.apply(W).T + x), None),
    "function of the state": (lambda z, W, x: HalfSlope.apply(z @ W.T + x), None),
    "grad": (
        lambda z, W, x: 0.5 * grad(lambda z: torch.log(torch.cosh(z @ W.T + x)).sum())(z),
        lambda z, W, x: 0.5 * torch.tanh(z @ W.T + x) @ W,
    ),
    "vmap": (
        lambda z, W, x: vmap(lambda z, x: torch.tanh(W @ z + x))(z, x),
        lambda z, W, x: torch.tanh(z @ W.T + x),
    ),
    "checkpoint": (
        lambda z, W, x: checkpoint(lambda z: torch.tanh(z @ W.T + x), z, use_reentrant=False, preserve_rng_state=False),
        lambda z, W, x: torch.tanh(z @ W.T + x),
    ),
    "an implicit solve": (inner_solve, inner_unrolled),
}


EVERY_KIND = (
    *("reverse_for_more", "reverse_twice", "reverse_in_the_cotangent", "jacobian_in_one_batch", "hessian_in_one_batch"),
    *("forward", "forward_over_reverse", "reverse_over_forward", "grad", "jvp", "jvp_of_grad", "grad_of_jvp"),
    *("grad_of_grad", "jacrev", "jacfwd", "hessian", "vmap", "vmap_of_grad", "jvp_of_vmap"),
)


@pytest.mark.parametrize("name", HIDDEN)
def test_first_order_is_right_whatever_cannot_be_seen(name: str) -> None:
    case = case_of(*HIDDEN[name])
    check(case, "reverse")


@pytest.mark.parametrize("mode", ["reverse_for_more", "reverse_twice", "hessian_in_one_batch"])
def test_a_hidden_function_of_parameters_alone_is_an_input(mode: str) -> None:
    check(case_of(*HIDDEN["function of a parameter by numpy"]), mode)


@pytest.mark.parametrize("mode", EVERY_KIND)
@pytest.mark.parametrize("name", HIDDEN)
def test_what_cannot_be_seen_is_refused_or_right(name: str, mode: str) -> None:
    case = case_of(*HIDDEN[name])
    try:
        ours = MODES[mode](case.solved(NEWTON))
    except RuntimeError as error:
        refusals = (
            "out of sight",
            "must implement the jvp function",
            "must override the setup_context",
            "saved tensor hooks",
            "A different number of tensors was saved",
            "may have escaped",
        )
        assert any(words in str(error) for words in refusals), error  # noqa: PT017
        return
    assert_near(ours, MODES[mode](case.unrolled))


# --- forward over forward --------------------------------------------------------------------------------------------


def _jvp(f: Function, at: Tensor = THETA, tangent: Tensor = TANGENT) -> Tensor:
    return jvp(f, (at,), (tangent,))[1]


def _dual_inside(f: Function) -> Function:
    def inside(theta: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(theta, TANGENT))).tangent

    return inside


def _jvp_in_a_level(f: Function) -> Tensor:
    with forward_ad.dual_level():
        return _jvp(f, forward_ad.make_dual(THETA, TANGENT))


ONE = torch.ones((), dtype=torch.float64)
FORWARD_TWICE: dict[str, Callable[[Function], Any]] = {
    "jvp of jvp": lambda f: _jvp(lambda theta: _jvp(f, theta)),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f))(THETA),
    "jvp of jacfwd": lambda f: _jvp(jacfwd(f)),
    "jvp of grad of jvp": lambda f: _jvp(grad(lambda theta: (_jvp(f, theta) ** 2).sum())),
    "jvp of jvp of grad": lambda f: _jvp(lambda theta: _jvp(grad(loss(f)), theta)),
    "grad of jvp of jvp": lambda f: grad(lambda theta: _jvp(lambda t: _jvp(loss(f), t), theta))(THETA),
    "jvp of vmap of jvp": lambda f: _jvp(lambda theta: vmap(lambda t: _jvp(f, theta, t))(TANGENTS)),
    "vmap of jvp of jvp": lambda f: vmap(lambda theta: _jvp(lambda t: _jvp(f, t), theta))(STACK),
    "jvp of hessian": lambda f: _jvp(hessian(loss(f))),
    "hessian of jvp": lambda f: hessian(lambda theta: (_jvp(f, theta) ** 2).sum())(THETA),
    "jvp of vjp of jvp": lambda f: _jvp(lambda theta: vjp(lambda t: _jvp(f, t), theta)[1](torch.ones(4).double())[0]),
    "jvp of a constant jvp": lambda f: _jvp(lambda theta: _jvp(f, THETA) * theta.sum()),
    "jvp of jvp of a constant": lambda f: _jvp(lambda theta: _jvp(lambda _: f(theta), THETA)),
    "jvp of jvp of a pullback": lambda f: _pullback(vjp(f, THETA)[1]),
    "jvp of jvp of a backward": lambda f: _pullback(_backward(f)),
}


def _pullback(back: Callable[[Tensor], Any]) -> Tensor:
    def along(s: Tensor) -> Tensor:
        return back(s**2 * torch.ones(4, dtype=torch.float64))[0]

    return _jvp(lambda s: _jvp(along, s, ONE), ONE, ONE)


def _backward(f: Function) -> Callable[[Tensor], Any]:
    leaf = THETA.clone().requires_grad_()
    value = f(leaf)
    return lambda v: torch.autograd.grad(value, leaf, v, retain_graph=True)


@pytest.mark.parametrize("name", FORWARD_TWICE)
@pytest.mark.parametrize("form", ["closure", "args", "root"])
def test_forward_over_forward_is_refused_and_the_way_out_named(name: str, form: str) -> None:
    f = (FORMS | OTHERS)[form].solved(NEWTON)
    with pytest.raises(RuntimeError, match=r"take one of the two in reverse mode: jacfwd\(jacrev\(f\)\)"):
        FORWARD_TWICE[name](f)


def test_forward_levels_of_torch_do_not_nest() -> None:
    f = FORMS["args"].solved(NEWTON)
    with pytest.raises(RuntimeError, match="Nested forward mode AD is not supported"):
        _jvp(_dual_inside(f))
    with pytest.raises(RuntimeError, match="Nested forward mode AD is not supported"):
        _jvp_in_a_level(f)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's own, from its constant folding
@pytest.mark.parametrize("form", list(FORMS))
def test_linearize_is_the_derivative_in_every_direction(form: str) -> None:
    f, plain = FORMS[form].solved(NEWTON), FORMS[form].unrolled
    _, linear = linearize(f, THETA)
    for seed in range(3):
        t = torch.randn(THETA.shape, generator=torch.Generator().manual_seed(seed), dtype=THETA.dtype)
        assert_near(linear(t), torch.func.jvp(plain, (THETA,), (t,))[1])


def test_forward_mode_in_a_level_composes_with_reverse_and_vmap() -> None:
    f, plain = FORMS["args"].solved(NEWTON), FORMS["args"].unrolled
    for outer in (lambda f: grad(loss(f)), jacrev, lambda f: lambda theta: vmap(f)(theta.expand(3, 8) * 2)):
        found = [_dual_inside(outer(g))(THETA) for g in (f, plain)]
        assert_near(*found)
