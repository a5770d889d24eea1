"""Ranges for `torch.profiler`, named after a layer and a phase of its work; nothing while no profiler runs."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

_NOTHING = nullcontext()


def span(label: str, phase: str) -> AbstractContextManager[Any]:
    """A block that a profiler shows as `"label: phase"`."""
    # A range takes 10 µs, to ask 0.1: and operations that nobody profiles must not become more.
    enabled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    return record_function(f"{label}: {phase}") if enabled else _NOTHING
