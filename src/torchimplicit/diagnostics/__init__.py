"""Looking into implicit layers while they run, comparing solvers on one problem, and measuring gradients."""

from ._check_gradients import check_gradients as check_gradients
from ._compare import compare_solvers as compare_solvers
from ._comparison import Comparison as Comparison
from ._comparison import SolverResult as SolverResult
from ._comparison import Trace as Trace
from ._gradient_check import DirectionCheck as DirectionCheck
from ._gradient_check import GradientCheck as GradientCheck
from ._gradient_error import Deviation as Deviation
from ._gradient_error import GradientError as GradientError
from ._gradient_error import Outcome as Outcome
from ._gradient_error import gradient_error as gradient_error
from ._jacobian_penalty import jacobian_penalty as jacobian_penalty
from ._map import is_implicit as is_implicit
from ._monitor import Monitor as Monitor
from ._monitor import Record as Record
from ._monitor import monitor as monitor
from ._monitor import name_of as name_of
from ._monitor import record as record
from ._path_independence import PathIndependence as PathIndependence
from ._path_independence import path_independence as path_independence
from ._spectral_radius import SpectralRadius as SpectralRadius
from ._spectral_radius import spectral_radius as spectral_radius
