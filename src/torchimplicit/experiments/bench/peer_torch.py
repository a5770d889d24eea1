"""xitorch and TorchOpt, which differentiate implicitly in torch, with the solvers they bring or are given."""

# The peers are an extra of their own, and need not be there for the types to be checked.
# pyright: reportMissingImports=false

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.experiments.bench.contender import Contender, Counts, Runner, torch_runner
from torchimplicit.experiments.bench.problems import Problem

_STEPS = 500


def _f(z: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(functional.linear(z, weight) + x)


def _norm(problem: Problem) -> float:
    """Norm of all entries of the solution, roughly: what makes an absolute tolerance relative."""
    with torch.no_grad():
        z = problem.start
        for _ in range(20):
            z = problem.f(z)
        return float(torch.linalg.vector_norm(z))


def _unknown() -> Counts:
    return Counts(0, None)


def xitorch(problem: Problem) -> tuple[Contender, ...]:
    """`xitorch.optimize.equilibrium` by each of its methods, with each of its matrix-free adjoint solvers."""
    from xitorch._utils.exceptions import ConvergenceWarning
    from xitorch.optimize import equilibrium

    warnings.simplefilter("ignore", ConvergenceWarning)  # what it returns is judged here
    size = _norm(problem)

    def contender(method: str, adjoint: str) -> Contender:
        def make(forward: float, backward: float, _: Counts | None) -> Runner:
            options: dict[str, Any] = {"method": method, "maxiter": _STEPS, "f_tol": forward * size}
            if method != "anderson_acc":
                options["line_search"] = False
                options["alpha"] = -1.0  # the plain step
            adjoint_options: dict[str, Any] = {"method": adjoint, "rtol": backward, "atol": 0.0, "posdef": True}

            def solve() -> Tensor:
                return equilibrium(
                    _f,
                    problem.start,
                    params=(problem.cell.weight, problem.x),
                    bck_options=dict(adjoint_options),
                    **dict(options),
                )

            return torch_runner(problem, solve, _unknown, options | {"bck_options": adjoint_options})

        return Contender(f"xitorch {method}; {adjoint}", make)

    return tuple(
        contender(method, adjoint)
        for method in ("broyden1", "broyden2", "linearmixing", "anderson_acc")
        for adjoint in ("bicgstab", "gmres")
    )


def torchopt(problem: Problem) -> tuple[Contender, ...]:
    """`torchopt.diff.implicit.custom_root` around plain iteration: it brings the gradient, not the solver."""
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_cg, solve_normal_cg

    def optimality(z: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return _f(z, weight, x) - z

    def contender(name: str, linear_solver: Any) -> Contender:
        def make(forward: float, backward: float, _: Counts | None) -> Runner:
            solver = linear_solver(rtol=backward, atol=0.0, maxiter=_STEPS)

            @custom_root(optimality, argnums=(1, 2), solve=solver)
            def picard(z: Tensor, weight: Tensor, x: Tensor) -> Tensor:
                with torch.no_grad():
                    for _ in range(_STEPS):
                        value = _f(z, weight, x)
                        left = torch.linalg.vector_norm(value - z, dim=1) / torch.linalg.vector_norm(value, dim=1)
                        z = value
                        if float(left.max()) <= forward:
                            break
                return z

            def solve() -> Tensor:
                z = picard(problem.start, problem.cell.weight, problem.x)
                assert isinstance(z, Tensor)
                return z

            return torch_runner(problem, solve, _unknown, {})

        return Contender(f"torchopt picard; {name}", make)

    return (contender("normal CG", solve_normal_cg), contender("CG", solve_cg))
