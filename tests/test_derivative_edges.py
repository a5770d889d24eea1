"""Where derivatives could go wrong unseen: the start, contexts, what changes meanwhile, scales, failures, ensembles."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import torchimplicit as ti
from tests.modes import (
    CELL,
    FORMS,
    MODES,
    STACK,
    TANGENT,
    THETA,
    X,
    assert_near,
    loss,
    normal,
)
from tests.problems import EXACT, SOLVERS, TIGHT, unrolled

NEWTON = SOLVERS["newton"]


# --- the start, other inputs, contexts -------------------------------------------------------------------------------


def from_start(z0: Tensor) -> Tensor:
    x = X
    return ti.fixed_point(lambda z: 0.5 * torch.sin(z) + x, z0, solver=NEWTON, adjoint=EXACT, batch_dims=1).value


def test_the_start_has_an_exactly_zero_derivative_in_every_mode() -> None:
    start = normal(2, 2)
    zero = torch.zeros_like(start)
    total = lambda z0: from_start(z0).sum()  # noqa: E731
    assert torch.equal(grad(total)(start), zero)
    assert torch.equal(jvp(from_start, (start,), (start,))[1], zero)
    assert torch.equal(vjp(from_start, start)[1](start)[0], zero)
    assert torch.equal(jacrev(from_start)(start), torch.zeros(2, 2, 2, 2).double())
    assert torch.equal(jacfwd(from_start)(start), torch.zeros(2, 2, 2, 2).double())
    assert torch.equal(grad(lambda z0: grad(total)(z0).sum())(start), zero)
    assert torch.equal(hessian(total)(start), torch.zeros(2, 2, 2, 2).double())
    assert torch.equal(jvp(grad(total), (start,), (start,))[1], zero)
    assert torch.equal(vmap(grad(total))(start.expand(3, 2, 2)), zero.expand(3, 2, 2))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(from_start(forward_ad.make_dual(start, start))).tangent
        assert tangent is None or torch.equal(tangent, zero)


def test_the_start_has_an_exactly_zero_second_derivative() -> None:
    start, x = normal(2, 2).requires_grad_(), X.clone().requires_grad_()
    value = ti.fixed_point(lambda z: 0.5 * torch.sin(z) + x, start, batch_dims=1).value
    first, by_x = torch.autograd.grad((value**2).sum(), [start, x], create_graph=True)
    assert torch.equal(first, torch.zeros_like(start))
    (second,) = torch.autograd.grad(by_x.sum(), start, allow_unused=True)
    assert second is None or torch.equal(second, torch.zeros_like(start))


@pytest.mark.parametrize("mode", ["reverse", "reverse_twice", "forward", "grad", "jvp_of_grad", "hessian", "vmap"])
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_a_start_that_fn_reads_as_well(mode: str, batch_dims: int) -> None:
    """Its derivative is that of what fn reads."""

    def solved(theta: Tensor) -> Tensor:
        W, x = theta[:4].reshape(2, 2), theta[4:].reshape(2, 2)
        fn = lambda z: torch.tanh(z @ W.T + x)  # noqa: E731
        return ti.fixed_point(fn, x, solver=NEWTON, adjoint=EXACT, batch_dims=batch_dims).value.flatten()

    assert_near(MODES[mode](solved), MODES[mode](FORMS["closure"].unrolled))


@pytest.mark.parametrize("mode", ["reverse_twice", "forward", "grad_of_grad", "jvp_of_grad", "hessian", "vmap_of_grad"])
def test_arguments_that_are_not_floating_tensors(mode: str) -> None:
    order, keep = torch.tensor([1, 0]), torch.tensor([[True, False], [True, True]])

    def fn(z: Tensor, data: dict[str, Any], order: Tensor, name: str, power: int) -> Tensor:
        assert name == "tanh" and data["none"] is None
        W, x = data["W"], data["x"]
        return torch.where(keep, torch.tanh(z[:, order] @ W.T + x**power), 0.3 * x * data["count"])

    def f(theta: Tensor) -> Tensor:
        data = {"W": theta[:4].reshape(2, 2), "x": theta[4:].reshape(2, 2), "none": None, "count": torch.tensor(2)}
        zero = torch.zeros(2, 2, dtype=torch.float64)
        sol = ti.fixed_point(fn, zero, data, order, "tanh", 3, solver=NEWTON, adjoint=EXACT, batch_dims=1)
        return sol.value.flatten()

    def plain(theta: Tensor) -> Tensor:
        data = {"W": theta[:4].reshape(2, 2), "x": theta[4:].reshape(2, 2), "none": None, "count": torch.tensor(2)}
        return unrolled(lambda z: fn(z, data, order, "tanh", 3), torch.zeros(2, 2).double(), 60).flatten()

    assert_near(MODES[mode](f), MODES[mode](plain))


def test_no_grad_inside_a_transform_tracks_nothing() -> None:
    f = FORMS["args"].solved(NEWTON)

    def quiet(theta: Tensor) -> Tensor:
        with torch.no_grad():
            return f(theta)

    assert torch.equal(grad(lambda theta: (quiet(theta) * theta[:4]).sum())(THETA)[:4], f(THETA))
    leaf = THETA.clone().requires_grad_()
    with torch.no_grad():
        assert not f(leaf).requires_grad
        torch.testing.assert_close(vmap(f)(STACK), torch.stack([f(theta) for theta in STACK]))
    with torch.inference_mode():
        value = f(leaf)
        assert value.is_inference()
    assert torch.equal(value, f(leaf))


@pytest.mark.parametrize("form", ["fixed_point", "root", "minimize", "least_squares"])
def test_an_empty_batch_in_every_mode(form: str) -> None:
    def f(w: Tensor) -> Tensor:
        x = torch.zeros(0, 2, dtype=torch.float64) * w
        call = getattr(ti, form)
        fn = lambda z: w * torch.cos(z) + x if form != "minimize" else ((z - w) ** 2 + x).sum(1)  # noqa: E731
        return call(fn, torch.zeros(0, 2, dtype=torch.float64), batch_dims=1).value

    w = torch.tensor([0.3, 0.2], dtype=torch.float64)
    total = lambda w: f(w).sum()  # noqa: E731
    zero = torch.zeros_like(w)
    assert torch.equal(grad(total)(w), zero)
    assert jvp(f, (w,), (w,))[1].shape == (0, 2)
    assert torch.equal(hessian(total)(w), torch.zeros(2, 2).double())
    assert vmap(f)(w.expand(3, 2)).shape == (3, 0, 2)
    assert torch.equal(vmap(grad(total))(w.expand(3, 2)), zero.expand(3, 2))
    leaf = w.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    assert torch.equal(first, zero)
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.sum(), leaf, allow_unused=True)
        assert second is None or torch.equal(second, zero)


def test_vmap_over_an_empty_batch_of_samples_and_over_one() -> None:
    f = FORMS["args"].solved(NEWTON)
    torch.testing.assert_close(vmap(f)(STACK[:1])[0], f(STACK[0]))


# --- what changes between the call and the backward ------------------------------------------------------------------


def test_a_closure_variable_rebound_before_the_second_derivative() -> None:
    xs = [torch.full((1, 2), v, dtype=torch.float64, requires_grad=True) for v in (0.1, 0.7, -0.4)]
    zero = torch.zeros(1, 2, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for x in xs:
        total = total + (ti.fixed_point(lambda z: 0.5 * torch.sin(z) + x, zero, batch_dims=1).value ** 3).sum()  # noqa: B023
    firsts = torch.autograd.grad(total, xs, create_graph=True)
    x = torch.full((1, 2), 9.0, dtype=torch.float64)
    for leaf, first in zip(xs, firsts, strict=True):
        (second,) = torch.autograd.grad(first.sum(), leaf, retain_graph=True)
        z = unrolled(lambda z, leaf=leaf: 0.5 * torch.sin(z) + leaf, zero).detach()
        slope = 1 / (1 - 0.5 * torch.cos(z))
        torch.testing.assert_close(first.detach(), 3 * z**2 * slope)
        torch.testing.assert_close(second, 6 * z * slope**2 - 3 * z**2 * 0.5 * torch.sin(z) * slope**3)


def test_functional_call_whose_parameters_are_restored_before_the_second_derivative() -> None:
    layer = ti.nn.TanhEquilibrium(2, dtype=torch.float64, adjoint=EXACT, solver=NEWTON)
    own = layer.linear.weight.detach().clone()
    other, x = THETA[:4].reshape(2, 2).clone().requires_grad_(), THETA[4:].reshape(2, 2).clone().requires_grad_()
    value = functional_call(layer, {"cell.linear.weight": other}, (x,))
    (first,) = torch.autograd.grad((value**3).sum(), other, create_graph=True)
    assert torch.equal(layer.linear.weight, own)
    with torch.no_grad():
        layer.linear.weight.mul_(7.0)
    ours = torch.autograd.grad((first**2).sum(), [other, x])
    plain = unrolled(lambda z: torch.tanh(z @ other.T + x), torch.zeros_like(x), 60)
    (first,) = torch.autograd.grad((plain**3).sum(), other, create_graph=True)
    for a, b in zip(ours, torch.autograd.grad((first**2).sum(), [other, x]), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("when", ["before the first", "before the second"])
def test_a_parameter_changed_in_place_before_a_derivative_is_an_error(when: str) -> None:
    weight, x = THETA[:4].reshape(2, 2).clone().requires_grad_(), THETA[4:].reshape(2, 2)
    value = ti.fixed_point(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), batch_dims=1).value
    total = (value**2).sum()
    if when == "before the second":
        total = torch.autograd.grad(total, weight, create_graph=True)[0].sum()
    with torch.no_grad():
        weight.mul_(0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, weight, create_graph=True)


def test_second_derivatives_twice_need_retain_graph_and_give_the_same() -> None:
    leaf = THETA.clone().requires_grad_()
    value = loss(FORMS["args"].solved(NEWTON))(leaf)
    (first,) = torch.autograd.grad(value, leaf, create_graph=True)
    again = [torch.autograd.grad(first @ TANGENT, leaf, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*again)
    torch.autograd.grad(first @ TANGENT, leaf)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(first @ TANGENT, leaf)


def test_backward_accumulates_second_derivatives() -> None:
    leaf = THETA.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(FORMS["closure"].solved(NEWTON))(leaf), leaf, create_graph=True)
    (first @ TANGENT).backward()
    assert leaf.grad is not None
    assert_near(leaf.grad, MODES["reverse_twice"](FORMS["closure"].unrolled))


# --- scales, dtypes, autocast, failed samples ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_scale_with_the_loss(scale: float, dtype: torch.dtype) -> None:
    def total(theta: Tensor) -> Tensor:
        W, x = theta[:4].reshape(2, 2), theta[4:].reshape(2, 2)
        z = ti.fixed_point(lambda z: torch.tanh(z @ W.T + x), torch.zeros_like(x), batch_dims=1).value
        return (z**3).sum()

    theta = THETA.to(dtype)
    scaled = lambda theta: scale * total(theta)  # noqa: E731
    assert_near(grad(scaled)(theta) / scale, grad(total)(theta), 1e-6)
    assert_near(hessian(scaled)(theta) / scale, hessian(total)(theta), 1e-6)
    leaf = theta.clone().requires_grad_()
    for again in (False, True):
        ours, plain = (torch.autograd.grad(fn(leaf), leaf, create_graph=again)[0].detach() for fn in (scaled, total))
        assert_near(ours / scale, plain, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_of_less_precise_states(dtype: torch.dtype) -> None:
    def total(theta: Tensor) -> Tensor:
        W, x = theta[:4].reshape(2, 2), theta[4:].reshape(2, 2)
        z = ti.fixed_point(lambda z: torch.tanh(z @ W.T + x), torch.zeros_like(x), batch_dims=1).value
        return (z.to(torch.float32) ** 3).sum()

    truth = hessian(lambda theta: (FORMS["args"].unrolled(theta) ** 3).sum())(THETA)
    ours = hessian(total)(THETA.to(dtype))
    assert ours.dtype == dtype
    assert_near(ours.double(), truth, 1e-4 if dtype == torch.float32 else 0.05)


def _under_autocast(W: Tensor, x: Tensor) -> Tensor:
    def fn(z: Tensor) -> Tensor:
        with torch.no_grad():
            scale = (W @ W).sum()
        with torch.autocast("cpu", enabled=False):
            precise = z @ W
        return torch.tanh((z @ W.T).float() + 0.1 * precise + 0.1 * scale.float() * z + x)

    with torch.autocast("cpu", torch.bfloat16):
        return ti.fixed_point(fn, torch.zeros_like(x), batch_dims=1, on_failure="ignore").value


def test_the_replay_computes_as_the_call_did_under_autocast() -> None:
    """`create_graph` takes the tape, without it the recorded graph is used: the same to far better than bfloat16."""
    W, x = (0.3 * normal(6, 6)).float().requires_grad_(), normal(3, 6, seed=1).float()
    (plain,) = torch.autograd.grad((_under_autocast(W, x) ** 2).sum(), W)
    (taped,) = torch.autograd.grad((_under_autocast(W, x) ** 2).sum(), W, create_graph=True)
    assert_near(taped.detach(), plain, 1e-4)
    with torch.no_grad():
        exact = W.clone().requires_grad_()
    z = unrolled(
        lambda z: torch.tanh(z @ exact.T + 0.1 * z @ exact + x + 0.1 * (exact @ exact).sum().detach() * z),
        torch.zeros_like(x),
        60,
    )
    (truth,) = torch.autograd.grad((z**2).sum(), exact)
    assert 1e-4 < (plain - truth).norm() / truth.norm() < 0.05  # it was under autocast


def test_autocast_around_the_backward_is_not_that_of_fn() -> None:
    W, x = (0.3 * normal(6, 6)).float().requires_grad_(), normal(3, 6, seed=1).float()
    found = []
    for enabled in (False, True):
        value = ti.fixed_point(lambda z: torch.tanh(z @ W.T + x), torch.zeros_like(x), batch_dims=1).value
        total = (value**2).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(total, W, create_graph=True)[0].detach())
    assert_near(*found, 1e-5)


def _square_roots(a: Tensor, weight: Tensor) -> Tensor:
    """Heron's iteration, mixed: no square root for a negative sample, where fn is not finite."""

    def fn(z: Tensor, a: Tensor) -> Tensor:
        return 0.5 * (z + a * weight / z) + 0 * torch.log(a)

    return ti.fixed_point(fn, torch.ones_like(a), a, batch_dims=1, on_failure="ignore").value


