"""What is measured: one record per batch, and the totals of an epoch that are built from them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import torchimplicit as ti
from torchimplicit.experiments.recipe import CLASSES

_SUMMED = ("samples", "steps", "converged", "evaluations_forward", "evaluations_backward")


@dataclass
class Solves:
    """Counts over the implicit solves of one batch; all zero if the network has no implicit layer."""

    samples: int = 0
    iterations: int = 0  # the largest number of steps in the batch: what the notebook counts
    steps: int = 0  # summed over the samples
    converged: int = 0
    evaluations_forward: int = 0
    evaluations_backward: int = 0
    statuses: dict[str, int] = field(default_factory=dict)  # samples that did not converge, by status
    adjoint_statuses: dict[str, int] = field(default_factory=dict)  # of converged samples whose adjoint failed

    @classmethod
    def of(cls, log: ti.Monitor) -> Solves:
        """Count what `ti.monitor` collected, after the backward pass if there is one."""
        total = cls()
        for solution in log.solutions:
            total.samples += solution.converged.numel()
            total.iterations = max(total.iterations, int(solution.steps.max()))
            total.steps += int(solution.steps.sum())
            total.evaluations_forward += solution.evaluations
            failures = _failures(solution.status)
            total.converged += solution.converged.numel() - sum(failures.values())
            _add(total.statuses, failures)
            if solution.adjoint.evaluations is not None:
                total.evaluations_backward += solution.adjoint.evaluations
            if solution.adjoint.status is not None:
                _add(total.adjoint_statuses, _failures(solution.adjoint.status[solution.converged]))
        return total


@dataclass
class BatchRecord:
    """One line of `batches.jsonl`."""

    epoch: int
    batch: int
    size: int
    loss: float
    wrong: int
    solves: Solves
    gradient_norm: float | None = None  # None: no backward pass was made
    skipped: str | None = None  # why the optimiser did not see this batch
    penalty: float | None = None  # before its weight; None: there is none

    def line(self) -> dict[str, Any]:
        """The record as JSON values; fractions and means are None where nothing was solved."""
        solves = self.solves
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "loss": self.loss,
            "error": self.wrong / self.size,
            "iterations": solves.iterations if solves.samples else None,
            "steps": _ratio(solves.steps, solves.samples),
            "converged": _ratio(solves.converged, solves.samples),
            "statuses": solves.statuses,
            "adjoint_statuses": solves.adjoint_statuses,
            "evaluations_forward": solves.evaluations_forward,
            "evaluations_backward": solves.evaluations_backward,
            "gradient_norm": self.gradient_norm,
            "penalty": self.penalty,
            "skipped": self.skipped,
        }

    def numbers(self) -> list[float]:
        """What the processes have to tell each other, each of its part of a batch."""
        solves = self.solves
        return [
            float(solves.iterations),
            float(self.size),
            self.loss * self.size if self.size else 0.0,
            float(self.wrong),
            *(float(getattr(solves, name)) for name in _SUMMED),
            *(
                float(statuses.get(s.name, 0))
                for statuses in (solves.statuses, solves.adjoint_statuses)
                for s in ti.Status
            ),
        ]

    def of_all(self, parts: list[list[float]]) -> BatchRecord:
        """The record of the whole batch, from the `numbers` of all its parts."""
        size, loss, wrong, *counts = (sum(column) for column in [*zip(*parts, strict=True)][1:])
        figures = dict(zip(_SUMMED, map(int, counts), strict=False))
        of_status = [int(c) for c in counts[len(_SUMMED) :]]
        half = len(ti.Status)
        whole = Solves(
            iterations=int(max(part[0] for part in parts)),
            statuses=_named(of_status[:half]),
            adjoint_statuses=_named(of_status[half:]),
            **figures,
        )
        return replace(self, size=int(size), loss=loss / size, wrong=int(wrong), solves=whole)


@dataclass
class EpochTotals:
    """Sums over the batches of one epoch so far; goes into a checkpoint as plain numbers."""

    batches: int = 0
    samples: int = 0
    wrong: int = 0
    loss: float = 0.0  # summed over the samples with a finite loss
    loss_samples: int = 0
    solved: int = 0
    iterations: int = 0
    steps: int = 0
    converged: int = 0
    worst_converged: float = 1.0
    failed_batches: int = 0
    evaluations_forward: int = 0
    evaluations_backward: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    adjoint_statuses: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, record: BatchRecord) -> None:
        """Add one batch."""
        solves = record.solves
        self.batches += 1
        self.samples += record.size
        self.wrong += record.wrong
        if math.isfinite(record.loss):
            self.loss += record.loss * record.size
            self.loss_samples += record.size
        self.solved += solves.samples
        self.iterations += solves.iterations
        self.steps += solves.steps
        self.converged += solves.converged
        if solves.samples:
            self.worst_converged = min(self.worst_converged, solves.converged / solves.samples)
        self.failed_batches += bool(solves.statuses)
        self.evaluations_forward += solves.evaluations_forward
        self.evaluations_backward += solves.evaluations_backward
        _add(self.statuses, solves.statuses)
        _add(self.adjoint_statuses, solves.adjoint_statuses)
        if record.skipped:
            _add(self.skipped, {record.skipped: 1})

    def summary(self) -> dict[str, Any]:
        """The epoch's line in `metrics.jsonl`, as far as the training set goes; errors are in percent."""
        implicit = self.solved > 0
        return {
            "train_error": 100.0 * self.wrong / max(self.samples, 1),
            "train_loss": _ratio(self.loss, self.loss_samples),
            "iterations": self.iterations / self.batches if implicit else None,
            "steps": _ratio(self.steps, self.solved),
            "converged": _ratio(self.converged, self.solved),
            "worst_batch_converged": self.worst_converged if implicit else None,
            "batches": self.batches,
            "failed_batches": self.failed_batches,
            "statuses": self.statuses,
            "adjoint_statuses": self.adjoint_statuses,
            "evaluations_forward": self.evaluations_forward,
            "evaluations_backward": self.evaluations_backward,
            "skipped": self.skipped,
            "seconds": self.seconds,
        }

    def state(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


def outcome(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences on what went wrong over the epochs `rows` (lines of `metrics.jsonl`); none if nothing did."""
    batches = sum(row["batches"] for row in rows)
    failed = sum(row["failed_batches"] for row in rows)
    lines = []
    statuses = _summed(row["statuses"] for row in rows)
    if statuses:
        worst = max(statuses, key=lambda name: statuses[name])
        lines.append(
            f"{failed:,} of {batches:,} batches: {_listed(statuses)} samples did not converge. "
            f"{ti.Status[worst].advice}"
        )
    adjoint = _summed(row["adjoint_statuses"] for row in rows)
    if adjoint:
        lines.append(
            f"backward pass: the adjoint solve failed for {_listed(adjoint)} converged samples; their gradient is zero."
        )
    for reason, count in _summed(row["skipped"] for row in rows).items():
        lines.append(f"{count:,} of {batches:,} steps skipped: {reason}. The parameters stayed as they were.")
    loss, guessing = rows[-1]["train_loss"], math.log(CLASSES)
    if loss is None or loss > guessing:
        end = "not finite" if loss is None else f"at {loss:.2f}"
        lines.append(
            f"The loss ended {end}, worse than guessing ({guessing:.2f}): "
            "training failed, most likely because of too large a learning rate."
        )
    return lines


def _named(counts: list[int]) -> dict[str, int]:
    """Counts of all statuses as those of the ones there are."""
    return {status.name: count for status, count in zip(ti.Status, counts, strict=True) if count}


def _failures(status: torch.Tensor) -> dict[str, int]:
    """How many samples have which status other than CONVERGED."""
    if not bool(status.any()):  # CONVERGED is 0
        return {}
    counts = torch.bincount(status.flatten().long().cpu(), minlength=len(ti.Status)).tolist()
    return {ti.Status(i).name: n for i, n in enumerate(counts) if n and i != ti.Status.CONVERGED}


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        total[name] = total.get(name, 0) + count


def _summed(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        _add(total, part)
    return total


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None
