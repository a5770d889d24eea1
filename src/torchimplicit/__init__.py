"""torchimplicit: implicit layers for PyTorch, with exact gradients and per-sample evidence of convergence."""

from . import nn as nn
from ._adjoint import Implicit as Implicit
from ._api import fixed_point as fixed_point
from ._api import root as root
from ._solution import AdjointReport as AdjointReport
from ._solution import ConvergenceError as ConvergenceError
from ._solution import ConvergenceWarning as ConvergenceWarning
from ._solution import Solution as Solution
from ._solution import Status as Status
from .diagnostics import Monitor as Monitor
from .diagnostics import monitor as monitor
from .linear import GMRES as GMRES
from .linear import LU as LU
from .linear import Cascade as Cascade
from .linear import Neumann as Neumann
from .solvers import Anderson as Anderson
from .solvers import Newton as Newton
from .solvers import Picard as Picard

__version__ = "0.1.0"

__all__ = [
    "GMRES",
    "LU",
    "AdjointReport",
    "Anderson",
    "Cascade",
    "ConvergenceError",
    "ConvergenceWarning",
    "Implicit",
    "Monitor",
    "Neumann",
    "Newton",
    "Picard",
    "Solution",
    "Status",
    "fixed_point",
    "monitor",
    "nn",
    "root",
]