@pytest.mark.parametrize("mode", ["create_graph", "func", "jvp"])
def test_a_failed_sample_has_zero_derivatives_and_leaves_the_others_alone(mode: str) -> None:
    a = torch.tensor([[2.0], [-1.0], [3.0]], dtype=torch.float64)
    weight = torch.tensor(1.5, dtype=torch.float64)
    good = a[[0, 2]]

    def second(a: Tensor) -> tuple[Tensor, Tensor]:
        if mode == "create_graph":
            leaf, w = a.clone().requires_grad_(), weight.clone().requires_grad_()
            (first,) = torch.autograd.grad((_square_roots(leaf, w) ** 3).sum(), leaf, create_graph=True)
            by_a, by_w = torch.autograd.grad((first**2).sum(), [leaf, w])
            return torch.cat([first.detach(), by_a]), by_w
        total = lambda a, w: (_square_roots(a, w) ** 3).sum()  # noqa: E731
        if mode == "func":
            first = grad(total)(a, weight)
            return torch.cat([first, grad(lambda a: (grad(total)(a, weight) ** 2).sum())(a)]), grad(
                lambda w: (grad(total)(a, w) ** 2).sum()
            )(weight)
        return jvp(_square_roots, (a, weight), (torch.ones_like(a), weight))[1], weight

    all_three, shared = second(a)
    two, alone = second(good)
    assert torch.isfinite(all_three).all() and torch.isfinite(shared)
    blocks = all_three.reshape(-1, 3)
    assert torch.equal(blocks[:, 1], torch.zeros_like(blocks[:, 1]))
    assert_near(blocks[:, [0, 2]].flatten(), two.flatten())
    assert_near(shared, alone)


