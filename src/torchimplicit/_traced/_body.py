"""Whether a function can be the body of a loop in a graph: no two tensors that it reads may share their memory there.

Dynamo hands a loop whatever its body reads from outside. A view beside its base, or two views of one tensor, are then
an error that no graph break saves, even of code that never asked for a loop. A function of which that is not clear
is left out of the graph.
"""

from typing import Any

import torch
from torch import nn

_VIEWS = ("T", "mT", "H", "mH", "real", "imag")


def reason_against_body(fn: Any) -> str | None:
    """Why fn may share memory among what it reads, beside its arguments; None if it does not, as far as one can see."""
    modules = list(fn.modules()) if isinstance(fn, nn.Module) else []
    codes = [getattr(type(m).forward, "__code__", None) for m in modules] or [getattr(fn, "__code__", None)]
    for code in codes:
        for name in _VIEWS:
            if code is not None and name in code.co_names:
                return f"fn reads an attribute .{name}; write x.t() or x.transpose(...), which are operations"
    # What a function closes over cannot be looked at here: Dynamo fails on a function whose closure it has shown.
    if not modules and not torch.compiler.is_exporting() and (codes[0] is None or codes[0].co_freevars):
        return "fn closes over something; give it as an argument, or make fn an nn.Module"
    return None
