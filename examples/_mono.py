"""What the examples of monotone layers share: MNIST with small shifts, a training loop, a plot, a recorded result."""

import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.progress import track
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.experiments.data import Digits, Split, load_digits

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent


def digits() -> Digits:
    """The full MNIST where `TORCHIMPLICIT_DATA` names its folder, else the 5,000 embedded digits."""
    return load_digits()


def batches(split: Split, size: int, shift: int, shuffled: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Images `(B, 1, 28, 28)`, standardised, each moved by at most `shift` pixels, and labels."""
    order = torch.randperm(len(split)) if shuffled else torch.arange(len(split))
    for index in order.split(size):
        x, labels = split.batch(index)
        if shift:
            x = shifted(x, shift)
        yield x[:, None].sub_(0.1307).div_(0.3081), labels


def shifted(x: Tensor, by: int) -> Tensor:
    """Each image of `(B, H, W)` moved by a random number of pixels, −by to by, in each direction."""
    padded = nn.functional.pad(x, (by, by, by, by))
    rows = torch.arange(x.shape[1]) + torch.randint(0, 2 * by + 1, (len(x), 1))
    columns = torch.arange(x.shape[2]) + torch.randint(0, 2 * by + 1, (len(x), 1))
    return padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]


def train(
    model: nn.Module, data: Digits, *, epochs: int, rate: float, batch: int, shift: int, decay: float = 0.0
) -> dict[str, Any]:
    """Adam with one cycle of the learning rate; what a batch cost, on average, and the losses of the epochs."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    steps = epochs * -(-len(data.train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.25)
    forward, backward, losses, begun, processor = [], [], [], time.perf_counter(), time.process_time()
    with ti.monitor(model) as log:
        for epoch in range(epochs):
            model.train()
            total = 0.0
            for x, labels in track(
                batches(data.train, batch, shift, True), f"epoch {epoch + 1}", -(-len(data.train) // batch)
            ):
                loss = nn.functional.cross_entropy(model(x), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                total += loss.item() * len(x)
                for entry in log.records:
                    forward.append(entry.solution.evaluations)
                    backward.append(entry.solution.adjoint.evaluations)
                log.records.clear()
            losses.append(total / len(data.train))
            print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}, {time.perf_counter() - begun:.0f} s", flush=True)
    return {
        "losses": losses,
        "evaluations_forward": sum(forward) / max(len(forward), 1),
        "evaluations_backward": sum(backward) / max(len(backward), 1),
        "wall_s": time.perf_counter() - begun,
        "processor_s": time.process_time() - processor,
    }


@torch.no_grad()
def test(model: nn.Module, split: Split) -> dict[str, float]:
    """Accuracy, and the fraction of the samples whose equilibrium was found."""
    model.eval()
    right = converged = 0
    with ti.monitor(model) as log:
        for x, labels in batches(split, 500, 0, False):
            right += int((model(x).argmax(1) == labels).sum())
            converged += sum(int(r.solution.converged.sum()) for r in log.records)
            solved = bool(log.records)
            log.records.clear()
    return {"accuracy": right / len(split), "converged": converged / len(split) if solved else 1.0}


def record(name: str, key: str, run: dict[str, Any], facts: dict[str, Any]) -> None:
    """Put a run beside the earlier ones, of other seeds, in `results/NAME.json`."""
    path = HERE / "results" / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    command = "python -m examples." + Path(sys.argv[0]).stem + " " + " ".join(sys.argv[1:])
    runs = {**result.get("runs", {}), key: {**run, "command": command}}
    result = {
        **result,
        **facts,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchimplicit": ti.__version__},
        "runs": runs,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(f"wrote {path.relative_to(HERE.parent)}")


def keep(model: nn.Module, name: str) -> None:
    """Leave the parameters in `runs/`, which git ignores."""
    path = HERE.parent / "runs" / f"{name}.pt"
    path.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parameters(model: nn.Module) -> int:
    """How many there are."""
    return sum(p.numel() for p in model.parameters())


def plot(name: str, draw: Callable[[Any], None]) -> None:
    """`plots/NAME.png`, drawn on a figure's axes."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    draw(axes)
    path = HERE / "plots" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"wrote {path.relative_to(HERE.parent)}")
