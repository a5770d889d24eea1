"""Wrong input is refused by name: which argument, its value, and what would be right; and nothing is changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti

Z = torch.ones(2, 3)


def half(z: Tensor) -> Tensor:
    return 0.5 * z


def layer(**options: Any) -> Any:
    """Construct a layer and call it: an option may be refused at either."""
    return ti.nn.FixedPoint(lambda z, x: 0.5 * z + x, **options)(Z)


def tanh_layer(*args: Any, **options: Any) -> Any:
    return ti.nn.TanhEquilibrium(*args, **options)(Z)


CALLS = {"fixed_point": ti.fixed_point, "root": ti.root}
LAYERS = {"FixedPoint": ti.nn.FixedPoint, "Root": ti.nn.Root}

# what is given, the error, and what its message must say: the argument, the value, the remedy
Case = tuple[Callable[[Callable[..., Any]], Any], type[Exception], list[str]]

STATES: dict[str, Case] = {
    "integer": (lambda f: f(half, torch.ones(3, dtype=torch.int64)), TypeError, ["z0", "int64", r"\.float\(\)"]),
    "bool": (lambda f: f(half, torch.ones(3, dtype=torch.bool)), TypeError, ["z0", "torch.bool", r"\.float\(\)"]),
    "integer leaf": (
        lambda f: f(half, {"a": Z, "b": torch.ones(2, dtype=torch.int32)}),
        TypeError,
        ["z0", "int32", r"\.double\(\)"],
    ),
    "float": (lambda f: f(half, 1.0), TypeError, ["z0", "float", "torch.as_tensor"]),
    "None": (lambda f: f(half, None), TypeError, ["z0", "None", "torch.as_tensor"]),
    "list of floats": (lambda f: f(half, [1.0, 2.0]), TypeError, ["z0", "float", "torch.as_tensor"]),
    "array": (lambda f: f(half, Z.numpy()), TypeError, ["z0", "ndarray", "torch.as_tensor"]),
    "no tensors": (lambda f: f(half, ()), TypeError, ["z0", "no tensors", "give a tensor"]),
    "batch shapes": (
        lambda f: f(half, (torch.ones(2, 3), torch.ones(4, 3)), batch_dims=1),
        ValueError,
        ["z0", "batch_dims=1", r"\(2, 3\)", r"\(4, 3\)", "share"],
    ),
    "batch dims of a leaf": (
        lambda f: f(half, (torch.ones(2, 3), torch.ones(())), batch_dims=1),
        ValueError,
        ["batch_dims=1", r"z0.ndim=0", "leading dims"],
    ),
    "sparse": (lambda f: f(half, torch.eye(3).to_sparse()), TypeError, ["z0", "sparse", "dense"]),
    "float8": (
        lambda f: f(half, torch.ones(3).to(torch.float8_e4m3fn)),
        TypeError,
        ["z0", "float8", "float32|float16|bfloat16"],
    ),
}

FUNCTIONS: dict[str, Case] = {
    "no function": (lambda f: f(3, Z), TypeError, ["fn", "int", "give a function"]),
    "None": (lambda f: f(lambda z: None, Z), TypeError, ["fn", "returned None", r"\(2, 3\)", "return one tensor"]),
    "another shape": (
        lambda f: f(lambda z: z[:1], Z),
        ValueError,
        ["fn", r"\(2, 3\)", r"\(1, 3\)", "give z0 the shape"],
    ),
    "shape that broadcasts": (lambda f: f(lambda z: z[None], Z), ValueError, [r"\(2, 3\)", r"\(1, 2, 3\)", "fix what"]),
    "number": (lambda f: f(lambda z: 1.0, Z), TypeError, ["fn", "float", "return one tensor"]),
    "array": (lambda f: f(lambda z: z.detach().numpy(), Z), TypeError, ["fn", "ndarray", "return one tensor"]),
    "integers": (lambda f: f(lambda z: z.long(), Z), TypeError, ["fn", "int64", "must return a floating-point"]),
    "more precision": (lambda f: f(lambda z: z.double(), Z), TypeError, ["fn", "float64", "float32", r"z0\.to\("]),
    "complex": (lambda f: f(lambda z: z + 1j, Z), TypeError, ["fn", "complex64", "float32", r"z0\.to\("]),
    "tuple": (lambda f: f(lambda z: (z,), Z), TypeError, ["fn", "structure of z0", "tuple"]),
    "tensor for a tuple": (lambda f: f(lambda z: z[0], (Z, Z)), TypeError, ["structure of z0", "Tensor", "each leaf"]),
    "other keys": (lambda f: f(lambda z: {"b": z["a"]}, {"a": Z}), TypeError, ["structure of z0", "'a'", "dict"]),
    "a leaf missing": (lambda f: f(lambda z: (z[0], None), (Z, Z)), TypeError, ["structure of z0", "each leaf"]),
}

OPTIONS: dict[str, Case] = {
    "misspelt": (lambda f: f(half, Z, sovler=None), TypeError, ["'sovler'", "did you mean 'solver'", "batch_dims"]),
    "unknown": (lambda f: f(half, Z, qqq=1), TypeError, ["'qqq'", "Valid: solver, adjoint"]),
    "tolerance on the call": (lambda f: f(half, Z, rtol=1e-3), TypeError, ["'rtol'", "Valid: solver"]),
    "batch_dims too large": (
        lambda f: f(half, Z, batch_dims=3),
        ValueError,
        ["batch_dims=3", "ndim=2", r"\(2, 3\)", "give"],
    ),
    "batch_dims negative": (lambda f: f(half, Z, batch_dims=-1), ValueError, ["batch_dims=-1", "integer >= 0"]),
    "batch_dims bool": (lambda f: f(half, Z, batch_dims=True), ValueError, ["batch_dims=True", "integer >= 0"]),
    "batch_dims float": (lambda f: f(half, Z, batch_dims=1.0), ValueError, ["batch_dims=1.0", "integer >= 0"]),
    "max_steps negative": (lambda f: f(half, Z, max_steps=-1), ValueError, ["max_steps=-1", "integer >= 0"]),
    "max_steps bool": (lambda f: f(half, Z, max_steps=True), ValueError, ["max_steps=True", "integer >= 0"]),
    "max_steps float": (lambda f: f(half, Z, max_steps=2.5), ValueError, ["max_steps=2.5", "integer >= 0"]),
    "on_failure": (
        lambda f: f(half, Z, on_failure="rasie"),
        ValueError,
        ["on_failure", "'rasie'", "did you mean 'raise'"],
    ),
    "on_failure None": (lambda f: f(half, Z, on_failure=None), ValueError, ["on_failure=None", "Valid: warn, raise"]),
    "solver class": (lambda f: f(half, Z, solver=ti.Newton), TypeError, ["solver", "Newton", "instance"]),
    "solver name": (lambda f: f(half, Z, solver="newton"), TypeError, ["solver", "'newton'", r"Newton\(\)"]),
    "linear solver": (lambda f: f(half, Z, solver=ti.LU()), TypeError, ["solver", r"LU\(\)", r"Anderson\(\)"]),
    "adjoint class": (lambda f: f(half, Z, adjoint=ti.Implicit), TypeError, ["adjoint", "Implicit", "instance"]),
    "adjoint name": (lambda f: f(half, Z, adjoint="implicit"), TypeError, ["adjoint", "'implicit'", r"Implicit\(\)"]),
    **{
        f"solver {value!r}": (lambda f, value=value: f(half, Z, solver=value), TypeError, ["solver", "instance"])
        for value in (False, "", 0)
    },
}


def _table(*tables: dict[str, Case]) -> list[Any]:
    return [pytest.param(*case, id=name) for table in tables for name, case in table.items()]


def _expect(run: Callable[[], Any], error: type[Exception], says: list[str]) -> None:
    with pytest.raises(error) as caught:
        run()
    for part in says:
        caught.match(part)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("call, error, says", _table(STATES, FUNCTIONS, OPTIONS))
def test_bad_call_is_refused_by_name(
    name: str, call: Callable[[Callable[..., Any]], Any], error: type[Exception], says: list[str]
) -> None:
    before = Z.clone()
    _expect(lambda: call(CALLS[name]), error, says)
    assert torch.equal(Z, before)


NUMBERS = "finite number"
SETTINGS: list[tuple[type, str, Any, type[Exception], list[str]]] = [
    *[
        (solver, name, value, ValueError, [f"{name}={value!r}", r"finite number in \[0.0, inf\) or None"])
        for solver in (ti.Picard, ti.Anderson, ti.Newton)
        for name in ("rtol", "atol")
        for value in (-1e-3, float("inf"), float("nan"), True, "1e-3")
    ],
    *[
        (solver, "norm", value, ValueError, [f"norm={value!r}", "Valid: rms, two, max"])
        for solver in (ti.Picard, ti.Anderson, ti.Newton)
        for value in ("l2", 2, None)
    ],
    *[
        (solver, "check_every", value, ValueError, [f"check_every={value!r}", "integer >= 1"])
        for solver in (ti.Picard, ti.Anderson, ti.Newton)
        for value in (0, -1, 1.0, True)
    ],
    *[(ti.Picard, "damping", value, ValueError, ["damping=", NUMBERS]) for value in (0, -0.5, 2.0, 2.5, float("nan"))],
    *[(ti.Anderson, "history", value, ValueError, ["history=", "integer >= 1"]) for value in (0, -1, 2.0, None)],
    *[(ti.Anderson, "mixing", value, ValueError, ["mixing=", NUMBERS]) for value in (0.0, -1, 2.0, 3, "1")],
    (ti.Anderson, "drop_tolerance", -1e-9, ValueError, ["drop_tolerance=-1e-09", NUMBERS]),
    (ti.Newton, "linear_solver", ti.GMRES, ValueError, ["linear_solver=", "GMRES", r"GMRES\(\)"]),
    (ti.Newton, "linear_solver", "gmres", ValueError, ["linear_solver='gmres'", r"LU\(\)"]),
    (ti.Newton, "linear_solver", ti.Newton(), ValueError, ["linear_solver=Newton", r"LU\(\)"]),
    *[(ti.Newton, "max_backtracks", value, ValueError, ["max_backtracks=", "integer >= 0"]) for value in (-1, 1.5)],
    *[(ti.Newton, "forcing", value, ValueError, ["forcing=", NUMBERS]) for value in (0.0, -1, 1.0, 2)],
    *[(ti.Implicit, "rtol", value, ValueError, ["rtol=", NUMBERS]) for value in (0.0, -1e-6, 2.0, float("nan"))],
    (ti.Implicit, "unconverged", "linearise", ValueError, ["unconverged", "'linearise'", "did you mean 'linearize'"]),
    (ti.Implicit, "linear_solver", ti.LU, ValueError, ["linear_solver=", "LU", r"LU\(\)"]),
    *[(ti.GMRES, name, 0, ValueError, [f"{name}=0", "integer >= 1"]) for name in ("restart", "max_steps")],
    *[(ti.Neumann, name, 0, ValueError, [f"{name}=0", "integer >= 1"]) for name in ("max_steps", "patience")],
    *[(ti.Neumann, "slowest", value, ValueError, ["slowest=", NUMBERS]) for value in (0.0, 1.5, -1)],
    *[(ti.Cascade, name, -1, ValueError, [f"{name}=-1", "integer >= 0"]) for name in ("small", "dense_limit")],
    (ti.Cascade, "neumann", 3, ValueError, ["neumann=", "give"]),
    *[(ti.Cascade, "gmres", value, ValueError, ["gmres=", "give"]) for value in (None, ti.GMRES)],
    (ti.Picard, "dampign", 0.5, TypeError, ["Picard", "'dampign'", "did you mean 'damping'"]),
    (ti.Picard, "max_steps", 5, TypeError, ["Picard", "'max_steps'", "Valid: .*rtol"]),
    (ti.Anderson, "histroy", 5, TypeError, ["Anderson", "'histroy'", "did you mean 'history'"]),
    (ti.Newton, "linearsolver", None, TypeError, ["Newton", "'linearsolver'", "did you mean 'linear_solver'"]),
    (ti.Implicit, "rtoll", 1e-3, TypeError, ["Implicit", "'rtoll'", "did you mean 'rtol'"]),
    (ti.GMRES, "restrat", 5, TypeError, ["GMRES", "'restrat'", "did you mean 'restart'"]),
    (ti.Neumann, "maxsteps", 5, TypeError, ["Neumann", "'maxsteps'", "did you mean 'max_steps'"]),
    (ti.Cascade, "smal", 5, TypeError, ["Cascade", "'smal'", "did you mean 'small'"]),
    (ti.LU, "pivot", True, TypeError, ["LU", "'pivot'"]),
]


@pytest.mark.parametrize("cls, name, value, error, says", SETTINGS)
def test_bad_setting_is_refused_when_it_is_made(
    cls: type, name: str, value: Any, error: type[Exception], says: list[str]
) -> None:
    _expect(lambda: cls(**{name: value}), error, says)


@pytest.mark.parametrize("cls", [ti.Picard, ti.Anderson, ti.Newton, ti.Implicit, ti.GMRES, ti.Neumann, ti.Cascade])
def test_settings_are_frozen_and_copies_of_them_equal(cls: type) -> None:
    made = cls()
    name = next(iter(vars(made)))
    with pytest.raises(AttributeError, match=name):
        setattr(made, name, 1)
    assert copy.deepcopy(made) == made == cls()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "option, value, error, says",
    [
        ("solvr", None, TypeError, ["'solvr'", "did you mean 'solver'"]),
        ("trace", True, TypeError, ["'trace'", "Valid: solver"]),
        ("on_failure", "raises", ValueError, ["on_failure='raises'", "did you mean 'raise'"]),
        ("solver", ti.Anderson, TypeError, ["solver=", "Anderson", "instance"]),
        ("solver", "anderson", TypeError, ["solver='anderson'", r"Anderson\(\)"]),
        ("adjoint", "exact", TypeError, ["adjoint='exact'", r"Implicit\(\)"]),
        ("batch_dims", -1, ValueError, ["batch_dims=-1", "integer >= 0"]),
        ("batch_dims", True, ValueError, ["batch_dims=True", "integer >= 0"]),
        ("batch_dims", 5, ValueError, ["batch_dims=5", "ndim=2", "leading dims"]),
        ("max_steps", -3, ValueError, ["max_steps=-3", "integer >= 0"]),
        ("init", 3, TypeError, ["init", "callable"]),
        ("init", torch.zeros(3), TypeError, ["init", "callable"]),
    ],
)
def test_bad_option_of_a_layer_is_refused_at_the_first_call_at_the_latest(
    name: str, option: str, value: Any, error: type[Exception], says: list[str]
) -> None:
    _expect(lambda: LAYERS[name](lambda z, x: 0.5 * z - x, **{option: value})(Z), error, says)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cell", [None, 3, "tanh", torch.ones(3)], ids=["None", "int", "str", "tensor"])
def test_cell_that_is_not_callable_is_refused(name: str, cell: Any) -> None:
    _expect(lambda: LAYERS[name](cell), TypeError, ["cell", type(cell).__name__, "give an nn.Module or a function"])


@pytest.mark.parametrize("inputs, found", [((), "missing"), ((3,), "int"), (({"x": Z},), "dict")])
def test_layer_without_init_needs_a_tensor_to_start_like(inputs: tuple[Any, ...], found: str) -> None:
    _expect(lambda: ti.nn.FixedPoint(lambda z, *x: 0.5 * z)(*inputs), TypeError, ["FixedPoint", found, "init="])


def test_integer_input_is_refused_as_the_start() -> None:
    _expect(lambda: ti.nn.TanhEquilibrium(3)(torch.ones(2, 3, dtype=torch.int64)), TypeError, ["int64", r"\.float\(\)"])


@pytest.mark.parametrize("features", [0, -1, True, 2.5, "3", None])
def test_features_must_be_a_positive_integer(features: Any) -> None:
    _expect(lambda: ti.nn.TanhEquilibrium(features), ValueError, [f"features={features!r}", "integer >= 1"])


@pytest.mark.parametrize(
    "option, says",
    [("slover", ["'slover'", "did you mean 'solver'"]), ("bias", ["'bias'", "Valid: solver"])],
)
def test_bad_option_of_the_tanh_layer_is_refused(option: str, says: list[str]) -> None:
    _expect(lambda: ti.nn.TanhEquilibrium(3, **{option: None}), TypeError, ["TanhEquilibrium", *says])


def test_input_of_another_width_is_refused_by_the_tanh_layer() -> None:
    with pytest.raises((ValueError, RuntimeError), match="features"):
        ti.nn.TanhEquilibrium(3)(torch.ones(2, 4))


def test_refused_option_leaves_the_layer_as_it_was() -> None:
    layer = ti.nn.TanhEquilibrium(3)
    weight = layer.linear.weight.detach().clone()
    layer.max_steps = -1
    with pytest.raises(ValueError, match="max_steps=-1"):
        layer(Z)
    layer.max_steps = None
    assert torch.equal(layer.linear.weight, weight)
    assert layer.linear.weight.grad is None
    assert layer.solve(Z).converged.all()


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError, KeyError])
def test_error_inside_the_function_is_passed_on_unchanged(error: type[Exception]) -> None:
    def fn(z: Tensor) -> Tensor:
        raise error("mine")

    with torch.no_grad(), pytest.raises(error, match="mine"):
        ti.fixed_point(fn, Z)
    with pytest.raises(error, match="mine"):
        ti.root(fn, Z)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("solver", [ti.Picard(), ti.Anderson(), ti.Newton()], ids=lambda s: type(s).__name__)
def test_function_that_works_in_place_is_refused_and_leaves_z0_unchanged(solver: ti.solvers.Solver) -> None:
    z0 = torch.zeros(3)
    with torch.no_grad(), pytest.raises(ValueError, match="changes its argument z in place"):
        ti.fixed_point(lambda z: z.mul_(0.5).add_(1.0), z0, solver=solver, on_failure="ignore")
    assert torch.equal(z0, torch.zeros(3))


@pytest.mark.parametrize("solver", [ti.Picard(), ti.Anderson(), ti.Newton()], ids=lambda s: type(s).__name__)
def test_function_that_returns_the_same_buffer_each_time_is_refused(solver: ti.solvers.Solver) -> None:
    buffer = torch.empty(3)
    with torch.no_grad(), pytest.raises(ValueError, match=r"changes its argument z in place|returned before"):
        ti.fixed_point(lambda z: buffer.copy_(0.5 * z + 1.0), torch.zeros(3), solver=solver)


@pytest.mark.parametrize("solver", [ti.Picard(), ti.Anderson(), ti.Newton()], ids=lambda s: type(s).__name__)
def test_function_that_returns_one_of_its_inputs_is_fine(solver: ti.solvers.Solver) -> None:
    x = torch.ones(3, requires_grad=True)
    sol = ti.fixed_point(lambda z, x: x, torch.zeros(3), x, solver=solver)
    sol.value.sum().backward()
    assert sol.converged
    assert torch.equal(sol.value, torch.ones(3))
    assert torch.equal(x.grad, torch.ones(3))
    assert ti.fixed_point(lambda z: z, torch.ones(3), solver=solver).steps == 0


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("solver", [ti.Picard(), ti.Anderson(), ti.Newton()], ids=lambda s: type(s).__name__)
def test_solve_changes_none_of_its_inputs(call: Callable[..., Any], solver: ti.solvers.Solver) -> None:
    z0, x = torch.zeros(2, 3), torch.ones(2, 3, requires_grad=True)
    options = {"scale": [2.0], "none": None, "flag": True}
    sol = call(
        lambda z, x, o: (z - x) / o["scale"][0], z0, x, options, solver=solver, batch_dims=1, on_failure="ignore"
    )
    sol.value.sum().backward()
    assert torch.equal(z0, torch.zeros(2, 3))
    assert torch.equal(x.detach(), torch.ones(2, 3))
    assert options == {"scale": [2.0], "none": None, "flag": True}


@pytest.mark.parametrize("start", [torch.zeros(3), torch.ones(3)], ids=["solved at once", "solved in steps"])
def test_value_does_not_share_memory_with_the_start(start: Tensor) -> None:
    before = start.clone()
    with torch.no_grad():
        sol = ti.fixed_point(half, start, on_failure="ignore", solver=ti.Picard())
        sol.value.add_(1.0)
    assert torch.equal(start, before)
