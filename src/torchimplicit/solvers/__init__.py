"""Nonlinear solvers, one family per file; hyper-parameters only. The loop they run in is `_iterate.py`."""

from ._anderson import Anderson as Anderson
from ._base import Solver as Solver
from ._base import Step as Step
from ._newton import Newton as Newton
from ._picard import Picard as Picard
