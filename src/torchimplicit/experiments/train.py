"""The training loop: epochs, guarded steps, evaluation on the test set, checkpoints in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.experiments import checkpoint, run_folder
from torchimplicit.experiments.checkpoint import Progress
from torchimplicit.experiments.config import TrainConfig
from torchimplicit.experiments.console import Reporter
from torchimplicit.experiments.data import Digits, Split
from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.feed import Feed
from torchimplicit.experiments.metrics import BatchRecord, EpochTotals, Solves
from torchimplicit.experiments.recipe import make_model
from torchimplicit.experiments.shares import Shares
from torchimplicit.experiments.step import Scheme, train_batch
from torchimplicit.experiments.weights import check_safetensors, write_safetensors
from torchimplicit.experiments.world import World

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Job:
    """What to train, on what, with whom, and where to write it.

    Attributes:
        config: the recipe.
        digits: the data.
        folder: of the run.
        resume: go on with the run that is there.
        checkpoint_every: batches between two checkpoints.
        safetensors: write the weights in that format, too.
        world: the processes.
        shares: how they divide a batch, see `Shares`.
    """

    config: TrainConfig
    digits: Digits
    folder: Path
    resume: bool = False
    checkpoint_every: int = 100
    safetensors: bool = False
    world: World = field(default_factory=World)
    shares: str = "even"


def train(job: Job, reporter: Reporter) -> tuple[nn.Sequential, list[dict[str, Any]]]:
    """Run `job` to its last epoch and return the trained network and the lines of `metrics.jsonl`."""
    config, world = job.config, job.world
    device = world.device(config.device)
    _check_device(device)
    if job.safetensors:
        check_safetensors()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if len(job.digits.train) < config.batch_size:
        raise ExperimentError(
            f"--batch-size: {config.batch_size} is more than the {len(job.digits.train)} training images"
        )
    checksum = job.digits.checksum()
    torch.manual_seed(config.seed)
    model = make_model(
        config.layer,
        tolerance=config.tolerance,
        batch_size=config.batch_size,
        max_steps=config.max_steps,
        features=config.width,
        precision=config.precision,
        compiled=config.compiled,
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    scheme = Scheme.of(config.precision, config.device, world, config.jacobian_penalty)
    progress = Progress()
    content = world.from_first(lambda: _begin(job, checksum, reporter))
    if content is not None:
        progress = checkpoint.restore(content, model, optimizer, scheme.scaler)
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(run_folder.JsonLines(job.folder / name, progress.lengths.get(name, 0)))
            for name in ((run_folder.METRICS, run_folder.BATCHES) if world.leads else ())
        }
        _Trainer(job, model, optimizer, scheme, device, progress, files, checksum, reporter).fit()
    return model, run_folder.read_lines(job.folder, run_folder.METRICS) if world.leads else []


def _begin(job: Job, checksum: str, reporter: Reporter) -> dict[str, Any] | None:
    """Make the run's folder, or find the checkpoint to go on from: where asked to, or started again by torchrun."""
    # Only what the same launch began: another run in the folder is an error, in the second attempt as in the first.
    begun = job.world.restarts > 0 and (job.folder / run_folder.CONFIG).exists()
    restarted = begun and run_folder.read_config(job.folder).get("launch") == job.world.launch
    if not (job.resume or restarted):
        data = {"source": job.digits.source, "checksum": checksum}
        data |= {"train": len(job.digits.train), "test": len(job.digits.test)}
        run_folder.create(job.folder, job.config, data, job.world.launch)
        return None
    run_folder.check_resumable(job.folder, job.config, checksum)
    content = checkpoint.load(job.folder)
    if content is None and run_folder.read_lines(job.folder, run_folder.BATCHES):
        raise ExperimentError(
            f"{job.folder / checkpoint.NAME}: missing, although the run had begun; put it back, or "
            "start a new run with another --out"
        )
    progress = Progress() if content is None else Progress(**content["progress"])
    again = f"started again ({job.world.restarts}), " if restarted else ""
    done = progress.epoch >= job.config.epochs
    reporter.say("already complete" if done else f"{again}resuming at {progress.describe()}")
    return content