def _bad_input(a: Tensor, weight: Tensor) -> Tensor:
    fn = lambda z, a: 0.5 * (z + weight * torch.sqrt(a) ** 2 / z)  # noqa: E731
    return ti.fixed_point(fn, torch.ones_like(a), a, batch_dims=1, on_failure="ignore").value


def _bad_state(a: Tensor, weight: Tensor) -> Tensor:
    fn = lambda z, a: weight * torch.sqrt(z) + a.abs()  # noqa: E731
    return ti.fixed_point(fn, a, a, batch_dims=1, solver=ti.Picard(rtol=TIGHT), on_failure="ignore").value


@pytest.mark.parametrize("fn", [_bad_input, _bad_state])
@pytest.mark.parametrize(
    "mode",
    [
        "create_graph",
        "func",
    ],
)
def test_a_failed_sample_leaves_shared_parameters_alone(fn: Callable[..., Tensor], mode: str) -> None:
    """Where fn is not finite for a sample, neither is its derivative in what the samples share."""
    a = torch.tensor([[2.0], [-1.0], [3.0]], dtype=torch.float64)
    weight = torch.tensor(1.5, dtype=torch.float64)

    def derivatives(a: Tensor) -> tuple[Tensor, Tensor]:
        total = lambda weight: (fn(a, weight) ** 3).sum()  # noqa: E731
        if mode == "func":
            return grad(total)(weight), grad(grad(total))(weight)
        leaf = weight.clone().requires_grad_()
        (first,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
        return first.detach(), torch.autograd.grad(first, leaf)[0]

    for ours, alone in zip(derivatives(a), derivatives(a[[0, 2]]), strict=True):
        assert_near(ours, alone)


def test_a_failed_sample_is_no_failure_of_the_derivative_as_well() -> None:
    """Its linear system is not solved, only left out: one warning, of the solve itself."""
    a = torch.tensor([[2.0], [-1.0], [3.0]], dtype=torch.float64)
    fn = lambda z, a: 0.5 * (z + a / z) + 0 * torch.log(a)  # noqa: E731
    with pytest.warns(ti.ConvergenceWarning) as told:
        grad(lambda a: ti.fixed_point(fn, torch.ones_like(a), a, batch_dims=1).value.sum())(a)
    assert len(told) == 1 and "derivative" not in str(told[0].message)


# --- ensembles -------------------------------------------------------------------------------------------------------


def test_an_ensemble_of_layers_by_stacked_parameters() -> None:
    torch.manual_seed(0)
    layers = [ti.nn.FixedPoint(copy.deepcopy(CELL), solver=NEWTON, adjoint=EXACT) for _ in range(3)]
    for layer in layers:
        torch.nn.init.normal_(layer.cell.linear.weight, std=0.3)
    params, buffers = stack_module_state(layers)  # pyright: ignore[reportArgumentType]
    base = copy.deepcopy(layers[0])

    def total(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(base, (params, buffers), (x,)) ** 2).sum()

    detached = {name: t.detach() for name, t in params.items()}
    found = vmap(grad(total), in_dims=(0, 0, None))(detached, buffers, X)
    for i, layer in enumerate(layers):
        alone = torch.autograd.grad((layer(X) ** 2).sum(), list(layer.parameters()))
        for (name, _), truth in zip(layer.named_parameters(), alone, strict=True):
            assert_near(found[name][i], truth)
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (X,)), in_dims=(0, 0))(params, buffers)
    (outputs**2).sum().backward()
    for name, t in params.items():
        assert t.grad is not None
        assert_near(t.grad, found[name])


