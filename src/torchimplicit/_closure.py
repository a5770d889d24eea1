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
        args, kwargs = self.swap((args, kwargs or {}))
        return func(*args, **kwargs)

    def swap(self, tree: Any) -> Any:
        """A pytree with the others in their places."""
        return pytree.tree_map(lambda t: self._replacements.get(id(t), t) if isinstance(t, Tensor) else t, tree)


def substituted(run: Callable[[], Any], old: list[Tensor], new: list[Tensor]) -> Any:
    """`run()` with each tensor of `old` replaced, by identity, by the one of `new`."""
    with _Substitution({id(o): n for o, n in zip(old, new, strict=True)}) as mode:
        out = run()
    return mode.swap(out)  # one of them may be returned as it is
