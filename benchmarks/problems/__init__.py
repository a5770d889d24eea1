"""Nonlinear-equation test problems, each written once for torch, NumPy and JAX and batched over leading dims."""

from ._problem import Problem as Problem
from .classical import CLASSICAL as CLASSICAL
from .domain import DOMAIN as DOMAIN
from .large import LARGE as LARGE
from .larger import LARGER as LARGER
from .mgh import MGH as MGH
from .rootless import ROOTLESS as ROOTLESS

PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in (*CLASSICAL, *LARGER)}
"""All problems by name."""
