"""What a function does with tensors, as a list of operations that can be done again with others in their places."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
_NESTED = (list, tuple, dict)
_PLAIN: WeakSet[Any] = WeakSet()
"""Code and modules that were seen not to be compiled."""


class Operation(NamedTuple):
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
        opaque: whether some tensors were made where it could not be seen, as by a custom `autograd.Function` or a
            `torch.func` transform inside the function; or an operation has no derivative, a quantised one.
        operations: what was done, in order.
        given: slots of the argument's leaves.
        outputs: place and slot of each tensor among the leaves of what was returned.
        out: these leaves but for the tensors, and their structure.
        kept: the tensor in each slot, where they were to be kept.
    """

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.opaque = False
        self.operations: list[Operation] = []
        self.given: list[int] = []
        self._slots: list[int] = []
        self.outputs: list[tuple[int, int]] = []
        self.out: tuple[list[Any], pytree.TreeSpec] = ([], pytree.tree_structure(None))
        self.kept: list[Tensor] = []

    @staticmethod
    def record(
        fn: Callable[..., Any],
        argument: Any,
        args: tuple[Any, ...],
        user: Any = None,
        once: bool = False,
        keep: bool = False,
    ) -> "tuple[Tape, Any]":
        """Call `fn(argument, *args)`; its tape, and what it returned.

        Where `torch.compile` is in use fn is called once more before: one whose graph it has compiled is left unseen.

        Args:
            fn: what to call.
            argument: first argument, whose leaves may be replaced.
            args: the other ones.
            user: what fn is at heart, by which one that is not compiled is remembered.
            once: whether fn must not be called more than once; what is compiled then runs as it was written.
            keep: whether to keep every tensor.
        """
        tape = Tape()
        given = pytree.tree_leaves(argument)
        first = min((t.grad_fn._sequence_nr() for t in given if t.grad_fn is not None), default=None)
        key = getattr(user, "__code__", user)
        if first is not None and not once and "torch._dynamo" in sys.modules and not _remembered(key):
            with _unsaved():
                out = fn(argument, *args)
            if _compiled(pytree.tree_leaves(out), first):
                tape.opaque = True
                return tape, out
            with suppress(TypeError):  # not everything can be remembered
                _PLAIN.add(key)
        mode = _Recording(tape)
        tape.given = mode.begin(argument)
        with run_eagerly(), mode:
            out = fn(argument, *args)
        leaves, spec = pytree.tree_flatten(out)
        if keep:
            tape.kept = mode.kept
        tape.outputs = [(i, mode.read(t)) for i, t in enumerate(leaves) if isinstance(t, Tensor)]
        tape.out = [None if isinstance(t, Tensor) else t for t in leaves], spec
        return tape, out

    def replay(self, argument: Any, inputs: Sequence[Tensor]) -> Any:
        """What fn returns for another argument, `inputs` in the place of `self.inputs`."""
        values: dict[int, Tensor] = dict(zip(self.given, pytree.tree_leaves(argument), strict=True))
        values.update(zip(self._slots, inputs, strict=True))
        for step in self.operations:
            leaves = list(step.leaves)
            for place, slot in step.reads:
                leaves[place] = values[slot]
            args, kwargs = (leaves, {}) if step.spec is None else pytree.tree_unflatten(leaves, step.spec)
            with _context(step):
                out = step.func(*args, **kwargs)
            if step.makes:
                found = pytree.tree_leaves(out)
                read = [slot for _, slot in step.reads]
                for place, slot in step.makes:
                    # Forward mode would look through `no_grad`.
                    values[slot] = found[place] if step.recording or slot in read else found[place].detach()
        leaves = list(self.out[0])
        for place, slot in self.outputs:
            leaves[place] = values[slot]
        return pytree.tree_unflatten(leaves, self.out[1])


