"""`monitor`: the Solutions of every implicit layer of a model, collected while a block runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._solution import Solution


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


def _detached(value: Any) -> Any:
    return pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, value)
