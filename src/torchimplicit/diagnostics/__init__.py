"""Looking into implicit layers while they run, and comparing solvers on one problem."""

from ._compare import compare_solvers as compare_solvers
from ._comparison import Comparison as Comparison
from ._comparison import SolverResult as SolverResult
from ._comparison import Trace as Trace
from ._monitor import Monitor as Monitor
from ._monitor import Record as Record
from ._monitor import monitor as monitor
from ._monitor import record as record
