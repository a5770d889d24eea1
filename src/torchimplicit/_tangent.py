"""The derivative of a taped evaluation, applied without evaluating again: one product costs no more than the function.

Reverse mode over reverse mode, which is how `AutogradJacobian.mv` applies a Jacobian, takes a convolution and three
copies for what is one convolution here, and forward mode computes the function beside its derivative each time. What is
known of an operation is used: of one that is linear in what varies, and of a function of single numbers. Any other is
left to forward mode, alone.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils import _pytree as pytree

from ._tape import Operation, Tape

T = torch.Tensor
_PRODUCTS: set[Any] = {
    *(functional.linear, functional.conv1d, functional.conv2d, functional.conv3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
    *(torch.matmul, torch.mm, torch.bmm, torch.mul, T.matmul, T.mm, T.bmm, T.mul),
    *(T.__matmul__, T.__mul__, T.__rmul__),
}
"""Linear in either of their first two arguments; a third one, the bias, is added."""
_SUMS: set[Any] = {torch.add, T.add, T.__add__, T.__radd__}
_POINTWISE: set[Any] = {
    *(torch.tanh, torch.relu, torch.sigmoid, T.tanh, T.relu, T.sigmoid, functional.relu, functional.sigmoid),
    *(functional.silu, functional.gelu, functional.softplus, functional.elu, functional.leaky_relu),
}
"""Functions of single numbers."""

_HOPELESS = (NotImplementedError, RuntimeError, TypeError, ValueError)
"""What says that it is to be left to reverse mode."""

Tangents = dict[int, Tensor]
Rule = Callable[[Tangents], dict[int, Tensor]]


class _Slot(NamedTuple):
    """In the place of a tensor among the arguments of an operation."""

    number: int


def differentiable(t: Tensor) -> bool:
    """Whether a tensor's dtype has derivatives."""
    return t.is_floating_point() or t.is_complex()


class Differential:
    """`dfn` of a taped evaluation with respect to its argument.

    Args:
        tape: made with `keep=True`.

    Raises:
        NotImplementedError: some operation writes in place, or was made out of sight.
    """

    def __init__(self, tape: Tape) -> None:
        if tape.opaque:
            raise NotImplementedError
        self._tape = tape
        self._rules: list[Rule] = []
        varies = set(tape.given)
        for step in tape.operations:
            read = {slot for _, slot in step.reads}
            made = {slot for _, slot in step.makes}
            if not made or made & read:
                raise NotImplementedError
            if not read & varies or not step.recording:
                continue
            self._rules.append(_rule(step, tape.kept, varies))
            varies |= {slot for slot in made if differentiable(tape.kept[slot])}

    def __call__(self, argument: Any) -> Any:
        """The derivative in the direction of an argument, in the structure of what the function returned."""
        tape = self._tape
        tangents = dict(zip(tape.given, pytree.tree_leaves(argument), strict=True))
        for rule in self._rules:
            tangents.update(rule(tangents))
        leaves, spec = tape.out
        leaves = list(leaves)
        for place, slot in tape.outputs:
            tangent = tangents.get(slot)
            value = tape.kept[slot]
            leaves[place] = torch.zeros_like(value) if tangent is None else tangent.to(value.dtype)
        return pytree.tree_unflatten(leaves, spec)


def _rule(step: Operation, values: Mapping[int, Tensor] | list[Tensor], varies: set[int]) -> Rule:
    """How the tangents of what an operation returns come from those of what it is given."""
    leaves = list(step.leaves)
    for place, slot in step.reads:
        leaves[place] = _Slot(slot)
    args, kwargs = (leaves, {}) if step.spec is None else pytree.tree_unflatten(leaves, step.spec)
    args = list(args)
    moving = [slot for _, slot in step.reads if slot in varies]
    fixed = [values[a.number] if isinstance(a, _Slot) else a for a in args]
    if len(moving) == 1 and len(step.makes) == 1 and _Slot(moving[0]) in args[:2]:
        (slot,), place, made = moving, args.index(_Slot(moving[0])), step.makes[0][1]
        func = step.func
        if func in _PRODUCTS:
            options = {k: values[v.number] if isinstance(v, _Slot) else v for k, v in kwargs.items()}
            if "bias" in options:
                options["bias"] = None
            before, after = fixed[:place], fixed[place + 1 :]
            if len(args) > 2:
                after[1 - place] = None
            return lambda of: {made: func(*before, of[slot], *after, **options)} if slot in of else {}
        if func in _SUMS and (place == 0 or not kwargs) and values[slot].shape == values[made].shape:
            return lambda of: {made: of[slot]} if slot in of else {}
        if func in _POINTWISE and place == 0 and values[slot].is_floating_point():
            with torch.enable_grad():
                point = values[slot].detach().requires_grad_()
                out = func(point, *fixed[1:], **kwargs)
            (slope,) = torch.autograd.grad(out, point, torch.ones_like(out))
            return lambda of: {made: of[slot] * slope} if slot in of else {}
    return lambda of: _forward_mode(step, values, of)


def _forward_mode(step: Operation, values: Mapping[int, Tensor] | list[Tensor], tangents: Tangents) -> Tangents:
    """The tangents of what any operation returns."""
    leaves = list(step.leaves)
    with forward_ad.dual_level():
        for place, slot in step.reads:
            value, tangent = values[slot].detach(), tangents.get(slot)
            leaves[place] = value if tangent is None else forward_ad.make_dual(value, tangent.to(value.dtype))
        args, kwargs = (leaves, {}) if step.spec is None else pytree.tree_unflatten(leaves, step.spec)
        found = pytree.tree_leaves(step.func(*args, **kwargs))
        made = {slot: forward_ad.unpack_dual(found[place]).tangent for place, slot in step.makes}
    return {slot: tangent for slot, tangent in made.items() if tangent is not None}


class Tangent:
    """`p ↦ J p` of a taped evaluation; None once an operation turned out to have no derivative in forward mode.

    Args:
        tape: made with `keep=True`.
        run: calls a function of the argument in the function's own conditions, and packs what it returns.
    """

    def __init__(self, tape: Tape, run: Callable[[Callable[[Any], Any], Tensor], Tensor]) -> None:
        self._run = run
        self._apply: Differential | None = None
        with suppress(*_HOPELESS):
            self._apply = Differential(tape)

    @property
    def usable(self) -> bool:
        """Whether there is any hope."""
        return self._apply is not None

    def __call__(self, p: Tensor) -> Tensor | None:
        """`J p`, `(B, n)`."""
        if self._apply is None:
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._run(self._apply, p)
        except _HOPELESS:
            self._apply = None
            return None
