"""The derivative rules of a solution, to every order and in every mode, as two Functions that call each other.

`z* = solve(θ)` has `dz = A⁻¹ ∂r/∂θ dθ` with `A = −∂r/∂z`; `u = A⁻¹ v` or `A⁻ᵀ v` has `du = A⁻¹ (dv − dA u)`, another
linear solve. The rules of both are written with these two and with products that torch differentiates itself, so that
any order and any mix of modes follows.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ._eagerly import eagerly
from ._system import (
    System,
    batched,
    differentiable,
    pull,
    pull_in_graph,
    push,
    refuse_forward_over_forward,
    traced,
    transformed,
    untraced,
)

functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


class Settings(Protocol):
    """What a system is solved with; all tensors are plain ones, of no transform."""

    def solve(self, system: System, z0: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`z*`, and of each sample the status, the residual, the steps, and who stands in for it where it failed."""
        ...

    def isolated(self, tensors: Sequence[Tensor], donors: Tensor) -> list[Tensor]:
        """The tensors that a system needs: with the donors among them where samples failed."""
        ...

    def solve_linear(
        self, system: System, transposed: bool, v: Tensor, z: Tensor, status: Tensor, tensors: Sequence[Tensor]
    ) -> Tensor:
        """`A⁻¹ v` or `A⁻ᵀ v`, `(B, n)`; zero for samples without a derivative."""
        ...

    def require_exact(self) -> None:
        """Raise unless the linear solves are exact, so that they have derivatives and transposes."""
        ...


