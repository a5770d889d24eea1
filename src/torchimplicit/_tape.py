"""What a function does with tensors, as a list of operations that can be done again with others in their places."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_NESTED = (list, tuple, dict)
_PLAIN: WeakSet[Any] = WeakSet()
"""Code and modules that were seen not to be compiled."""


class _Operation(NamedTuple):
    """One call, with slots in the place of tensors.

    Attributes:
        func: what was called.
        leaves: of its arguments; None where a tensor was.
        spec: their structure; None where they are a tuple without nested structures, and no keywords.
        reads: place among the leaves and slot of each tensor.
        makes: place among the leaves of what it returned and slot of each tensor.
        recording: whether grad mode was on.
        autocast: device type and dtype, where autocast was on.
    """

    func: Callable[..., Any]
    leaves: list[Any]
    spec: pytree.TreeSpec | None
    reads: list[tuple[int, int]]
    makes: list[tuple[int, int]]
    recording: bool
    autocast: tuple[str, torch.dtype] | None


class Tape:
    """The operations of one evaluation of a function, and the tensors that it read beside its argument.

    A replay is that function with other tensors in the places of these: it does not call the function again, so that
    nothing it closes over can have changed meanwhile, and takes the branches that were taken then.

    Attributes:
        inputs: the tensors read and not made, the argument's leaves excepted: closures, parameters, arguments alike.
        opaque: whether some tensors were made where it could not be seen, as by a custom `autograd.Function`.
    """

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.opaque = False
        self._operations: list[_Operation] = []
        self._given: list[int] = []
        self._slots: list[int] = []
        self._outputs: list[tuple[int, int]] = []
        self._out: tuple[list[Any], pytree.TreeSpec] = ([], pytree.tree_structure(None))

    @staticmethod
    def record(fn: Callable[..., Any], argument: Any, args: tuple[Any, ...], user: Any = None) -> "tuple[Tape, Any]":
        """Call `fn(argument, *args)`; its tape, and what it returned.

        Where `torch.compile` is in use fn is called once more before: one whose graph it has compiled is left unseen.

        Args:
            fn: what to call.
            argument: first argument, whose leaves may be replaced.
            args: the other ones.
            user: what fn is at heart, by which one that is not compiled is remembered.
        """
        tape = Tape()
        given = pytree.tree_leaves(argument)
        first = min((t.grad_fn._sequence_nr() for t in given if t.grad_fn is not None), default=None)
        key = getattr(user, "__code__", user)
        if first is not None and "torch._dynamo" in sys.modules and not _remembered(key):
            out = fn(argument, *args)
            if _compiled(pytree.tree_leaves(out), first):
                tape.opaque = True
                return tape, out
            with suppress(TypeError):  # not everything can be remembered
                _PLAIN.add(key)
        mode = _Recording(tape, first)
        tape._given = [mode.made(t) for t in given]
        with run_eagerly(), mode:
            out = fn(argument, *args)
        leaves, spec = pytree.tree_flatten(out)
        tape._outputs = [(i, mode.read(t)) for i, t in enumerate(leaves) if isinstance(t, Tensor)]
        tape._out = [None if isinstance(t, Tensor) else t for t in leaves], spec
        return tape, out

    def replay(self, argument: Any, inputs: Sequence[Tensor]) -> Any:
        """What fn returns for another argument, `inputs` in the place of `self.inputs`."""
        values: dict[int, Tensor] = dict(zip(self._given, pytree.tree_leaves(argument), strict=True))
        values.update(zip(self._slots, inputs, strict=True))
        for step in self._operations:
            leaves = list(step.leaves)
            for place, slot in step.reads:
                leaves[place] = values[slot]
            args, kwargs = (leaves, {}) if step.spec is None else pytree.tree_unflatten(leaves, step.spec)
            with _context(step):
                out = step.func(*args, **kwargs)
            if step.makes:
                found = pytree.tree_leaves(out)
                for place, slot in step.makes:
                    values[slot] = found[place]
        leaves = list(self._out[0])
        for place, slot in self._outputs:
            leaves[place] = values[slot]
        return pytree.tree_unflatten(leaves, self._out[1])


class _Recording(TorchFunctionMode):
    """Writes a tape while a function runs."""

    def __init__(self, tape: Tape, first: int | None) -> None:
        super().__init__()
        self._tape = tape
        self._first = first  # number of the argument's graph node: those of tensors made since then are not lower
        self._slot: dict[int, int] = {}
        self._kept: list[Tensor] = []  # lest an id be used twice
        self._unseen: set[int] = set()

    def read(self, t: Tensor) -> int:
        """The slot of a tensor that is read; a new one is an input."""
        slot = self._slot.get(id(t))
        if slot is None:
            slot = self.made(t)
            self._tape.inputs.append(t)
            self._tape._slots.append(slot)
            if self._first is not None and t.grad_fn is not None and t.grad_fn._sequence_nr() >= self._first:
                self._tape.opaque = True
        elif slot in self._unseen and t.requires_grad:
            self._tape.opaque = True  # made without a graph, and has one now: by the forward of a custom Function
        return slot

    def made(self, t: Tensor) -> int:
        """The slot of a tensor that an operation returned: its own, where that is one that it was given."""
        slot = self._slot.get(id(t))
        if slot is None:
            slot = self._slot[id(t)] = len(self._kept)
            self._kept.append(t)
        return slot

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if kwargs or any(isinstance(a, _NESTED) for a in args):
            leaves, spec = pytree.tree_flatten((args, kwargs or {}))
        else:
            leaves, spec = list(args), None
        reads = []
        for i, t in enumerate(leaves):
            if isinstance(t, Tensor):
                reads.append((i, self.read(t)))
                leaves[i] = None
        out = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(out, Tensor):
            makes = [(0, self.made(out))]
        elif isinstance(out, _NESTED):
            makes = [(i, self.made(t)) for i, t in enumerate(pytree.tree_leaves(out)) if isinstance(t, Tensor)]
        else:
            makes = []
        if makes or func is Tensor.__setitem__:
            recording = torch.is_grad_enabled()
            if not recording:
                self._unseen.update(slot for _, slot in makes)
            autocast = self._autocast() if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu") else None
            self._tape._operations.append(_Operation(func, leaves, spec, reads, makes, recording, autocast))
        return out

    def _autocast(self) -> tuple[str, torch.dtype]:
        device = self._kept[0].device.type
        return device, torch.get_autocast_dtype(device)


def run_eagerly() -> AbstractContextManager[Any]:
    """The context in which functions that `torch.compile` made run as they were written."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _remembered(key: Any) -> bool:
    try:
        return key in _PLAIN
    except TypeError:
        return False


def _compiled(outputs: list[Any], first: int) -> bool:
    """Whether the graph of some outputs, back to the node numbered `first`, holds a compiled function's."""
    pending = [t.grad_fn for t in outputs if isinstance(t, Tensor)]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen or node._sequence_nr() < first:
            continue
        if node.name().startswith("CompiledFunction"):
            return True
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
    return False


def _context(step: _Operation) -> AbstractContextManager[Any]:
    if not step.recording:
        return torch.no_grad()
    if step.autocast is not None:
        return torch.autocast(*step.autocast)
    return nullcontext()
