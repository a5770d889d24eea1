"""Optimistix with lineax, and jaxopt: under jit, compiled and warm, float32, on arrays that lie on the device."""

# The peers are an extra of their own, and need not be there for the types to be checked.
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import torch

from torchimplicit.experiments.bench.contender import Contender, Counts, Pass, Runner
from torchimplicit.experiments.bench.problems import Problem

STEPS = 2000
"""Steps that a solver may take."""

Solve = Callable[..., Any]
"""`(W, x, forward tolerance, backward tolerance) -> (z, steps)`, traceable; the tolerances are relative."""


def optimistix(problem: Problem) -> tuple[Contender, ...]:
    """Fixed-point iteration and Newton–Krylov, with each linear solver of lineax that can serve as adjoint.

    The batch as one system ("whole") or by vmap. Its own test is elementwise; here it is given the norm that the
    benchmark judges by, so that it stops as early as it may.
    """
    import jax
    import jax.numpy as jnp
    import lineax as lx
    import optimistix as optx

    def cell(z: Any, args: Any) -> Any:
        W, x = args
        return jnp.tanh(z @ W.T + x)

    def largest_row(e: Any) -> Any:
        return jnp.sqrt(jnp.max(jnp.sum(e * e, axis=-1)))

    size = _size(problem)

    def linear(name: str, atol: Any) -> Any:
        # GMRES looks at its residual at the end of a cycle only, so the length of the cycle matters. BiCGStab is left
        # out: in float32 it takes a negative inner product for a breakdown (lineax 0.1.1), and gives up at once.
        if name.startswith("GMRES"):
            restart = int(name.removeprefix("GMRES "))
            return lx.GMRES(rtol=0.0, atol=atol, norm=largest_row, restart=restart, max_steps=STEPS)
        if name == "normal CG":
            return lx.Normal(lx.CG(rtol=0.0, atol=atol, norm=largest_row, max_steps=STEPS))
        return lx.AutoLinearSolver(well_posed=True)

    def solve(forward: str, adjoint: str, mapped: bool) -> Solve:
        def one(x: Any, W: Any, ftol: Any, btol: Any) -> Any:
            if forward == "fixed point":
                solver: Any = optx.FixedPointIteration(rtol=0.0, atol=ftol * size, norm=largest_row)
            else:
                inner = lx.GMRES(rtol=1e-2, atol=1e-7, norm=largest_row, restart=10, max_steps=STEPS)
                solver = optx.Newton(rtol=0.0, atol=ftol * size, norm=largest_row, linear_solver=inner)
            found = optx.fixed_point(
                cell,
                solver,
                jnp.zeros_like(x),
                (W, x),
                max_steps=STEPS,
                adjoint=optx.ImplicitAdjoint(linear_solver=linear(adjoint, btol * _gradient_size(problem))),
                throw=False,
            )
            return found.value, found.stats["num_steps"]

        def all_of_them(W: Any, x: Any, ftol: Any, btol: Any) -> Any:
            if not mapped:
                return one(x, W, ftol, btol)
            z, steps = jax.vmap(one, in_axes=(0, None, None, None))(x, W, ftol, btol)
            return z, steps.max()

        return all_of_them

    combinations = [
        ("fixed point", "GMRES 8", False),
        ("fixed point", "GMRES 16", False),
        ("fixed point", "GMRES 32", False),
        ("fixed point", "GMRES 64", False),
        ("fixed point", "GMRES 16", True),
        ("fixed point", "normal CG", False),
        ("Newton", "GMRES 16", False),
        ("fixed point", "LU", True),
    ]
    return tuple(
        _contender(problem, f"optimistix {f}; lineax {a}; {'vmap' if m else 'whole'}", solve(f, a, m))
        for f, a, m in combinations
    )