def solve(system: System, z0: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`z*`, `(B, n)`, differentiable in the tensors; of each sample the status, the residual, the steps, the donor."""
    return _Solve.apply(system, z0, *tensors)  # pyright: ignore[reportReturnType]


def solve_linear(
    system: System, transposed: bool, v: Tensor, z: Tensor, status: Tensor, tensors: Sequence[Tensor]
) -> Tensor:
    """`A⁻¹ v` or `A⁻ᵀ v`, differentiable in `v`, `z` and the tensors."""
    if batched(v) and not transformed():
        # Of `torch.autograd.grad(..., is_grads_batched=True)`, whose vmap knows no rules of Functions.
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        whole: Tensor = torch._remove_batch_dim(v, level, 1, 0)  # pyright: ignore[reportPrivateImportUsage]
        copies = system.mapped(len(whole), [None] * len(tensors))
        rows = _rows(whole, 0, len(whole)), _rows(z, None, len(whole)), _rows(status, None, len(whole))
        found = solve_linear(copies, transposed, *rows, tensors)
        return torch._add_batch_dim(found.reshape(whole.shape), 0, level)  # pyright: ignore[reportPrivateImportUsage]
    if transformed():
        refuse_forward_over_forward(system.kind)
    return _LinearSolve.apply(system, transposed, v, z, status, *tensors)  # pyright: ignore[reportReturnType]


def gradients(
    system: System, v: Tensor, z: Tensor, status: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """What the gradient `v` with respect to z* is with respect to each tensor that needs one; None for the others."""
    u = solve_linear(system, True, v, z, status, tensors)
    places = [i for i, (t, need) in enumerate(zip(tensors, needed, strict=False)) if need and differentiable(t)]
    fn = _at_places(system.residual, z, tensors, places)
    found = pull(fn, [tensors[i] for i in places], u)
    return _in_places(found, places, len(tensors))


class _Solve(torch.autograd.Function):
    """`z*` as a function of the tensors."""

    @staticmethod
    def forward(system: System, z0: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return system.settings.solve(system, z0, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        system, z0, *tensors = inputs
        ctx.system, ctx.z0 = system, (z0.shape, z0.dtype, z0.device)
        z, status, _, _, donors = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(z, status, donors, *tensors)
        ctx.save_for_forward(z, status, donors, *tensors)

    @staticmethod
    @eagerly  # `backward()` may be called in the midst of a function that is compiled
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, status, donors, *tensors = _saved(ctx)
        wide = ctx.system.settings.isolated(tensors, donors)
        found = gradients(ctx.system, grads[0], z, status, wide, ctx.needs_input_grad[2:])[: len(tensors)]
        if ctx.system.settings.failed:
            # Where every sample of a lane failed there is nobody to stand in.
            alive = ctx.system.settings.adjoint.without_gradient(status).logical_not().any()
            found = [None if g is None else torch.where(alive, g, 0.0) for g in found]
        return None, torch.zeros_like(z), *found

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        ctx.system.settings.require_exact()
        z, status, donors, *tensors = ctx.saved_tensors
        places = [i for i, t in enumerate(tangents[2:]) if t is not None and differentiable(tensors[i])]
        if not places:
            return torch.zeros_like(z), None, None, None, None
        tensors = ctx.system.settings.isolated(tensors, donors)
        if traced():
            found = [tangents[2 + i] for i in places]
            return _product_in_one(ctx.system, z, status, tensors, places, found), None, None, None, None
        fn = _at_places(ctx.system.residual, z, tensors, places)
        right = push(fn, [tensors[i] for i in places], [tangents[2 + i] for i in places], z)
        return solve_linear(ctx.system, False, right, z, status, tensors), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, system: System, z0: Tensor, *tensors: Tensor) -> Any:
        size = info.batch_size
        mapped, dims = _fronted(tensors, in_dims[2:])
        out = solve(system.mapped(size, dims, _randomness(info)), _rows(z0, in_dims[1], size), mapped)
        split = tuple(t.reshape(size, t.shape[0] // size, *t.shape[1:]) for t in out)
        return split, (0,) * len(split)


class _LinearSolve(torch.autograd.Function):
    """`u = A⁻¹ v`, or `A⁻ᵀ v`, as a function of `v`, `z` and the tensors."""

    @staticmethod
    def forward(system: System, transposed: bool, v: Tensor, z: Tensor, status: Tensor, *tensors: Tensor) -> Tensor:
        # The caller's autocast is that of its own backward pass, not of fn.
        with torch.autocast(v.device.type, enabled=False):
            return system.settings.solve_linear(system, transposed, v, z, status, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        system, transposed, _, z, status, *tensors = inputs
        ctx.system, ctx.transposed = system, transposed
        ctx.save_for_backward(output, z, status, *tensors)
        ctx.save_for_forward(output, z, status, *tensors)

    @staticmethod
    @eagerly
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.system.settings.require_exact()
        u, z, status, *tensors = _saved(ctx)
        s = solve_linear(ctx.system, not ctx.transposed, grads[0], z, status, tensors)
        left, right = (u, s) if ctx.transposed else (s, u)
        # d⟨s, u⟩ = −⟨left, dA right⟩, and A = −∂r/∂z.
        # A buffer needs none, and some operations refuse to hear of one.
        needed = ctx.needs_input_grad[5:]
        places = [i for i, t in enumerate(tensors) if needed[i] and differentiable(t)]

        def product(z: Tensor, *some: Tensor) -> Tensor:
            full = _filled(tensors, places, some)
            (row,) = pull_in_graph(lambda z: ctx.system.residual(z, full), [z], left)
            return row

        found = pull(product, [z, *(tensors[i] for i in places)], right)
        return None, None, s, found[0], None, *_in_places(found[1:], places, len(tensors))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        ctx.system.settings.require_exact()
        u, z, status, *tensors = ctx.saved_tensors
        dv, dz = tangents[2], tangents[3]
        right = torch.zeros_like(u) if dv is None else dv
        moving = [i for i, t in enumerate(tangents[5:]) if t is not None and differentiable(tensors[i])]
        if dz is not None or moving:
            dz = torch.zeros_like(z) if dz is None else dz

            def product(z: Tensor, *some: Tensor) -> Tensor:
                """`∂r/∂z u`, or its transpose's: `−A u`."""
                full = _filled(tensors, moving, some)
                at = lambda z: ctx.system.residual(z, full)  # noqa: E731
                with torch.enable_grad():
                    return pull(at, [z], u)[0] if ctx.transposed else push(at, [z], [u], u)

            primals = [z, *(tensors[i] for i in moving)]
            right = right + push(product, primals, [dz, *(tangents[5 + i] for i in moving)], u)
        return solve_linear(ctx.system, ctx.transposed, right, z, status, tensors)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        system: System,
        transposed: bool,
        v: Tensor,
        z: Tensor,
        status: Tensor,
        *tensors: Tensor,
    ) -> Any:
        size = info.batch_size
        mapped, dims = _fronted(tensors, in_dims[5:])
        v, z, status = (_rows(t, d, size) for t, d in zip((v, z, status), in_dims[2:5], strict=True))
        # Copies of right-hand sides alone are all of one system.
        randomness = "same" if in_dims[3] is None else _randomness(info)
        out = solve_linear(system.mapped(size, dims, randomness), transposed, v, z, status, mapped)
        return out.reshape(size, out.shape[0] // size, out.shape[1]), 0


def _product_in_one(
    system: System, z: Tensor, status: Tensor, tensors: Sequence[Tensor], places: list[int], tangents: list[Tensor]
) -> Tensor:
    """`dz/dθ` of the tensors in some places, formed, times their tangents: one product for a trace to keep."""
    needed = [i in places for i in range(len(tensors))]
    with untraced():
        basis = torch.eye(z.numel(), dtype=z.dtype, device=z.device).reshape(-1, *z.shape)

        def rows(v: Tensor) -> list[Tensor]:
            found = gradients(system, v, z, status, tensors, needed)
            return [g for g in found if g is not None]

        parts = torch.func.vmap(rows)(basis) if len(basis) else []
    total = torch.zeros_like(z).reshape(-1)
    for part, tangent in zip(parts, tangents, strict=True):
        both = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (part, tangent))
        matrix, vector = (t.reshape(n, -1) for t, n in zip(both, (len(basis), 1), strict=True))
        total = total + (matrix.to(z.dtype) * vector.to(z.dtype)).sum(dim=1)
    return total.reshape(z.shape)


