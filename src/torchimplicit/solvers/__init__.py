"""Nonlinear solvers, one family per file; hyper-parameters only. The loop they run in is `_iterate.py`."""

from ._anderson import Anderson as Anderson
from ._auto import Auto as Auto
from ._base import Method as Method
from ._base import Solver as Solver
from ._base import Stage as Stage
from ._base import Step as Step
from ._bracketing import Bisection as Bisection
from ._bracketing import Chandrupatla as Chandrupatla
from ._broyden import Broyden as Broyden
from ._chord import Chord as Chord
from ._dogleg import Dogleg as Dogleg
from ._forward_backward import ForwardBackward as ForwardBackward
from ._lbfgs import LBFGS as LBFGS
from ._levenberg_marquardt import LevenbergMarquardt as LevenbergMarquardt
from ._newton import Newton as Newton
from ._newton import NewtonKrylov as NewtonKrylov
from ._newton_cg import NewtonCG as NewtonCG
from ._peaceman_rachford import PeacemanRachford as PeacemanRachford
from ._picard import Picard as Picard
from ._preconditioned_picard import PreconditionedPicard as PreconditionedPicard
from ._splitting import SplitForm as SplitForm