class _Recording(TorchFunctionMode):
    """Writes a tape while a function runs."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape
        self._slot: dict[int, int] = {}
        self.kept: list[Tensor] = []  # lest an id be used twice
        self._unseen: dict[int, bool] = {}  # slots filled without a graph, and whether with a tangent
        self._level = _level()
        self._first: int = torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]
        self._origins: set[Any] = set()

    def begin(self, argument: Any) -> list[int]:
        """The slots of the argument's leaves."""
        leaves = pytree.tree_leaves(argument)
        self._origins = {t.grad_fn for t in leaves if t.grad_fn is not None}
        return [self.made(t) for t in leaves]

    def read(self, t: Tensor) -> int:
        """The slot of a tensor that is read; a new one is an input."""
        slot = self._slot.get(id(t))
        if slot is None:
            slot = self.made(t)
            if functorch.maybe_get_level(t) > self._level:
                self._tape.opaque = True  # of a transform inside the function: of no use outside
                return slot
            if self._hidden(t):
                self._tape.opaque = True  # a function of the argument, and not by an operation
            self._tape.inputs.append(t)
            self._tape._slots.append(slot)
        elif slot in self._unseen and (t.requires_grad or (_is_dual(t) and not self._unseen[slot])):
            self._tape.opaque = True  # made without a derivative, and has one now: by a custom Function's forward
        return slot

    def _hidden(self, t: Tensor) -> bool:
        """Whether autograd leads from a tensor to the argument."""
        pending, seen = [t.grad_fn], set()
        while pending:
            node = pending.pop()
            if node in self._origins:
                return True
            # What is older than this evaluation does not depend on it.
            if node is not None and node not in seen and node._sequence_nr() >= self._first:
                seen.add(node)
                pending.extend(following for following, _ in node.next_functions)
        return False

    def made(self, t: Tensor) -> int:
        """The slot of a tensor that an operation returned: its own, where that is one that it was given."""
        slot = self._slot.get(id(t))
        if slot is None:
            slot = self._slot[id(t)] = len(self.kept)
            self.kept.append(t)
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
        if isinstance(func, OpOverload | OpOverloadPacket) and str(func).startswith("quantized."):
            self._tape.opaque = True  # has no derivative, which torch says in a warning, if at all
        if isinstance(out, Tensor):
            makes = [(0, self.made(out))]
        elif isinstance(out, _NESTED):
            makes = [(i, self.made(t)) for i, t in enumerate(pytree.tree_leaves(out)) if isinstance(t, Tensor)]
        else:
            makes = []
        if makes or (reads and out is None):  # the latter writes: an assignment by index, say
            recording = torch.is_grad_enabled()
            if not recording:
                read = [slot for _, slot in reads]  # what is written in place keeps the graph it has
                self._unseen.update((slot, _is_dual(self.kept[slot])) for _, slot in makes if slot not in read)
            device = self.kept[0].device.type
            autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
            self._tape.operations.append(Operation(func, leaves, spec, reads, makes, recording, autocast))
        return out


def _is_dual(t: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def _level() -> int:
    """How many `torch.func` transforms are at work."""
    top = functorch.peek_interpreter_stack()
    return 0 if top is None else top.level()


def run_eagerly() -> AbstractContextManager[Any]:
    """The context in which functions that `torch.compile` made run as they were written."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _unsaved() -> AbstractContextManager[Any]:
    """For a call whose graph is thrown away: checkpoints, which count what is saved, are not told of it."""
    if _autograd._top_saved_tensors_default_hooks(False) is None:  # torch.func, within fn too, would refuse ours
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(t: Tensor) -> Tensor:
    return t


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


def _context(step: Operation) -> AbstractContextManager[Any]:
    if step.recording and step.autocast is None:
        return nullcontext()
    stack = ExitStack()
    if not step.recording:
        stack.enter_context(torch.no_grad())
    if step.autocast is not None:
        stack.enter_context(torch.autocast(*step.autocast))
    return stack
