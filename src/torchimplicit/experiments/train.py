"""The training loop: epochs, guarded steps, evaluation on the test set, checkpoints in between."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
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
from torchimplicit.experiments.metrics import BatchRecord, EpochTotals, Solves
from torchimplicit.experiments.recipe import make_model

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Job:
    """What to train, on what, and where to write it; `checkpoint_every` counts batches."""

    config: TrainConfig
    digits: Digits
    folder: Path
    resume: bool = False
    checkpoint_every: int = 100


def train(job: Job, reporter: Reporter) -> tuple[nn.Sequential, list[dict[str, Any]]]:
    """Run `job` to its last epoch and return the trained network and the lines of `metrics.jsonl`."""
    config = job.config
    _check_device(config.device)
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
    ).to(config.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    progress = Progress()
    if job.resume:
        run_folder.check_resumable(job.folder, config, checksum)
        content = checkpoint.load(job.folder)
        if content is not None:
            progress = checkpoint.restore(content, model, optimizer)
        elif run_folder.read_lines(job.folder, run_folder.BATCHES):
            raise ExperimentError(
                f"{job.folder / checkpoint.NAME}: missing, although the run had begun; put it back, or "
                "start a new run with another --out"
            )
        reporter.say(f"resuming at {progress.describe()}" if progress.epoch < config.epochs else "already complete")
    else:
        data = {"source": job.digits.source, "checksum": checksum}
        data |= {"train": len(job.digits.train), "test": len(job.digits.test)}
        run_folder.create(job.folder, config, data)
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(run_folder.JsonLines(job.folder / name, progress.lengths.get(name, 0)))
            for name in (run_folder.METRICS, run_folder.BATCHES)
        }
        _Trainer(job, model, optimizer, progress, files, checksum, reporter).fit()
    return model, run_folder.read_lines(job.folder, run_folder.METRICS)


class _Trainer:
    """The state of a run in flight."""

    def __init__(
        self,
        job: Job,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        files: dict[str, run_folder.JsonLines],
        data_checksum: str,
        reporter: Reporter,
    ) -> None:
        self.job, self.config = job, job.config
        self.model, self.optimizer = model, optimizer
        self.progress, self.files, self.data_checksum = progress, files, data_checksum
        self.reporter = reporter
        self.train_split = job.digits.train.to(job.config.device)
        self.test_split = job.digits.test.to(job.config.device)

    def fit(self) -> None:
        if self.progress.epoch == 0 and self.progress.batch == 0:
            self._checkpoint(0, 0, EpochTotals())
        for epoch in range(self.progress.epoch, self.config.epochs):
            self._epoch(epoch)

    def _epoch(self, epoch: int) -> None:
        batches = list(self._batches(epoch))
        begin = self.progress.batch
        totals = EpochTotals(**self.progress.totals)
        rate = self.config.learning_rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.reporter.begin_epoch(epoch, self.config.epochs, len(batches), begin)
        self.model.train()
        before, clock = totals.seconds, time.perf_counter()
        for number in range(begin, len(batches)):
            images, labels = self.train_split.batch(batches[number])
            record = train_batch(self.model, self.optimizer, images, labels, epoch, number)
            totals.add(record)
            totals.seconds = before + time.perf_counter() - clock
            self.files[run_folder.BATCHES].append(record.line())
            self.reporter.batch(totals)
            if (number + 1) % self.job.checkpoint_every == 0 and number + 1 < len(batches):
                self._checkpoint(epoch, number + 1, totals)
        row = {"epoch": epoch, "lr": rate} | totals.summary() | evaluate(self.model, self.test_split)
        self.files[run_folder.METRICS].append(row)
        self._checkpoint(epoch + 1, 0, EpochTotals())
        self.reporter.epoch(row)

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        """The epoch's batches of indices: a permutation that depends on the seed and the epoch alone."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_split), generator=generator).to(self.config.device)
        return iter(order.split(self.config.batch_size))

    def _checkpoint(self, epoch: int, batch: int, totals: EpochTotals) -> None:
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
        )


def train_batch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    epoch: int,
    number: int,
) -> BatchRecord:
    """One forward pass, one backward pass, one step of plain gradient descent, unless a number is not finite.

    The optimiser sees neither a non-finite loss nor a non-finite gradient, and no step is taken that could
    overflow a parameter; such a batch is skipped, and the record says why.
    """
    optimizer.zero_grad(set_to_none=True)
    gradient_norm, skipped = None, None
    with ti.monitor(model) as log:
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        value = loss.item()
        if not math.isfinite(value):
            skipped = "non-finite loss"
        else:
            loss.backward()
            gradient_norm, skipped = _check_step(optimizer)
            if skipped is None:
                optimizer.step()
    wrong = int((logits.detach().argmax(dim=1) != labels).sum())
    return BatchRecord(epoch, number, len(labels), value, wrong, Solves.of(log), gradient_norm, skipped)


def _check_step(optimizer: torch.optim.Optimizer) -> tuple[float, str | None]:
    """The global norm of the gradient, and why the coming step must not be taken (None: it may).

    Plain gradient descent moves no entry further than `lr * norm`, so entries stay finite as long as
    `|parameters| + lr * |gradient|` does, with a factor 2 to spare for rounding.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradient_norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if not math.isfinite(gradient_norm):
        return gradient_norm, "non-finite gradient norm"
    rate = max(group["lr"] for group in optimizer.param_groups)
    reach = float(nn.utils.get_total_norm([p.detach() for p in parameters])) + rate * gradient_norm
    limit = min(torch.finfo(p.dtype).max for p in parameters) / 2
    return gradient_norm, None if reach < limit else "the step would overflow the parameters"


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> dict[str, Any]:
    """Error (percent), loss and convergence on `split`, and the seconds it took."""
    clock = time.perf_counter()
    totals = EpochTotals()
    model.eval()
    for number, start in enumerate(range(0, len(split), EVALUATION_BATCH)):
        images, labels = split.batch(slice(start, start + EVALUATION_BATCH))
        with ti.monitor(model) as log:
            logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels).item()
        wrong = int((logits.argmax(dim=1) != labels).sum())
        totals.add(BatchRecord(-1, number, len(labels), loss, wrong, Solves.of(log)))
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
