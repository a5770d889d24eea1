"""Bracketed scalars: the iterates of Chandrupatla's method, failures sample by sample, and what counts as a root."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import elementwise
from torch import Tensor

import torchimplicit as ti
from torchimplicit.solvers import _bracketing

DOUBLE = torch.float64
BOTH = pytest.mark.parametrize("cls", [ti.Bisection, ti.Chandrupatla])

# f(z, c) for arrays and tensors alike, the bracket, the range of c, and the tolerance on |f|
Function = Callable[[Any, Any], Any]
FUNCTIONS: dict[str, tuple[Function, tuple[float, float], tuple[float, float], float]] = {
    "cubic": (lambda z, c: z * z * z + z - c, (-2.0, 2.0), (-9.0, 9.0), 1e-12),
    "exp": (lambda z, c: _of(z).exp(z) - c, (-3.0, 3.0), (0.06, 20.0), 1e-12),
    "flat": (lambda z, c: (z - c) ** 9, (-1.0, 1.0), (-0.9, 0.9), 1e-40),
    "steep": (lambda z, c: _of(z).tanh(50 * (z - c)), (-1.0, 1.0), (-0.9, 0.9), 1e-12),
    "wiggly": (lambda z, c: z - c + _of(z).sin(8 * z), (-9.0, 9.0), (-5.0, 5.0), 1e-11),
    "square root": (lambda z, c: _of(z).sqrt(z) - c, (0.6, 9.0), (0.8, 2.9), 1e-13),
    "kink": (lambda z, c: _of(z).maximum(z - c, 0.01 * (z - c)), (-1.0, 3.0), (-0.9, 2.9), 1e-13),
    "huge": (lambda z, c: _of(z).expm1(40 * (z - c)), (-5.0, 5.0), (-4.0, 4.0), 1e-9),
}
EVERY_FUNCTION = pytest.mark.parametrize("name", FUNCTIONS)


def _of(z: Any) -> Any:
    return torch if isinstance(z, Tensor) else np


def _brackets(name: str, count: int) -> tuple[Function, Tensor, Tensor, Tensor, float]:
    """`f, lower, upper, c, tolerance` with ends of random distance to the root."""
    f, (low, high), (least, most), tolerance = FUNCTIONS[name]
    c = least + (most - least) * torch.rand(count, dtype=DOUBLE)
    lower = low - (0.5 if name == "square root" else 1.0) * torch.rand(count, dtype=DOUBLE)
    return f, lower, high + torch.rand(count, dtype=DOUBLE), c, tolerance


def _scipy(f: Function, lower: Tensor, upper: Tensor, c: Tensor, tolerance: float, **options: Any) -> Any:
    only_f = {"fatol": tolerance, "frtol": 0.0, "xatol": 0.0, "xrtol": 0.0}
    with np.errstate(over="ignore", invalid="ignore"):
        ends = (lower.numpy(), upper.numpy())
        return elementwise.find_root(f, ends, args=(c.numpy(),), tolerances=only_f, **options)


@EVERY_FUNCTION
def test_chandrupatla_takes_as_many_steps_as_scipys(name: str) -> None:
    f, lower, upper, c, tolerance = _brackets(name, 4000)
    theirs = _scipy(f, lower, upper, c, tolerance)
    solver = ti.Chandrupatla(lower, upper, rtol=0.0, atol=tolerance)
    sol = ti.root(f, lower, c, solver=solver, batch_dims=1)
    assert theirs.success.all()
    assert sol.converged.all()
    assert (f(sol.value, c).abs() <= tolerance).all()
    assert ((sol.value >= lower) & (sol.value <= upper)).all()
    difference = sol.steps - torch.from_numpy(theirs.nit)
    assert int(difference.abs().max()) <= 1
    assert int((difference != 0).sum()) <= 4
    torch.testing.assert_close(sol.value, torch.from_numpy(theirs.x), rtol=1e-9, atol=1e-4 if name == "flat" else 1e-9)


@EVERY_FUNCTION
def test_chandrupatla_evaluates_where_scipys_does(name: str) -> None:
    f, lower, upper, c, tolerance = _brackets(name, 1)
    tried: dict[str, list[float]] = {"ours": [], "theirs": []}

    def recorded(z: Any, c: Any) -> Any:
        tried["ours" if isinstance(z, Tensor) else "theirs"].append(float(z[0]))
        return f(z, c)

    solver = ti.Chandrupatla(lower, upper, rtol=0.0, atol=tolerance)
    with torch.no_grad():
        sol = ti.root(recorded, lower, c, solver=solver, batch_dims=1)
    _scipy(recorded, lower, upper, c, tolerance)
    assert sol.evaluations == len(tried["ours"]) == int(sol.steps) + 3
    assert len(tried["theirs"]) == int(sol.steps) + 2
    # The rounding of one point reaches the next magnified; the first steps have not had the time.
    torch.testing.assert_close(
        torch.tensor(tried["ours"][1:9]), torch.tensor(tried["theirs"][:8]), rtol=1e-9, atol=1e-10
    )


def test_steps_of_bisection_are_halvings() -> None:
    """f = z − c on [0, 1] with c = 1/3: the middles are 1/2, 1/4, 3/8, …, at a distance of 2^{-k}/3 and 2^{-k}/6."""
    third = torch.full((1,), 1 / 3, dtype=DOUBLE)
    tried: list[float] = []

    def f(z: Tensor) -> Tensor:
        tried.append(z.item())
        return z - third

    with torch.no_grad():
        sol = ti.root(f, torch.zeros(1, dtype=DOUBLE), solver=ti.Bisection(0.0, 1.0, rtol=0.0, atol=1e-3), batch_dims=1)
    assert tried == [0.0, 0.0, 1.0, 0.5, 0.25, 0.375, 0.3125, 0.34375, 0.328125, 0.3359375, 0.33203125, 0.333984375]
    assert sol.steps.tolist() == [9]
    assert sol.value.item() == 0.333984375
    assert sol.residual.item() == pytest.approx(0.333984375 - 1 / 3, rel=1e-12)


@pytest.mark.parametrize(
    "name, share",
    [
        ("cubic", 0.25),
        ("exp", 0.25),
        ("square root", 0.1),
        ("wiggly", 0.35),
        ("steep", 0.35),
        ("huge", 0.4),
        ("flat", 1.2),  # |f| <= 1e-40 is all within 1e-4 of the root: little is left to gain
        ("kink", 1.5),  # no parabola is like it
    ],
)
def test_share_of_bisections_steps_that_chandrupatla_needs(name: str, share: float) -> None:
    f, lower, upper, c, tolerance = _brackets(name, 200)
    options = {"rtol": 0.0, "atol": tolerance}
    runs = [
        ti.root(f, lower, c, solver=cls(lower, upper, **options), batch_dims=1)
        for cls in (ti.Bisection, ti.Chandrupatla)
    ]
    bisection, chandrupatla = (run.steps.double().mean().item() for run in runs)
    assert all(run.converged.all() for run in runs)
    assert chandrupatla < share * bisection


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_default_tolerance_is_met_and_the_fixed_point_found(cls: type, dtype: torch.dtype) -> None:
    x = torch.linspace(0.1, 1.5, 50, dtype=dtype)
    sol = ti.fixed_point(lambda z, x: torch.cos(z) * x, torch.ones_like(x), x, solver=cls(0.0, 2.0), batch_dims=1)
    assert sol.converged.all()
    residual = torch.cos(sol.value) * x - sol.value
    assert (residual.abs() <= 1.01 * torch.finfo(dtype).eps ** (2 / 3) * sol.value.abs()).all()
    assert torch.equal(sol.residual, residual.abs())
    assert int(sol.steps.max()) <= (38 if dtype == DOUBLE else 19)  # halvings of [0, 2] to a relative ε^(2/3)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(cls: type, dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, 2.0, 8.0], dtype=dtype, requires_grad=True)
    sol = ti.root(lambda z, a: z * z - a, torch.ones_like(a), a, solver=cls(0.5, 4.0), batch_dims=1)
    assert sol.value.dtype == dtype
    assert sol.converged.all()
    sol.value.sum().backward()
    torch.testing.assert_close(a.grad, (0.5 / a.detach().sqrt()), rtol=0.03, atol=0.0)


@BOTH
def test_gradient_is_that_of_the_implicit_function_theorem(cls: type) -> None:
    a = torch.linspace(-20.0, 20.0, 41, dtype=DOUBLE, requires_grad=True)
    sol = ti.root(lambda z, a: z**3 + z - a, torch.zeros_like(a), a, solver=cls(-4.0, 4.0, rtol=1e-14), batch_dims=1)
    (gradient,) = torch.autograd.grad(sol.value.sum(), a)
    torch.testing.assert_close(sol.value**3 + sol.value, a.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, 1 / (3 * sol.value.detach() ** 2 + 1), rtol=1e-12, atol=0.0)


@BOTH
def test_bounds_and_batches_of_every_shape(cls: type) -> None:
    c = torch.rand(3, 4, dtype=DOUBLE) + 0.5
    lower, upper = torch.tensor([[0.0], [0.1], [0.2]]), torch.tensor([2.0, 3.0, 4.0, 5.0])
    for z0, target, low, high in (
        (torch.ones_like(c), c, lower, upper),
        (torch.ones_like(c), c, 0, upper),
        (torch.ones_like(c), c, lower.double(), 3),
        (torch.ones(12, 1, dtype=DOUBLE), c.reshape(12, 1), 0.0, torch.full((12, 1), 2)),
        (torch.ones((), dtype=DOUBLE), c[0, 0], 0.0, 2.0),
        (torch.ones(1, dtype=DOUBLE), c[0, :1], 0.0, 2.0),
    ):
        sol = ti.root(lambda z, c: z * z - c, z0, target, solver=cls(low, high), batch_dims=z0.ndim)
        assert sol.status.shape == z0.shape
        torch.testing.assert_close(sol.value, target.sqrt())
    leaf = {"z": torch.ones(12, 1, dtype=DOUBLE)}
    sol = ti.root(lambda z: {"z": z["z"] ** 2 - c.reshape(12, 1)}, leaf, solver=cls(0.0, 2.0), batch_dims=1)
    torch.testing.assert_close(sol.value["z"], c.reshape(12, 1).sqrt())


@BOTH
def test_failures_are_those_of_their_samples_only(cls: type) -> None:
    """z² − c on [0, 2]: no sign change for c < 0 and c > 4, NaN at an end, NaN on the way, infinite at an end."""
    c = torch.tensor([2.0, -1.0, 5.0, torch.nan, 3.25, 1.0, 0.5], dtype=DOUBLE)
    kind = torch.tensor([0, 0, 0, 0, 1, 2, 0])

    def f(z: Tensor, c: Tensor, kind: Tensor) -> Tensor:
        value = torch.where((kind == 1) & (z > 0.9) & (z < 1.9), torch.nan, z * z - c)
        return torch.where((kind == 2) & ((z == 0) | (z == 2)), (z - 1) * torch.inf, value)

    z0 = torch.full_like(c, 0.75)
    sol = ti.root(f, z0, c, kind, solver=cls(0.0, 2.0), batch_dims=1, on_failure="ignore")
    good, bad, hole = ti.Status.CONVERGED, ti.Status.STALLED, ti.Status.NONFINITE
    assert sol.status.tolist() == [good, bad, bad, hole, hole, good, good]
    assert sol.steps[[1, 2, 4]].tolist() == [1, 1, 1]
    alone = [0, 5, 6]
    clean = ti.root(f, z0[alone], c[alone], kind[alone], solver=cls(0.0, 2.0), batch_dims=1)
    assert torch.equal(sol.value[alone], clean.value)
    assert torch.equal(sol.steps[alone], clean.steps)
    torch.testing.assert_close(clean.value, c[alone].sqrt())
    # the best point handed to the loop and its residual; NaN at the first trial leaves z0
    assert sol.value[[1, 2, 4]].tolist() == [0.0, 2.0, 0.75]
    assert sol.residual[[1, 2, 4]].tolist() == [1.0, 1.0, 3.25 - 0.75**2]


@BOTH
def test_hole_is_not_forgotten_between_two_looks(cls: type) -> None:
    """fn is NaN on (½ − h, ½ + h), the first trial, and fine at all others up to the next look."""
    f = lambda z: torch.where((z - 0.5).abs() < 0.01, torch.nan, z - 0.9)  # noqa: E731
    solver = cls(0.0, 1.0, check_every=5)
    sol = ti.root(f, torch.zeros(1, dtype=DOUBLE), solver=solver, batch_dims=1, on_failure="ignore")
    assert sol.status.item() == ti.Status.NONFINITE
    assert sol.steps.item() == 5


@BOTH
def test_an_end_or_a_start_that_is_the_root_is_found_whatever_the_signs(cls: type) -> None:
    zero = torch.zeros(4, dtype=DOUBLE)
    sol = ti.root(lambda z: z * (z - 3.0), zero + 0.5, solver=cls(0.0, 1.0), batch_dims=1)  # 0 at 0, −2 at 1
    assert sol.converged.all()
    assert torch.equal(sol.value, zero)
    sol = ti.root(lambda z: (z - 1.0) ** 2, zero + 0.5, solver=cls(0.0, 1.0), batch_dims=1)  # touches 0 at 1
    assert sol.converged.all()
    assert torch.equal(sol.value, zero + 1)
    sol = ti.root(lambda z: (z - 0.25) ** 2, zero + 0.25, solver=cls(0.0, 1.0), batch_dims=1)  # touches 0 at z0
    assert sol.steps.tolist() == [0] * 4
    assert torch.equal(sol.value, zero + 0.25)


JUMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": lambda z: torch.where(z < 0.3, -1.0, 1.0).to(z.dtype),
    "step on a slope": lambda z: z - 0.3 + torch.where(z < 0.3, -0.01, 0.02),
    "pole": lambda z: 1 / (z - 0.3),
    "pole at a trial point": lambda z: 1 / (z - 0.5),
    "odd pole": lambda z: (z - 0.7) ** -3,
    "floor": lambda z: torch.floor(10 * z) - 6.5,
    "tangent": lambda z: torch.tan(torch.pi * z),
}


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("name", JUMPS)
def test_jump_or_pole_is_no_root(cls: type, dtype: torch.dtype, name: str) -> None:
    for z0 in (0.11, 0.2, 0.85):
        start = torch.full((3,), z0, dtype=dtype)
        sol = ti.root(JUMPS[name], start, solver=cls(0.1, 0.9), batch_dims=1, on_failure="ignore")
        assert sol.status.tolist() == [ti.Status.STALLED] * 3
        # a step per binary digit, until there is no number between the ends
        assert int(sol.steps.max()) <= (64 if dtype == DOUBLE else 32)
        assert torch.equal(sol.residual, JUMPS[name](sol.value).abs())


@BOTH
def test_sign_change_at_zero_is_given_up_after_the_patience(cls: type) -> None:
    """Around 0 there are 2,000 halvings before no number is left."""
    for f in (torch.sign, torch.reciprocal):
        start = torch.ones(2, dtype=DOUBLE)
        sol = ti.root(f, start, solver=cls(-0.3, 1.0), batch_dims=1, on_failure="ignore")
        assert sol.status.tolist() == [ti.Status.STALLED] * 2
        assert sol.steps.tolist() == [cls.patience] * 2


@BOTH
def test_root_that_rounding_keeps_from_the_tolerance_is_a_root(cls: type) -> None:
    """No double makes 1000·(z³ − c) smaller than 1e-13; the bracket closes, and its best end is the root."""
    c = torch.rand(200, dtype=DOUBLE) + 0.5
    solver = cls(0.1, 3.0, rtol=0.0, atol=1e-30)
    sol = ti.root(lambda z, c: 1000 * (z**3 - c), c, c, solver=solver, batch_dims=1)
    assert sol.converged.all()
    assert int((sol.residual > 1e-13).sum()) > 50
    torch.testing.assert_close(sol.value, c ** (1 / 3), rtol=4e-16, atol=0.0)
    assert int(sol.steps.max()) <= 128


@BOTH
def test_an_infinite_value_has_a_sign(cls: type) -> None:
    c = torch.linspace(-3.0, 3.0, 30, dtype=DOUBLE)
    sol = ti.root(lambda z, c: torch.log(z) - c, torch.ones_like(c), c, solver=cls(0.0, 1000.0), batch_dims=1)
    torch.testing.assert_close(sol.value, c.exp(), rtol=1e-9, atol=0.0)
    sol = ti.root(lambda z, c: torch.exp(z) - c.exp(), torch.zeros_like(c), c, solver=cls(-9.0, 1e5), batch_dims=1)
    torch.testing.assert_close(sol.value, c, rtol=1e-9, atol=1e-9)


@BOTH
@pytest.mark.parametrize("width", [1e-12, 1.0, 1e12, 1e30])
def test_brackets_of_every_width(cls: type, width: float) -> None:
    """Wide ones are halved where tanh is ±1 to all digits, a hundred times with a residual that does not fall."""
    c = torch.tensor([0.3, -0.7], dtype=DOUBLE)
    solver = cls(c - width, c + 0.7 * width)
    sol = ti.root(lambda z, c: torch.tanh(z - c), c - 0.4 * width, c, solver=solver, batch_dims=1)
    torch.testing.assert_close(sol.value, c, rtol=1e-12, atol=1e-11)
    assert sol.converged.all()
    if width == 1e30:
        assert int(sol.steps.min()) > 95


@BOTH
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_best_point_seen_is_returned_when_the_steps_run_out(cls: type, steps: int) -> None:
    tried: list[Tensor] = []
    c = torch.linspace(-1.9, 1.9, 30, dtype=DOUBLE)

    def f(z: Tensor) -> Tensor:
        tried.append(z)
        return torch.sin(7 * z) + z - c

    solver = cls(-4.0, 4.0, rtol=0.0, atol=1e-30)
    with torch.no_grad():
        sol = ti.root(f, torch.zeros_like(c), solver=solver, batch_dims=1, max_steps=steps, on_failure="ignore")
        seen = torch.stack(tried[: steps + 3])
        values = (torch.sin(7 * seen) + seen - c).abs()
    assert torch.equal(sol.residual, values.amin(0))
    assert torch.equal(sol.value, seen.gather(0, values.argmin(0)[None])[0])
    assert (sol.status == ti.Status.MAX_STEPS).all()


@BOTH
def test_start_near_the_root_does_not_make_the_ends_look_like_divergence(cls: type) -> None:
    z0 = torch.full((5,), 0.3 + 1e-10, dtype=DOUBLE)
    sol = ti.root(lambda z: z**3 - 0.3**3, z0, solver=cls(-5.0, 8.0), batch_dims=1)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, torch.full_like(z0, 0.3), rtol=1e-15, atol=0.0)


@BOTH
@pytest.mark.parametrize("samplewise", [True, False])
@pytest.mark.parametrize("every", [1, 4])
def test_a_sample_gets_the_same_answer_alone_and_in_any_batch(
    cls: type, samplewise: bool, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in blocks of rows, of which there is one at 40 rows otherwise, and with settled samples gone."""
    f, lower, upper, c, _ = _brackets("wiggly", 40)

    def fn(z: Tensor, c: Tensor) -> Tensor:
        return f(z, c)

    fn.samplewise = samplewise

    def solve(rows: slice) -> ti.Solution:
        solver = cls(lower[rows], upper[rows], check_every=every)
        return ti.root(fn, lower[rows], c[rows], solver=solver, batch_dims=1)

    together = solve(slice(None))
    assert together.converged.all()
    monkeypatch.setattr(_bracketing, "_BLOCK", 7)
    blocks = solve(slice(None))
    assert torch.equal(blocks.value, together.value)
    assert torch.equal(blocks.steps, together.steps)
    for i in range(0, 40, 5):
        alone = solve(slice(i, i + 1))
        assert torch.equal(alone.value, together.value[i : i + 1])
        assert torch.equal(alone.steps, together.steps[i : i + 1])


