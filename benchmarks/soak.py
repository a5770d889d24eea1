"""A long training run with rate spikes, NaN inputs and kills: it must neither crash nor spoil its weights nor leak.

make soak

Lives of 2,000 steps each end with SIGKILL at a random step; the next one goes on from the last checkpoint. The network
is that of the MNIST job on the embedded digits, under autocast. In one of a hundred batches some inputs are NaN: half
of the time pixels, which the layer before the implicit one turns into NaN gradients of its weights, so that the step is
skipped; half of the time features of the implicit layer itself, whose samples then fail and add exactly nothing to the
gradients of the step that is taken. In one of two hundred batches the learning rate is 3 to 30 times as large.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import RESULTS, circumstances, write
from torchimplicit.experiments.data import load_embedded
from torchimplicit.experiments.files import write_atomically
from torchimplicit.experiments.recipe import make_model
from torchimplicit.experiments.step import Scheme, train_batch
from torchimplicit.experiments.world import World

NAN, SPIKE, RATE, BATCH = 0.01, 0.005, 0.05, 100
SETTLED = 1000
"""Steps of a life after which its memory must not grow any more."""
CHECKPOINT_EVERY = 100


@dataclass
class Tally:
    """What has happened so far; every entry is plain, so that a checkpoint holds it."""

    step: int = 0
    spikes: int = 0
    nan_pixels: int = 0
    nan_features: int = 0
    taken_with_nan: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    growth: list[float] = field(default_factory=list)
    loss: float = 0.0


class Spoilt(nn.Module):
    """Makes some features NaN when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        """The features, of which a sample's first may be NaN."""
        if not self.rows:
            return x
        mask = torch.zeros(x.shape, dtype=torch.bool)
        mask[self.rows, 0] = True
        return x.masked_fill(mask, torch.nan)


def memory() -> int:
    """Bytes resident now, where the system says so, else the most there have been."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def life(folder: Path, last: int, dies_at: int | None, layer: str, precision: str, settled: int = SETTLED) -> Tally:
    """Train from the last checkpoint to step `last`, or to SIGKILL after step `dies_at`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = load_embedded().train
    model = make_model(layer, batch_size=BATCH, precision=precision)
    spoilt = Spoilt()
    model.insert(2, spoilt)
    weight = next(model[1].parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scheme = Scheme.of(precision, "cpu", World())
    tally, path, settled_at = Tally(), folder / "soak.pt", 0
    if path.exists():
        content = torch.load(path, weights_only=True)
        model.load_state_dict(content["model"])
        tally = Tally(**content["tally"])
        if scheme.scaler is not None:
            scheme.scaler.load_state_dict(content["scaler"])
    begun, reference = tally.step, None
    for step in range(tally.step, last):
        chance = random.Random(step)  # the same step is the same whoever takes it
        index = torch.randint(len(digits), (BATCH,), generator=torch.Generator().manual_seed(step))
        images, labels = digits.batch(index)
        spiked = chance.random() < SPIKE
        optimizer.param_groups[0]["lr"] = RATE * (10 ** chance.uniform(0.5, 1.5) if spiked else 1.0)
        spoilt.rows, bad = [], chance.random() < NAN
        if bad and chance.random() < 0.5:
            images[chance.randrange(BATCH), 14, 14] = torch.nan
            tally.nan_pixels += 1
        elif bad:
            spoilt.rows = chance.sample(range(BATCH), 3)
            tally.nan_features += 1
        before = weight.detach().clone() if spoilt.rows else None
        record = train_batch(model, optimizer, images, labels, 0, step, scheme)
        tally.spikes += spiked
        tally.loss = 0.99 * tally.loss + 0.01 * min(record.loss, 10.0) if tally.step else record.loss
        if record.skipped:
            tally.skipped[record.skipped] = tally.skipped.get(record.skipped, 0) + 1
        if before is not None and not torch.equal(before, weight):
            tally.taken_with_nan += 1
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            raise RuntimeError(f"step {step}: a parameter is not finite")
        tally.step = step + 1
        if tally.step - begun == settled:
            reference, settled_at = memory(), len(tally.growth)
        if reference is not None:
            tally.growth[settled_at:] = [memory() / reference - 1.0]
        if tally.step % CHECKPOINT_EVERY == 0 or tally.step == last:
            scaler = None if scheme.scaler is None else scheme.scaler.state_dict()
            content = {"model": model.state_dict(), "tally": asdict(tally), "scaler": scaler}
            write_atomically(path, lambda file, content=content: torch.save(content, file))
        if step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return tally


def soak(folder: Path, steps: int, every: int, layer: str, precision: str, settled: int = SETTLED) -> dict[str, Any]:
    """Lives of about `every` steps, each in a process of its own that is killed, until `steps` are done."""
    kills, chance, lives = 0, random.Random(0), 0
    while True:
        done = torch.load(folder / "soak.pt", weights_only=True)["tally"]["step"] if lives else 0
        lives += 1
        dies_at = done + every - chance.randrange(1, CHECKPOINT_EVERY)  # not where a checkpoint has just been written
        arguments = [folder, steps, dies_at, layer, precision, settled]
        command = [sys.executable, "-m", "benchmarks.soak", "--life", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == -signal.SIGKILL:
            kills += 1
        elif result.returncode:
            raise RuntimeError(f"after {done} steps: {result.stderr}")
        else:
            return json.loads(result.stdout) | {"kills": kills}


def main(arguments: Sequence[str]) -> int:
    """Run, print and write down; 0 if nothing was spoilt and memory stayed flat."""
    if arguments and arguments[0] == "--life":
        folder, last, dies_at, layer, precision, settled = arguments[1:]
        tally = life(Path(folder), int(last), int(dies_at), layer, precision, int(settled))
        print(json.dumps(asdict(tally)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=2_000)
    parser.add_argument("--layer", default="picard")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), options.steps, options.every, options.layer, options.precision)
    flat = max(found["growth"]) <= 0.02
    what = {"layer": options.layer, "precision": options.precision, "steps": options.steps, "every": options.every}
    write(options.out, circumstances("benchmarks.soak", arguments) | what | found | {"flat": flat})
    print(json.dumps(found, indent=1))
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
