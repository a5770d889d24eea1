"""A layer's solve as one operator of torch, so that a training step is one graph under `torch.compile`.

The operator is opaque: the compiler sees tensors go in and come out. When it runs, the layer solves as it always does,
into a graph of autograd's that waits for the operator of the backward pass. The graph belongs to the memory of a
`token`, a tensor that the compiler keeps for that pass, and is gone when the token is.

All that the layer reads is an input of the operator: start, arguments, parameters and buffers. A tensor that requires
a gradient and is none of these would get none, which is an error.

This module is imported where a compiler first asks for the operator: to define one takes ten milliseconds.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import compress, count
from operator import is_not
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.library import Library, register_fake
from torch.nn.utils.stateless import _reparametrize_module

from .._solution import PyTree
from ._enrolled import enrolled

R = TypeVar("R")


class _Held(bytearray):
    """The memory of a token: its number, and what waits for the backward pass."""

    values: tuple[Tensor, ...]
    sources: list[Tensor]


_held: WeakValueDictionary[int, _Held] = WeakValueDictionary()
_numbers = count()

_library = Library("torchimplicit", "FRAGMENT")
# Of the tensors `starts` are the start (none: the layer's own) and `inputs` the arguments; the rest is the layer's
# state. `wanted`, which of them require a gradient, and `autocast`, its dtype if it is enabled, are found out where the
# operator is recorded, and given where it runs.
_library.define(
    "solve(Tensor[] tensors, int starts, int inputs, int layer, bool[]? wanted=None, ScalarType? autocast=None)"
    " -> (Tensor[], Tensor)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
_library.define("solve_backward(Tensor?[] grads, Tensor token, Tensor[] sources) -> Tensor[]")
_SOLVE: Any = torch.ops.torchimplicit.solve.default
_BACKWARD: Any = torch.ops.torchimplicit.solve_backward.default


def solve_in_graph(layer: nn.Module, number: int, inputs: tuple[Tensor, ...], start: PyTree | None) -> Any:
    """The solution by the operator: for the compiler to trace.

    Args:
        layer: it.
        number: what `enroll` gave it.
        inputs: its arguments.
        start: a tensor or a tuple of two or more; None is zeros like the first input.
    """
    starts = () if start is None else start if isinstance(start, tuple) else (start,)
    values, _ = _SOLVE([*starts, *inputs, *_state(layer, set())], len(starts), len(inputs), number)
    return tuple(values) if isinstance(start, tuple) else values[0]


def _state(module: nn.Module, seen: set[Tensor]) -> list[Tensor]:
    """Parameters and buffers, each one once. (`parameters()` makes the compiler guard twice as much.)"""
    found = []
    for own in (module._parameters, module._buffers):
        for t in own.values():
            if t is not None and t not in seen:
                seen.add(t)
                found.append(t)
    for part in module._modules.values():
        if part is not None:
            found.extend(_state(part, seen))
    return found


def _solve(
    tensors: Sequence[Tensor],
    starts: int,
    inputs: int,
    number: int,
    wanted: Sequence[bool] | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Solve, and hold the graph."""
    layer = enrolled(number)
    wanted = [False] * len(tensors) if wanted is None else wanted
    recorded = any(wanted)
    with torch.set_grad_enabled(recorded):
        leaves = [_leaf(t, w, recorded) for t, w in zip(tensors[: starts + inputs], wanted, strict=False)]
        start = None if not starts else leaves[0] if starts == 1 else tuple(leaves[:starts])
        state, own = tensors[starts + inputs :], _state(layer, set())
        kind = tensors[0].device.type
        given = leaves[starts:]
        same = len(own) == len(state) and not any(map(is_not, own, state))
        if same and autocast is None and not torch.is_autocast_enabled(kind) and not any(map(_has_hooks, own)):
            value = layer.solve(*given, start=start).value
        else:
            own, others = _in_place_of(layer, own, state, wanted[starts + inputs :], recorded)
            with torch.autocast(kind, autocast, enabled=autocast is not None), _reparametrize_module(layer, others):
                value = layer.solve(*given, start=start).value
    values = value if isinstance(value, tuple) else (value,)
    held = _Held(next(_numbers).to_bytes(8, "little"))
    if recorded:
        held.values, held.sources = values, list(compress((*leaves, *own), wanted))
        _refuse_others(layer, values, held.sources)
        _held[int.from_bytes(held, "little")] = held
    # Copies, too: what is held must not be written to.
    like = tensors[: max(starts, 1)]
    return [_copy(z, t) for z, t in zip(values, like, strict=True)], torch.frombuffer(held, dtype=torch.int64)