@BOTH
def test_trace_and_looks(cls: type) -> None:
    c = torch.linspace(0.5, 3.0, 6, dtype=DOUBLE)
    f = lambda z, c: z * z - c  # noqa: E731
    sol = ti.root(f, torch.ones_like(c), c, solver=cls(0.0, 2.0), batch_dims=1, trace=True)
    assert sol.trace is not None
    assert sol.trace.shape == (int(sol.steps.max()), 6)
    assert (sol.trace[1:] <= sol.trace[:-1]).all()  # the best so far
    assert torch.equal(sol.trace[-1], sol.residual)
    late = ti.root(f, torch.ones_like(c), c, solver=cls(0.0, 2.0, check_every=5), batch_dims=1)
    assert late.converged.all()
    assert torch.equal(late.steps, (sol.steps + 4) // 5 * 5)


@BOTH
@pytest.mark.parametrize("units", [1e-250, 1e-20, 1e20, 1e250])
def test_units_of_the_function_do_not_matter(cls: type, units: float) -> None:
    c = torch.linspace(-3.0, 3.0, 30, dtype=DOUBLE)
    runs = [
        ti.root(lambda z, c, u=u: u * (z**3 + z - c), torch.ones_like(c), c, solver=cls(-2.0, 2.0), batch_dims=1)
        for u in (1.0, units)
    ]
    assert all(run.converged.all() for run in runs)
    torch.testing.assert_close(runs[1].value, runs[0].value, rtol=1e-10, atol=1e-10)
    assert int((runs[1].steps - runs[0].steps).abs().max()) <= 1


@BOTH
def test_empty_batch(cls: type) -> None:
    sol = ti.root(lambda z: z - 0.5, torch.zeros(0), solver=cls(0.0, torch.ones(0)), batch_dims=1)
    assert sol.value.shape == (0,)


@BOTH
@pytest.mark.parametrize("f", [lambda z: z, lambda z: z.clone(), lambda z: z.view_as(z)], ids=["z", "copy", "view"])
def test_function_that_returns_its_argument_is_fine(cls: type, f: Callable[[Tensor], Tensor]) -> None:
    sol = ti.root(f, torch.ones(3), solver=cls(-1.0, 2.0), batch_dims=1)
    assert sol.converged.all()
    assert (sol.value.abs() < 1e-4).all()


@BOTH
def test_solve_changes_neither_bounds_nor_start(cls: type) -> None:
    lower, upper, z0 = torch.zeros(5, 1, dtype=DOUBLE), torch.full((5, 1), 2.0, dtype=DOUBLE), torch.ones(5, 1).double()
    solver = cls(lower, upper)
    for _ in range(2):
        assert ti.root(lambda z: z * z - 2.0, z0, solver=solver, batch_dims=1).converged.all()
    assert torch.equal(lower, torch.zeros_like(lower))
    assert torch.equal(upper, torch.full_like(upper, 2.0))
    assert torch.equal(z0, torch.ones_like(z0))


@BOTH
def test_records_of_tensors_compare_copy_and_print(cls: type) -> None:
    lower = torch.zeros(2000, requires_grad=True)
    made = cls(lower * 1.0, lower + 1.0, rtol=1e-3)
    same = cls(torch.zeros(2000), torch.ones(2000), rtol=1e-3)
    assert made == same
    assert hash(made) == hash(same)
    for other in (
        cls(torch.zeros(2000), torch.ones(2000)),
        cls(torch.zeros(2000), torch.full((2000,), 2.0), rtol=1e-3),
        cls(torch.zeros(1), torch.ones(2000), rtol=1e-3),
        cls(0.0, torch.ones(2000), rtol=1e-3),
        ti.Picard(rtol=1e-3),
    ):
        assert made != other
    assert ti.Bisection(0.0, 1.0) != ti.Chandrupatla(0.0, 1.0)
    assert cls(0, 1) == cls(0.0, 1.0)
    assert copy.deepcopy(made) == made == pickle.loads(pickle.dumps(made))
    assert repr(made).startswith(f"{cls.__name__}(")
    assert "lower=tensor([0., 0., 0.,  ..., 0.])" in repr(made).replace("0., 0., 0.])", "0.])")
    assert len(repr(made)) < 400
    with pytest.raises(AttributeError, match="lower"):
        made.lower = 0.0


@BOTH
@pytest.mark.parametrize(
    "options, says",
    [
        ({"lower": 0.0, "upper": 0.0}, ["lower=0.0", "upper=0.0", "lower < upper"]),
        ({"lower": 1, "upper": -1}, ["lower=1", "upper=-1", "lower < upper"]),
        ({"lower": torch.nan, "upper": 1.0}, ["lower=nan", "finite number"]),
        ({"lower": 0.0, "upper": torch.inf}, ["upper=inf", "finite number"]),
        ({"lower": None, "upper": 1.0}, ["lower=None", "finite number", "tensor"]),
        ({"lower": True, "upper": 2.0}, ["lower=True", "finite number"]),
        ({"lower": "0", "upper": 2.0}, ["lower='0'", "finite number"]),
        ({"lower": [0.0], "upper": 2.0}, [r"lower=\[0.0\]", "tensor"]),
        ({"lower": np.zeros(3), "upper": 2.0}, ["lower=array", "tensor"]),
        ({"lower": torch.zeros(2000), "upper": torch.zeros(2000)}, [r"\(2000,\)", "lower < upper"]),
        ({"lower": torch.zeros(3), "upper": torch.tensor([1.0, -1.0, 1.0])}, [r"\(3,\)", "every sample"]),
        ({"lower": torch.tensor([0.0, torch.nan]), "upper": 1.0}, ["lower", r"\(2,\)", "finite number"]),
        ({"lower": torch.zeros(3), "upper": torch.ones(4)}, ["lower", "upper", r"\(3,\)", r"\(4,\)"]),
        ({"lower": torch.zeros(3, dtype=torch.complex64), "upper": 1.0}, ["lower", "real"]),
        ({"lower": torch.zeros(3, dtype=torch.bool), "upper": 1.0}, ["lower", "real"]),
        ({"lower": 0.0, "upper": 1.0, "rtol": -1.0}, ["rtol=-1.0"]),
    ],
)
def test_bad_bounds_are_refused_when_they_are_given(cls: type, options: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ValueError, match=cls.__name__) as caught:
        cls(**options)
    for part in says:
        caught.match(part)
    assert len(str(caught.value)) < 400


@BOTH
def test_misspelt_bound_is_refused(cls: type) -> None:
    with pytest.raises(TypeError, match=r"'lover'; did you mean 'lower'"):
        cls(lover=0.0, upper=1.0)


@BOTH
@pytest.mark.parametrize("call", [ti.root, ti.fixed_point])
@pytest.mark.parametrize(
    "z0, batch_dims, bounds, says",
    [
        (torch.zeros(2, 3), 1, (0.0, 1.0), [r"z0 of shape \(2, 3\) has 3", "batch_dims=1", "batch_dims=z0.ndim"]),
        (torch.zeros(5), 0, (0.0, 1.0), [r"\(5,\) has 5", "batch_dims=0", "batch_dims=z0.ndim"]),
        (torch.zeros(3, 0), 1, (0.0, 1.0), ["has 0", "batch_dims=z0.ndim"]),
        (torch.zeros(3, dtype=torch.complex64), 1, (0.0, 1.0), ["has 2", "complex", "give a real z0"]),
        (torch.zeros(3), 1, (torch.zeros(4), 1.0), [r"lower of shape \(4,\)", r"z0, \(3,\)", "give a number"]),
        (torch.zeros(3), 1, (0.0, torch.ones(2, 3)), [r"upper of shape \(2, 3\)", r"z0, \(3,\)"]),
        (torch.zeros(3), 1, (-3e38, 3e38), ["upper - lower", "float32", "narrower"]),
        (torch.zeros(3), 1, (0.0, 1e39), ["upper - lower", "float32"]),
        (torch.zeros(3), 1, (0.5, 1.0), ["z0 is not between lower and upper", r"\(lower \+ upper\) / 2"]),
        (torch.tensor([0.5, 2.0]), 1, (0.0, torch.ones(2)), ["z0 is not between lower and upper"]),
    ],
)
def test_problem_that_cannot_be_bracketed_is_refused(
    cls: type, call: Callable[..., Any], z0: Tensor, batch_dims: int, bounds: tuple[Any, Any], says: list[str]
) -> None:
    with pytest.raises(ValueError, match=cls.__name__) as caught:
        call(lambda z: 0.5 * z - 0.1, z0, solver=cls(*bounds), batch_dims=batch_dims)
    for part in says:
        caught.match(part)
    assert len(str(caught.value)) < 400