def jaxopt(problem: Problem) -> tuple[Contender, ...]:
    """Fixed-point iteration and Anderson acceleration, with jaxopt's linear solvers, the batch whole or by vmap."""
    import jax
    import jax.numpy as jnp
    import jaxopt as jo
    from jaxopt.linear_solve import solve_bicgstab, solve_gmres, solve_normal_cg

    def cell(z: Any, W: Any, x: Any) -> Any:
        return jnp.tanh(z @ W.T + x)

    size, batch = _size(problem), len(problem.x)
    linear = {"BiCGStab": solve_bicgstab, "GMRES": solve_gmres, "normal CG": solve_normal_cg}
    methods = {"fixed point": jo.FixedPointIteration, "Anderson": jo.AndersonAcceleration}

    def solve(forward: str, adjoint: str, mapped: bool) -> Solve:
        def one(x: Any, W: Any, ftol: Any, btol: Any) -> Any:
            def backward(matvec: Any, b: Any, **_: Any) -> Any:
                return linear[adjoint](matvec, b, tol=btol, maxiter=STEPS)

            norm = size if mapped else size * batch**0.5  # its norm is that of all entries
            solver = methods[forward](
                cell, maxiter=STEPS, tol=ftol * norm, implicit_diff=True, implicit_diff_solve=backward
            )
            params, state = solver.run(jnp.zeros_like(x), W, x)
            return params, state.iter_num

        def all_of_them(W: Any, x: Any, ftol: Any, btol: Any) -> Any:
            if not mapped:
                return one(x, W, ftol, btol)
            z, steps = jax.vmap(one, in_axes=(0, None, None, None))(x, W, ftol, btol)
            return z, steps.max()

        return all_of_them

    return tuple(
        _contender(problem, f"jaxopt {f}; {a}; {'vmap' if m else 'whole'}", solve(f, a, m))
        for f, a, m in (
            ("fixed point", "BiCGStab", False),
            ("fixed point", "GMRES", False),
            ("fixed point", "normal CG", False),
            ("fixed point", "BiCGStab", True),
            ("Anderson", "BiCGStab", False),
            ("Anderson", "GMRES", False),
            ("Anderson", "BiCGStab", True),
        )
    )


def _size(problem: Problem) -> float:
    """A sample's norm of the solution, roughly: what makes an absolute tolerance relative."""
    with torch.no_grad():
        z = problem.start
        for _ in range(20):
            z = problem.f(z)
        return float(torch.linalg.vector_norm(z, dim=1).mean())


def _gradient_size(problem: Problem) -> float:
    return float(torch.linalg.vector_norm(problem.cotangent, dim=1).mean())


def _contender(problem: Problem, label: str, solve: Solve) -> Contender:
    import jax
    import jax.numpy as jnp

    if jax.config.read("jax_enable_x64"):
        raise RuntimeError("JAX_ENABLE_X64 is set; these rows are float32")

    W = jax.device_put(problem.cell.weight.detach().numpy())
    x = jax.device_put(problem.x.detach().numpy())
    c = jax.device_put(problem.cotangent.numpy())

    def loss(W: Any, x: Any, ftol: Any, btol: Any) -> Any:
        z, steps = solve(W, x, ftol, btol)
        return jnp.sum(c * z), (z, steps)

    forward_pass = jax.jit(solve)
    both_passes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def make(forward: float, backward: float, _: Counts | None) -> Runner:
        ftol, btol = jnp.float32(forward), jnp.float32(backward)

        def both() -> Any:
            return jax.block_until_ready(both_passes(W, x, ftol, btol))

        def found() -> Pass:
            (_, (z, _)), (weight, inputs) = both()
            return _tensor(z), _tensor(weight), _tensor(inputs)

        def count() -> Counts:
            (_, (_, steps)), _ = both()
            return Counts(int(steps), None)

        def forward_only() -> Any:
            return jax.block_until_ready(forward_pass(W, x, ftol, btol))

        return Runner(forward_only, lambda: _tensor(forward_only()[0]), both, found, count)

    return Contender(label, make)


def _tensor(array: Any) -> torch.Tensor:
    import numpy

    return torch.from_numpy(numpy.array(array))
