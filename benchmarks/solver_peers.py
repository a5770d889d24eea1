"""The peers of the solver table, each asked for `max|F| ≤ 1e-8` as far as its options can say so.

Where a method's own test is on the step alone (MINPACK's), its tolerance is set so tight that the residual decides. A
method that can use the exact Jacobian gets it. SciPy, JAX and xitorch are imported by the methods that need them.
"""

# The peers are an extra of their own, and need not be there for the types to be checked.
# pyright: reportMissingImports=false

import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.problems import Problem
from benchmarks.solver_claim import TOLERANCE, Claim, Method

MAX_STEPS = 2000


def _start(problem: Problem) -> Tensor:
    return torch.tensor(problem.start, dtype=torch.float64)


# --- SciPy ------------------------------------------------------------------------------------------------------------

_NONLIN = ("broyden1", "broyden2", "anderson", "krylov", "linearmixing", "diagbroyden", "excitingmixing")


def _scipy_options(method: str) -> dict[str, Any]:
    if method == "hybr":
        return {"xtol": 1e-12, "maxfev": 100 * MAX_STEPS}
    if method == "lm":
        return {"xtol": 1e-12, "ftol": 1e-12, "maxiter": 100 * MAX_STEPS}
    if method == "df-sane":
        return {"fatol": TOLERANCE, "ftol": 0.0, "fnorm": lambda f: np.abs(f).max(), "maxfev": 10 * MAX_STEPS}
    return {"fatol": TOLERANCE, "maxiter": MAX_STEPS}


def _scipy(problem: Problem, method: str) -> Claim:
    from scipy.optimize import root

    def fn(z: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return problem.fn(z, np)

    jacobian = torch.func.jacrev(lambda z: problem.fn(z, torch))
    jac = (lambda z: jacobian(torch.from_numpy(z)).numpy()) if method in ("hybr", "lm") else None
    found = root(fn, np.array(problem.start), method=method, jac=jac, options=_scipy_options(method))
    return Claim(found.x, bool(found.success), int(found.nfev))


# --- optimistix -------------------------------------------------------------------------------------------------------


def _optimistix(problem: Problem, solver: str) -> Claim:
    import jax
    import jax.numpy as jnp
    import optimistix

    jax.config.update("jax_enable_x64", True)
    found = optimistix.root_find(
        lambda z, _: problem.fn(z, jnp),
        getattr(optimistix, solver)(rtol=TOLERANCE, atol=TOLERANCE),
        jnp.array(problem.start),
        max_steps=MAX_STEPS,
        throw=False,
    )
    return Claim(np.asarray(found.value), bool(found.result == optimistix.RESULTS.successful))


# --- xitorch ----------------------------------------------------------------------------------------------------------


def _xitorch(problem: Problem, method: str) -> Claim:
    """Solve with xitorch, which returns no status: success is that it did not warn.

    Its tolerance is set four digits tighter: it returns the iterate before the one that passed its test.
    """
    from xitorch._utils.exceptions import ConvergenceWarning
    from xitorch.optimize import rootfinder

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        z = rootfinder(
            lambda z: problem.fn(z, torch),
            _start(problem),
            method=method,
            f_tol=1e-12,
            x_tol=float("inf"),
            maxiter=MAX_STEPS,
        )
    warned = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return Claim(z.detach().numpy(), not warned)


PEERS: tuple[Method, ...] = (
    *(Method(f"scipy-{name}", "scipy", partial(_scipy, method=name)) for name in ("hybr", "lm", "df-sane", *_NONLIN)),
    *(
        Method(f"optimistix-{name}", "optimistix", partial(_optimistix, solver=name))
        for name in ("Newton", "Dogleg", "LevenbergMarquardt")
    ),
    *(
        Method(f"xitorch-{name}", "xitorch", partial(_xitorch, method=name))
        for name in ("broyden1", "broyden2", "linearmixing")
    ),
)
