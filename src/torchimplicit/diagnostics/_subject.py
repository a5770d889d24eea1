"""A model under examination: the tensors it is differentiated by, and runs of it that leave no trace."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .._solution import PyTree, Solution
from ..solvers import Auto, Method
from ._map import is_implicit
from ._monitor import monitor


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        outputs: the output's floating-point and complex tensors, with their graph.
        solutions: those of the implicit layers that ran, as far as they can be seen.
    """

    outputs: list[Tensor]
    solutions: list[Solution]


@dataclass(frozen=True)
class Subject:
    """A module or function with its inputs.

    Attributes:
        caller: the public call, for messages.
        fn: what is examined.
        inputs: copies of the caller's: every floating-point or complex tensor among them requires a gradient.
        leaves: what the output is differentiated by, by name: parameters as in `named_parameters`, inputs as
            `inputs[0]`, other leaves that fn reads, as a closure does, as `closure[0]`.
        layers: the implicit layers inside a module: every submodule with the attributes `solver` and `adjoint`.
        after: applied to the output; None is the identity.
    """

    caller: str
    fn: Callable[..., PyTree]
    inputs: tuple[Any, ...]
    leaves: dict[str, Tensor]
    layers: list[nn.Module]
    after: Callable[[PyTree], PyTree] | None = None

    @classmethod
    def of(
        cls,
        caller: str,
        fn: Callable[..., PyTree],
        inputs: tuple[Any, ...],
        options: Mapping[str, Any],
        after: Callable[[PyTree], PyTree] | None = None,
    ) -> "Subject":
        """Copy the inputs, evaluate once and see what is read.

        Args:
            caller: the public call, for messages.
            fn: a module or function.
            inputs: the caller's.
            options: keywords for fn.
            after: see `Subject`.

        Raises:
            ValueError: nothing to differentiate by, or an output that does not depend on it.
        """
        if not callable(fn):
            raise TypeError(f"{caller}: layer must be an nn.Module or a function, but is {type(fn).__name__}.")
        modules = list(fn.modules()) if isinstance(fn, nn.Module) else []
        layers = [m for m in modules if is_implicit(m)]
        parameters = dict(fn.named_parameters()) if isinstance(fn, nn.Module) else {}
        leaves: dict[str, Tensor] = {name: p for name, p in parameters.items() if p.requires_grad}
        with untouched(fn, inputs):
            paths, spec = pytree.tree_flatten_with_path(inputs)
            copies = [_copied(value) for _, value in paths]
            for (path, _), leaf in zip(paths, copies, strict=True):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaves[f"inputs{pytree.keystr(path)}"] = leaf
            subject = cls(caller, fn, pytree.tree_unflatten(copies, spec), leaves, layers, after)
            reader = _Reader([*parameters.values(), *leaves.values()])
            # A compiler that is in use would trace the reader too.
            compiled = "torch._dynamo" in sys.modules
            eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
            with eager, reader, subject.with_options(on_failure="ignore"):
                outputs = subject.run(options).outputs
            leaves.update({f"closure[{i}]": leaf for i, leaf in enumerate(reader.found)})
        if not leaves:
            raise ValueError(
                f"{caller}: there is nothing to differentiate by: layer has no parameter that requires a gradient and "
                "inputs hold no floating-point or complex tensor; unfreeze a parameter or give such an input."
            )
        if not any(t.requires_grad for t in outputs):
            raise ValueError(
                f"{caller}: the output of layer requires no gradient, though {next(iter(leaves))} does; it was "
                "computed without these tensors, from detached ones or under no_grad: keep the graph."
            )
        return subject

    def run(self, options: Mapping[str, Any]) -> Run:
        """Evaluate, with a graph. The inputs are handed over as copies: fn may write into them."""
        solutions: list[Solution] = []
        given = pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, self.inputs)
        with monitor(self.fn) if isinstance(self.fn, nn.Module) else nullcontext() as log:
            out = self.fn(*given, **options)
        if log is not None:
            solutions = log.solutions
        if isinstance(out, Solution):
            solutions.append(out)
            out = out.value
        out = out if self.after is None else self.after(out)
        tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        outputs = [t for t in tensors if t.is_floating_point() or t.is_complex()]
        if not outputs:
            raise TypeError(
                f"{self.caller}: layer must return a floating-point or complex tensor, a pytree of them or a Solution, "
                f"but it returned {type(out).__name__}."
            )
        return Run(outputs, solutions)

    def gradients(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
        """`Σ ∂⟨cotangent, output⟩/∂leaf` by backward, for every leaf; zero where it is not reached."""
        pairs = [(out, v) for out, v in zip(outputs, cotangents, strict=True) if out.requires_grad]
        found = torch.autograd.grad(
            [out for out, _ in pairs], list(self.leaves.values()), [v for _, v in pairs], allow_unused=True
        )
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(self.leaves.items(), found, strict=True)
        }

    def untouched(self) -> AbstractContextManager[None]:
        """A block that leaves the model and torch's random numbers as they were."""
        return untouched(self.fn, self.inputs)

    @property
    def epsilon(self) -> float:
        """Of the coarsest dtype among the leaves."""
        return max(torch.finfo(t.dtype).eps for t in self.leaves.values())

    def with_options(self, **options: Any) -> AbstractContextManager[None]:
        """Other options on the implicit layers, inside the block; a layer without such an option goes without."""
        return exchanged([(m, name, value) for m in self.layers for name, value in options.items() if name in vars(m)])

    def with_tolerance(self, rtol: float) -> AbstractContextManager[None]:
        """The layers' own solvers at another tolerance, with as many steps as they take by default."""
        changes: list[tuple[nn.Module, str, Any]] = []
        for layer in self.layers:
            solver = Auto() if layer.solver is None else layer.solver
            if isinstance(solver, Method):
                changes.append((layer, "solver", replace(solver, rtol=rtol, atol=None)))
                changes += [(layer, "max_steps", None)] if "max_steps" in vars(layer) else []
        return exchanged(changes)


