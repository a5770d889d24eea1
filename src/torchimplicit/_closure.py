"""Other tensors in the places of those that a function reads, while it runs."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class _Substitution(TorchFunctionMode):
    """Puts other tensors in the place of some, by identity."""

    def __init__(self, replacements: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def swap(leaf: Any) -> Any:
            return self._replacements.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(swap, (args, kwargs or {}))
        return func(*args, **kwargs)


def substituted(run: Callable[[], Any], old: list[Tensor], new: list[Tensor]) -> Any:
    """`run()` with each tensor of `old` replaced, by identity, by the one of `new`."""
    with _Substitution({id(o): n for o, n in zip(old, new, strict=True)}):
        return run()
