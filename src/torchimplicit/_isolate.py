"""Keeping failed samples out of the others' gradients, where `0·NaN = NaN` would carry them over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ._closure import substituted
from ._problem import Problem
from ._tape import Tape

_ATTEMPTS = 64


class _Start(torch.autograd.Function):
    """The identity on `z`, as the start of a recorded graph: gradients end here and accumulate nowhere."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None


def start_of_graph(z: Tensor) -> Tensor:
    """`z` as a differentiable start of a graph that ends there."""
    return _Start.apply(torch.empty(0, requires_grad=True), z)  # pyright: ignore[reportReturnType]


class _Inert(torch.autograd.Function):
    """`z` unchanged, with an exactly zero gradient with respect to the other inputs."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, *inputs: Tensor) -> Tensor:
        ctx.inputs = [(t.shape, t.dtype, t.device) for t in inputs]
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.inputs)
        return grads[0], *zeros


def inert(z: Tensor, inputs: list[Tensor]) -> Tensor:
    """`z` unchanged, with an exactly zero gradient with respect to the inputs."""
    return _Inert.apply(z, *inputs) if inputs else z  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False, repr=False)
class Donors:
    """Healthy samples whose rows stand in the places of failed ones'.

    Attributes:
        index: the sample in each place, `(B,)`.
        batch: the batch shape.
        places: which of the tensors that fn reads are indexed by sample.
    """

    index: Tensor
    batch: torch.Size
    places: tuple[int, ...]

    def replace(self, z: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The states and the tensors with the donors' rows."""
        full = list(tensors)
        for i in self.places:
            full[i] = _take(full[i], self.index, self.batch)
        # A donor's Jacobian must not count twice: what stands in for others is a constant.
        donated = self.index != torch.arange(len(z), device=z.device)
        return torch.where(donated[:, None], z.detach().index_select(0, self.index), z), full


def evaluate_without(
    problem: Problem, z: Tensor, failed: Tensor
) -> tuple[Tensor | None, Tensor, list[Tensor], Tape, Donors | None]:
    """fn's output at `z`, with the failed samples' inputs replaced by those of a healthy sample.

    The recorded evaluation then is finite everywhere, and the failed samples' parts of it are thrown away by a zero
    gradient. Which of the tensors that fn reads are indexed by sample is not known; a choice is accepted only if it
    leaves the healthy samples' values as they were and makes all others finite.

    Args:
        problem: the equation.
        z: the states, `(B, n)`.
        failed: `(B,)` bool.

    Returns:
        The output `(B, n)` with its graph, or None where no sample is healthy or no choice is accepted: then no
        gradient can be told from the failed samples' and all must be zero. The start of that graph. The tensors that
        fn reads and that require a gradient. The tape of an evaluation. The donors.
    """
    start = start_of_graph(z)
    reference, tape = problem.recorded(start)
    read = tape.inputs
    wanted = [t for t in read if t.requires_grad]
    healthy = ~failed
    if not bool(healthy.any()):
        return None, start, wanted, tape, None
    index = torch.arange(failed.numel(), device=failed.device)
    index = torch.where(failed, index[healthy][0], index)
    value = reference.detach()
    # The replaced states start the graph, not the originals: a donor's Jacobian must not count twice.
    start = start_of_graph(z.index_select(0, index))
    for chosen in choices(problem, read):
        replaced = [_take(t, index, problem.layout.batch_shape) for t in chosen]
        try:
            output = substituted(lambda: problem.output(start), chosen, replaced)
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        if same(output.detach(), value, healthy):
            places = tuple(i for i, t in enumerate(read) if any(t is c for c in chosen))
            return output, start, wanted, tape, Donors(index, problem.layout.batch_shape, places)
    return None, start, wanted, tape, None


def choices(problem: Problem, read: list[Tensor]) -> Iterator[list[Tensor]]:
    """Sets of tensors that may be indexed by sample, the likeliest first.

    Every tensor with the batch shape in front may be; a parameter only where nothing else will do.
    """
    if problem.layout.shared:  # an attempt is a call of fn, which every process must make
        yield []
        return
    batch = problem.layout.batch_shape
    candidates = [t for t in read if t.shape[: len(batch)] == batch]
    inputs = [t for t in candidates if not isinstance(t, torch.nn.Parameter)]
    left = _ATTEMPTS
    for pool in (inputs, candidates):
        for size in range(len(pool), -1, -1):
            for chosen in combinations(pool, size):
                if left == 0:
                    return
                left -= 1
                yield list(chosen)


def _take(tensor: Tensor, index: Tensor, batch: torch.Size) -> Tensor:
    rows = tensor.reshape(index.numel(), *tensor.shape[len(batch) :])
    return rows.index_select(0, index.to(tensor.device)).reshape(tensor.shape)


def same(output: Tensor, value: Tensor, healthy: Tensor, replaced: Tensor | None = None) -> bool:
    """Whether the healthy samples' values are as they were, and all finite: or those that could be `replaced`."""
    finite = output.isfinite().flatten(1).all(dim=1) if output.ndim > 1 else output.isfinite()
    if not bool((finite if replaced is None else finite | ~replaced.reshape(-1)).all()):
        return False
    scale = value[healthy].abs().amax()
    error = (output - value)[healthy].abs().amax()
    return bool(error <= 64 * torch.finfo(value.dtype).eps * scale)


def shield(output: Tensor, start: Tensor, everywhere: bool, infinite: bool = True) -> None:
    """Make non-finite gradients zero where they leave the recorded graph from `start` to `output`, or at all its nodes.

    An operation that torch has no derivative of, a quantised one say, is an error if a gradient comes to it: torch
    would go on with a zero in its place, and a warning.

    No gradient that leaves the library is NaN or infinite. And where the gradient of failed samples is exactly zero,
    every product with it is zero or, where a local derivative is infinite, NaN; with these put to zero at every node,
    nothing of the failed samples is left wherever samples are mixed. Without `infinite` NaN alone is made zero: in
    float16 infinity is how an overflow of the others shows.
    """
    if output.grad_fn is None or start.grad_fn is None:
        return
    first = start.grad_fn._sequence_nr()
    pending, seen = [output.grad_fn], {start.grad_fn}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name().endswith("WarnNotImplemented"):
            node.register_prehook(_refuse)
        chosen = []
        for i, (following, _) in enumerate(node.next_functions):
            if following is None:
                continue
            inner = not following.name().endswith("AccumulateGrad") and following._sequence_nr() >= first
            if inner:
                pending.append(following)
            if everywhere or not inner:
                chosen.append(i)
        if chosen:
            node.register_hook(partial(_clean, tuple(chosen), 0.0 if infinite else torch.inf))


def _refuse(grads: tuple[Any, ...]) -> None:
    raise RuntimeError(
        "backward of an implicit layer: an operation inside fn has no derivative in torch (a quantised layer's, say); "
        "call the layer under torch.no_grad(), or train it before it is quantised."
    )


def _clean(
    chosen: tuple[int, ...], most: float, grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    grads = None
    for i in chosen:  # in a product with the Jacobian, which goes to the state alone, most are None
        if grad_inputs[i] is not None:
            grads = list(grad_inputs) if grads is None else grads
            grads[i] = grads[i].nan_to_num(nan=0.0, posinf=most, neginf=-most)
    return None if grads is None else tuple(grads)
