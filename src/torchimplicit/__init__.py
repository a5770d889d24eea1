"""torchimplicit: implicit layers for PyTorch, with exact gradients and per-sample evidence of convergence."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._adjoint import Adjoint as Adjoint
from ._adjoint import Implicit as Implicit
from ._adjoint import JacobianFree as JacobianFree
from ._adjoint import NeumannSeries as NeumannSeries
from ._adjoint import PhantomGradient as PhantomGradient
from ._adjoint import Shine as Shine
from ._adjoint import WarmStart as WarmStart
from ._api import fixed_point as fixed_point
from ._api import least_squares as least_squares
from ._api import minimize as minimize
from ._api import root as root
from ._solution import AdjointReport as AdjointReport
from ._solution import ConvergenceError as ConvergenceError
from ._solution import ConvergenceWarning as ConvergenceWarning
from ._solution import Solution as Solution
from ._solution import Status as Status
from ._unroll import Unroll as Unroll
from .linear import CG as CG
from .linear import GMRES as GMRES
from .linear import LU as LU
from .linear import QR as QR
from .linear import BiCGStab as BiCGStab
from .linear import Cascade as Cascade
from .linear import Jacobi as Jacobi
from .linear import Neumann as Neumann
from .linear import Splitting as Splitting
from .solvers import LBFGS as LBFGS
from .solvers import Anderson as Anderson
from .solvers import Auto as Auto
from .solvers import Bisection as Bisection
from .solvers import Broyden as Broyden
from .solvers import Chandrupatla as Chandrupatla
from .solvers import Chord as Chord
from .solvers import Dogleg as Dogleg
from .solvers import ForwardBackward as ForwardBackward
from .solvers import LevenbergMarquardt as LevenbergMarquardt
from .solvers import Newton as Newton
from .solvers import NewtonCG as NewtonCG
from .solvers import NewtonKrylov as NewtonKrylov
from .solvers import PeacemanRachford as PeacemanRachford
from .solvers import Picard as Picard
from .solvers import PreconditionedPicard as PreconditionedPicard

if TYPE_CHECKING:
    from . import diagnostics as diagnostics
    from . import nn as nn
    from .diagnostics import Comparison as Comparison
    from .diagnostics import GradientCheck as GradientCheck
    from .diagnostics import GradientError as GradientError
    from .diagnostics import Monitor as Monitor
    from .diagnostics import PathIndependence as PathIndependence
    from .diagnostics import SpectralRadius as SpectralRadius
    from .diagnostics import check_gradients as check_gradients
    from .diagnostics import compare_solvers as compare_solvers
    from .diagnostics import gradient_error as gradient_error
    from .diagnostics import jacobian_penalty as jacobian_penalty
    from .diagnostics import monitor as monitor
    from .diagnostics import path_independence as path_independence
    from .diagnostics import spectral_radius as spectral_radius

__version__ = "0.1.0"

__all__ = [
    "Adjoint",
    "AdjointReport",
    "Anderson",
    "Auto",
    "BiCGStab",
    "Bisection",
    "Broyden",
    "CG",
    "Cascade",
    "Chandrupatla",
    "Chord",
    "Comparison",
    "ConvergenceError",
    "ConvergenceWarning",
    "Dogleg",
    "ForwardBackward",
    "GMRES",
    "GradientCheck",
    "GradientError",
    "Implicit",
    "Jacobi",
    "JacobianFree",
    "LBFGS",
    "LU",
    "LevenbergMarquardt",
    "Monitor",
    "Neumann",
    "NeumannSeries",
    "Newton",
    "NewtonCG",
    "NewtonKrylov",
    "PathIndependence",
    "PeacemanRachford",
    "PhantomGradient",
    "Picard",
    "PreconditionedPicard",
    "QR",
    "Shine",
    "Solution",
    "SpectralRadius",
    "Splitting",
    "Status",
    "Unroll",
    "WarmStart",
    "check_gradients",
    "compare_solvers",
    "fixed_point",
    "gradient_error",
    "jacobian_penalty",
    "least_squares",
    "minimize",
    "monitor",
    "nn",
    "path_independence",
    "root",
    "spectral_radius",
]

_DIAGNOSTICS = {
    "Comparison",
    "GradientCheck",
    "GradientError",
    "Monitor",
    "PathIndependence",
    "SpectralRadius",
    "check_gradients",
    "compare_solvers",
    "gradient_error",
    "jacobian_penalty",
    "monitor",
    "path_independence",
    "spectral_radius",
}
"""Names that lie in `diagnostics`, which, like `nn`, is not imported before it is asked for."""


def __getattr__(name: str) -> Any:
    if name in ("diagnostics", "nn"):
        return import_module(f".{name}", __name__)
    if name in _DIAGNOSTICS:
        value = globals()[name] = getattr(import_module(".diagnostics", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "diagnostics"})
