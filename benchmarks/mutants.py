"""Whether the tests of derivatives can fail: mistakes put into a copy of the derivative engine, each to be noticed.

Every mutant is one change of a few words in a copy of the package. The tests run against the copy and stop at the first
failure, which kills the mutant; one that lives is a hole in the tests. The unchanged copy must pass. The test that
killed a mutant in the figures that are there is tried first.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, circumstances, write

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "torchimplicit"
TESTS = (
    "test_bilevel",
    "test_pullback",
    "test_derivatives",
    "test_derivative_edges",
    "test_derivative_styles",
    "test_failures",
    "test_tangent",
    "test_mixed_refinement",
    "test_preconditioned",
    "test_compiled_layer",
)
"""For the rules; a mistake elsewhere shows in the last ones, which are then run first."""
LIMIT = 600
"""Seconds: a mutant that never ends is noticed, too."""


class Mutant(NamedTuple):
    """A mistake: `old`, which stands once in the file, becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        """The file's text with the mistake in it.

        Raises:
            ValueError: `old` is not there exactly once: the engine has changed, and the list must follow.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {text.count(self.old)} times in {self.file}, not once.")
        return text.replace(self.old, self.new)


MUTANTS = [
    # The rules of a solution.
    Mutant(
        "gradient: Aᵀ is not transposed",
        "_rules.py",
        "u = solve_linear(system, True,",
        "u = solve_linear(system, False,",
    ),
    Mutant(
        "gradient: v in the place of u",
        "_rules.py",
        "pull(fn, [tensors[i] for i in places], u)",
        "pull(fn, [tensors[i] for i in places], v)",
    ),
    Mutant(
        "gradient: sign",
        "_rules.py",
        "pull(fn, [tensors[i] for i in places], u)",
        "pull(fn, [tensors[i] for i in places], -u)",
    ),
    Mutant(
        "solution jvp: A transposed",
        "_rules.py",
        "solve_linear(ctx.system, False, right",
        "solve_linear(ctx.system, True, right",
    ),
    Mutant(
        "solution jvp: no linear solve",
        "_rules.py",
        "return solve_linear(ctx.system, False, right, z, status, tensors), None",
        "return right, None",
    ),
    Mutant(
        "solution jvp: sign",
        "_rules.py",
        "return solve_linear(ctx.system, False, right,",
        "return solve_linear(ctx.system, False, -right,",
    ),
    Mutant(
        "solution jvp: tangents of other tensors",
        "_rules.py",
        "[tangents[2 + i] for i in places], z)",
        "[tangents[2 + i] for i in reversed(places)], z)",
    ),
    Mutant(
        "solution jvp: only the first tensor",
        "_rules.py",
        "if not places:\n",
        "places = places[:1]\n        if not places:\n",
    ),
    Mutant(
        "solution vmap: the start's dim",
        "_rules.py",
        "_rows(z0, in_dims[1], size), mapped)",
        "_rows(z0, None, size), mapped)",
    ),
    # The rules of a linear solve.
    Mutant(
        "linear backward: same side again",
        "_rules.py",
        "s = solve_linear(ctx.system, not ctx.transposed,",
        "s = solve_linear(ctx.system, ctx.transposed,",
    ),
    Mutant(
        "linear backward: zeros for s", "_rules.py", "left, right = (u, s)", "s = 0 * s\n        left, right = (u, s)"
    ),
    Mutant(
        "linear backward: left and right exchanged",
        "_rules.py",
        "(u, s) if ctx.transposed else (s, u)",
        "(s, u) if ctx.transposed else (u, s)",
    ),
    Mutant("linear backward: never exchanged", "_rules.py", "(u, s) if ctx.transposed else (s, u)", "(s, u)"),
    Mutant(
        "linear backward: sign of dA",
        "_rules.py",
        "found = pull(product, [z, *(tensors[i] for i in places)], right)",
        "found = pull(product, [z, *(tensors[i] for i in places)], -right)",
    ),
    Mutant(
        "linear backward: dA in z missing",
        "_rules.py",
        "return None, None, s, found[0], None,",
        "return None, None, s, None, None,",
    ),
    Mutant(
        "linear backward: dA in the tensors missing",
        "_rules.py",
        "*_in_places(found[1:], places, len(tensors))",
        "*(None for _ in tensors)",
    ),
    Mutant(
        "linear backward: dv missing",
        "_rules.py",
        "return None, None, s, found[0]",
        "return None, None, None, found[0]",
    ),
    Mutant(
        "linear jvp: dv missing",
        "_rules.py",
        "right = torch.zeros_like(u) if dv is None else dv",
        "right = torch.zeros_like(u)",
    ),
    Mutant(
        "linear jvp: dz missing",
        "_rules.py",
        "dz = torch.zeros_like(z) if dz is None else dz",
        "dz = torch.zeros_like(z)",
    ),
    Mutant("linear jvp: dA missing", "_rules.py", "if dz is not None or moving:", "if False:"),
    Mutant(
        "linear jvp: dA in the tensors missing",
        "_rules.py",
        "[dz, *(tangents[5 + i] for i in moving)]",
        "[dz, *(0 * tangents[5 + i] for i in moving)]",
    ),
    Mutant("linear jvp: sign of dA", "_rules.py", "right = right + push(product", "right = right - push(product"),
    Mutant(
        "linear jvp: always the transpose",
        "_rules.py",
        "if ctx.transposed else push(at, [z], [u], u)",
        "if True else push(at, [z], [u], u)",
    ),
    Mutant(
        "linear jvp: never the transpose",
        "_rules.py",
        "return pull(at, [z], u)[0] if ctx.transposed else",
        "return pull(at, [z], u)[0] if False else",
    ),
    Mutant(
        "linear jvp: solved on the other side",
        "_rules.py",
        "return solve_linear(ctx.system, ctx.transposed, right",
        "return solve_linear(ctx.system, not ctx.transposed, right",
    ),
    Mutant(
        "linear vmap: v's dim for z",
        "_rules.py",
        "zip((v, z, status), in_dims[2:5], strict=True)",
        "zip((v, z, status), (in_dims[2], None, in_dims[4]), strict=True)",
    ),
    Mutant(
        "vmap: mapped tensors are shared",
        "_rules.py",
        "return moved, [None if d is None else 0 for d in dims]",
        "return moved, [None for d in dims]",
    ),
    Mutant("vmap: dim not moved to the front", "_rules.py", "t if d is None else t.movedim(d, 0).contiguous()", "t"),
    Mutant(
        "vmap: rows interleaved",
        "_rules.py",
        "return t.reshape(size * t.shape[1], *t.shape[2:])",
        "return t.transpose(0, 1).reshape(size * t.shape[1], *t.shape[2:])",
    ),
    Mutant("pullback outlives its transform", "_rules.py", "while inner is not t:", "while False:"),
    Mutant(
        "batched cotangents: A⁻¹ for A⁻ᵀ",
        "_rules.py",
        "found = solve_linear(copies, transposed, *rows",
        "found = solve_linear(copies, not transposed, *rows",
    ),
    Mutant(
        "forward over forward in a pullback",
        "_rules.py",
        "if transformed():\n        refuse_forward_over_forward",
        "if False:\n        refuse_forward_over_forward",
    ),
    # Products and the system.
    Mutant(
        "push: conjugate dropped",
        "_system.py",
        "(g.conj() * t).real if g.is_complex()",
        "(g * t).real if g.is_complex()",
    ),
    Mutant(
        "push: real part only",
        "_system.py",
        "(g.conj() * t).real if g.is_complex()",
        "(g.real * t.real) if g.is_complex()",
    ),
    Mutant("pull: not differentiable", "_system.py", "create_graph=again", "create_graph=False"),
    Mutant(
        "pull: primals detached",
        "_system.py",
        "p.view_as(p) if again and p.requires_grad else",
        "p.view_as(p) if False else",
    ),
    Mutant(
        "pull: the caller's autocast",
        "_system.py",
        "torch.autocast(cotangent.device.type, enabled=False):",
        "torch.enable_grad():",
    ),
    Mutant(
        "residual: root has the sign of fn",
        "_system.py",
        'return value - z if self.kind == "fixed_point" else -value',
        'return value - z if self.kind == "fixed_point" else value',
    ),
    Mutant(
        "objective: half a square",
        "_system.py",
        "0.5 * out.square().sum(dim=1) if",
        "0.5 * out.square().sum(dim=1).detach() if",
    ),
    Mutant("forward over forward allowed", "_system.py", "if forward_levels() > 1:", "if False:"),
    Mutant(
        "linearize: twice the tangent",
        "_rules.py",
        "found = [tangents[2 + i] for i in places]",
        "found = [2 * tangents[2 + i] for i in places]",
    ),
    # The tape.
    Mutant("tape: grad mode ignored", "_tape.py", "if not step.recording:\n        stack", "if False:\n        stack"),
    Mutant(
        "tape: forward mode looks through no_grad",
        "_tape.py",
        "if step.recording or slot in read else found[place].detach()",
        "if True else found[place].detach()",
    ),
    Mutant(
        "tape: autocast ignored", "_tape.py", "if step.autocast is not None:\n        stack", "if False:\n        stack"
    ),
    Mutant(
        "tape: autocast ignored without a graph",
        "_tape.py",
        "if step.autocast is not None:\n        stack",
        "if step.autocast is not None and step.recording:\n        stack",
    ),
    Mutant("tape: assignment by index not recorded", "_tape.py", "if makes or (reads and out is None):", "if makes:"),
    Mutant(
        "tape: nested arguments not read",
        "_tape.py",
        "if kwargs or any(isinstance(a, _NESTED) for a in args):",
        "if kwargs:",
    ),
    Mutant(
        "tape: several outputs, the first only",
        "_tape.py",
        "values[slot] = found[place] if",
        "values[slot] = found[0] if",
    ),
    Mutant("tape: hidden Functions not noticed", "_tape.py", "elif slot in self._unseen and (", "elif False and ("),
    Mutant(
        "tape: hidden tensors with a graph not noticed",
        "_tape.py",
        "if self._hidden(t):",
        "if False:",
    ),
    Mutant(
        "tape: inputs of the recording, not of the replay",
        "_tape.py",
        "values.update(zip(self._slots, inputs, strict=True))",
        "values.update(zip(self._slots, self.inputs, strict=True))",
    ),
    # The equation and the calls.
    Mutant(
        "equation: places off",
        "_transformed.py",
        "[known[id(t)] for t in final.inputs]",
        "[known[id(t)] for t in reversed(final.inputs)]",
    ),
    Mutant("equation: places ignored", "_transformed.py", "[known[id(t)] for t in final.inputs]", "None"),
    Mutant(
        "equation: what cannot be seen is let through",
        "_transformed.py",
        "if final.opaque or any(id(t) not in known for t in final.inputs):",
        "if False:",
    ),
    Mutant(
        "equation: not transformed in forward mode",
        "_transformed.py",
        "return tape.opaque or any(_is_dual(t) for t in tape.inputs)",
        "return False",
    ),
    Mutant(
        "equation: dead mask dropped before",
        "_equation.py",
        "v = torch.where(dead[:, None], 0.0, v)\n",
        "v = v.clone()\n",
    ),
    Mutant(
        "equation: every sample dead",
        "_equation.py",
        "dead = self.adjoint.without_gradient(status)",
        "dead = self.adjoint.without_gradient(status) | True",
    ),
    Mutant(
        "equation: A and Aᵀ exchanged",
        "_equation.py",
        "operator.mT if transposed else operator",
        "operator if transposed else operator.mT",
    ),
    Mutant(
        "equation: A of a root for a fixed point",
        "_problem.py",
        'shifted=self.kind == "fixed_point"',
        "shifted=False",
    ),
    Mutant("equation: donors not applied", "_equation.py", "if self.donors is not None:", "if False:"),
    Mutant("closure: a tensor returned as it is", "_closure.py", "return mode.swap(out)", "return out"),
    Mutant(
        "donors: the states only",
        "_isolate.py",
        "full[i] = _take(full[i], self.index, self.batch)",
        "full[i] = full[i]",
    ),
    Mutant(
        "donors: a donor's Jacobian counts twice",
        "_isolate.py",
        "z.detach().index_select(0, self.index), z)",
        "z.index_select(0, self.index), z)",
    ),
    Mutant(
        "donors: the tensors only",
        "_isolate.py",
        "return torch.where(donated[:, None], z.detach().index_select(0, self.index), z), full",
        "return z, full",
    ),
    Mutant("attach: hidden operations let through", "_attach.py", "if tape.opaque or", "if False or"),
    Mutant(
        "attach: sign of a batch of gradients",
        "_attach.py",
        'return None, u if of.problem.kind == "fixed_point" else -u, None',
        "return None, u, None",
    ),
    Mutant(
        "attach: gradient of the plain rule not transposed",
        "_attach.py",
        "replace(self.operator.mT, record=self._coarsely)",
        "replace(self.operator, record=self._coarsely)",
    ),
    Mutant("pullback: one part of two", "_attach.py", "else total[id(t)] + grad", "else grad"),
    Mutant("pullback: believed incomplete", "_attach.py", "return operator if complete and", "return operator if"),
    Mutant("pullback: no slope for x", "nn/_tanh_jacobian.py", 'return (scaled,), {"linear', 'return (u,), {"linear'),
    Mutant(
        "pullback: no slope for W",
        "nn/_tanh_jacobian.py",
        "torch.mm(scaled.reshape(-1, n).t(), self.z.reshape(-1, n))",
        "torch.mm(u.reshape(-1, n).t(), self.z.reshape(-1, n))",
    ),
    Mutant(
        "pullback: the slope where z was",
        "nn/_tanh_jacobian.py",
        "torch.mm(scaled.reshape(-1, n).t(), self.z.reshape(-1, n))",
        "torch.mm(scaled.reshape(-1, n).t(), self.slope.reshape(-1, n))",
    ),
    Mutant(
        "pullback: nothing needed of the second derivative",
        "_attach.py",
        "if torch.is_grad_enabled() or not of.record:",
        "if torch.is_grad_enabled() and of.record:",
    ),
    # Products from a tape, and the refinement that they serve.
    Mutant("tangent: bias kept", "_tangent.py", "after[1 - place] = None", "pass"),
    Mutant("tangent: bias by name kept", "_tangent.py", 'options["bias"] = None', "pass"),
    Mutant("tangent: factor of a sum forgotten", "_tangent.py", "(place == 0 or not kwargs) and ", ""),
    Mutant(
        "tangent: sum that broadcasts",
        "_tangent.py",
        "(place == 0 or not kwargs) and values[slot].shape == values[made].shape",
        "(place == 0 or not kwargs)",
    ),
    Mutant("tangent: product linear in both", "_tangent.py", "if len(moving) == 1 and", "if moving and"),
    Mutant("tangent: writes in place", "_tangent.py", "if not made or made & read:", "if not made:"),
    Mutant("tangent: what is out of sight", "_tangent.py", "if tape.opaque:", "if False:"),
    Mutant("tangent: constants vary", "_tangent.py", "or not step.recording", ""),
    Mutant(
        "tangent: random functions",
        "_problem.py",
        "isinstance(self.fn, Gradient) or not self._purity.known",
        "isinstance(self.fn, Gradient)",
    ),
    Mutant(
        "preconditioned: the value by P",
        "nn/_shifted_tanh.py",
        "        b = torch.mm(z, self.weight.t())\n        self._last",
        "        self._last",
    ),
    Mutant("preconditioned: W z of another state", "nn/_shifted_tanh.py", "last[0] is z", "True"),
    Mutant(
        "preconditioned: no shift of the start", "nn/_shifted_tanh.py", "z = torch.add(z, b, alpha=self.shift)", "pass"
    ),
    Mutant("preconditioned: singular M", "nn/_shifted_tanh.py", "not math.isfinite(float(product.sum()))", "False"),
    Mutant(
        "preconditioned: c too large", "nn/_shifted_tanh.py", "if radius * _LARGEST <= _PART else _PART / radius", ""
    ),
    Mutant(
        "preconditioned: remainder of the shifted system",
        "nn/_tanh_jacobian.py",
        "torch.addmm(p, self.slope * u, self.weight).sub_(u)",
        "torch.addmm(q, rest * u, product).sub_(u)",
    ),
    Mutant(
        "preconditioned: remainder of the shifted system, forward",
        "nn/_tanh_jacobian.py",
        "torch.addcmul(p, self.slope, torch.mm(u, self.weight.t())).sub_(u)",
        "torch.addcmul(p, self.slope, w).sub_(u)",
    ),
    Mutant(
        "preconditioned: nobody goes on with plain steps",
        "solvers/_preconditioned_picard.py",
        "plain = astray if plain is None else plain | astray",
        "pass",
    ),
    Mutant("preconditioned: a residual may stay", "solvers/_preconditioned_picard.py", "_FALL = 0.99", "_FALL = 1.0"),
    Mutant(
        "preconditioned: plain steps for everyone",
        "solvers/_preconditioned_picard.py",
        "not bool(plain.all())",
        "not bool(plain.any())",
    ),
    Mutant(
        "preconditioned: the series cut short",
        "_adjoint.py",
        "operator.neumann(v, self.terms + 1)",
        "operator.approach(v, self.terms + 1)",
    ),
    Mutant(
        "preconditioned: refused under transforms",
        "_equation.py",
        "problem.preconditionable = self.problem.preconditionable",
        "pass",
    ),
    Mutant("promises: any age", "_promises.py", ' and _age(fn, name) <= _age(fn, "forward")', ""),
    Mutant(
        "promises: samples of an older forward",
        "_problem.py",
        'declared = None if declared and not keeps(fn, "samplewise") else declared',
        "pass",
    ),
    Mutant(
        "mixed: judged without a fall",
        "_tolerance.py",
        "torch.where(self.first < self.limit(start), torch.inf, self.first)",
        "torch.full_like(self.first, torch.inf)",
    ),
    Mutant(
        "mixed: residual in reduced precision", "_mixed.py", "found = problem.evaluate(z)", "found = coarse.evaluate(z)"
    ),
    Mutant("mixed: step taken that is worse", "_mixed.py", "better = going & (after < norm)", "better = going"),
    Mutant(
        "mixed: adjoint refined in reduced precision",
        "linear/_neumann.py",
        "rest = b - operator.mv(value)",
        "rest = b - coarse.mv(value)",
    ),
    Mutant(
        "mixed: adjoint of the present function",
        "_attach.py",
        "if self.tape is None:\n                return AutogradJacobian",
        "if True:\n                return AutogradJacobian",
    ),
    # The compiled loops.
    Mutant(
        "compiled: no absolute tolerance",
        "nn/_tanh_loops/operators.cpp",
        "std::max(atol + atol_first * first[i], tiny)",
        "tiny",
    ),
    Mutant(
        "compiled: a residual need not fall",
        "nn/_tanh_loops/operators.cpp",
        "return norm < fallen && norm",
        "return norm",
    ),
    Mutant("compiled: rounding counts as solved", "nn/_tanh_loops/operators.cpp", " && eps * two(z, n) <= fallen", ""),
    Mutant(
        "compiled: nobody is done at the start",
        "nn/_tanh_loops/operators.cpp",
        "passed[i] = first[i] < atols[i] + rtol * two(std::as_const(value).at(i), n);",
        "passed[i] = false;",
    ),
    Mutant(
        "compiled: adjoint: no slope at the end",
        "nn/_tanh_loops/operators.cpp",
        "o[i] = (T(1) - f[i] * f[i]) * u[i];",
        "o[i] = u[i];",
    ),
    Mutant(
        "compiled: adjoint: W is not transposed",
        "nn/_tanh_loops/operators.cpp",
        "at::mm(of_x.t(), z)",
        "at::mm(z.t(), of_x)",
    ),
    Mutant(
        "compiled: adjoint: underflow counts as zero",
        "nn/_tanh_loops/operators.cpp",
        "target[i] = lost ? -1.0 : rtol * size;",
        "target[i] = rtol * size;",
    ),
    Mutant(
        "compiled: zero start without looking",
        "nn/_tanh_loops/operators.cpp",
        "[](T number) { return number == 0; }",
        "[](T) { return true; }",
    ),
    Mutant(
        "compiled: samples of another row", "nn/_tanh_loops/loop.h", "rows[j] = rows[kept[j]];", "rows[j] = rows[j];"
    ),
    Mutant(
        "compiled: who is given up is done",
        "nn/_tanh_loops/loop.h",
        "done_out[row.sample] = done;",
        "done_out[row.sample] = true;",
    ),
    Mutant("compiled: nobody is given up", "nn/_tanh_loops/loop.h", "given_up += !done;", ""),
    Mutant(
        "compiled: stuck for ever",
        "nn/_tanh_loops/loop.h",
        "const bool goes = !done && !stuck && std::isfinite(row.norm);",
        "const bool goes = !done && std::isfinite(row.norm);",
    ),
    Mutant("compiled: adjoint: v at each step", "nn/_tanh_loops/steps.h", "return t[i] + vs[i];", "return t[i];"),
    Mutant(
        "compiled: rows stay where they are",
        "nn/_tanh_loops/rows.h",
        "std::as_const(*this).at(kept[j]), n * sizeof(T));\n    now_",
        "std::as_const(*this).at(j), n * sizeof(T));\n    now_",
    ),
    Mutant(
        "compiled: x of another row",
        "nn/_tanh_loops/steps.h",
        "void keep(const std::vector<int64_t>& kept) { x.keep(kept); }",
        "void keep(const std::vector<int64_t>&) {}",
    ),
    Mutant("compiled: extrapolation without its end", "nn/_tanh_loops/steps.h", "if (worse) off_[row] = 1;", ""),
    Mutant(
        "compiled: extrapolation of another row", "nn/_tanh_loops/steps.h", "off_[j] = off_[kept[j]];", "off_[j] = 0;"
    ),
    Mutant("compiled: shifted: no shift back", "nn/_tanh_loops/shifted.h", "return z[i] + c * b[i];", "return z[i];"),
    Mutant(
        "compiled: shifted: value by P",
        "nn/_tanh_loops/shifted.h",
        "at::mm_out(b_.tensor(), z_.tensor(), transposed_);",
        "",
    ),
    Mutant(
        "compiled: shifted: adjoint without its first term",
        "nn/_tanh_loops/shifted.h",
        "return u[i] + (q[i] + r[i]);",
        "return u[i] + r[i];",
    ),
    Mutant(
        "compiled: mixed: judged in reduced precision",
        "nn/_tanh_loops/mixed.h",
        "map_(z_, value_);",
        "for (int64_t i = 0; i < numbers; ++i) value[i] = z[i];",
    ),
    Mutant(
        "compiled: mixed: no slope", "nn/_tanh_loops/mixed.h", "low[i] = low_of(d[i] * e[i]);", "low[i] = low_of(e[i]);"
    ),
    Mutant(
        "compiled: mixed: the last term alone",
        "nn/_tanh_loops/mixed.h",
        "z[i] += residual[i] + d[i] * full_of(image[i]);",
        "z[i] += d[i] * full_of(image[i]);",
    ),
    Mutant(
        "compiled: mixed: slope of the start",
        "nn/_tanh_loops/mixed.h",
        "map_.begin(value_);",
        "if (false) map_.begin(value_);",
    ),
    Mutant(
        "compiled: Newton: any step is taken",
        "nn/_tanh_loops/newton.h",
        "if (!(after <= (1 - 1e-4) * before)) return {step, false};",
        "if (false) return {step, false};",
    ),
    Mutant("compiled: Newton: all are solved", "nn/_tanh_loops/newton.h", "found.clean = found.clean && done[i];", ""),
    Mutant(
        "compiled: Newton: Givens' sine",
        "nn/_tanh_loops/newton.h",
        "h(j + 1, k) = cosine_[j] * lower - sine_[j] * upper;",
        "h(j + 1, k) = cosine_[j] * lower + sine_[j] * upper;",
    ),
    Mutant(
        "compiled: Newton: restart from the right side",
        "nn/_tanh_loops/newton.h",
        "residual_[i] = right_side_[i] - (delta_[i] - slope_[i] * image[i]);",
        "residual_[i] = right_side_[i];",
    ),
    Mutant(
        "compiled: tanh: a slope where there is none",
        "nn/_tanh_loops/tanh.h",
        "return p > kOne ? 1.0f : (p < -kOne ? -1.0f : inside);",
        "return inside;",
    ),
    Mutant(
        "compiled: dead samples have a gradient",
        "nn/_compiled.py",
        "dead = without if bool(without.any()) else None",
        "dead = None",
    ),
    Mutant(
        "compiled: second derivatives by the loop",
        "nn/_compiled.py",
        "if not torch.is_grad_enabled() and not batched(v):",
        "if not batched(v):",
    ),
    Mutant(
        "compiled: steps of the loop are not counted",
        "nn/_compiled.py",
        "before = steps.index_select(0, left) if plan.resumes else 0",
        "before = 0",
    ),
    Mutant("compiled: under autocast", "nn/_compiled.py", 'if torch.is_autocast_enabled("cpu") or torch', "if torch"),
    Mutant("compiled: damped", "nn/_compiled_plan.py", " and solver.damping == 1.0", ""),
]


def run(mutant: Mutant | None, killer: str | None = None) -> dict[str, Any]:
    """Run the tests against a copy of the package; what killed it, None if nothing did, and the seconds.

    Args:
        mutant: the mistake; None for none.
        killer: the test that noticed it before, which is tried first.
    """
    began = time.perf_counter()
    rules = mutant is None or mutant.file in ("_rules.py", "_system.py")
    files = [f"{name}.py" for name in (TESTS if rules else TESTS[::-1])]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "torchimplicit"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            path = copy / mutant.file
            path.write_text(mutant.applied(path.read_text()))
        found = _first_failure(folder, [killer]) if killer else None
        found = found or _first_failure(folder, files)
    name = "unchanged" if mutant is None else mutant.name
    print(f"{name}: {found or 'passes'}", file=sys.stderr, flush=True)
    return {"killer": found, "seconds": round(time.perf_counter() - began, 1)}


def _first_failure(source: str, tests: Sequence[str]) -> str | None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-o", "pythonpath="]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, str(ROOT)]), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command += [str(ROOT / "tests" / test) for test in tests]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"nothing within {LIMIT} s"
    failed = re.search(r"^(?:FAILED|ERROR) (?:\S*tests/)?(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if failed:
        return failed[1]
    if done.returncode == 0 or "not found" in done.stderr:  # a test of that name is no more
        return None
    raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def _killers(path: Path) -> dict[str, str | None]:
    """Which test killed each mutant when the figures were written last."""
    return {row["name"]: row["killer"] for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}


def main(arguments: Sequence[str]) -> int:
    """Try every mutant, print the table, write the figures; the status is 1 when one lives."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__, allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=2, help="test runs at a time")
    parser.add_argument("--only", default="", help="mutants whose name contains this; nothing is written then")
    parser.add_argument("--out", type=Path, default=RESULTS / "mutants.json", help="where the figures go")
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    began = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        killers = _killers(options.out)
        found = list(pool.map(run, [None, *chosen], [None, *(killers.get(mutant.name) for mutant in chosen)]))
    unchanged, outcomes = found[0]["killer"], found[1:]
    table = Table(title=f"{len(chosen)} mutants of the derivative engine")
    for heading in ("mutant", "file", "killed by", "s"):
        table.add_column(heading, justify="right" if heading == "s" else "left", overflow="fold")
    rows = []
    for mutant, outcome in zip(chosen, outcomes, strict=True):
        rows.append({**mutant._asdict(), **outcome})
        table.add_row(mutant.name, mutant.file, outcome["killer"] or "LIVES", f"{outcome['seconds']:.0f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    killed = sum(row["killer"] is not None for row in rows)
    print(f"{killed} of {len(rows)} killed in {time.perf_counter() - began:.0f} s; unchanged: {unchanged or 'passes'}")
    if not options.only:
        totals = {"mutants": len(rows), "killed": killed, "unchanged_passes": unchanged is None}
        write(options.out, {**circumstances("benchmarks.mutants", arguments), **totals, "rows": rows})
    return int(killed < len(rows) or unchanged is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
