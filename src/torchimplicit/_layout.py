"""Pytrees of tensors to and from one real matrix `(B, n)`: the only shape that solvers see."""

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._solution import PyTree


@dataclass(frozen=True, repr=False)
class Layout:
    """How the leaves of a state lie in the columns of a matrix `(B, n)`.

    The first `batch_dims` dims of every leaf index the `B` independent problems. A complex leaf takes two real
    columns per entry, so that solvers and derivatives work on ℝⁿ and need no holomorphic functions. Leaves of less
    than single precision are widened: the solver's algebra is done in at least float32. A single leaf in the memory
    format `channels_last` keeps it: fn sees it so in every evaluation, and nothing is copied.

    Attributes:
        spec: the tree structure.
        shapes: shape of each leaf.
        dtypes: dtype of each leaf.
        batch_shape: the leading dims that index independent problems.
        sizes: real columns of each leaf.
        matrix_shape: `(B, n)`: the number of independent problems, and the real unknowns of one.
        dtype: dtype of the matrix.
        device: device of the matrix.
        simple: one real leaf of the matrix's own dtype, so that packing is a view.
        bare: `simple`, and the state is that tensor itself.
        order: the dims of a `channels_last` leaf as they lie in memory, outermost first; None for the usual order.
    """

    spec: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    batch_shape: torch.Size
    sizes: tuple[int, ...]
    matrix_shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    simple: bool
    bare: bool
    order: tuple[int, ...] | None

    shared: ClassVar[bool] = False
    """Whether other processes hold parts of the state (see `_spread`)."""

    @staticmethod
    def of(z: PyTree, batch_dims: int) -> "Layout":
        """Read the layout off a state.

        Raises:
            TypeError: if a leaf is no floating-point or complex tensor.
            ValueError: if `batch_dims` is negative, larger than a leaf's ndim, or the leaves' batch shapes differ.
        """
        if type(z) is not Tensor or type(batch_dims) is not int or torch.compiler.is_compiling():
            return Layout._read(z, batch_dims)
        key = (z.shape, z.dtype, z.device, z.layout, batch_dims, _order(z))
        found = _SEEN.get(key)
        if found is None:
            found = Layout._read(z, batch_dims)
            if len(_SEEN) == _KEPT:
                _SEEN.clear()
            _SEEN[key] = found
        return found

    @staticmethod
    def _read(z: PyTree, batch_dims: int) -> "Layout":
        leaves, spec = pytree.tree_flatten(z)
        _check_leaves(leaves, batch_dims)
        real = [leaf.dtype.to_real() if leaf.is_complex() else leaf.dtype for leaf in leaves]
        dtype = reduce(torch.promote_types, real, torch.float32)
        batch = leaves[0].shape[:batch_dims]
        sizes = tuple(prod(t.shape[batch_dims:]) * (2 if t.is_complex() else 1) for t in leaves)
        simple = len(leaves) == 1 and leaves[0].dtype == dtype
        return Layout(
            spec=spec,
            shapes=tuple(t.shape for t in leaves),
            dtypes=tuple(t.dtype for t in leaves),
            batch_shape=batch,
            sizes=sizes,
            matrix_shape=(prod(batch), sum(sizes)),
            dtype=dtype,
            device=leaves[0].device,
            simple=simple,
            bare=simple and spec.is_leaf(),
            order=_order(leaves[0]) if simple and batch_dims <= 1 else None,
        )

    def select(self, count: int) -> "Layout":
        """The same for `count` of the samples, in one batch dim."""
        dims = len(self.batch_shape)
        shapes = tuple(torch.Size((count, *shape[dims:])) for shape in self.shapes)
        part = object.__new__(Layout)  # `replace` takes as long as a cheap cell
        matrix_shape = count, self.matrix_shape[1]
        part.__dict__.update(self.__dict__, shapes=shapes, batch_shape=torch.Size((count,)), matrix_shape=matrix_shape)
        return part

    def pack(self, leaves: list[Tensor]) -> Tensor:
        """Leaves to the matrix `(B, n)`; differentiable."""
        if self.simple:
            leaf = leaves[0] if leaves[0].dtype == self.dtype else leaves[0].to(self.dtype)
            leaf = leaf if self.order is None else leaf.permute(self.order)
            return leaf if leaf.shape == self.matrix_shape else leaf.reshape(self.matrix_shape)
        columns = [
            (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).reshape(self.matrix_shape[0], size)
            for t, size in zip(leaves, self.sizes, strict=True)
        ]
        return torch.cat([c.to(self.dtype) for c in columns], dim=1)

    def rounded(self, matrix: Tensor) -> Tensor:
        """The matrix `(B, n)` as the leaves can hold it: rounded where they are of less precision."""
        if all(torch.finfo(dtype).eps <= torch.finfo(self.dtype).eps for dtype in self.dtypes):
            return matrix
        return self.pack(pytree.tree_leaves(self.unpack(matrix)))

    def unpack(self, matrix: Tensor) -> PyTree:
        """The matrix `(B, n)` to a pytree with the shapes and dtypes of the state; differentiable."""
        if self.bare and matrix.shape == self.shapes[0]:
            return matrix
        if self.simple:
            leaf = matrix.reshape(self.shapes[0]) if self.order is None else self._from_memory(matrix)
            return leaf if self.bare else pytree.tree_unflatten([leaf], self.spec)
        leaves = []
        for column, shape, dtype in zip(matrix.split(self.sizes, dim=1), self.shapes, self.dtypes, strict=True):
            if dtype.is_complex:
                pairs = column.to(dtype.to_real()).reshape(*shape, 2).clone(memory_format=torch.contiguous_format)
                leaves.append(torch.view_as_complex(pairs))
            else:
                leaves.append(column.to(dtype).reshape(shape))
        return pytree.tree_unflatten(leaves, self.spec)

    def _from_memory(self, matrix: Tensor) -> Tensor:
        """The matrix `(B, n)` as the `channels_last` leaf."""
        assert self.order is not None
        lying = matrix.reshape([self.shapes[0][d] for d in self.order])
        return lying.permute([self.order.index(d) for d in range(lying.ndim)])

    def per_sample(self, vector: Tensor) -> Tensor:
        """A vector `(..., B)` of per-sample figures in the batch shape `(..., *batch)`."""
        return vector if len(self.batch_shape) == 1 else vector.reshape((*vector.shape[:-1], *self.batch_shape))

    def check_output(self, out: Any, what: str) -> list[Tensor]:
        """The leaves of fn's output, checked against the state's structure, shapes and dtypes.

        Raises:
            TypeError: another structure (None, say), a non-floating dtype, or more precision than the state has.
            ValueError: another shape.
        """
        if self.bare and type(out) is Tensor and out.shape == self.shapes[0] and out.dtype == self.dtype:
            return [out]
        leaves, spec = pytree.tree_flatten(out)
        if spec != self.spec or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise TypeError(
                f"{what}: fn must return the structure of z0, {_describe(self.spec, self.shapes)}, "
                f"but it returned {_name(out)}; return one tensor for each leaf of z0."
            )
        for leaf, shape, dtype in zip(leaves, self.shapes, self.dtypes, strict=True):
            if leaf.shape != shape:
                raise ValueError(
                    f"{what}: fn must return the shape of z0, {tuple(shape)}, but it returned {tuple(leaf.shape)}; "
                    "give z0 the shape of the solution, or fix what fn returns."
                )
            floating = leaf.is_floating_point() or leaf.is_complex()
            if not floating or torch.promote_types(leaf.dtype, dtype) != dtype:
                raise TypeError(
                    f"{what}: fn returned {leaf.dtype} for a state of {dtype}; give z0 the dtype of the result, "
                    f"z0.to({leaf.dtype})."
                    if floating
                    else f"{what}: fn returned {leaf.dtype}; it must return a floating-point or complex tensor."
                )
        return [leaf.to(dtype) if dtype.is_complex else leaf for leaf, dtype in zip(leaves, self.dtypes, strict=True)]


