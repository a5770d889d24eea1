"""Ways to take derivatives, and functions with an implicit solve in them to take derivatives of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import torchimplicit as ti
from tests.problems import EXACT, SOLVERS, unrolled

Function = Callable[[Tensor], Tensor]
"""Parameters `(8,)` to a vector."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


THETA = 0.3 * normal(8, seed=1)
TANGENT = normal(8, seed=2)
STACK = THETA + 0.1 * normal(3, 8, seed=3)
TANGENTS = normal(3, 8, seed=4)


def loss(f: Function) -> Function:
    """A scalar with every entry weighted differently, whose third derivatives are not zero."""

    def of(theta: Tensor) -> Tensor:
        value = f(theta)
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype)
        return (weights * value**2 + 0.3 * value**3).sum()

    return of


# --- ways to take derivatives: of a function, at THETA ---------------------------------------------------------------


def _leaf() -> Tensor:
    return THETA.clone().requires_grad_()


def _gradient(y: Tensor, x: Tensor, again: bool = False) -> Tensor:
    return torch.autograd.grad(y, x, create_graph=again)[0]


def reverse(f: Function) -> Tensor:
    leaf = _leaf()
    return _gradient(loss(f)(leaf), leaf)


def reverse_for_more(f: Function) -> Tensor:
    leaf = _leaf()
    return _gradient(loss(f)(leaf), leaf, again=True).detach()


def reverse_twice(f: Function) -> Tensor:
    leaf = _leaf()
    return _gradient(_gradient(loss(f)(leaf), leaf, again=True) @ TANGENT, leaf)


def reverse_thrice(f: Function) -> Tensor:
    leaf = _leaf()
    once = _gradient(loss(f)(leaf), leaf, again=True)
    return _gradient((_gradient((once**2).sum(), leaf, again=True) ** 2).sum(), leaf)


def reverse_in_the_cotangent(f: Function) -> Tensor:
    """`vᵀJ` differentiated in v: the double-backward trick, `J t`."""
    leaf = _leaf()
    value = f(leaf)
    v = torch.zeros_like(value).requires_grad_()
    (row,) = torch.autograd.grad(value, leaf, v, create_graph=True)
    return _gradient(row @ TANGENT, v)


def jacobian_in_one_batch(f: Function) -> Tensor:
    return torch.autograd.functional.jacobian(f, THETA, vectorize=True)


def hessian_in_one_batch(f: Function) -> Tensor:
    return torch.autograd.functional.hessian(loss(f), THETA, vectorize=True)


def hessian_row_by_row(f: Function) -> Tensor:
    return torch.autograd.functional.hessian(loss(f), THETA)


def forward(f: Function) -> Tensor:
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(f(forward_ad.make_dual(THETA, TANGENT)))
        return out.tangent.clone()


def forward_over_reverse(f: Function) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(_leaf(), TANGENT)
        return forward_ad.unpack_dual(_gradient(loss(f)(dual), dual, again=True)).tangent.detach().clone()


def reverse_over_forward(f: Function) -> Tensor:
    leaf = _leaf()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(f)(forward_ad.make_dual(leaf, TANGENT))).tangent
        return _gradient(tangent, leaf)


def func_jvp(f: Function) -> Tensor:
    return jvp(f, (THETA,), (TANGENT,))[1]


def func_vjp(f: Function) -> Tensor:
    value, back = vjp(f, THETA)
    return back(torch.ones_like(value))[0]


def jvp_of_vjp(f: Function) -> Tensor:
    value, back = vjp(f, THETA)
    return jvp(lambda v: back(v)[0], (torch.ones_like(value),), (value,))[1]


def grad_of_jvp(f: Function) -> Tensor:
    return grad(lambda theta: jvp(loss(f), (theta,), (TANGENT,))[1])(THETA)


def jvp_of_grad(f: Function) -> Tensor:
    return jvp(grad(loss(f)), (THETA,), (TANGENT,))[1]


def grad_of_grad(f: Function) -> Tensor:
    return grad(lambda theta: grad(loss(f))(theta) @ TANGENT)(THETA)


def grad_thrice(f: Function) -> Tensor:
    twice = grad(lambda theta: (grad(loss(f))(theta) ** 2).sum())
    return grad(lambda theta: (twice(theta) ** 2).sum())(THETA)


def grad_of_jvp_of_grad(f: Function) -> Tensor:
    return grad(lambda theta: (jvp(grad(loss(f)), (theta,), (TANGENT,))[1] ** 2).sum())(THETA)


