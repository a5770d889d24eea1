"""`monitor`: the Solutions of every implicit layer of a model, collected while a block runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._solution import AdjointReport, Solution, Status


@dataclass(frozen=True)
class Record:
    """One call of one implicit layer.

    Attributes:
        name: the layer's name in the model (`""` if it is the model).
        solution: its `Solution`, with the value detached; `solution.adjoint` is filled once a backward pass has run.
    """

    name: str
    solution: Solution


@dataclass(eq=False)
class Monitor:
    """What `monitor` collects.

    Attributes:
        records: one `Record` per call, in the order of the calls.
    """

    records: list[Record] = field(default_factory=list)
    _names: dict[int, str] = field(default_factory=dict, repr=False)

    @property
    def solutions(self) -> list[Solution]:
        """The Solutions alone."""
        return [r.solution for r in self.records]

    def scalars(self, prefix: str = "implicit/") -> dict[str, float]:
        """What to log of the records so far, by `prefix`, the layer's name and the quantity.

        Of each layer, over all its calls: `residual`, the largest; `steps`, the mean over samples; `failures`, the
        number of samples that did not converge; `evaluations`, the sum. The same with `adjoint_` in front where a
        backward pass has solved something (`JacobianFree` has no residual).

        >>> import torch, torchimplicit as ti
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), ti.nn.TanhEquilibrium(3))
        >>> with ti.monitor(model) as log:
        ...     model(torch.ones(2, 4)).sum().backward()
        >>> sorted(log.scalars())[:3]
        ['implicit/1/adjoint_evaluations', 'implicit/1/adjoint_failures', 'implicit/1/adjoint_residual']
        >>> log.scalars()["implicit/1/failures"]
        0.0
        """
        calls: dict[str, list[Solution]] = {}
        for r in self.records:
            calls.setdefault(r.name, []).append(r.solution)
        found = {}
        for name, solutions in calls.items():
            where = prefix + (f"{name}/" if name else "")
            adjoint = [s.adjoint for s in solutions if s.adjoint.status is not None]
            for kind, reports in (("", solutions), ("adjoint_", adjoint)):
                found |= {f"{where}{kind}{quantity}": value for quantity, value in _figures(reports).items()}
        return found

    def clear(self) -> None:
        """Forget the records so far."""
        self.records.clear()


_active: list[Monitor] = []


@contextmanager
def monitor(model: nn.Module) -> Iterator[Monitor]:
    """Collect the `Solution` of every implicit layer of `model` that runs inside the block.

    Nothing is kept on the modules: copies, pickles and nested or repeated calls are unaffected. Every call of a layer
    gives one record. Blocks may be nested.

    >>> import torch, torchimplicit as ti
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), ti.nn.TanhEquilibrium(3))
    >>> with ti.monitor(model) as log:
    ...     z = model(torch.ones(2, 4))
    >>> log.records[0].name, log.records[0].solution.converged.tolist()
    ('1', [True, True])

    Args:
        model: a module; its implicit layers, at any depth, are watched.
    """
    log = Monitor(_names={id(module): name for name, module in model.named_modules()})
    _active.append(log)
    try:
        yield log
    finally:
        _active.remove(log)


def record(layer: nn.Module, solution: Solution) -> None:
    """Tell the active monitors of a layer's solve."""
    for log in _active:
        name = log._names.get(id(layer))
        if name is not None:
            log.records.append(Record(name, replace(solution, value=_detached(solution.value))))


def _figures(reports: Sequence[Solution | AdjointReport]) -> dict[str, float]:
    """Of one layer's solves; only what there is."""
    if not reports:
        return {}
    status, residual, steps = (
        torch.cat([t.detach().reshape(-1) for r in reports if (t := getattr(r, name)) is not None])
        for name in ("status", "residual", "steps")
    )
    known = residual[~residual.isnan()]
    return {
        **({"residual": float(known.max())} if known.numel() else {}),
        **({"steps": float(steps.double().mean())} if steps.numel() else {}),
        "failures": float((status != int(Status.CONVERGED)).sum()),
        "evaluations": float(sum(r.evaluations or 0 for r in reports)),
    }


def name_of(layer: nn.Module) -> str:
    """What to call a layer: its class, and its name in the model where a monitor knows it."""
    for log in reversed(_active):
        name = log._names.get(id(layer))
        if name:
            return f"{name} ({type(layer).__name__})"
    return type(layer).__name__


def _detached(value: Any) -> Any:
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, value)
