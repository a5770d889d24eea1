"""What the rows rest on: problems of the radius asked for, errors measured against float64, the loosest tolerances."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

import torchimplicit as ti
from torchimplicit.experiments.bench import ours, plots
from torchimplicit.experiments.bench.contender import Contender, Counts, Pass, Runner
from torchimplicit.experiments.bench.match import play
from torchimplicit.experiments.bench.problems import CLOSE, largest_radius, make_problem
from torchimplicit.experiments.bench.reference import GRADIENT, RESIDUAL, Reference
from torchimplicit.experiments.bench.report import summarise
from torchimplicit.experiments.bench.results import Record
from torchimplicit.experiments.bench.row import Measurement
from torchimplicit.experiments.bench.search import BACKWARD, FORWARD, find_best, search


def test_the_radius_is_the_largest_of_the_batch() -> None:
    problem = make_problem("tanh-24", 0.9, 0, batch=6)
    solution = ti.fixed_point(problem.cell, problem.start, problem.x, batch_dims=1).value
    assert isinstance(solution, torch.Tensor)
    slopes = 1 - solution.detach() ** 2
    jacobians = slopes[:, :, None] * problem.cell.weight.detach()
    radii = torch.linalg.eigvals(jacobians).abs().amax(dim=1)
    assert float(radii.max()) == pytest.approx(0.9, rel=0.02)
    assert largest_radius(problem.cell, problem.x.detach()) == pytest.approx(0.9, rel=2 * CLOSE)


def test_the_same_seed_is_the_same_problem() -> None:
    first, second = (make_problem("tanh-16", 0.5, 3, batch=4) for _ in range(2))
    assert torch.equal(first.cell.weight, second.cell.weight)
    assert not torch.equal(first.x, make_problem("tanh-16", 0.5, 4, batch=4).x)


def test_images_of_ours_are_channels_last_and_the_same() -> None:
    problem = make_problem("conv", 0.5, 0, batch=1)
    (name, last), (unnamed, plain) = problem.layouts()
    assert (name, unnamed) == (", channels_last", "") and plain is problem
    format_ = torch.channels_last
    tensors = (last.cell.weight, last.x, last.cotangent, last.start, last.f(last.start))
    assert all(t.is_contiguous(memory_format=format_) and not t.is_contiguous() for t in tensors)
    assert last.x.requires_grad and torch.equal(last.x, problem.x)
    torch.testing.assert_close(last.f(last.cotangent), problem.f(problem.cotangent))
    labels = [contender.label for contender in ours.everything(problem)]
    assert len(labels) == len(set(labels)) and all(label.endswith(", channels_last") for label in labels)
    assert [name for name, _ in make_problem("tanh-16", 0.5, 3, batch=4).layouts()] == [""]


def test_only_cheap_cells_are_tried_with_few_looks() -> None:
    cheap, dear = make_problem("tanh-16", 0.5, 0, batch=4), make_problem("conv", 0.5, 0, batch=1)
    for contenders in (ours.everything, lambda problem: ours.same_name(problem, "picard")):
        assert any("20th" in contender.label for contender in contenders(cheap))
        assert not any("20th" in contender.label for contender in contenders(dear))
    assert not any("20th" in contender.label for contender in ours.same_name(cheap, "anderson"))


def test_an_unknown_problem_is_named() -> None:
    with pytest.raises(ValueError, match="'conf' is not known"):
        make_problem("conf", 0.5, 0)


def test_errors_are_those_that_were_put_in() -> None:
    problem = make_problem("tanh-16", 0.5, 0, batch=4)
    reference = Reference(problem)
    z = ti.fixed_point(reference.cell, reference.x * 0, reference.x, batch_dims=1).value
    assert isinstance(z, torch.Tensor)
    exact = reference.judge(z.detach(), reference.weight_gradient, reference.input_gradient)
    assert exact.good
    assert exact.residual < 1e-9
    off = reference.judge(z.detach(), 1.001 * reference.weight_gradient, -reference.input_gradient)
    assert off.weight_error == pytest.approx(1e-3)
    assert off.input_error == pytest.approx(2.0)
    assert not off.good
    assert not reference.judge(z * torch.nan, reference.weight_gradient, reference.input_gradient).good


class _Scripted:
    """A contender whose errors are multiples of its tolerances, and that notes which it was asked for."""

    def __init__(self, reference: Reference, z: torch.Tensor, forward: float, backward: float) -> None:
        self.asked: list[tuple[float, float]] = []

        def make(ftol: float, btol: float, _: Counts | None) -> Runner:
            def solution() -> torch.Tensor:
                return z * (1 + forward * ftol)

            def found() -> Pass:
                self.asked.append((ftol, btol))
                scale = 1 + backward * btol
                return solution(), scale * reference.weight_gradient, scale * reference.input_gradient

            return Runner(solution, solution, found, found, lambda: Counts(1, 1))

        self.contender = Contender("scripted", make)


def test_the_search_finds_the_loosest_tolerances_within_both_bounds() -> None:
    problem = make_problem("tanh-16", 0.1, 0, batch=4)
    reference = Reference(problem)
    z = ti.fixed_point(reference.cell, reference.x * 0, reference.x, batch_dims=1).value
    assert isinstance(z, torch.Tensor)
    scripted = _Scripted(reference, z.detach(), forward=0.5, backward=2.0)
    trials = search(reference, scripted.contender)
    [trial] = trials  # a tighter forward tolerance does not help the adjoint
    loosest = max(tolerance for tolerance in BACKWARD if 2 * tolerance <= GRADIENT)
    assert trial.backward_tolerance == loosest
    looser = FORWARD[FORWARD.index(trial.forward_tolerance) - 1]
    assert trial.accuracy.residual <= RESIDUAL
    assert not reference.solves(z * (1 + 0.5 * looser))


def test_a_contender_that_never_meets_the_bounds_has_no_trials() -> None:
    problem = make_problem("tanh-16", 0.1, 0, batch=4)
    reference = Reference(problem)
    wrong = _Scripted(reference, torch.ones_like(reference.x), forward=0.0, backward=0.0)
    assert find_best(reference, [wrong.contender]) == (None, ())


def test_ours_meet_the_bounds_on_a_small_problem() -> None:
    problem = make_problem("tanh-16", 0.5, 0, batch=4)
    best, trials = find_best(Reference(problem), ours.short_list(problem))
    assert best is not None
    assert best in trials
    assert all(trial.accuracy.good for trial in trials)
    assert best.counts.forward > 0
    assert best.counts.backward


@pytest.mark.slow
def test_a_match_against_torchdeq() -> None:
    pytest.importorskip("torchdeq")
    from torchimplicit.experiments.bench.peer_torchdeq import torchdeq

    problem = make_problem("tanh-16", 0.5, 0, batch=4)
    found = play(problem, [torchdeq(problem, "picard")], 1, ours.same_name(problem, "picard"), curves=True)
    assert found.verified
    assert found.value > 0
    assert found.evidence["theirs"]["evaluations_forward"] > 0
    assert found.evidence["theirs"]["products_backward"] > 0
    for name, curve in found.evidence["curves"].items():
        steps = [point["evaluations"] for point in curve]
        residuals = [point["residual"] for point in curve]
        # One evaluation is saved where all samples end at one look, so a tighter bound may take one less.
        assert all(later >= earlier - 1 for earlier, later in pairwise(steps)), name
        assert steps[-1] >= steps[0] - 1, name
        # Ours, if it looks every 24th step, is at rounding by the first look.
        assert residuals[0] > residuals[-1] or (steps[0] == steps[-1] and residuals[0] < 1e-6), name


def test_the_layer_may_stand_for_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem("tanh-16", 0.5, 0, batch=4)
    plain = [c for c in ours.everything(problem) if c.label.startswith("picard; ")]
    layers = [c for c in ours.layers(problem) if c.label.startswith("TanhEquilibrium: preconditioned")]
    assert len(layers) == 2
    assert any(c.label.startswith("TanhEquilibrium(compiled=True): preconditioned") for c in ours.layers(problem))
    monkeypatch.setattr(ours, "everything", lambda _: plain)
    monkeypatch.setattr(ours, "layers", lambda *_: layers)
    found = play(problem, [plain], 1, layer=True)
    assert found.verified
    assert found.evidence["layer"]["method"].startswith("TanhEquilibrium: preconditioned")
    assert found.value == min(found.evidence["layer_ratio"], found.evidence["plain_cell_ratio"])
    told = "TanhEquilibrium" if found.evidence["measured_as"] == "layer" else "ours: picard"
    assert told in summarise(found)
    assert play(problem, [plain], 1).evidence["layer"] is None


def test_plots_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    points = [
        {"features": n, "batch": 8, "ratio": 0.5, "seconds": {"ours": 1.0, "theirs": 2.0}, "methods": {}}
        for n in (4, 8)
    ]
    measurement = Measurement(0.5, 0.5, 0.5, 1, 1.0, 2.0, True, {"points": points})
    record = Record("scaling/features", "a title", None, "ratio", "measured", measurement)
    assert plots.draw({record.name: record}, tmp_path) == [Path("plots/scaling-features.png")]
    assert (tmp_path / "plots" / "scaling-features.png").stat().st_size > 1000
