"""`FixedPoint` and `Root`: a cell in, an implicit layer out."""

from collections.abc import Callable
from typing import Any, ClassVar, Never

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.compiler import is_compiling, is_exporting

from .._adjoint import Adjoint
from .._call import run
from .._options import refuse_unknown
from .._problem import Kind
from .._report import OnFailure, check_on_failure
from .._solution import PyTree, Solution
from .._spread import ProcessGroup
from ..diagnostics import name_of, record
from ..solvers import Method
from ._depth import take_steps
from ._enrolled import enroll
from ._memory import Memory
from ._quantised import couples_samples

_OPTIONS = ("solver", "adjoint", "batch_dims", "max_steps", "on_failure", "init", "depth", "process_group")


class _Implicit(nn.Module):
    """What the two layers share: options, start, `forward` and `solve`. No state but the cell's own."""

    _kind: ClassVar[Kind]

    in_graph: bool | None = None
    """Whether a solve is one operator in the graphs of `torch.compile`, whatever its solver and its adjoint: with True
    there is no break (`fullgraph=True`). With None there is one in training, unless the gradient is in the same graph
    (`torch._dynamo.config.trace_autograd_ops`); in inference the solve is a loop in the graph, or a break. With False
    it is never the operator.
    """

    def __init__(
        self,
        cell: Callable[..., PyTree],
        *,
        solver: Method | None = None,
        adjoint: Adjoint | None = None,
        batch_dims: int = 1,
        max_steps: int | None = None,
        on_failure: OnFailure = "warn",
        init: Callable[..., PyTree] | Memory | None = None,
        depth: int | None = None,
        process_group: ProcessGroup | None = None,
        **unknown: Never,
    ) -> None:
        super().__init__()
        refuse_unknown(type(self).__name__, unknown, _OPTIONS)
        check_on_failure(on_failure)
        if not callable(cell):
            raise TypeError(f"cell must be callable, but is {type(cell).__name__}; give an nn.Module or a function.")
        if init is not None and not callable(init) and not isinstance(init, Memory):
            raise TypeError(
                f"init={init!r} is not callable; give a function or nn.Module of the inputs, "
                "torchimplicit.nn.Previous(), or None."
            )
        if process_group is not None and isinstance(init, Memory):
            raise ValueError(
                f"init={type(init).__name__}(...) starts each process from its own last solution, which process_group= "
                "cannot allow; give one of the two."
            )
        self.cell = cell
        self.init = init
        self.solver = solver
        self.adjoint = adjoint
        self.batch_dims = batch_dims
        self.max_steps = max_steps
        self.on_failure: OnFailure = on_failure
        self.process_group = process_group
        self.depth = depth
        self._number = enroll(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = enroll(self)  # a copy is another layer

    @property
    def depth(self) -> int | None:
        """None to solve; k to take k plain steps from the start and differentiate these, as a weight-tied network does.

        A switch for the beginning of training, when the equilibrium of random weights teaches little (Bai, Kolter &
        Koltun 2019, §4): set it back to None after some epochs. `solver` and `adjoint` are not used meanwhile, but for
        the tolerance by which `Solution.converged` says which samples have arrived. There is no `init=Previous()` then.
        """
        return self._depth

    @depth.setter
    def depth(self, depth: int | None) -> None:
        if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 1):
            raise ValueError(f"depth={depth!r} is not valid; give an integer >= 1, or None to solve.")
        self._depth = depth

    def forward(self, *inputs: PyTree) -> PyTree:
        """The solution z for these inputs: `solve(*inputs).value`."""
        compiled = is_compiling() and not is_exporting()
        if compiled and (torch.is_grad_enabled() or isinstance(self.init, Memory) or self.in_graph):
            return self._forward_compiled(*inputs)
        return self.solve(*inputs).value

    def _forward_compiled(self, *inputs: PyTree) -> PyTree:
        in_graph = torch._dynamo.config.trace_autograd_ops if self.in_graph is None else self.in_graph
        if in_graph and isinstance(self.cell, nn.Module) and _are_dense(inputs):
            from ._operation import solve_in_graph

            zeros = type(self)._start is _Implicit._start and (self.init is None or isinstance(self.init, Memory))
            if zeros:
                return solve_in_graph(self, self._number, inputs, None)
            if not isinstance(self.init, Memory):
                start = self._start(*inputs)
                if isinstance(start, Tensor) or (isinstance(start, tuple) and len(start) > 1 and _are_dense(start)):
                    return solve_in_graph(self, self._number, inputs, start)
        # One break, here: further in, every function on the way would be compiled for nothing.
        return _forward_uncompiled(self, *inputs)

    def solve(self, *inputs: PyTree, trace: bool = False, start: PyTree | None = None) -> Solution:
        """The solution for these inputs with its evidence, a `Solution`.

        Args:
            inputs: as of `forward`.
            trace: keep the residual norms of every step.
            start: where to begin; None is where `init` says.
        """
        memory = self.init if start is None and self.depth is None and isinstance(self.init, Memory) else None
        z0, solver = self._start(*inputs) if start is None else start, self.solver
        cell, given = self._bound(*inputs)
        solver = self._method(cell) if solver is None else solver
        batch_dims = 0 if couples_samples(self.cell) else self._batch_dims(*inputs)
        label = name_of(self)
        if self.depth is not None:
            if trace:
                raise ValueError(f"trace=True has nothing to show of depth={self.depth} steps; set layer.depth = None.")
            solution = take_steps(
                self._kind,
                cell,
                z0,
                given,
                depth=self.depth,
                solver=solver,
                batch_dims=batch_dims,
                on_failure=self.on_failure,
                label=label,
            )
        else:
            if memory is not None:
                z0, solver = memory.begin(z0, solver)
            solution = self._run(cell, z0, given, solver, batch_dims, trace, label)
            if memory is not None:
                memory.keep(solution)
        record(self, solution)
        return solution

    def _run(
        self,
        cell: Callable[..., PyTree],
        z0: PyTree,
        given: tuple[PyTree, ...],
        solver: Method | None,
        batch_dims: int,
        trace: bool,
        label: str,
    ) -> Solution:
        """The solve itself, of which all is settled."""
        return run(
            self._kind,
            cell,
            z0,
            given,
            solver=solver,
            adjoint=self.adjoint,
            batch_dims=batch_dims,
            max_steps=self.max_steps,
            on_failure=self.on_failure,
            trace=trace,
            verbose=False,
            process_group=self.process_group,
            label=label,
        )

    def extra_repr(self) -> str:
        """The options."""
        depth = "" if self.depth is None else f", depth={self.depth}"
        return f"solver={self.solver}, adjoint={self.adjoint}, batch_dims={self.batch_dims}{depth}"

    def _bound(self, *inputs: PyTree) -> tuple[Callable[..., PyTree], tuple[PyTree, ...]]:
        """The map of this solve, and what it is given: a layer may compute once here what every step would."""
        return self.cell, inputs

    def _method(self, cell: Callable[..., PyTree]) -> Method | None:
        """The solver of this map where none was chosen; None is the call's own default."""
        return None

    def _batch_dims(self, *inputs: PyTree) -> int:
        return self.batch_dims

    def _start(self, *inputs: PyTree) -> PyTree:
        if self.init is not None and not isinstance(self.init, Memory):
            return self.init(*inputs)
        if not inputs or not isinstance(inputs[0], Tensor):
            raise TypeError(
                f"{type(self).__name__} starts from zeros like its first input, which must be a tensor but is "
                f"{type(inputs[0]).__name__ if inputs else 'missing'}; give init=, a callable of the inputs."
            )
        return torch.zeros_like(inputs[0], dtype=_start_dtype(inputs[0]))


