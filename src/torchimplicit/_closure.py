"""The tensors a function reads beside its arguments: found, and replaced, while it runs."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class _Recorder(TorchFunctionMode):
    """Notes every tensor that an operation reads and none of them made."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        # Made tensors are kept alive with their ids, lest an id be used twice.
        self._known = {id(t): t for t in given}
        self.found: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) not in self._known:
                self.found.setdefault(id(leaf), leaf)
        out = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf) not in self.found:
                self._known.setdefault(id(leaf), leaf)
        return out


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


def closure_tensors(run: Callable[[], Any], given: list[Tensor]) -> list[Tensor]:
    """The tensors that `run()` reads and that are not in `given`: closures, parameters and arguments alike."""
    recorder = _Recorder(given)
    with recorder:
        run()
    return list(recorder.found.values())


def substituted(run: Callable[[], Any], old: list[Tensor], new: list[Tensor]) -> Any:
    """`run()` with each tensor of `old` replaced, by identity, by the one of `new`."""
    with _Substitution({id(o): n for o, n in zip(old, new, strict=True)}):
        return run()