def jvp_of_grad_of_grad(f: Function) -> Tensor:
    return jvp(lambda theta: grad(lambda t: grad(loss(f))(t) @ TANGENT)(theta), (THETA,), (TANGENT**2,))[1]


def jvp_in_a_graph(f: Function) -> Tensor:
    """An eager backward through a torch.func derivative."""
    leaf = _leaf()
    return _gradient((jvp(f, (leaf,), (TANGENT,))[1] ** 2).sum(), leaf)


def grad_in_a_graph(f: Function) -> Tensor:
    leaf = _leaf()
    return _gradient((grad(loss(f))(leaf) ** 2).sum(), leaf)


def vmap_of_tangents(f: Function) -> Tensor:
    return vmap(lambda t: jvp(f, (THETA,), (t,))[1])(TANGENTS)


def jvp_of_vmap(f: Function) -> Tensor:
    return jvp(vmap(f), (STACK,), (TANGENTS,))[1]


def vmap_in_a_graph(f: Function) -> Tensor:
    leaf = STACK.clone().requires_grad_()
    return _gradient((vmap(f, in_dims=1)(leaf.T) ** 2).sum(), leaf)


def vmap_twice(f: Function) -> Tensor:
    return vmap(vmap(f), in_dims=1, out_dims=1)(torch.stack([STACK, STACK.flip(0)]).transpose(0, 1))


MODES: dict[str, Callable[[Function], Tensor]] = {
    "value": lambda f: f(THETA).detach(),
    "reverse": reverse,
    "reverse_for_more": reverse_for_more,
    "reverse_twice": reverse_twice,
    "reverse_thrice": reverse_thrice,
    "reverse_in_the_cotangent": reverse_in_the_cotangent,
    "jacobian_in_one_batch": jacobian_in_one_batch,
    "hessian_in_one_batch": hessian_in_one_batch,
    "hessian_row_by_row": hessian_row_by_row,
    "forward": forward,
    "forward_over_reverse": forward_over_reverse,
    "reverse_over_forward": reverse_over_forward,
    "grad": lambda f: grad(loss(f))(THETA),
    "jvp": func_jvp,
    "vjp": func_vjp,
    "jvp_of_vjp": jvp_of_vjp,
    "grad_of_jvp": grad_of_jvp,
    "jvp_of_grad": jvp_of_grad,
    "grad_of_grad": grad_of_grad,
    "grad_thrice": grad_thrice,
    "grad_of_jvp_of_grad": grad_of_jvp_of_grad,
    "jvp_of_grad_of_grad": jvp_of_grad_of_grad,
    "jvp_in_a_graph": jvp_in_a_graph,
    "grad_in_a_graph": grad_in_a_graph,
    "jacrev": lambda f: jacrev(f)(THETA),
    "jacfwd": lambda f: jacfwd(f)(THETA),
    "jacrev_in_chunks": lambda f: jacrev(f, chunk_size=1)(THETA),
    "jacrev_of_jacrev": lambda f: jacrev(jacrev(f))(THETA),
    "jacrev_of_jacfwd": lambda f: jacrev(jacfwd(f))(THETA),
    "jacfwd_of_jacrev": lambda f: jacfwd(jacrev(f))(THETA),
    "hessian": lambda f: hessian(loss(f))(THETA),
    "jacrev_of_hessian": lambda f: jacrev(hessian(loss(f)))(THETA),
    "vmap": lambda f: vmap(f)(STACK),
    "vmap_twice": vmap_twice,
    "vmap_of_grad": lambda f: vmap(grad(loss(f)))(STACK),
    "vmap_of_tangents": vmap_of_tangents,
    "vmap_of_hessian": lambda f: vmap(hessian(loss(f)))(STACK),
    "grad_of_vmap": lambda f: grad(lambda s: (vmap(f)(s) ** 3).sum())(STACK),
    "jvp_of_vmap": jvp_of_vmap,
    "vmap_in_a_graph": vmap_in_a_graph,
}


# --- functions: each solves by the solver given, or unrolls a plain iteration ----------------------------------------


class Case(NamedTuple):
    """A function of the parameters, solved implicitly and by the unrolled iteration."""

    solved: Callable[[Any], Function]
    unrolled: Function


def _parts(theta: Tensor) -> tuple[Tensor, Tensor]:
    """W and x, `(2, 2)` both."""
    return theta[:4].reshape(2, 2), theta[4:].reshape(2, 2)


def _tanh(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W.T + x)


def _zero() -> Tensor:
    return torch.zeros(2, 2, dtype=torch.float64)


def _unrolled_tanh(theta: Tensor) -> Tensor:
    W, x = _parts(theta)
    return unrolled(lambda z: _tanh(z, W, x), _zero(), 60).flatten()