_KEPT = 256
_SEEN: dict[tuple[Any, ...], Layout] = {}
"""The layouts of single tensors that were read, by all that they depend on; not more than `_KEPT` of them."""
_FORMATS = {4: (torch.channels_last, (0, 2, 3, 1)), 5: (torch.channels_last_3d, (0, 2, 3, 4, 1))}


def _order(leaf: Tensor) -> tuple[int, ...] | None:
    """How the dims of a tensor in `channels_last` lie in memory; None for any other."""
    if leaf.ndim not in _FORMATS or leaf.is_contiguous() or torch.compiler.is_compiling():
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(leaf):  # pyright: ignore[reportAttributeAccessIssue]
        return None
    memory_format, order = _FORMATS[leaf.ndim]
    return order if leaf.is_contiguous(memory_format=memory_format) else None


def _check_leaves(leaves: list[Any], batch_dims: int) -> None:
    if isinstance(batch_dims, bool) or not isinstance(batch_dims, int) or batch_dims < 0:
        raise ValueError(f"batch_dims={batch_dims!r} is not valid; give an integer >= 0.")
    if not leaves:
        raise TypeError("z0 has no tensors; give a tensor or a pytree (tuple, list, dict) of tensors.")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"z0 must hold tensors only, but a leaf is {_name(leaf)}; use torch.as_tensor.")
        if leaf.layout != torch.strided:
            raise TypeError(f"z0 must be a dense tensor, but its layout is {leaf.layout}; use z0.to_dense().")
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"z0 must be floating point or complex, but is {leaf.dtype}; use z0.float() or z0.double()."
            )
        if leaf.itemsize < 2:
            raise TypeError(
                f"z0 has the dtype {leaf.dtype}, too coarse to solve in; use z0.to(torch.bfloat16) or more."
            )
        if batch_dims > leaf.ndim:
            raise ValueError(
                f"batch_dims={batch_dims} is larger than z0.ndim={leaf.ndim} (shape {tuple(leaf.shape)}); "
                "give the number of leading dims that index independent problems."
            )
        if leaf.shape[:batch_dims] != leaves[0].shape[:batch_dims]:
            raise ValueError(
                f"batch_dims={batch_dims}: the leaves of z0 must share their first {batch_dims} dims, but have "
                f"{tuple(leaves[0].shape)} and {tuple(leaf.shape)}."
            )
        if leaf.device != leaves[0].device:
            raise ValueError(f"z0: all leaves must be on one device, but are on {leaves[0].device} and {leaf.device}.")


def _name(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__}"


def _describe(spec: pytree.TreeSpec, shapes: tuple[torch.Size, ...]) -> str:
    return (
        f"a tensor of shape {tuple(shapes[0])}"
        if spec.is_leaf()
        else str(pytree.tree_unflatten([tuple(s) for s in shapes], spec))
    )