@contextmanager
def untouched(fn: Any, inputs: PyTree = ()) -> Iterator[None]:
    """Grad mode on; and torch's random numbers and a module's buffers and modes as they were, afterwards.

    Args:
        fn: a module, or something else that holds no state.
        inputs: their devices' random numbers are kept too, beside the CPU's and the module's.
    """
    modules = list(fn.modules()) if isinstance(fn, nn.Module) else []
    held = [(m, dict(m._buffers), m.training) for m in modules]
    buffers = [b for _, own, _ in held for b in own.values() if b is not None]
    values = [(b, b.detach().clone()) for b in buffers]
    parameters = fn.parameters() if isinstance(fn, nn.Module) else []
    tensors = chain(parameters, buffers, (t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)))
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    here = [device for device in devices if device.type == kind]
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(here, device_type=kind):
            yield
    finally:
        for module, own, training in held:
            module.training = training
            for name in module._buffers.keys() - own.keys():
                del module._buffers[name]
            for name, buffer in own.items():
                if name not in module._buffers or module._buffers[name] is not buffer:
                    module._buffers[name] = buffer
        for buffer, before in values:
            if not torch.equal(buffer, before):
                buffer.data.copy_(before)  # not an in-place change that a graph of the caller's would refuse


def random_like(tensors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Standard normal tensors of the same shapes, dtypes and devices; the same on every device."""
    drawn = []
    for t in tensors:
        dtype = torch.complex128 if t.is_complex() else torch.float64
        drawn.append(torch.randn(t.shape, generator=generator, dtype=dtype, device="cpu").to(t.dtype).to(t.device))
    return drawn


def as_real(tensor: Tensor) -> Tensor:
    """Dense, real and in double precision, for inner products: `⟨a, b⟩ = Re Σ ā b`."""
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    tensor = tensor.cpu() if tensor.device.type == "mps" else tensor  # which has no double precision
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.to(torch.float64)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """`⟨a, b⟩`, real, over all tensors."""
    return float(sum(torch.sum(as_real(x) * as_real(y)).cpu() for x, y in zip(a, b, strict=True)))


def check_seed(caller: str, seed: Any) -> None:
    """Raise `ValueError` unless it is an integer >= 0."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"{caller}: seed={seed!r} is not valid; give an integer >= 0.")


@contextmanager
def exchanged(changes: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Other values for attributes of modules, inside the block."""
    before = [(module, name, vars(module)[name]) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone()
    return copy.requires_grad_() if copy.is_floating_point() or copy.is_complex() else copy


class _Reader(TorchFunctionMode):
    """Notes the leaves of autograd that an operation reads and that are neither known nor made meanwhile."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        # Kept alive with their ids, lest an id be used twice.
        self._known = {id(t): t for t in known}
        self.found: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for t in _differentiable((args, kwargs)):
            if id(t) not in self._known:
                self._known[id(t)] = t
                self.found.append(t)
        out = func(*args, **(kwargs or {}))
        for t in _differentiable((args, kwargs, out)):  # such as a result of requires_grad_
            self._known.setdefault(id(t), t)
        return out


def _differentiable(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.requires_grad and t.is_leaf]