def _closure(solver: Any) -> Function:
    def f(theta: Tensor) -> Tensor:
        W, x = _parts(theta)
        fn = lambda z: _tanh(z, W, x)  # noqa: E731
        return ti.fixed_point(fn, _zero(), solver=solver, adjoint=EXACT, batch_dims=1).value.flatten()

    return f


def _args(solver: Any) -> Function:
    def f(theta: Tensor) -> Tensor:
        W, x = _parts(theta)
        return ti.fixed_point(_tanh, _zero(), W, x, solver=solver, adjoint=EXACT, batch_dims=1).value.flatten()

    return f


class Cell(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2, dtype=torch.float64)
        self.scale = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.linear(z) + x)


def _cell_parts(theta: Tensor) -> dict[str, Tensor]:
    return {"linear.weight": theta[:4].reshape(2, 2), "linear.bias": theta[4:6], "scale": 1 + theta[6:]}


X = normal(2, 2, seed=5)
CELL = Cell()


def _module(solver: Any) -> Function:
    layer = ti.nn.FixedPoint(CELL, solver=solver, adjoint=EXACT)
    return lambda theta: functional_call(
        layer, {f"cell.{name}": t for name, t in _cell_parts(theta).items()}, (X,)
    ).flatten()


def _unrolled_module(theta: Tensor) -> Tensor:
    parts = _cell_parts(theta)
    return unrolled(lambda z: functional_call(CELL, parts, (z, X)), _zero(), 60).flatten()


