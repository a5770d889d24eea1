"""Every example runs by its command in the reduced setting, and finds its own figure sane: `make examples-smoke`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "tutorial": [""],
    "residual_deq": [""],
    "backward_pareto": ["", "--twin"],
    "deblur": [""],
    "mondeq": ["fc", "conv", "fc --twin", "conv --twin"],
    "certified": ["", "--twin"],
    "graph_chains": [""],
    "parity": [""],
    "copy_memory": ["", "--twin"],
    "bratu": [""],
    "market": [""],
    "lightning_mnist": [""],
}
RUNS = [f"{name} {arguments}".strip() for name, some in COMMANDS.items() for arguments in some]


def test_no_example_is_left_out() -> None:
    scripts = {path.stem for path in (ROOT / "examples").glob("[!_]*.py")}
    assert scripts - {"results_table"} == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_the_example_runs_and_is_sane(run: str, tmp_path: Path) -> None:
    if run.startswith("lightning"):
        pytest.importorskip("lightning.pytorch")
    name, *arguments = run.split()
    command = [sys.executable, "-m", f"examples.{name}", *arguments, "--smoke", "--out", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "TORCHIMPLICIT_DATA"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "\nsane: " in done.stdout
    assert len(list(tmp_path.glob("results/*.json"))) == 1
    assert "--twin" in arguments or len(list(tmp_path.glob("plots/*.png"))) == 1


def test_an_insane_figure_stops_the_example(tmp_path: Path) -> None:
    """So that the checks above can fail."""
    code = "from examples import market as m; m.gradient_error = lambda *_: 1.0; m.main(['--smoke', '--steps', '1'])"
    code = code.replace("'1'", f"'1', '--out', {str(tmp_path)!r}")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "expected a gradient within 1e-6 of differences" in done.stderr