def _are_dense(values: tuple[Any, ...]) -> bool:
    return len(values) > 0 and all(isinstance(t, Tensor) and t.layout == torch.strided for t in values)


def _start_dtype(x: Tensor) -> torch.dtype:
    """That of the input; single precision under autocast, whose business the cell's precision is then."""
    reduced = x.is_floating_point() and x.itemsize < 4 and torch.is_autocast_enabled(x.device.type)
    return torch.float32 if reduced else x.dtype


_forward_uncompiled: Any = _disable_dynamo(_Implicit.forward)  # called only where the compiler is in use


class FixedPoint(_Implicit):
    """The layer `z = cell(z, *inputs)`.

    >>> import torch, torchimplicit as ti
    >>> class Cell(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = torch.nn.Linear(8, 8)
    ...     def forward(self, z, x):
    ...         return torch.tanh(0.5 * self.linear(z) + x)
    >>> layer = ti.nn.FixedPoint(Cell(), solver=ti.Anderson())
    >>> layer(torch.randn(4, 8)).shape
    torch.Size([4, 8])

    Samples that are done leave the batch where the cell can be split: where its tensor inputs have the batch dims in
    front, as z has, which is tried and checked. A cell may help: an attribute `samplewise = True` says that all of them
    do, which saves the check, and `False` forbids the split, for a compiled cell, say; a method `linearize` supplies
    its Jacobian in closed form (see `linear.JacobianOperator`), and then an attribute `pure = True` says that it draws
    nothing at random and changes nothing.

    A cell with dropout or batch norm in training mode is one function for the length of a solve, its masks drawn once
    and its buffers changed once (see `fixed_point`). One with dynamically quantised layers, which scale by the largest
    entry of a batch, is solved as one problem for all samples.

    Args:
        cell: maps `(z, *inputs)` to the next z: an `nn.Module`, whose parameters are the layer's, or a function.
        solver: None is `Auto()`.
        adjoint: None is `Implicit()`.
        batch_dims: leading dims of z that index independent samples.
        max_steps: None is the solver's default.
        on_failure: `"warn"`, `"raise"` or `"ignore"`.
        init: gives the start from the inputs, a callable or a Module; None starts from zeros like the first input. Or
            `Previous()`, to start from the last solution, or `BySample(n)`, from that of the epoch before.
        depth: None solves; a number takes that many plain steps instead, see the attribute.
        process_group: for a cell that communicates with other processes: these, or `"world"`, which a copy or pickle
            of the layer survives; as in `fixed_point`.
    """

    _kind = "fixed_point"


class Root(_Implicit):
    """The layer `cell(z, *inputs) = 0`; as `FixedPoint`."""

    _kind = "root"
