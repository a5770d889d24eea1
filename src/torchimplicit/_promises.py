"""What a function or cell says of itself beside its values, and whether what it does is what that was said of."""

from typing import Any

from torch import nn

from ._layout import Layout


def supplies_jacobian(fn: Any, layout: Layout) -> bool:
    """Whether fn supplies its Jacobian itself (see `JacobianOperator`); of one tensor in the usual order only.

    Not of a module that has hooks, on itself or within, nor of one whose `forward` is newer than its `linearize`,
    overridden in a subclass or on the instance: the closed form would know nothing of what they change.
    """
    if not layout.simple or layout.order is not None or not getattr(fn, "closed_form", True):
        return False
    return keeps(fn, "linearize") and not _hooked(fn)


def keeps(fn: Any, name: str) -> bool:
    """Whether fn has a method or an attribute of this name, and it is no older than its `forward`."""
    return hasattr(fn, name) and _age(fn, name) <= _age(fn, "forward")


def _hooked(fn: Any) -> bool:
    """Whether a module, or one within it, has forward or backward hooks."""
    return isinstance(fn, nn.Module) and any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in fn.modules()
    )


def _age(fn: Any, method: str) -> int:
    """How far up among the classes of fn a method is defined; −1 on the instance itself."""
    if method in getattr(fn, "__dict__", ()):
        return -1
    order = type(fn).__mro__
    return next((i for i, c in enumerate(order) if method in vars(c)), len(order))
