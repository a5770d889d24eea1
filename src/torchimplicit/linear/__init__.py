"""Linear algebra of batches: Jacobian operators and the solvers of `A x = b`, one system per sample."""

from ._bicgstab import BiCGStab as BiCGStab
from ._cascade import Cascade as Cascade
from ._cg import CG as CG
from ._gmres import GMRES as GMRES
from ._inverse import Factors as Factors
from ._inverse import Inverse as Inverse
from ._inverse import LowRank as LowRank
from ._lu import LU as LU
from ._neumann import Neumann as Neumann
from ._operator import AutogradJacobian as AutogradJacobian
from ._operator import JacobianOperator as JacobianOperator
from ._operator import PartialJacobian as PartialJacobian
from ._operator import ResidualJacobian as ResidualJacobian
from ._operator import SuppliedJacobian as SuppliedJacobian
from ._preconditioner import Jacobi as Jacobi
from ._preconditioner import Preconditioner as Preconditioner
from ._qr import QR as QR
from ._solver import LinearOperator as LinearOperator
from ._solver import LinearSolution as LinearSolution
from ._solver import LinearSolver as LinearSolver
from ._splitting import RELAXATION as RELAXATION
from ._splitting import MonotoneOperator as MonotoneOperator
from ._splitting import Resolvent as Resolvent
from ._splitting import Splitting as Splitting
from ._splitting import resolvent_step as resolvent_step
