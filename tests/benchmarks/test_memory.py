"""Memory kept for the backward pass does not depend on how many steps the solver took."""

import pytest
import torch

from benchmarks.memory import STEPS, Footprint, footprint, held_bytes, main, saved_bytes


@pytest.mark.parametrize("layer", ["picard", "anderson", "newton"])
def test_memory_is_the_same_at_10_and_at_200_steps(layer: str) -> None:
    few, many = (footprint(layer, steps) for steps in STEPS)
    assert (few.steps, many.steps) == (10, 200)
    assert few.saved > 0
    assert many.saved == few.saved
    assert many.held == few.held


def test_memory_of_the_notebooks_loop_grows_with_its_steps() -> None:
    few, many = (footprint("notebook fixed point", steps) for steps in STEPS)
    assert (few.steps, many.steps) == (10, 200)
    assert many.saved > 15 * few.saved
    assert many.held > 15 * few.held


def test_saved_bytes_counts_what_outlives_the_forward_pass_and_each_storage_once() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def forward() -> torch.Tensor:
        torch.exp(x).sum()  # dropped: its graph goes, and what it saved with it
        y = torch.exp(x)  # saves its output: 5 x 4 x 8 bytes
        return y * y  # saves y twice, the same storage

    assert saved_bytes(forward) == 5 * 4 * 8


def test_held_bytes_sees_a_tensor_that_autograd_was_not_told_about() -> None:
    class Hoarder(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
            ctx.hoard = x.repeat(100)  # pyright: ignore[reportAttributeAccessIssue]
            return x.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0]

    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(lambda: Hoarder.apply(x)) == 0  # pyright: ignore[reportArgumentType]
    assert held_bytes(lambda: Hoarder.apply(x)) == 101 * 1000 * 8  # pyright: ignore[reportArgumentType]


def test_the_command_fails_when_memory_grows(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def growing(name: str, steps: int) -> Footprint:
        return Footprint(name, steps, saved=100, held=100 + steps * (name == "newton"))

    monkeypatch.setattr("benchmarks.memory.footprint", growing)
    assert main(["--out", str(tmp_path / "memory.json")]) == 1
    assert (tmp_path / "memory.json").is_file()
