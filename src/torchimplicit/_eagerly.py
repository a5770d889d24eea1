"""Functions that `torch.compile` leaves alone, at no cost where it is not in use."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._compile import _disable_dynamo
from torch.compiler import is_compiling

P = ParamSpec("P")
R = TypeVar("R")


def eagerly(function: Callable[P, R]) -> Callable[P, R]:
    """The function, never compiled: not by itself, and nothing that it calls.

    torch's own decorator imports the compiler when the function is first called, which takes longer than many a
    program; here it is called only where the compiler has been imported.
    """
    uncompiled: Any = _disable_dynamo(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        compiling = "torch._dynamo" in sys.modules and (is_compiling() or get_eval_frame_callback() is not None)
        return (uncompiled if compiling else function)(*args, **kwargs)

    return call
