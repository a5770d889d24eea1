"""Which solvers a comparison runs, and what it calls them."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch

from .._options import Options
from .._problem import Kind
from ..solvers import (
    LBFGS,
    Anderson,
    Auto,
    Broyden,
    Chord,
    Dogleg,
    LevenbergMarquardt,
    Method,
    Newton,
    NewtonCG,
    NewtonKrylov,
    Picard,
)

Solvers = Mapping[str, Method] | Sequence[Method]
"""Solvers under labels of the caller's, or without."""

DENSE_BYTES = 2**30
"""Size up to which the Jacobians of a batch are formed."""


def applicable(
    kind: Kind, batch: int, rows: int, unknowns: int, dtype: torch.dtype
) -> tuple[list[Method], tuple[str, ...], int]:
    """The solvers that suit a kind of problem, the names of those left out, and the bytes of the dense Jacobians.

    Left out are the ones that need dense Jacobians, `(B, m, n)`, where those would take more than `DENSE_BYTES`. Not
    among them at all: the bracketing solvers, which need a bracket, and for `minimize` Newton's method, which would as
    soon find a saddle point.

    Args:
        kind: of the problem.
        batch: samples, B.
        rows: components of the residual, m.
        unknowns: of one sample, n.
        dtype: of the state.
    """
    if kind == "minimize":
        return [Auto(), LBFGS(), NewtonCG()], (), 0
    dense: list[Method]
    if kind == "least_squares":
        dense = [LevenbergMarquardt(), Dogleg()]
        light = [Auto(), LevenbergMarquardt(linear_solver="cg"), LBFGS(), NewtonCG()]
    else:
        dense = [Chord(), Newton(), Dogleg(), LevenbergMarquardt()]
        light = [Auto(), Picard(), Anderson(), Broyden(), Broyden(update="good"), NewtonKrylov()]
    size = batch * rows * unknowns * dtype.itemsize
    if size > DENSE_BYTES:
        return light, tuple(label(solver) for solver in dense), size
    return light + dense, (), size


def labelled(solvers: Solvers) -> dict[str, Method]:
    """The caller's solvers by label.

    Raises:
        TypeError: something else than solvers, or labels that are no strings.
        ValueError: no solver at all.
    """
    if isinstance(solvers, Mapping):
        named = dict(solvers)
    elif isinstance(solvers, Sequence) and not isinstance(solvers, str):
        named = by_label(solvers)
    else:
        raise TypeError(
            f"compare_solvers: solvers={solvers!r} is neither a list of solvers nor a dict of them by label; "
            "give [torchimplicit.Picard(), torchimplicit.Newton()], say, or None for all that apply."
        )
    if not named:
        raise ValueError("compare_solvers: solvers is empty; give at least one, or None for all that apply.")
    for name, solver in named.items():
        if not isinstance(name, str):
            raise TypeError(f"compare_solvers: the label {name!r} of a solver is no string.")
        if not isinstance(solver, Method):
            raise TypeError(
                f"compare_solvers: {solver!r} is no solver; give an instance such as torchimplicit.Anderson()."
            )
    return named


def by_label(solvers: Sequence[Method]) -> dict[str, Method]:
    """Solvers by their own labels, made different by a number where two are the same."""
    named: dict[str, Method] = {}
    for solver in solvers:
        name = first = label(solver)
        turn = 1
        while name in named:
            turn += 1
            name = f"{first} #{turn}"
        named[name] = solver
    return named


def label(solver: Any) -> str:
    """A solver's `repr` without the options that have their default value."""
    if not isinstance(solver, Options):
        return repr(solver)
    told = []
    for f in fields(solver):
        value = getattr(solver, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if isinstance(value, torch.Tensor):
            told.append(f"{f.name}=tensor{tuple(value.shape)}")
        elif value is not default and value != default:
            told.append(f"{f.name}={label(value)}")
    return f"{type(solver).__name__}({', '.join(told)})"
