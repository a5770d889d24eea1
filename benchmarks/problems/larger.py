"""The larger set: far starts, many unknowns, no root, no finite start."""

from ._problem import Problem
from .domain import DOMAIN
from .large import LARGE
from .mgh import MGH
from .rootless import ROOTLESS

LARGER: tuple[Problem, ...] = (*MGH, *LARGE, *ROOTLESS, *DOMAIN)
