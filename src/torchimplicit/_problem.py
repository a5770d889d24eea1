"""The equation to solve, in residual form, on matrices `(B, n)`; counts the calls of the user's function."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._evaluation import Evaluation
from ._layout import Layout
from ._objective import Gradient
from ._precision import Watch
from ._promises import keeps, supplies_jacobian
from ._purity import Purity
from ._refinement import coarse_dtype
from ._tangent import Tangent
from ._tape import Tape, run_eagerly
from .linear import AutogradJacobian, ResidualJacobian, SuppliedJacobian

Kind = Literal["fixed_point", "root", "minimize", "least_squares"]
_TRUSTED, _TRIED = 1.5, 2.0
_ROUNDING = 64.0
"""Rounding units by which values of the same sample may differ between batches of different size."""


class Problem:
    """`z = fn(z, *args)` or `fn(z, *args) = 0` as one residual `r(z)` whose zero is wanted.

    `r = fn(z) − z` for a fixed point and `r = −fn(z)` for a root (of a gradient, in the other two kinds), so that
    `z + r` is the plain (Picard or Richardson) step in both cases, and with `A = −∂r/∂z` Newton's step is `A⁻¹ r`.

    fn runs under the autocast of the call; everything else runs without (see `exact`). For the length of a solve it is
    a function, whatever it draws at random or changes in its buffers (see `_purity`).

    Attributes:
        epsilon: rounding unit of fn's values; larger than the state's own where fn computes in less than single
            precision, by its parameters or under autocast.
        narrow: whether float16 takes part in them.
        has_closed_form: whether fn supplies its Jacobian itself; False once it was seen to draw or change anything.
        preconditionable: whether fn claims to have a form in which steps contract faster.
        keeps_inverse: whether the solver is asked what it knows of `A⁻¹` when it is done.
        label: what a profiler calls it.
    """

    label: str = "equation"

    def __init__(self, kind: Kind, fn: Any, args: tuple[Any, ...], layout: Layout) -> None:
        self.kind: Kind = kind
        self.fn = fn
        self.args = args
        self.layout = layout
        self._counted = [0]
        self._last: Tensor | None = None
        self._version = 0
        self._room: Tensor | None = None
        # The state's own shape is (B, n) already: nothing to pack or unpack.
        self._shape = layout.shapes[0]
        self._same = layout.bare and self._shape == layout.matrix_shape
        device = layout.device.type
        self._autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                self.args = pytree.tree_map(_usable, args)
        self.epsilon = max(torch.finfo(dtype).eps for dtype in (layout.dtype, *layout.dtypes))
        self.narrow = torch.float16 in layout.dtypes
        self._watched = self._autocast is None
        self._purity = Purity(layout.device, fn, args)
        # A promise that a newer `forward` may not keep is none; a prohibition stands.
        declared = getattr(fn, "samplewise", None)
        declared = None if declared and not keeps(fn, "samplewise") else declared
        self._samplewise = bool(declared) and self._indexed_by_sample()
        self._split = self._samplewise or (declared is None and bool(layout.batch_shape) and self._carries_the_batch())
        self._split = self._split and not layout.shared  # nobody may leave before all others
        # Whether fn was seen to return the state's own dtype and shape, and may repeat itself unseen.
        self._plain = False
        self.keeps_inverse = False
        self.has_closed_form = supplies_jacobian(fn, layout)
        # Hooks, of which it knows nothing, might draw or change something, but with a closed form there are none; a
        # `forward` that is newer than the promise is not meant by it.
        self._purity.known = self.has_closed_form and keeps(fn, "pure") and bool(fn.pure)
        self._repeats = self._same and self._autocast is None and self.has_closed_form and keeps(fn, "repeat")
        self.preconditionable = kind == "fixed_point" and hasattr(fn, "preconditioned")
        self._form: list[Any] = []

    def _indexed_by_sample(self) -> bool:
        """Whether every tensor among the args is indexed by sample in its first dim; one batch dim only."""
        # An input that is broadcast to the samples is not indexed by them.
        shape = self.layout.shapes[0]
        return len(self.layout.batch_shape) == 1 and not any(
            isinstance(a, Tensor) and (a.ndim != len(shape) or a.shape[0] != shape[0]) for a in self.args
        )

    def _carries_the_batch(self) -> bool:
        """Whether a tensor among the args has the batch shape in front."""
        batch = self.layout.batch_shape
        leaves = pytree.tree_leaves(self.args)
        return any(isinstance(a, Tensor) and a.shape[: len(batch)] == batch for a in leaves)

    def exact(self) -> AbstractContextManager[Any]:
        """The context for the solvers' own algebra: no autocast."""
        return nullcontext() if self._autocast is None else torch.autocast(self.layout.device.type, enabled=False)

    def coarse(self) -> "Problem | None":
        """The equation with fn under autocast, for a refinement to begin with; None where that gains nothing.

        Calls count as calls of this one.
        """
        dtype = coarse_dtype(self.layout.device)
        dtypes = {self.layout.dtype, *self.layout.dtypes}
        if dtype is None or self._autocast is not None or dtypes != {torch.float32}:
            return None
        other = copy(self)
        other._last, other._version, other._form = None, 0, [None]
        if self.has_closed_form and keeps(self.fn, "reduced"):
            other.fn = self.fn.reduced(dtype)
            return other
        other._autocast = dtype
        # What a closed form or a repetition computes with is not seen by autocast, or rounded where it should not be.
        other.has_closed_form = other._repeats = False
        return other

    def casts(self) -> AbstractContextManager[Any]:
        """A context that keeps the weights that autocast has cast, from one evaluation to the next."""
        return nullcontext() if self._autocast is None else torch.autocast(self.layout.device.type, self._autocast)

    @property
    def evaluations(self) -> int:
        """Calls of fn so far, Jacobian products included."""
        return self._counted[0]

    def output(self, z: Tensor) -> Tensor:
        """fn's value `(B, n)` at a state `(B, n)`; differentiable where grad mode is on.

        Raises:
            TypeError: what fn returns has another structure or dtype than z0.
            ValueError: it has another shape, or fn writes into its argument or into what it returned before.
        """
        self._counted[0] += 1
        layout = self.layout
        argument = z if self._same else layout.unpack(z)
        version = None if z.is_inference() else z._version
        out = self.under_autocast(self.held(self.fn), argument)
        if version is not None and z._version != version:
            raise ValueError(f"{self.kind}: fn changes its argument z in place; use out-of-place operations on z.")
        if layout.bare and type(out) is Tensor and out.shape == self._shape and out.dtype == layout.dtype:
            value = out if self._same else layout.pack([out])
            self._plain = True
        else:
            leaves = layout.check_output(out, self.kind)
            self.epsilon = max(self.epsilon, *(torch.finfo(leaf.dtype).eps for leaf in leaves))
            value = layout.pack(leaves)
        if self._last is not None and self._last._version != self._version:
            raise ValueError(f"{self.kind}: fn writes into what it returned before; return a new tensor each time.")
        self._last = None if value.is_inference() else value.detach() if value.requires_grad else value
        self._version = 0 if self._last is None else self._last._version
        return value

    def recorded(self, z: Tensor, keep: bool = False) -> tuple[Tensor, Tape]:
        """`output(z)`, and the tape of what the user's function did for it, which may `keep` all tensors."""
        holder: Any = self.fn if isinstance(self.fn, Gradient) else self
        user, tapes = holder.fn, []

        def recording(argument: Any, *args: Any) -> Any:
            tape, out = Tape.record(self.held(user), argument, args, user, self.layout.shared, keep)
            tapes.append(tape)
            return out

        holder.fn = recording
        try:
            return self.output(z), tapes[-1]
        finally:
            holder.fn = user

    def under_autocast(self, user: Callable[..., Any], argument: Any) -> Any:
        """`user(argument, *args)` as `output` calls fn."""
        if self._autocast is None:
            return user(argument, *self.args)
        with torch.autocast(self.layout.device.type, self._autocast):
            if self._watched:
                return user(argument, *self.args)
            self._watched = True
            with run_eagerly(), Watch() as seen:
                out = user(argument, *self.args)
            self.epsilon, self.narrow = max(self.epsilon, seen.epsilon), self.narrow or seen.narrow
            return out

    def packed(self, out: Any) -> Tensor:
        """What the user's function returned as a matrix `(B, n)`, objectives `(B,)`, or rows of residuals `(B, m)`."""
        if isinstance(self.fn, Gradient):
            return self.fn.rows_of(out) if self.fn.squares else self.fn.objective_of(out)
        return self.layout.pack(self.layout.check_output(out, self.kind))

    def held(self, user: Callable[..., Any]) -> Callable[..., Any]:
        """A function that calls the user's, made to do so under the conditions of the first evaluation of the solve."""
        if self._purity.known:
            return user

        def call(*args: Any) -> Any:
            out = self._purity.run(user, *args)
            if not self._purity.known:
                # Masks have the shape of the whole batch, and closed forms know nothing of them.
                self._split = self._repeats = self.has_closed_form = False
            return out

        return call

    def conclude(self, z: Tensor) -> None:
        """Leave the buffers that fn changes as one evaluation at the solution, `(B, n)`, makes them."""
        if self._purity.keeps_state:
            self.output(z)
            self._purity.leave()

    def evaluate(self, z: Tensor) -> Evaluation:
        """Value and residual at a state `(B, n)`, and the objective where there is one."""
        return self.evaluation(z, self.output(z))

    def evaluation(self, z: Tensor, value: Tensor, norm_only: bool = False) -> Evaluation:
        """The evaluation at a state where fn's value is known.

        Args:
            z: the state, `(B, n)`.
            value: fn there.
            norm_only: of the residual nothing but its norm will be asked for, as a rule.
        """
        if self.kind != "fixed_point":
            if not isinstance(self.fn, Gradient):
                return Evaluation(value)
            residuals = self.fn.residuals
            target = None if residuals is None else -residuals
            return Evaluation(value, objective=self.fn.objective, target=target)
        if norm_only and (self._room is None or self._room.shape != value.shape):
            self._room = torch.empty_like(value)
        return Evaluation(value, z if self._same else self.layout.rounded(z), room=self._room if norm_only else None)

    def repeat(self, value: Tensor, times: int) -> tuple[Tensor, Tensor]:
        """fn applied `times` in succession, from a state `(B, n)`: the last state and fn's value there.

        A cell that supplies its Jacobian may also have a method `repeat(z, times, *args)`, which does the same without
        a look at what happens in between; it is used where nothing of that could matter.
        """
        if self._repeats and self._plain:
            self._counted[0] += times
            return self.fn.repeat(value, times, *self.args)
        z = value
        for _ in range(times):
            z, value = value, self.output(value)
        return z, value

    def preconditioned(self) -> bool:
        """Whether fn has a form in which steps contract faster, for which it is asked once in a solve.

        A cell that supplies its Jacobian may also have a method `preconditioned()`, which gives that form, made of its
        parameters alone, or None where it cannot: an object with a method `repeat(z, times, *args)`, which takes so
        many of its own steps from z and returns the state and fn's value there, and with `linearize`.
        """
        if not self._form:
            # Where a weight is drawn anew, or changed, whenever it is read, it may not be read once more.
            usable = self.preconditionable and self._repeats and self._purity.known
            usable = usable and keeps(self.fn, "preconditioned")
            self._form.append(self.fn.preconditioned() if usable else None)
        # Before the first evaluation it is not known yet that fn returns the state's own dtype and shape.
        return self._form[0] is not None and (self._plain or not self.evaluations)

    def approach(self, z: Tensor, times: int) -> tuple[Tensor, Tensor]:
        """So many steps of the preconditioned form, from a state `(B, n)`: the last state and fn's value there."""
        self._counted[0] += times + 1
        return self._form[0].repeat(z, times, *self.args)

    def scale(self, evaluation: Evaluation, norm: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The scale of the relative tolerance at a state, `(B,)`: `‖fn(z)‖` for a fixed point; None for a root.

        The units of a root's fn are not those of z; its scale is the initial residual's norm.
        """
        return norm(evaluation.value) if self.kind == "fixed_point" else None

    def keep_inverse(self) -> None:
        """Ask the solver for it; no sample may leave the batch then."""
        self.keeps_inverse, self._split = True, False

    @property
    def crowd(self) -> float:
        """Rows at hand per row that runs, from which on it pays to go on without the others; infinite if one cannot.

        Whether fn can be split is said by an attribute `samplewise = True` of it: every tensor among its inputs is
        indexed by sample in its first dims, and no row depends on another; `False` forbids it. A function that says
        nothing is tried, which costs an evaluation, where a tensor of `args` has the batch shape in front.
        """
        if not self._split:
            return math.inf
        return _TRUSTED if self._samplewise else _TRIED

    def select(self, samples: Tensor, z: Tensor, evaluation: Evaluation, scale: Tensor) -> "Problem | None":
        """The problem of some samples alone, by their indices, or None if fn cannot be split.

        A split that fn has not promised is accepted only if it leaves the value at z of these samples as it was.
        Calls of the part count as calls of the whole.

        Args:
            samples: indices.
            z: states of all samples at hand, `(B, n)`.
            evaluation: fn there.
            scale: size of the residuals, `(B,)`, beside which rounding is judged.
        """
        if not self._split:
            return None
        layout = self.layout.select(samples.numel())
        fn = self.fn.part(layout) if isinstance(self.fn, Gradient) else self.fn
        rows = partial(_rows, samples, self.layout.batch_shape)
        args = tuple(rows(a) if isinstance(a, Tensor) else pytree.tree_map(rows, a) for a in self.args)
        part = copy(self)  # shares the count of calls
        part.fn, part.args, part.layout = fn, args, layout
        part._last, part._version = None, 0
        part._shape = layout.shapes[0]
        part._same = layout.bare and part._shape == layout.matrix_shape
        if self._samplewise:
            return part
        known, start = evaluation.value.index_select(0, samples), z.index_select(0, samples)
        try:
            value = part.output(start)
        except (RuntimeError, ValueError, TypeError, IndexError):
            self._split = False
            return None
        size = torch.maximum(known.abs().amax(1), start.abs().amax(1)).maximum(scale.index_select(0, samples))
        near = (value - known).abs().amax(1) <= _ROUNDING * self.epsilon * size
        self._split = bool(near.all())
        return part if self._split else None

    def linearize(self, z: Tensor, value: Tensor) -> ResidualJacobian:
        """`A = −∂r/∂z` at a state, from the closed form where fn supplies one, else by automatic differentiation."""
        if self.has_closed_form:
            shape = self.layout.shapes[0]
            self._counted[0] += 1
            # The form that the solve has made has quicker ways to solve with the same Jacobian.
            source = self._form[0] if self._form and self._form[0] is not None else self.fn
            operator = source.linearize(z.reshape(shape), value.reshape(shape), *self.args)
            jacobian = SuppliedJacobian(operator, shape, self.layout.matrix_shape, self.count)
            return self.operator(jacobian, exact=True)
        return self.operator(AutogradJacobian.at(self.output, z, self.count, partial(self._tangent, z)))

    def linearize_forward(self, z: Tensor, value: Tensor) -> ResidualJacobian | None:
        """`A = −∂r/∂z` at a state for many products `A p`; None where these are not to be had cheaply."""
        if self.has_closed_form:
            return self.linearize(z, value)
        jacobian = self.taped_jacobian(z)
        return None if jacobian is None else self.operator(jacobian)

    def taped_jacobian(self, z: Tensor) -> AutogradJacobian | None:
        """`∂fn/∂z` at a state, `(B, n)`, for many products `J p`; None where it cannot be had from a tape."""
        taped = self._taped(z)
        if taped is None:
            return None
        output, state, tangent = taped
        return AutogradJacobian(output, state, self.count, lambda: tangent)

    def _tangent(self, z: Tensor) -> Tangent | None:
        """`p ↦ J p` from a tape, which takes one more evaluation."""
        taped = self._taped(z)
        return None if taped is None else taped[2]

    def _taped(self, z: Tensor) -> tuple[Tensor, Tensor, Tangent] | None:
        """fn's value at a state, with a graph, the leaf that it starts from, and `p ↦ J p`."""
        if isinstance(self.fn, Gradient) or not self._purity.known:
            return None
        with torch.inference_mode(False), torch.enable_grad():
            state = (z.clone() if z.is_inference() else z.detach()).requires_grad_()
            output, tape = self.recorded(state.view_as(state), keep=True)
            tangent = Tangent(tape, self._run)
        return (output, state, tangent) if tangent.usable else None

    def _run(self, user: Callable[[Any], Any], p: Tensor) -> Tensor:
        """A linear function of the state's structure, on rows `(B, n)`."""
        out = self.under_autocast(lambda argument, *_: user(argument), self.layout.unpack(p))
        return self.layout.pack(pytree.tree_leaves(out))

    def operator(self, jacobian: AutogradJacobian | SuppliedJacobian, exact: bool = False) -> ResidualJacobian:
        """`A = −∂r/∂z` of fn's Jacobian, whose products are as coarse as fn, or `exact` in the state's own dtype."""
        return ResidualJacobian(jacobian, shifted=self.kind == "fixed_point", epsilon=0.0 if exact else self.epsilon)

    def linearize_target(self, z: Tensor, evaluation: Evaluation) -> AutogradJacobian | ResidualJacobian:
        """`−∂t/∂z` of what methods of least squares make small (see `Evaluation.target`), `m × n`."""
        if not isinstance(self.fn, Gradient) or not self.fn.squares:
            return self.linearize(z, evaluation.value)

        gradient = self.fn

        def residuals(z: Tensor) -> Tensor:
            self._counted[0] += 1
            return self.held(gradient.rows)(self.layout.unpack(z), *self.args)

        return AutogradJacobian.at(residuals, z, self.count)

    def count(self, products: int) -> None:
        """Add Jacobian products to the evaluations."""
        self._counted[0] += products


def _rows(samples: Tensor, batch: torch.Size, value: Any) -> Any:
    """The rows of some samples of a tensor that has the batch shape in front; anything else as it is."""
    if not isinstance(value, Tensor) or value.shape[: len(batch)] != batch:
        return value
    flat = value if len(batch) == 1 else value.reshape(-1, *value.shape[len(batch) :])
    return flat.index_select(0, samples)


def _usable(value: Any) -> Any:
    """An inference tensor as one that autograd can record; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