def _has_hooks(t: Tensor) -> bool:
    return t._backward_hooks is not None


def _in_place_of(
    layer: nn.Module, own: Sequence[Tensor], state: Sequence[Tensor], wanted: Sequence[bool], recorded: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What stands for the layer's state, and by which names: other tensors, as in `functional_call`, where they are
    given, and a detached one for a parameter with hooks, which are to be called just once. Its own are left as they
    are: a cell may write to its buffers.
    """
    used, places = [], {}
    for mine, t, w in zip(own, state, wanted, strict=True):
        used.append(mine if mine is t and not _has_hooks(t) else _leaf(t, w, recorded))
        places[id(mine)] = used[-1]
    named = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
    return used, {name: places[id(t)] for name, t in named if places[id(t)] is not t}


def _copy(z: Tensor, like: Tensor) -> Tensor:
    """The values in memory of their own, laid out as the compiler expects."""
    if z.is_contiguous() and like.is_contiguous():
        return z.detach().clone()
    return torch.empty_like(like, dtype=z.dtype, requires_grad=False).copy_(z.detach())


def _leaf(t: Tensor, wanted: bool, kept: bool) -> Tensor:
    """A start of the graph. What is kept in one is a copy: the compiler may write other things to its memory."""
    return (t.detach().clone() if kept else t.detach()).requires_grad_(wanted)


def _refuse_others(layer: nn.Module, values: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """An error if the values depend on a tensor that requires a gradient and is none of the sources."""
    known = {id(t) for t in sources}
    pending: list[Any] = [z.grad_fn for z in values]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known and variable.numel():  # a graph may end in an empty one
            raise RuntimeError(
                f"{type(layer).__name__}: its cell reads a tensor of shape {tuple(variable.shape)} which requires a "
                "gradient and is neither an input nor a parameter of the layer: in a graph of torch.compile it would "
                "have none. Make it one of these, or set in_graph = False on the layer."
            )
        pending.extend(following for following, _ in node.next_functions)


def _solve_backward(grads: Sequence[Tensor | None], token: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """The gradients with respect to the sources."""
    held = _held.get(int(token))
    if held is None:
        raise RuntimeError(
            "the graph of a layer's solve is gone: what torch.compile saved for the backward pass was copied or moved "
            "(by saved_tensors_hooks, say). Set in_graph = False on the layer."
        )
    pairs = [(z, g) for z, g in zip(held.values, grads, strict=True) if g is not None and z.requires_grad]
    if not pairs:
        return [torch.zeros_like(s) for s in sources]
    values, given = zip(*pairs, strict=True)
    # As `torch.autograd.grad(…, retain_graph=True, allow_unused=True)`, without its checks.
    found = _engine_run_backward(
        values, given, True, False, tuple(held.sources), allow_unreachable=True, accumulate_grad=False
    )
    taken = {g.untyped_storage().data_ptr() for g in given}
    return [_own(g, s, taken) for g, s in zip(found, sources, strict=True)]


def _own(grad: Tensor | None, source: Tensor, taken: set[int]) -> Tensor:
    """The gradient, in memory of its own."""
    if grad is None:
        return torch.zeros_like(source)
    if grad.is_contiguous() and source.is_contiguous() and grad.untyped_storage().data_ptr() not in taken:
        return grad
    return _copy(grad, source)


class _Recorded(torch.autograd.Function):
    """The operator where autograd records: in the compiler's hands."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        starts: int, inputs: int, layer: int, wanted: list[bool], autocast: torch.dtype | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            values, token = _SOLVE(tensors, starts, inputs, layer, wanted, autocast)
        return token, *values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, _, ctx.wanted, _, *tensors = inputs
        ctx.mark_non_differentiable(output[0])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0], *compress(tensors, ctx.wanted))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        token, *sources = ctx.saved_tensors
        found = iter(_BACKWARD(list(grads[1:]), token, sources))
        return (*[None] * 5, *(next(found) if wanted else None for wanted in ctx.wanted))