def test_per_sample_gradients_by_vmap() -> None:
    layer = ti.nn.TanhEquilibrium(2, dtype=torch.float64, solver=NEWTON, adjoint=EXACT)
    params = {name: t.detach() for name, t in layer.named_parameters()}

    def total(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(layer, params, (x[None],)) ** 2).sum()

    found = vmap(grad(total), in_dims=(None, 0))(params, X)["cell.linear.weight"]
    for i in range(2):
        (alone,) = torch.autograd.grad((layer(X[i : i + 1]) ** 2).sum(), layer.linear.weight)
        assert_near(found[i], alone)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_over_any_dim_of_some_arguments(dim: int) -> None:
    W = THETA[:4].reshape(2, 2)
    xs = normal(3, 2, 2, seed=7)

    def f(W: Tensor, x: Tensor) -> Tensor:
        zero = torch.zeros(2, 2, dtype=torch.float64)
        fn = lambda z, W, x: torch.tanh(z @ W.T + x)  # noqa: E731
        return ti.fixed_point(fn, zero, W, x, solver=NEWTON, adjoint=EXACT, batch_dims=1).value

    alone = torch.stack([f(W, x) for x in xs])
    assert_near(vmap(f, in_dims=(None, dim))(W, xs.movedim(0, dim)), alone)
    weights = W * torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)[:, None, None]
    alone = torch.stack([f(w, xs[0]) for w in weights])
    assert_near(vmap(f, in_dims=(dim, None))(weights.movedim(0, dim), xs[0]), alone)


def test_what_comes_in_for_a_failed_sample_is_of_no_interest() -> None:
    x = torch.tensor([[0.5], [torch.nan], [1.0]], dtype=torch.float64).requires_grad_()
    fn = lambda z, x: 0.5 * torch.sin(z) + x  # noqa: E731
    v = torch.tensor([[1.0], [torch.nan], [1.0]], dtype=torch.float64)
    solution = ti.fixed_point(fn, torch.zeros_like(x), x, batch_dims=1, on_failure="ignore")
    (gradient,) = torch.autograd.grad(solution.value, x, v, create_graph=True)
    assert gradient[1] == 0
    assert gradient.isfinite().all()
    assert solution.adjoint.status is not None
    assert solution.adjoint.status.flatten().tolist() == [0, int(ti.Status.NONFINITE), 0]
    assert solution.adjoint.residual is not None
    assert solution.adjoint.residual[1] == 0