class _Trainer:
    """The state of a run in flight."""

    def __init__(
        self,
        job: Job,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer,
        scheme: Scheme,
        device: str,
        progress: Progress,
        files: dict[str, run_folder.JsonLines],
        data_checksum: str,
        reporter: Reporter,
    ) -> None:
        self.job, self.config = job, job.config
        self.model, self.optimizer, self.scheme, self.device = model, optimizer, scheme, device
        self.replica = job.world.replicated(model)
        # What a GPU does is not seen by the processor's clock.
        self.shares = Shares(job.world.rank, job.world.size, "even" if device.startswith("cuda") else job.shares)
        self.progress, self.files, self.data_checksum = progress, files, data_checksum
        self.reporter = reporter
        self.train_split = job.digits.train.to(device)
        self.test_split = job.digits.test.to(device)

    def fit(self) -> None:
        if self.progress.epoch == 0 and self.progress.batch == 0:
            self._checkpoint(0, 0, EpochTotals())
        for epoch in range(self.progress.epoch, self.config.epochs):
            self._epoch(epoch)

    def _epoch(self, epoch: int) -> None:
        batches = list(self._batches(epoch))
        feed = Feed(lambda number: self.train_split.batch(self.shares.of(batches[number])), len(batches))
        begin = self.progress.batch
        totals = EpochTotals(**self.progress.totals)
        rate = self.config.learning_rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.reporter.begin_epoch(epoch, self.config.epochs, len(batches), begin)
        self.model.train()
        if self.replica is not None:
            self.replica.pause()
        before, clock = totals.seconds, time.perf_counter()
        for number in range(begin, len(batches)):
            images, labels = feed.take(number)
            record = train_batch(
                self.model,
                self.optimizer,
                images,
                labels,
                epoch,
                number,
                self.scheme,
                self.replica,
                len(batches[number]),
                partial(feed.prepare, number + 1),
            )
            if self.replica is not None:
                self.shares.observe(self.replica.speeds)
            totals.add(record)
            totals.seconds = before + time.perf_counter() - clock
            if self.job.world.leads:
                self.files[run_folder.BATCHES].append(record.line())
            self.reporter.batch(totals)
            if (number + 1) % self.job.checkpoint_every == 0 and number + 1 < len(batches):
                self._checkpoint(epoch, number + 1, totals)
        found = evaluate(self.model, self.test_split, self.scheme)
        row = {"epoch": epoch, "lr": rate} | totals.summary() | found
        if self.job.world.leads:
            self.files[run_folder.METRICS].append(row)
            if self.job.safetensors:
                write_safetensors(self.job.folder, self.model, epoch)
        self._checkpoint(epoch + 1, 0, EpochTotals())
        self.reporter.epoch(row)

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        """The epoch's batches of indices: a permutation that depends on the seed and the epoch alone."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_split), generator=generator).to(self.device)
        return iter(order.split(self.config.batch_size))

    def _checkpoint(self, epoch: int, batch: int, totals: EpochTotals) -> None:
        if not self.job.world.leads:
            return
        # The lines first: a checkpoint must never know of more lines than the disk holds.
        lengths = {name: file.sync() for name, file in self.files.items()}
        self.progress = Progress(epoch, batch, totals.state(), lengths)
        checkpoint.save(
            self.job.folder,
            self.progress,
            self.model,
            self.optimizer,
            self.config.as_dict(),
            self.data_checksum,
            self.scheme.scaler,
        )


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, scheme: Scheme | None = None) -> dict[str, Any]:
    """Error (percent), loss and convergence on `split`, and the seconds it took."""
    scheme = scheme or Scheme()
    clock = time.perf_counter()
    totals = EpochTotals()
    shares = Shares(scheme.world.rank, scheme.world.size)
    model.eval()
    for number, start in enumerate(range(0, len(split), EVALUATION_BATCH)):
        rows = torch.arange(start, min(start + EVALUATION_BATCH, len(split)), device=split.labels.device)
        images, labels = split.batch(shares.of(rows))
        with ti.monitor(model) as log, scheme.autocast(images.device):
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), labels).item()
        wrong = int((logits.argmax(dim=1) != labels).sum())
        record = BatchRecord(-1, number, len(labels), loss, wrong, Solves.of(log))
        world = scheme.world
        totals.add(record if world.size == 1 else record.of_all(world.gathered(record.numbers())))
    summary = totals.summary()
    return {
        "test_error": summary["train_error"],
        "test_loss": summary["train_loss"],
        "test_steps": summary["steps"],
        "test_converged": summary["converged"],
        "test_statuses": summary["statuses"],
        "test_evaluations": summary["evaluations_forward"],
        "test_seconds": time.perf_counter() - clock,
    }


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ExperimentError(
            f"--device: cannot use '{name}' ({reason}); try cpu, or cuda where there is a GPU"
        ) from error