def _runs(tensors: Sequence[Tensor]) -> bool:
    """Whether these are tensors of numbers, which nobody traces."""
    return not torch._C._len_torch_dispatch_stack() and all(type(t) in (Tensor, nn.Parameter) for t in tensors)


def _dispatch(
    tensors: Sequence[Tensor],
    starts: int,
    inputs: int,
    layer: int,
    wanted: Sequence[bool] | None = None,
    autocast: torch.dtype | None = None,
) -> Any:
    """The operator as autograd finds it: recorded, run or passed on."""
    if wanted is None:
        kind = tensors[0].device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        wanted = [torch.is_grad_enabled() and t.requires_grad for t in tensors]
        if any(wanted):
            token, *values = _Recorded.apply(starts, inputs, layer, wanted, autocast, *tensors)  # pyright: ignore
            return values, token
    if _runs(tensors):
        return _solve(tensors, starts, inputs, layer, wanted, autocast)
    with torch._C._AutoDispatchBelowAutograd():
        return _SOLVE(tensors, starts, inputs, layer, wanted, autocast)


def _dispatch_backward(grads: Sequence[Tensor | None], token: Tensor, sources: Sequence[Tensor]) -> Any:
    """The operator of the backward pass as autograd finds it."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*grads, *sources)):
        raise RuntimeError(
            "the gradient of a layer in a graph of torch.compile has no derivative; for second derivatives set "
            "in_graph = False on the layer, or do not compile it."
        )
    if _runs(sources):
        return _solve_backward(grads, token, sources)
    with torch._C._AutoDispatchBelowAutograd():
        return _BACKWARD(grads, token, sources)


def _of_autocast() -> torch._C.DispatchKeySet:
    """Its dispatch keys: what is excluded where nothing special is going on."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    for name in dir(torch._C.DispatchKey):
        if name.startswith("Autocast"):
            keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys


_AUTOCAST = _of_autocast()


def _recording(kernel: Callable[..., R]) -> Callable[..., R]:
    """The kernel, called below autograd, or below a mode that looks at operators, as if it were called outside.

    Else nothing would be recorded in it; and below a mode complex conjugates would not even be taken.
    """

    @wraps(kernel)
    def call(*args: Any) -> R:
        excluded = torch._C._dispatch_tls_local_exclude_set() & _AUTOCAST
        with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
            return kernel(*args)

    return call


def _fake(
    tensors: Sequence[Tensor],
    starts: int,
    inputs: int,
    layer: int,
    wanted: Sequence[bool] | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor]:
    """What comes out, without numbers."""
    if starts:
        values = [torch.empty_like(t) for t in tensors[:starts]]
    else:
        x = tensors[0]
        single = autocast is not None and x.is_floating_point() and x.itemsize < 4
        values = [torch.empty_like(x, dtype=torch.float32 if single else x.dtype)]
    return values, torch.empty(1, dtype=torch.int64)


def _fake_backward(grads: Sequence[Tensor | None], token: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(s) for s in sources]


for _name, _kernel, _of_autograd, _shapes in (
    ("solve", _solve, _dispatch, _fake),
    ("solve_backward", _solve_backward, _dispatch_backward, _fake_backward),
):
    _library.impl(_name, _recording(_kernel), "CompositeExplicitAutograd")
    _library.impl(_name, _of_autograd, "Autograd")
    register_fake(f"torchimplicit::{_name}", _shapes, lib=_library)
