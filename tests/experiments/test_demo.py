"""The demo keeps the notebook's promises: at most 14 iterations to 1e-4, Newton at most 4 to below 1e-6."""

from pathlib import Path

import pytest
import torch

from torchimplicit.experiments.demo import random_problem, run_demo
from torchimplicit.experiments.textplot import MARKERS, TextSeries, text_plot

from .conftest import Command


def test_the_notebooks_bounds() -> None:
    (picard, _), (anderson, _), (newton, _) = run_demo()
    assert picard.iterations <= 14
    assert picard.residuals[-1] <= 1e-4
    assert anderson.iterations <= picard.iterations
    assert anderson.residuals[-1] <= 1e-4
    assert newton.iterations <= 4
    assert newton.residuals[-1] < 1e-6
    assert picard.converged == anderson.converged == newton.converged == 1.0


def test_picards_iterations_are_those_of_the_plain_loop() -> None:
    linear, x = random_problem(0)
    z, updates = torch.zeros_like(x), 0
    with torch.no_grad():
        while torch.linalg.vector_norm(torch.tanh(linear(z) + x) - z) > 1e-4:
            z, updates = torch.tanh(linear(z) + x), updates + 1
    assert run_demo()[0][0].iterations == updates


def test_the_command_shows_table_and_plot(run: Command) -> None:
    result = run("demo")
    assert result.exit_code == 0, result.output
    for text in ("picard", "anderson", "newton", "iterations", "final residual", *MARKERS[:3], "1e-4"):
        assert text in result.output


def test_the_plot_goes_into_a_file(run: Command, tmp_path: Path) -> None:
    result = run("demo", "--png", tmp_path / "new" / "decay.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / "decay.png").read_bytes().startswith(b"\x89PNG")
    assert "⠤" not in result.output


@pytest.mark.parametrize("height, rows", [(8, 9), (15, 17), (1, 5)])
def test_a_plot_places_its_points(height: int, rows: int) -> None:
    line = TextSeries("a", [0, 10], [100.0, 0.01])
    lines = text_plot([line], "x", width=20, height=height).plain.splitlines()
    assert lines[0].startswith(f"  1e+2 ┤{MARKERS[0]}")
    assert lines[rows - 1].startswith("  1e-2 ┤ ")
    assert lines[rows - 1][8 + 19] == MARKERS[0]
    assert [text[:6].strip() for text in lines[:rows] if text[:6].strip()] == ["1e+2", "1e+1", "1e+0", "1e-1", "1e-2"]
    assert lines[rows + 1].split() == ["0", "x", "10"]
    assert lines[rows + 2].strip() == f"{MARKERS[0]} a"
