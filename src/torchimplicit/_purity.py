"""fn as a function: every evaluation of one solve draws the same random numbers and finds the same buffers.

A cell with dropout or noise is another map at each call, and one that writes into its buffers may be; neither has a
fixed point that could be found. What the first evaluation of a solve was given, all others are given too. They leave no
trace, so that afterwards the generators are as one evaluation leaves them, however many there were; this holds for
those of a backward pass as well. The buffers are left as one evaluation *at the solution* makes them, for which fn is
evaluated there once more (under `torch.func` transforms: as the first one makes them).

The first evaluation also shows whether there is anything to keep: a fn that draws nothing and changes nothing in it is
called as it is from then on. One that begins to do so later is not noticed.

What is kept: torch's default generators, the CPU's and that of the state's device; and the buffers, changed in place or
by assignment, of modules in training mode within reach of fn (see `_training_modules`). Not kept: other generators
(Python's, NumPy's, a `torch.Generator` that fn is given) and other state (attributes, captured tensors).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_MANY = 100
"""Items of a list, tuple or dict from which on it is data, and not looked into for modules."""


class _Buffer:
    """One buffer: where it is found, and what it was before the first evaluation."""

    __slots__ = ("before", "module", "name", "rebound", "tensor", "version", "writes")

    def __init__(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        self.module = module
        self.name = name
        self.tensor = tensor
        self.version = _version(tensor)
        self.before = None if tensor is None else tensor.detach().clone()
        self.rebound = self.writes = False

    @property
    def current(self) -> Tensor | None:
        """The buffer of that name now."""
        buffers = self.module._buffers
        return buffers[self.name] if self.name in buffers else None  # noqa: SIM401 - a scripted module's has no `get`

    def changed(self) -> bool:
        """Whether the first evaluation left another buffer, or others values in it."""
        self.rebound = self.current is not self.tensor
        self.writes = _version(self.tensor) != self.version
        # Batch norm's kernels write running statistics without raising the version.
        return self.rebound or self.writes or not _equal(self.tensor, self.before)

    def again(self) -> Tensor | None:
        """What was there before: a copy, or the tensor itself where fn lets it be or it takes part in gradients."""
        if self.tensor is None or self.before is None:
            return None
        if not self.writes and (self.rebound or self.tensor.requires_grad):
            return self.tensor
        return self.before.clone()

    def put(self, tensor: Tensor | None) -> None:
        """Put a tensor in the buffer's place."""
        self.module._buffers[self.name] = tensor

    def leave(self, made: Tensor | None) -> None:
        """Give the buffer the value that an evaluation made, in the way the first one did."""
        if self.rebound or self.tensor is None or made is None:
            self.put(made)
        else:
            # Graphs that have saved the tensor must not take this for more of a change than fn's own.
            (self.tensor if self.writes else self.tensor.data).copy_(made)


class Purity:
    """Calls fn such that, for the length of one solve, it is a function.

    Args:
        device: of the state.
        fn: the user's function.
        args: what it is called with beside the state.

    Attributes:
        known: whether the first evaluation has shown that fn is a function by itself.
    """

    def __init__(self, device: torch.device, fn: Any, args: tuple[Any, ...]) -> None:
        self.known = False
        self._device = device
        self._first: tuple[Any, ...] | None = (fn, *args)
        self._generators: list[Tensor] = []
        self._buffers: list[_Buffer] = []
        self._made: list[Tensor | None] = []

    @property
    def keeps_state(self) -> bool:
        """Whether fn changes buffers."""
        return bool(self._buffers)

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)`, of the solve's fn; the first call is an ordinary one, the others repeat its conditions."""
        if self._first is None:
            with self._as_at_first():
                return fn(*args)
        watched = _buffers(_training_modules(self._first))
        before = _generators(self._device)
        out = fn(*args)
        if not all(map(torch.equal, before, _generators(self._device))):
            self._generators = before
        if watched:
            with _unseen():
                changed = {b.module for b in watched if b.changed()}
            # All of a module's: from a start of zero a running mean stays what it was, at first.
            self._buffers = [b for b in watched if b.module in changed]
        self._first = None
        self.known = not self._generators and not self._buffers
        return out

    def leave(self) -> None:
        """Leave the buffers as the last evaluation made them."""
        with _unseen():
            for buffer, made in zip(self._buffers, self._made, strict=True):
                buffer.leave(made)

    @contextmanager
    def _as_at_first(self) -> Iterator[None]:
        """What the first evaluation found; afterwards, what is there now."""
        buffers = [b.current for b in self._buffers]
        states = _generators(self._device) if self._generators else []
        try:
            with _unseen():
                self._restore(self._generators)
            # Copies: a recorded evaluation keeps what it has read, and one tensor may stand in several places. A tape
            # sees them made, so that a replay makes its own.
            with torch.inference_mode(False):
                copies = {id(b.tensor): b.again() for b in self._buffers}
            for buffer in self._buffers:
                buffer.put(copies[id(buffer.tensor)])
            yield
            self._made = [None if b.current is None else b.current.detach() for b in self._buffers]
        finally:
            with _unseen():
                self._restore(states)
            for buffer, tensor in zip(self._buffers, buffers, strict=True):
                buffer.put(tensor)

    def _restore(self, states: list[Tensor]) -> None:
        for i, state in enumerate(states):
            if i == 0:
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, self._device)


def _generators(device: torch.device) -> list[Tensor]:
    """The states of the default generators that fn may draw from."""
    cpu = torch.get_rng_state()
    return [cpu, torch.cuda.get_rng_state(device)] if device.type == "cuda" else [cpu]


@contextmanager
def _unseen() -> Iterator[None]:
    """For what is no part of fn: nothing is recorded, by autograd or by the modes that watch fn's operations."""
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        yield


def _training_modules(things: tuple[Any, ...]) -> Iterator[nn.Module]:
    """The modules in training mode among `things`, and within their reach.

    Reached are: what a module contains; a method's object; what a `partial` holds; what a function has in its closure
    and defaults, and the modules among the globals that it names; the attributes of other callable objects; the items
    of lists, tuples and dicts, but not of those within them.
    """
    pending, seen = [*things], set()
    while pending:
        thing = pending.pop()
        if id(thing) in seen or thing is None or isinstance(thing, Tensor):
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            if thing.training:
                yield thing
            pending += thing._modules.values()
        elif isinstance(thing, list | tuple | dict):
            items = (thing.values() if isinstance(thing, dict) else thing) if len(thing) < _MANY else ()
            pending += [item for item in items if not isinstance(item, list | tuple | dict)]
        elif isinstance(thing, FunctionType):
            pending += _contents(thing)
        elif isinstance(thing, MethodType):
            pending += thing.__self__, thing.__func__
        elif isinstance(thing, partial):
            pending += thing.func, *thing.args, *thing.keywords.values()
        elif callable(thing) and not isinstance(thing, type):
            pending += getattr(thing, "__dict__", {}).values()


def _contents(function: FunctionType) -> Iterator[Any]:
    """What a function holds: its closure, its defaults, and the modules among the globals that it names."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    yield from (thing for thing in named if isinstance(thing, nn.Module))


def _buffers(modules: Iterable[nn.Module]) -> list[_Buffer]:
    """The modules' buffers, but for those that a lazy one has not made yet."""
    found = [(m, name, t) for m in modules for name, t in m._buffers.items()]
    if not found:
        return []
    with _unseen():
        return [_Buffer(*each) for each in found if not isinstance(each[2], nn.UninitializedBuffer)]


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    try:
        return torch.equal(one, other)
    except RuntimeError:  # a tensor without values (meta), or of a layout that has no comparison
        return True