def _saved(ctx: Any) -> list[Tensor]:
    """The saved tensors; what `torch.func.vjp` returns may be called when its transform is over."""
    found = []
    for t in ctx.saved_tensors:
        inner = functorch.unwrap_if_dead(t)
        while inner is not t:
            t, inner = inner, functorch.unwrap_if_dead(inner)
        found.append(t)
    return found


def _at_places(
    residual: Callable[[Tensor, Sequence[Tensor]], Tensor], z: Tensor, tensors: Sequence[Tensor], places: list[int]
) -> Callable[..., Tensor]:
    """The residual at z as a function of the tensors in some places."""
    return lambda *some: residual(z, _filled(tensors, places, some))


def _randomness(info: Any) -> str:
    """That of a vmap; one that allows none has seen by now that fn draws none, or draws the same for all."""
    return "different" if info.randomness == "different" else "same"


def _filled(tensors: Sequence[Tensor], places: list[int], some: Sequence[Tensor]) -> list[Tensor]:
    full = list(tensors)
    for i, t in zip(places, some, strict=True):
        full[i] = t
    return full


def _in_places(found: Sequence[Tensor], places: list[int], count: int) -> list[Tensor | None]:
    full: list[Tensor | None] = [None] * count
    for i, t in zip(places, found, strict=True):
        full[i] = t
    return full


def _fronted(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> tuple[list[Tensor], list[int | None]]:
    """Tensors with their mapped dim in front, and which have one."""
    moved = [t if d is None else t.movedim(d, 0).contiguous() for t, d in zip(tensors, dims, strict=True)]
    return moved, [None if d is None else 0 for d in dims]


def _rows(t: Tensor, dim: int | None, size: int) -> Tensor:
    """`(B, ...)`, mapped or not, as `(size·B, ...)`."""
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.reshape(size * t.shape[1], *t.shape[2:])
