"""Functions that are compiled when they are first called, for any number of samples."""

from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch

_OPTIONS: Any = {
    "cpp_wrapper": True,
    "size_asserts": False,
    "cpp.enable_floating_point_contract_flag": "fast",
}


class CompiledFunction:
    """A function compiled for any number of samples, but for every size and dtype by itself, when it is first called.

    Args:
        function: of tensors, and at last of what is constant.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._ready: dict[Any, Callable[..., Any]] = {}

    def __call__(self, key: Any, samples: tuple[int, ...], *args: Any) -> Any:
        """The function's value.

        Args:
            key: what is constant: of another one another function is compiled.
            samples: which of the arguments are `(B, …)`.
            args: of the function.

        Raises:
            RuntimeError: there is no compiler, or it fails.
        """
        function = self._ready.get(key)
        if function is not None:
            return function(*args)
        function = torch.compile(_another(self._function), fullgraph=True, options=_OPTIONS)
        for place in samples:
            torch._dynamo.mark_dynamic(args[place], 0)
        try:
            found = function(*args)
        except Exception as error:
            raise RuntimeError(
                "TanhEquilibrium(compiled=True): the loop could not be compiled, which takes a C++ compiler that "
                f"torch.compile can use; leave compiled=True out. ({type(error).__name__}: {error})"
            ) from error
        self._ready[key] = function
        return found


def _another(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own: Dynamo compiles each code but so many times."""
    assert isinstance(function, FunctionType)
    code: CodeType = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
