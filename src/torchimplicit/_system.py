"""An implicit equation as a pure function of its unknowns and of every tensor it reads: what derivative rules need."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._problem import Kind
from ._tangent import differentiable as differentiable

Call = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""`(z, tensors)` to fn's value: `(B, n)` to `(B, n)`, to the objective `(B,)`, or to rows of residuals `(B, m)`."""


def transformed() -> bool:
    """Whether a `torch.func` transform is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def forward_levels() -> int:
    """How many levels of forward mode are at work."""
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    levels = sum(str(i.key()).endswith("Jvp") for i in retrieve_all_functorch_interpreters())
    # torch.func.jvp opens a level of torch.autograd.forward_ad too.
    return levels + (forward_ad._current_level >= 0 and not levels)


def traced() -> bool:
    """Whether operations are being written down by `make_fx`, as `torch.func.linearize` does."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is not None and proxies.get_proxy_mode() is not None


def untraced() -> AbstractContextManager[Any]:
    """The context in which nothing is written down: what is computed counts as constant."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return nullcontext() if proxies is None else proxies.disable_proxy_modes_tracing()


def refuse_forward_over_forward(kind: str) -> None:
    """A custom Function's derivative in forward mode has none itself in torch: it would silently be zero.

    Raises:
        RuntimeError: under two levels of forward mode.
    """
    if forward_levels() > 1:
        raise RuntimeError(
            f"{kind}: forward mode over forward mode (jvp of jvp, jacfwd of jacfwd) is not supported by torch for "
            "custom derivatives; take one of the two in reverse mode: jacfwd(jacrev(f)), torch.func.hessian, or jvp "
            "of grad."
        )


def batched(t: Tensor) -> bool:
    """Whether a tensor carries dims that only a `vmap` sees: torch.func's, or that of `is_grads_batched`."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return transformed() or functorch.is_legacy_batchedtensor(t)


def pull(fn: Callable[..., Tensor], primals: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """`cotangentᵀ ∂fn/∂primals` at the primals; differentiable, by the caller's grad mode or transforms."""
    if transformed() or forward_ad._current_level >= 0:
        back: Any = torch.func.vjp(fn, *primals)[1]
        return back(cotangent)
    again = torch.is_grad_enabled()
    # The caller's autocast is that of its own backward pass, not of fn.
    with torch.enable_grad(), torch.autocast(cotangent.device.type, enabled=False):
        # A view each: the derivative by a place, also where two places hold the same tensor.
        own = [p.view_as(p) if again and p.requires_grad else p.detach().requires_grad_() for p in primals]
        out = fn(*own)
        if not out.requires_grad:
            return tuple(torch.zeros_like(p) for p in primals)
        return torch.autograd.grad(out, own, cotangent, create_graph=again, materialize_grads=True)


def push(fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor], like: Tensor) -> Tensor:
    """`∂fn/∂primals · tangents`, as the derivative of the linear map `c ↦ cᵀ ∂fn/∂primals`.

    `torch.func.jvp` cannot be used in the rules of a Function under eager forward mode.

    Args:
        fn: of the primals.
        primals: where.
        tangents: as many.
        like: of the shape and dtype that fn returns.
    """

    def paired(c: Tensor) -> Tensor:
        total = torch.zeros((), dtype=like.dtype, device=like.device)
        for g, t in zip(pull_in_graph(fn, primals, c), tangents, strict=True):
            total = total + ((g.conj() * t).real if g.is_complex() else g * t).sum()
        return total

    (product,) = pull(paired, [torch.zeros_like(like)], torch.ones((), dtype=like.dtype, device=like.device))
    return product


def pull_in_graph(fn: Callable[..., Tensor], primals: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """`pull` inside a function that is itself differentiated."""
    with torch.enable_grad():
        return pull(fn, primals, cotangent)


@dataclass(frozen=True, eq=False, repr=False)
class System:
    """`r(z, tensors) = 0` for `B` independent problems, `z` being `(B, n)`.

    Attributes:
        kind: what fn's value means.
        base: fn of one lane.
        settings: how to solve it, and whom to tell; shared with the systems made of this one.
        maps: what `vmap` has put in front of the batch, the innermost first: size, the tensors' dims, randomness.
    """

    kind: Kind
    base: Call
    settings: Any
    maps: tuple[tuple[int, tuple[int | None, ...], str], ...] = field(default=())

    @property
    def lanes(self) -> tuple[int, ...]:
        """Sizes of the mapped dims, the outermost first."""
        return tuple(size for size, _, _ in reversed(self.maps))

    def call(self, z: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """fn, for all lanes."""
        if not self.maps:
            return self.base(z, tensors)
        inner, (size, dims, randomness) = replace(self, maps=self.maps[:-1]), self.maps[-1]
        z = z.reshape(size, z.shape[0] // size, *z.shape[1:])
        out = torch.func.vmap(inner.call, in_dims=(0, list(dims)), randomness=randomness)(z, list(tensors))
        return out.reshape(out.shape[0] * out.shape[1], *out.shape[2:])

    def value(self, z: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """fn's value, or the gradient of its objective, `(B, n)`."""
        if self.kind in ("fixed_point", "root"):
            return self.call(z, tensors)
        (gradient,) = pull_in_graph(lambda z: self.objective(z, tensors).sum(), [z], z.new_ones(()))
        return gradient

    def objective(self, z: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Of a minimisation, `(B,)`."""
        out = self.call(z, tensors)
        return 0.5 * out.square().sum(dim=1) if self.kind == "least_squares" else out

    def residual(self, z: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """`r`: `fn(z) − z` for a fixed point, the negative value for the others; `A = −∂r/∂z`."""
        value = self.value(z, tensors)
        return value - z if self.kind == "fixed_point" else -value

    def mapped(self, size: int, dims: Sequence[int | None], randomness: str = "same") -> "System":
        """The system of `size` copies, `z` being `(size·B, n)`.

        Args:
            size: how many.
            dims: 0 for a tensor that has a dim of that size in front, None for one that the copies share.
            randomness: whether random numbers that fn draws are the `"same"` for all copies, or `"different"`.
        """
        return replace(self, maps=(*self.maps, (size, tuple(dims), randomness)))

    def widened(self) -> "System":
        """The system whose tensors have one more, mapped in every lane."""
        return replace(self, maps=tuple((size, (*dims, 0), randomness) for size, dims, randomness in self.maps))
