"""What `torch.profiler` shows of a layer: ranges named after it and the phase of its work, and none where it is off."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import torchimplicit as ti
from torchimplicit import _profile


def _ranges(prof: profile) -> dict[str, int]:
    """Those of ours, with how often each was entered."""
    return {e.key: e.count for e in prof.key_averages() if " solve" in e.key or " steps" in e.key}


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), ti.nn.TanhEquilibrium(3), ti.nn.FixedPoint(nn.Bilinear(3, 3, 3)))


@pytest.fixture(autouse=True)
def _contraction(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)


def test_profile_has_a_range_for_each_layer_and_phase() -> None:
    model = _model()
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        model(0.1 * torch.randn(2, 4)).sum().backward()
        model(0.1 * torch.randn(2, 4))
    assert _ranges(prof) == {
        "TanhEquilibrium: forward solve": 2,
        "TanhEquilibrium: adjoint solve": 1,
        "FixedPoint: forward solve": 2,
        "FixedPoint: adjoint solve": 1,
    }


def test_a_monitor_adds_the_layers_names() -> None:
    model = _model()
    with profile(activities=[ProfilerActivity.CPU]) as prof, ti.monitor(model):
        model(0.1 * torch.randn(2, 4)).sum().backward()
    assert set(_ranges(prof)) == {
        f"{name}: {phase} solve"
        for name in ("1 (TanhEquilibrium)", "2 (FixedPoint)")
        for phase in ("forward", "adjoint")
    }


def test_the_work_lies_inside_the_ranges() -> None:
    layer = ti.nn.TanhEquilibrium(200, solver=ti.Picard())
    x = torch.randn(50, 200)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        solution = layer.solve(x)
        solution.value.sum().backward()
    events = prof.events() or []
    for phase, least in (("forward", solution.steps.max()), ("adjoint", 5)):
        (outer,) = [e for e in events if e.name == f"TanhEquilibrium: {phase} solve"]
        inside = [
            e
            for e in events
            if e.name in ("aten::addmm", "aten::mm", "aten::matmul")
            and outer.time_range.start <= e.time_range.start
            and e.time_range.end <= outer.time_range.end
        ]
        assert len(inside) >= least


def test_plain_calls_transforms_and_fixed_depths_have_ranges_too() -> None:
    layer = ti.nn.TanhEquilibrium(3)
    x = torch.randn(2, 3)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        ti.root(lambda z: z - 1, torch.zeros(2))
        torch.func.jvp(layer, (x,), (x,))
        torch.func.grad(lambda x: layer(x).sum())(x)
        layer.depth = 2
        layer(x)
    assert set(_ranges(prof)) == {
        "root: forward solve",
        "TanhEquilibrium: forward solve",
        "TanhEquilibrium: tangent solve",
        "TanhEquilibrium: adjoint solve",
        "TanhEquilibrium: forward steps",
    }


def test_without_a_profiler_no_range_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counting(name: str) -> Any:
        made.append(name)
        return _profile._NOTHING

    monkeypatch.setattr(_profile, "record_function", counting)
    layer = ti.nn.TanhEquilibrium(3)
    layer(torch.randn(2, 3)).sum().backward()
    assert made == []
    with profile(activities=[ProfilerActivity.CPU]):
        layer(torch.randn(2, 3))
    assert made == ["TanhEquilibrium: forward solve"]
