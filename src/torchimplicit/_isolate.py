"""Keeping failed samples out of the others' gradients, where `0·NaN = NaN` would carry them over."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ._closure import closure_tensors, substituted
from ._problem import Problem

_ATTEMPTS = 64


def evaluate_without(problem: Problem, start: Tensor, failed: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """fn's output at `start`, with the failed samples' inputs replaced by those of a healthy sample.

    The recorded evaluation then is finite everywhere, and the failed samples' parts of it are thrown away by a zero
    gradient. Which of the tensors that fn reads are indexed by sample is not known; a choice is accepted only if it
    leaves the healthy samples' values as they were and makes all others finite.

    Args:
        problem: the equation.
        start: `(B, n)`, the start of the recorded graph.
        failed: `(B,)` bool.

    Returns:
        The output `(B, n)` with its graph, or None where no sample is healthy or no choice is accepted: then no
        gradient can be told from the failed samples' and all must be zero. And, in that case, the tensors that fn
        reads and that require a gradient.
    """
    reference: list[Tensor] = []
    read = closure_tensors(lambda: reference.append(problem.output(start)), [start])
    wanted = [t for t in read if t.requires_grad]
    healthy = ~failed
    if not bool(healthy.any()):
        return None, wanted
    index = torch.arange(failed.numel(), device=failed.device)
    index = torch.where(failed, index[healthy][0], index)
    value = reference[0].detach()
    for chosen in _choices(problem, read):
        replaced = [_take(t, index, problem.layout.batch_shape) for t in chosen]
        try:
            output = substituted(lambda: problem.output(start.index_select(0, index)), chosen, replaced)
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        if _same(output.detach(), value, healthy):
            return output, wanted
    return None, wanted


def _choices(problem: Problem, read: list[Tensor]) -> Iterator[list[Tensor]]:
    """Sets of tensors that may be indexed by sample, the likeliest first: every one with the batch shape in front."""
    batch = problem.layout.batch_shape
    candidates = [t for t in read if t.shape[: len(batch)] == batch]
    candidates.sort(key=lambda t: isinstance(t, torch.nn.Parameter))
    left = _ATTEMPTS
    for size in range(len(candidates), -1, -1):
        for chosen in combinations(candidates, size):
            if left == 0:
                return
            left -= 1
            yield list(chosen)


def _take(tensor: Tensor, index: Tensor, batch: torch.Size) -> Tensor:
    rows = tensor.reshape(index.numel(), *tensor.shape[len(batch) :])
    return rows.index_select(0, index.to(tensor.device)).reshape(tensor.shape)


def _same(output: Tensor, value: Tensor, healthy: Tensor) -> bool:
    if not bool(output.isfinite().all()):
        return False
    scale = value[healthy].abs().amax()
    error = (output - value)[healthy].abs().amax()
    return bool(error <= 64 * torch.finfo(value.dtype).eps * scale)


def shield(output: Tensor, start: Tensor) -> None:
    """Make non-finite gradients zero at every node of the graph from `start` to `output`, and only there.

    With the failed samples' gradient exactly zero, every product with it is zero or, where a local derivative is
    infinite, NaN; with these put to zero, nothing of the failed samples is left wherever samples are mixed.
    """

    def clean(grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(g if g is None else torch.where(g.isfinite(), g, 0.0) for g in grad_inputs)

    if output.grad_fn is None or start.grad_fn is None:
        return
    first = start.grad_fn._sequence_nr()
    pending, seen = [output.grad_fn], {start.grad_fn}
    while pending:
        node = pending.pop()
        if node is None or node in seen or node.name().endswith("AccumulateGrad"):
            continue
        seen.add(node)
        if node._sequence_nr() > first:
            node.register_hook(clean)
            pending.extend(following for following, _ in node.next_functions)