def _trees(theta: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    return {"w": theta[:2], "b": theta[2:4]}, [theta[4:6], theta[6:, None]]


def _tree_map(z: dict[str, Tensor], weights: dict[str, Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
    return {
        "u": torch.sin(weights["w"] * z["u"] + z["v"]) + inputs[0],
        "v": 0.3 * torch.cos(z["v"] * weights["b"].sum()) * z["u"][:, :1] + inputs[1],
    }


def _tree_start() -> dict[str, Tensor]:
    return {"u": _zero(), "v": torch.zeros(2, 1, dtype=torch.float64)}


def _tree(solver: Any) -> Function:
    def f(theta: Tensor) -> Tensor:
        trees = _trees(theta)
        z = ti.fixed_point(_tree_map, _tree_start(), *trees, solver=solver, adjoint=EXACT, batch_dims=1).value
        return torch.cat([z["u"], z["v"]], dim=1).flatten()

    return f


def _unrolled_tree(theta: Tensor) -> Tensor:
    z, trees = _tree_start(), _trees(theta)
    for _ in range(120):
        z = _tree_map(z, *trees)
    return torch.cat([z["u"], z["v"]], dim=1).flatten()


def _complex_parts(theta: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.complex(theta[:4], theta[4:])
    return both[:2], 0.5 * both[2:]


def _complex_map(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a + 0.3 * z.conj() * z + 1j * b * torch.sin(z) + 0.2 * b.conj() * z.real


def _flat(z: Tensor) -> Tensor:
    return torch.cat([z.real, z.imag]).flatten()


def _complex(solver: Any) -> Function:
    def f(theta: Tensor) -> Tensor:
        start = torch.zeros(2, dtype=torch.complex128)
        parts = _complex_parts(theta)
        return _flat(ti.fixed_point(_complex_map, start, *parts, solver=solver, adjoint=EXACT).value)

    return f


def _unrolled_complex(theta: Tensor) -> Tensor:
    parts = _complex_parts(theta)
    return _flat(unrolled(lambda z: _complex_map(z, *parts), torch.zeros(2, dtype=torch.complex128), 80))


def _scalar_map(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return 0.5 * torch.cos(a * z) + b * z * z / 4


def _scalar(solver: Any) -> Function:
    def f(theta: Tensor) -> Tensor:
        start = torch.zeros((), dtype=torch.float64)
        z = ti.fixed_point(_scalar_map, start, theta[0], theta[1:].sum(), solver=solver, adjoint=EXACT).value
        return z.reshape(1)

    return f


def _unrolled_scalar(theta: Tensor) -> Tensor:
    start = torch.zeros((), dtype=torch.float64)
    return unrolled(lambda z: _scalar_map(z, theta[0], theta[1:].sum()), start, 80).reshape(1)


def _sine(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return z + 0.5 * torch.sin(z @ W.T) - x


def _unrolled_sine(theta: Tensor) -> Tensor:
    W, x = _parts(theta)
    return unrolled(lambda z: z - _sine(z, W, x), _zero(), 60).flatten()


def _root(solver: Any) -> Function:
    def f(theta: Tensor) -> Tensor:
        W, x = _parts(theta)
        return ti.root(_sine, _zero(), W, x, solver=solver, adjoint=EXACT, batch_dims=1).value.flatten()

    return f


class SineCell(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(_zero())

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return _sine(z, self.weight, x)


def _root_layer(solver: Any) -> Function:
    layer = ti.nn.Root(SineCell(), solver=solver, adjoint=EXACT)

    def f(theta: Tensor) -> Tensor:
        W, x = _parts(theta)
        return functional_call(layer, {"cell.weight": W}, (x,)).flatten()

    return f


def _tanh_layer(solver: Any) -> Function:
    layer = ti.nn.TanhEquilibrium(2, dtype=torch.float64, solver=solver, adjoint=EXACT)

    def f(theta: Tensor) -> Tensor:
        W, x = _parts(theta)
        return functional_call(layer, {"cell.linear.weight": W}, (x,)).flatten()

    return f


def _energy(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    """Convex near its minimum: `½|z|² + ¼ Σ sin²(zWᵀ) − xz`."""
    return (0.5 * z**2 - x * z).sum(dim=-1) + 0.25 * (torch.sin(z @ W.T) ** 2).sum(dim=-1)


def _unrolled_energy(theta: Tensor) -> Tensor:
    W, x = _parts(theta)
    slope = lambda y: 0.5 * torch.sin(y) * torch.cos(y)  # noqa: E731
    return unrolled(lambda z: x - slope(z @ W.T) @ W, _zero(), 60).flatten()


def _minimize(solver: Any) -> Function:
    def f(theta: Tensor) -> Tensor:
        W, x = _parts(theta)
        return ti.minimize(_energy, _zero(), W, x, solver=solver, adjoint=EXACT, batch_dims=1).value.flatten()

    return f


def _residuals(z: Tensor, W: Tensor, x: Tensor) -> list[Tensor]:
    """`½|r|²` is the energy, up to a constant; two tensors, more rows than unknowns."""
    return [z - x, torch.sin(z @ W.T) * 0.5**0.5]


def _least_squares(solver: Any) -> Function:
    def f(theta: Tensor) -> Tensor:
        W, x = _parts(theta)
        return ti.least_squares(_residuals, _zero(), W, x, solver=solver, adjoint=EXACT, batch_dims=1).value.flatten()

    return f


FORMS = {
    "closure": Case(_closure, _unrolled_tanh),
    "args": Case(_args, _unrolled_tanh),
    "module": Case(_module, _unrolled_module),
    "tree": Case(_tree, _unrolled_tree),
    "complex": Case(_complex, _unrolled_complex),
    "scalar": Case(_scalar, _unrolled_scalar),
}
OTHERS = {
    "root": Case(_root, _unrolled_sine),
    "minimize": Case(_minimize, _unrolled_energy),
    "least_squares": Case(_least_squares, _unrolled_energy),
    "root_layer": Case(_root_layer, _unrolled_sine),
    "tanh_layer": Case(_tanh_layer, _unrolled_tanh),
}


Map = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of z, W and x, `(2, 2)` all."""


def case_of(fn: Map, reference: Map | None = None) -> Case:
    """The map of z, W and x, both `(2, 2)` parts of the parameters, solved; and unrolled, by a plainer map if given."""
    plain = fn if reference is None else reference

    def solved(solver: Any) -> Function:
        def f(theta: Tensor) -> Tensor:
            W, x = theta[:4].reshape(2, 2), theta[4:].reshape(2, 2)
            zero = torch.zeros(2, 2, dtype=torch.float64)
            return ti.fixed_point(fn, zero, W, x, solver=solver, adjoint=EXACT, batch_dims=1).value.flatten()

        return f

    def by_iteration(theta: Tensor) -> Tensor:
        W, x = theta[:4].reshape(2, 2), theta[4:].reshape(2, 2)
        return unrolled(lambda z: plain(z, W, x), torch.zeros(2, 2, dtype=torch.float64), 60).flatten()

    return Case(solved, by_iteration)


def assert_near(ours: Tensor, truth: Tensor, bound: float = 1e-8) -> None:
    """Equal to a relative error, of a truth that is not zero."""
    assert ours.shape == truth.shape and ours.dtype == truth.dtype
    assert truth.abs().max() > 1e-3
    error = (ours - truth).norm() / truth.norm()
    assert error < bound, error


def check(case: Case, mode: str) -> None:
    """Solved by Newton's method as unrolled."""
    assert_near(MODES[mode](case.solved(SOLVERS["newton"])), MODES[mode](case.unrolled))
