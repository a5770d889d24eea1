"""`Layout`: any pytree of tensors to one real matrix `(B, n)` and back, differentiably."""

import dataclasses
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import torchimplicit as ti
from torchimplicit._layout import Layout

REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
DTYPES = REAL + COMPLEX


def tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=wide).to(dtype)


@st.composite
def states(draw: st.DrawFn) -> tuple[Any, int]:
    """A pytree of tensors with a common batch shape, and the number of batch dims."""
    batch = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    seeds = st.integers(0, 10**6)
    leaf = st.builds(
        lambda shape, dtype, seed: tensor((*batch, *shape), dtype, seed),
        st.lists(st.integers(0, 3), max_size=2),
        st.sampled_from(DTYPES),
        seeds,
    )
    tree = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
        ),
        max_leaves=4,
    )
    return draw(tree), len(batch)


@settings(max_examples=50)
@given(states())
@example(((torch.ones(1), torch.full((1,), 2 + 3j)), 0))
def test_unpacking_undoes_packing_exactly(state: tuple[Any, int]) -> None:
    z, batch_dims = state
    leaves, spec = pytree.tree_flatten(z)
    layout = Layout.of(z, batch_dims)
    matrix = layout.pack(leaves)
    reals = sum(prod(t.shape[batch_dims:]) * (2 if t.is_complex() else 1) for t in leaves)
    assert matrix.shape == layout.matrix_shape == (prod(leaves[0].shape[:batch_dims]), reals)
    assert matrix.dtype == layout.dtype
    assert matrix.dtype in (torch.float32, torch.float64)
    back, spec_back = pytree.tree_flatten(layout.unpack(matrix))
    assert spec_back == spec
    for one, other in zip(leaves, back, strict=True):
        assert other.dtype == one.dtype
        assert other.shape == one.shape
        assert torch.equal(one, other)  # widening is exact, and so is its way back


@settings(max_examples=25)
@given(states())
def test_row_of_the_matrix_belongs_to_one_sample(state: tuple[Any, int]) -> None:
    z, batch_dims = state
    leaves, _ = pytree.tree_flatten(z)
    leaves = [t for t in leaves if not t.is_complex()]
    assume(leaves)
    z = tuple(leaves)
    layout = Layout.of(z, batch_dims)
    matrix = layout.pack(leaves)
    assume(0 not in matrix.shape)
    row = matrix.shape[0] // 2
    changed = matrix.clone()
    changed[row] += 1.0
    moved = pytree.tree_leaves(layout.unpack(changed))
    for one, other in zip(leaves, moved, strict=True):
        differs = (one != other).reshape(matrix.shape[0], -1).any(dim=1)
        assert differs.tolist() == [i == row and one.numel() > 0 for i in range(matrix.shape[0])]


@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("second", DTYPES, ids=str)
def test_matrix_is_as_precise_as_the_most_precise_leaf_and_never_less_than_single(
    first: torch.dtype, second: torch.dtype
) -> None:
    layout = Layout.of((torch.zeros(2, dtype=first), torch.zeros(3, dtype=second)), 0)
    double = {torch.float64, torch.complex128} & {first, second}
    assert layout.dtype == (torch.float64 if double else torch.float32)


@pytest.mark.parametrize("batch_dims", [0, 1, 2, 3])
def test_batch_dims_split_the_shape(batch_dims: int) -> None:
    z = torch.arange(24.0).reshape(2, 3, 4)
    layout = Layout.of(z, batch_dims)
    assert layout.matrix_shape == (prod(z.shape[:batch_dims]), prod(z.shape[batch_dims:]))
    assert torch.equal(layout.pack([z]).flatten(), z.flatten())
    samples = torch.arange(float(layout.matrix_shape[0]))
    assert layout.per_sample(samples).shape == z.shape[:batch_dims]
    trace = layout.per_sample(samples.expand(5, -1))
    assert trace.shape == (5, *z.shape[:batch_dims])


def test_complex_entry_is_a_pair_of_real_columns() -> None:
    z = torch.tensor([[1 + 2j, 3 - 4j], [5j, -6 + 0j]], dtype=torch.complex128)
    expected = torch.tensor([[1, 2, 3, -4], [0, 5, -6, 0]], dtype=torch.float64)
    assert torch.equal(Layout.of(z, 1).pack([z]), expected)
    assert torch.equal(Layout.of(z, 1).pack([z.conj()]), expected * torch.tensor([1, -1, 1, -1]))


