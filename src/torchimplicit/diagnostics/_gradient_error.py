"""`gradient_error`: how far the gradient by one adjoint is from the exact one, on a batch of the caller's."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, Never

import torch
from torch import Tensor, nn

from .._adjoint import Implicit
from .._options import Options, refuse_unknown
from .._solution import PyTree, Solution, Status
from ._candidates import label
from ._subject import Subject, as_real, check_seed, inner, random_like

_OPTIONS = ("adjoint", "reference", "loss", "seed")
_ROWS = 16
"""Parts that a table shows at most."""


@dataclass(frozen=True)
class Deviation:
    """A gradient g beside the reference g*.

    Attributes:
        cosine: of the angle between them, in [−1, 1]; NaN where one of them is zero.
        relative: `‖g − g*‖ / ‖g*‖`; 0 where both are zero, infinite where only g* is.
        norm_ratio: `‖g‖ / ‖g*‖`; NaN where both are zero.
        norm: `‖g*‖`, in the units of the loss per unit of what it is the gradient by.
    """

    cosine: float
    relative: float
    norm_ratio: float
    norm: float


@dataclass(frozen=True)
class Outcome:
    """How the solves behind a gradient ended, in samples by status; empty where no `Solution` or report was seen."""

    forward: Mapping[Status, int]
    adjoint: Mapping[Status, int]


@dataclass(frozen=True, eq=False)
class GradientError(Deviation):
    """The result of `gradient_error`. Its own figures are those of all parts together.

    Attributes:
        parts: a `Deviation` for each parameter (by its name in the model), each input (`inputs[0]`, or
            `inputs[0]['key']` inside a pytree) and each other leaf that is read (`closure[0]`).
        sample_cosine: `(B,)`, the cosine of each sample's gradient by the inputs that have the batch in front; NaN
            where one of the two is zero. None where no input has, or where no solve with `batch_dims` was seen.
        adjoint: what was measured.
        reference: what it was measured against.
        outcome: of the solves behind the gradient.
        reference_outcome: of those behind the reference.
    """

    parts: Mapping[str, Deviation] = field(repr=False)
    sample_cosine: Tensor | None = field(repr=False)
    adjoint: str
    reference: str
    outcome: Outcome = field(repr=False)
    reference_outcome: Outcome = field(repr=False)

    def __str__(self) -> str:
        """A table: everything, and each part, the largest absolute error first."""
        rows = sorted(self.parts.items(), key=lambda item: -_absolute(item[1]))
        lines = [("", "cosine", "relative error", "norm ratio", "norm"), _cells("everything", self)]
        lines += [_cells(name, part) for name, part in rows[:_ROWS]]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        told = [f"gradient by {self.adjoint}, against {self.reference}"]
        for name, *cells in lines:
            told.append("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip())
        if len(rows) > _ROWS:
            told.append(f"and {len(rows) - _ROWS} more, with smaller errors")
        if self.sample_cosine is not None:
            told.append(_sample_line(self.sample_cosine))
        told.append(f"forward: {_counted(self.outcome.forward)}; adjoint: {_counted(self.outcome.adjoint)}")
        reference = self.reference_outcome.adjoint
        if any(status is not Status.CONVERGED for status in reference):
            told.append(f"the reference is not exact: {_counted(reference)}")
        return "\n".join(told)


def gradient_error(
    layer: nn.Module | Callable[..., PyTree],
    *inputs: PyTree,
    adjoint: Options | None = None,
    reference: Options | None = None,
    loss: Callable[[PyTree], Tensor] | None = None,
    seed: int = 0,
    **unknown: Never,
) -> GradientError:
    """Compare the gradient by an adjoint with the exact one, on a batch of your own.

    >>> import torch, torchimplicit as ti
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 32), ti.nn.TanhEquilibrium(32), torch.nn.Linear(32, 2)).double()
    >>> x = torch.randn(16, 4, dtype=torch.float64)
    >>> error = ti.gradient_error(model, x, adjoint=ti.Implicit(rtol=1e-2))
    >>> error.cosine > 0.99, error.relative < 0.05, error.parts["1.cell.linear.weight"].relative < 0.1
    (True, True, True)
    >>> print(error)  # doctest: +ELLIPSIS
    gradient by Implicit(rtol=0.01), against Implicit(rtol=9e-14)
                            cosine  relative error  norm ratio     norm
    everything              ...

    The gradient is that of `loss` with respect to all parameters that require one, all floating-point and complex
    inputs (whether they require one or not), and all leaves of autograd that are read beside them, such as a closure's.
    A tensor that was computed from parameters outside of layer is a constant here.

    Both gradients are taken at what the forward solve returns: the adjoints are compared, not the solves. Everything is
    left as it was: `.grad`, adjoints, modes, buffers, torch's random numbers; random parts of a model (dropout) act
    alike in both runs. Failures do not warn or raise in the layers of a model; the result tells of them.

    Args:
        layer: a module, in which every implicit layer is given the adjoint (every submodule with the attributes
            `solver` and `adjoint`); or a function of the inputs and a keyword `adjoint`, to be handed on:
            `lambda x, adjoint: ti.fixed_point(f, torch.zeros_like(x), x, adjoint=adjoint, batch_dims=1)`. It returns
            a tensor, a pytree of tensors, or a `Solution`, which tells how its solve ended.
        inputs: handed to layer.
        adjoint: what to measure; None leaves each layer its own (and gives None to a function).
        reference: what to measure against; None is `Implicit` at a tolerance of `ε^(5/6)` (9e-14 in float64, 2e-6 in
            float32), or at its default one where that cannot be reached.
        loss: a real scalar of the output; None is the inner product with fixed standard normal numbers.
        seed: of these.

    Returns:
        A `GradientError`; print it for a table.

    Raises:
        TypeError: unknown option, no adjoint, a function that takes no keyword `adjoint`, an output without tensors.
        ValueError: nothing to differentiate by; an output that does not depend on it; a module without an implicit
            layer; a loss that is no real scalar.
    """
    refuse_unknown("gradient_error", unknown, _OPTIONS)
    _check(layer, adjoint, reference, loss)
    check_seed("gradient_error", seed)
    is_module = isinstance(layer, nn.Module)
    subject = Subject.of("gradient_error", layer, inputs, {} if is_module else {"adjoint": adjoint}, loss)
    if is_module and not subject.layers:
        raise ValueError(
            "gradient_error: layer has no implicit layer, none of its modules has the attributes solver and adjoint; "
            "give a model with a torchimplicit.nn layer, or a function that takes the keyword adjoint."
        )
    name = _own(subject) if adjoint is None else label(adjoint)
    exact = _take(subject, reference if reference is not None else _tight(subject), seed)
    if reference is None and exact.unsolved:
        looser = _take(subject, Implicit(), seed)
        exact = looser if looser.unsolved < exact.unsolved else exact
    ours = _take(subject, adjoint, seed, name)
    parts = {key: _deviation([ours.gradients[key]], [exact.gradients[key]]) for key in subject.leaves}
    whole = _deviation(list(ours.gradients.values()), list(exact.gradients.values()))
    return GradientError(
        cosine=whole.cosine,
        relative=whole.relative,
        norm_ratio=whole.norm_ratio,
        norm=whole.norm,
        parts=parts,
        sample_cosine=_sample_cosine(ours, exact),
        adjoint=ours.name,
        reference=exact.name,
        outcome=ours.outcome,
        reference_outcome=exact.outcome,
    )


@dataclass(frozen=True)
class _Taken:
    """A gradient, by leaf, and what is known of how it came about."""

    name: str
    gradients: dict[str, Tensor]
    outcome: Outcome
    batch: int | None
    """Size of the batch, where one was seen."""

    @property
    def unsolved(self) -> int:
        return sum(n for status, n in self.outcome.adjoint.items() if status is not Status.CONVERGED)


def _take(subject: Subject, adjoint: Options | None, seed: int, name: str | None = None) -> _Taken:
    options = {"on_failure": "ignore"} | ({} if adjoint is None else {"adjoint": adjoint})
    keywords = {} if isinstance(subject.fn, nn.Module) else {"adjoint": adjoint}
    with subject.untouched(), subject.with_options(**options):
        run = subject.run(keywords)
        if subject.after is None:
            cotangents = random_like(run.outputs, torch.Generator().manual_seed(seed))
        else:
            _check_loss(run.outputs)
            cotangents = [torch.ones_like(run.outputs[0])]
        gradients = subject.gradients(run.outputs, cotangents)
    outcome = Outcome(
        _count([s.status for s in run.solutions]),
        _count([s.adjoint.status for s in run.solutions if s.adjoint.status is not None]),
    )
    return _Taken(label(adjoint) if name is None else name, gradients, outcome, _batch(run.solutions))


def _tight(subject: Subject) -> Implicit:
    return Implicit(rtol=float(f"{subject.epsilon ** (5 / 6):.0e}"))


def _own(subject: Subject) -> str:
    """A name for the adjoints that the layers have."""
    names = {"Implicit()" if vars(m)["adjoint"] is None else label(vars(m)["adjoint"]) for m in subject.layers}
    return names.pop() if len(names) == 1 else "the layers' own adjoints" if names else "the function's own adjoint"


def _deviation(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> Deviation:
    a, b, product = inner(ours, ours) ** 0.5, inner(exact, exact) ** 0.5, inner(ours, exact)
    difference = [as_real(x) - as_real(y) for x, y in zip(ours, exact, strict=True)]
    apart = inner(difference, difference) ** 0.5
    return Deviation(
        cosine=max(-1.0, min(1.0, product / (a * b))) if a * b > 0 else math.nan,
        relative=apart / b if b > 0 else math.inf if a > 0 else 0.0,
        norm_ratio=a / b if b > 0 else math.inf if a > 0 else math.nan,
        norm=b,
    )


def _sample_cosine(ours: _Taken, exact: _Taken) -> Tensor | None:
    """`(B,)` over the inputs with the batch in front, or None."""
    batch = exact.batch if exact.batch is not None else ours.batch
    names = [key for key, g in exact.gradients.items() if key.startswith("inputs[") and g.ndim and g.shape[0] == batch]
    if not batch or not names:
        return None
    rows = [
        torch.cat([as_real(taken.gradients[key]).reshape(batch, -1).cpu() for key in names], dim=1)
        for taken in (ours, exact)
    ]
    a, b = (torch.linalg.vector_norm(matrix, dim=1) for matrix in rows)
    return (torch.linalg.vecdot(*rows) / (a * b)).clamp(-1.0, 1.0)  # 0/0 = NaN


def _batch(solutions: Sequence[Solution]) -> int | None:
    """The size of the first batch dim of a solve."""
    return next((s.status.shape[0] for s in solutions if s.status.ndim), None)


def _count(statuses: Sequence[Tensor]) -> dict[Status, int]:
    if not statuses:
        return {}
    together = torch.cat([s.reshape(-1).long().cpu() for s in statuses])
    counts = torch.bincount(together, minlength=len(Status)).tolist()
    return {s: counts[s] for s in Status if counts[s]}


def _counted(statuses: Mapping[Status, int]) -> str:
    if not statuses:
        return "not known"
    told = f"{statuses.get(Status.CONVERGED, 0)} of {sum(statuses.values())} converged"
    bad = ", ".join(f"{n} {status.name}" for status, n in statuses.items() if status is not Status.CONVERGED)
    return f"{told} ({bad})" if bad else told


def _cells(name: str, d: Deviation) -> tuple[str, str, str, str, str]:
    cosine, ratio = ("-" if math.isnan(x) else f"{x:.4f}" for x in (d.cosine, d.norm_ratio))
    return name, cosine, f"{d.relative:.1e}", ratio, f"{d.norm:.1e}"


def _absolute(part: Deviation) -> float:
    return part.relative * part.norm if part.norm > 0 else part.relative


def _sample_line(cosine: Tensor) -> str:
    known = cosine[~cosine.isnan()]
    zero = cosine.numel() - known.numel()
    told = f"gradient by the inputs, of each of {cosine.numel()} samples: "
    told += f"cosine at least {known.min():.4f}, median {known.median():.4f}" if known.numel() else "zero"
    return told + (f" ({zero} without a gradient)" if zero and known.numel() else "")


def _check(layer: Any, adjoint: Any, reference: Any, loss: Any) -> None:
    for name, value in (("adjoint", adjoint), ("reference", reference)):
        if value is not None and not isinstance(value, Options):
            raise TypeError(
                f"gradient_error: {name}={value!r} is no adjoint; give an instance such as torchimplicit.Implicit()."
            )
    if loss is not None and not callable(loss):
        raise TypeError(f"gradient_error: loss must be a function of the output, but is {type(loss).__name__}.")
    if callable(layer) and not isinstance(layer, nn.Module):
        try:
            given = signature(layer).parameters
        except (TypeError, ValueError):
            return
        if "adjoint" not in given and all(p.kind is not Parameter.VAR_KEYWORD for p in given.values()):
            raise TypeError(
                "gradient_error: layer is a function that takes no keyword adjoint; let it take one and hand it on, "
                "as lambda x, adjoint: torchimplicit.fixed_point(f, z0, x, adjoint=adjoint) does."
            )


def _check_loss(outputs: Sequence[Tensor]) -> None:
    if len(outputs) != 1 or outputs[0].numel() != 1 or outputs[0].is_complex():
        raise ValueError(
            f"gradient_error: loss must return one real scalar, but it returned {len(outputs)} tensor"
            f"{'s' * (len(outputs) != 1)}, the first of shape {tuple(outputs[0].shape)} and {outputs[0].dtype}."
        )
