"""What becomes of failures: a warning once per call site, an error, or nothing."""

import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from ._options import nearest
from ._solution import ConvergenceError, ConvergenceWarning, Solution, describe_failures

OnFailure = Literal["warn", "raise", "ignore"]
_CHOICES = ("warn", "raise", "ignore")
_warned: set[tuple[str, int, str]] = set()


def check_on_failure(on_failure: str) -> None:
    """Raise `ValueError` unless `on_failure` is one of its three values."""
    if on_failure not in _CHOICES:
        raise ValueError(f"on_failure={on_failure!r} is not known; {nearest(str(on_failure), _CHOICES)}")


def report_failures(
    what: str,
    status: Tensor,
    on_failure: OnFailure,
    solution: Solution | None = None,
    site: tuple[str, int] | None = None,
) -> None:
    """Tell of the samples whose status is not CONVERGED, as `on_failure` says.

    Args:
        what: the call, for the message.
        status: `(B,)` or the batch shape; at least one is not CONVERGED.
        on_failure: what to do.
        solution: carried by the error.
        site: file and line to blame; None looks for the caller.
    """
    if on_failure == "ignore":
        return
    message = describe_failures(what, status)
    if on_failure == "raise":
        raise ConvergenceError(message, solution)
    filename, line = site or call_site()
    key = (filename, line, what)
    if key not in _warned:
        _warned.add(key)
        warnings.warn_explicit(message, ConvergenceWarning, filename, line)


def undetected() -> AbstractContextManager[Any]:
    """The context for what meets NaN and deals with it: no anomaly detection, which would stop at it."""
    return torch.autograd.set_detect_anomaly(False) if torch.is_anomaly_enabled() else nullcontext()


def call_site() -> tuple[str, int]:
    """File and line of the nearest caller outside this package and torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torchimplicit", "torch"):
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