def test_single_tensor_of_the_matrix_dtype_is_not_copied() -> None:
    z = torch.randn(2, 3)
    assert Layout.of(z, 1).pack([z]).data_ptr() == z.data_ptr()
    assert Layout.of({"z": z}, 1).pack([z]).data_ptr() == z.data_ptr()


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(3, 2).T,
        lambda: torch.randn(1, 3).expand(2, 3),
        lambda: torch.randn(4, 3)[::2],
        lambda: torch.randn(3, 2, dtype=torch.complex64).T.conj(),
        lambda: torch.randn(2, 3, dtype=torch.complex64).imag,
        lambda: torch.randn(1, 3, dtype=torch.complex128).expand(2, 3),
    ],
    ids=["transposed", "expanded", "strided", "conjugated", "imaginary part", "expanded complex"],
)
def test_views_are_packed_by_their_entries(view: Any) -> None:
    z = view()
    layout = Layout.of((z,), 1)
    (back,) = layout.unpack(layout.pack([z]))
    assert torch.equal(back, z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("structure", ["bare", "tuple", "nested"])
def test_packing_and_unpacking_are_differentiable(dtype: torch.dtype, structure: str) -> None:
    leaves = [tensor((2, 3), dtype, 1).requires_grad_(), tensor((2,), torch.float64, 2).requires_grad_()]
    leaves = leaves[:1] if structure == "bare" else leaves
    tree = {"bare": leaves[0], "tuple": tuple(leaves), "nested": {"a": [leaves[0]], "b": leaves[-1]}}[structure]
    layout = Layout.of(tree, 1)

    def there_and_back(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(pytree.tree_leaves(layout.unpack(torch.sin(layout.pack(list(tensors))))))

    assert torch.autograd.gradcheck(there_and_back, tuple(leaves))


def test_gradient_reaches_a_half_precision_leaf_in_its_own_dtype() -> None:
    z = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    layout = Layout.of(z, 1)
    (3 * layout.pack([z])).sum().backward()
    assert z.grad is not None
    assert z.grad.dtype == torch.bfloat16
    assert torch.equal(z.grad, torch.full((2, 3), 3.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("z", [torch.ones(2, 3), (torch.ones(2, 3), {"a": torch.ones(2)})], ids=["tensor", "pytree"])
def test_output_of_the_same_layout_is_accepted(z: Any) -> None:
    leaves = Layout.of(z, 1).check_output(z, "fixed_point")
    assert all(a is b for a, b in zip(leaves, pytree.tree_leaves(z), strict=True))


def test_output_of_less_precision_is_accepted() -> None:
    assert Layout.of(torch.ones(3), 0).check_output(torch.ones(3).half(), "root")[0].dtype == torch.float16


SOLVERS = [ti.Picard(), ti.Anderson(), ti.Newton()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_mixed_state_is_solved_with_its_own_shapes_and_dtypes(solver: ti.solvers.Solver, batch_dims: int) -> None:
    x = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)

    def fn(z: dict[str, Any]) -> dict[str, Any]:
        a, (b,) = z["a"], z["b"]
        return {"a": (0.5j * a + x[:, None]), "b": [0.5 * b + (a.real.sum(1) + 1)]}

    z0 = {"a": torch.zeros(2, 3, dtype=torch.complex128), "b": [torch.zeros(2, dtype=torch.float64)]}
    sol = ti.fixed_point(fn, z0, solver=solver, batch_dims=batch_dims)
    a = (x.detach() / (1 - 0.5j))[:, None].expand(2, 3)
    torch.testing.assert_close(sol.value["a"].detach(), a, atol=1e-9, rtol=0)
    torch.testing.assert_close(sol.value["b"][0].detach(), 2 * (a.real.sum(1) + 1), atol=1e-9, rtol=0)
    sol.value["b"][0].sum().backward()
    # b = 2 (3 Re(x / (1 − i/2)) + 1), and Re 1/(1 − i/2) = 0.8
    torch.testing.assert_close(x.grad, torch.full((2,), 4.8, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.float32],
    ids=str,
)
def test_output_of_less_precision_than_the_state_leaves_the_state_its_dtype(
    solver: ti.solvers.Solver, dtype: torch.dtype
) -> None:
    state = torch.float32 if dtype == torch.float16 else torch.float64
    # In float16 a residual of 4 ε ‖fn(z)‖ = 0.008 is the least that is asked for: an error of twice that.
    rtol, atol = (1e-3, 2e-2) if dtype == torch.float16 else (None, 5e-3)
    solver = dataclasses.replace(solver, rtol=rtol)
    sol = ti.fixed_point(lambda z: (0.5 * z + 1).to(dtype), torch.zeros(4, dtype=state), solver=solver)
    assert sol.value.dtype == state
    torch.testing.assert_close(sol.value, torch.full((4,), 2.0, dtype=state), atol=atol, rtol=0)


def test_real_output_for_a_complex_state_is_taken_as_complex_or_refused_by_name() -> None:
    try:
        sol = ti.fixed_point(lambda z: 0.5 * z.abs() + 1, torch.zeros(3, dtype=torch.complex128))
    except TypeError as error:
        assert "complex128" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(sol.value, torch.full((3,), 2.0, dtype=torch.complex128))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "shape, batch_dims",
    [((), 0), ((1,), 1), ((2, 3), 2), ((0, 3), 1), ((0,), 0), ((3, 0), 1)],
)
def test_state_of_any_shape_is_solved_and_differentiated(
    solver: ti.solvers.Solver, shape: tuple[int, ...], batch_dims: int
) -> None:
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    z0 = torch.zeros(shape, dtype=torch.float64)
    sol = ti.fixed_point(lambda z: torch.cos(0.5 * z + a), z0, solver=solver, batch_dims=batch_dims, trace=True)
    assert sol.value.shape == shape
    assert sol.status.shape == sol.residual.shape == sol.steps.shape == shape[:batch_dims]
    assert sol.converged.all()
    assert sol.trace is not None
    assert sol.trace.shape[1:] == shape[:batch_dims]
    sol.value.sum().backward()
    z = sol.value.detach()
    slope = -torch.sin(0.5 * z + a.detach())
    torch.testing.assert_close(a.grad, (slope / (1 - 0.5 * slope)).sum(), atol=1e-9, rtol=0)
