"""One training step, guarded, on one process or many, in single or reduced precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.experiments.config import PRECISIONS
from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.metrics import BatchRecord, Solves
from torchimplicit.experiments.recipe import with_penalty
from torchimplicit.experiments.replica import Replica
from torchimplicit.experiments.world import World

OVERFLOW = "the scaled loss left the range of float16"


@dataclass(frozen=True)
class Scheme:
    """How a step is taken.

    Attributes:
        precision: `"float32"`, or what autocast computes in, `"bf16"` or `"fp16"`.
        scaler: of the loss, for float16, whose range is small.
        world: the processes among which a batch is divided.
        jacobian_penalty: weight of `ti.jacobian_penalty` in the loss; one process only.
    """

    precision: str = "float32"
    scaler: torch.amp.GradScaler | None = None
    world: World = field(default_factory=World)
    jacobian_penalty: float = 0.0

    @staticmethod
    def of(precision: str, device: str, world: World, jacobian_penalty: float = 0.0) -> Scheme:
        """With a scaler where one is needed.

        Raises:
            ExperimentError: a penalty with several processes.
        """
        if jacobian_penalty and world.size > 1:
            raise ExperimentError(
                "--jacobian-penalty: works with one process only; leave it out, or run without torchrun"
            )
        scaler = torch.amp.GradScaler(device.partition(":")[0]) if precision == "fp16" else None
        return Scheme(precision, scaler, world, jacobian_penalty)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """For the forward pass."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def train_batch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    epoch: int,
    number: int,
    scheme: Scheme | None = None,
    replica: Replica | None = None,
    size: int | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> BatchRecord:
    """One forward pass, one backward pass, one step of plain gradient descent, unless a number is not finite.

    The optimiser sees neither a non-finite loss nor a non-finite gradient, and no step is taken that could
    overflow a parameter; such a batch is skipped, and the record says why. With several processes the images are
    this one's part of the batch, and the step and the record are those of the whole.

    Args:
        model: what is trained.
        optimizer: of its parameters.
        images: `(B, 28, 28)`.
        labels: `(B,)`.
        epoch: for the record.
        number: of the batch, for the record.
        scheme: None is single precision, alone.
        replica: the model as several processes train it.
        size: of the whole batch, of which they have parts.
        meanwhile: what there is to do while they wait for each other.
    """
    scheme = scheme or Scheme()
    optimizer.zero_grad(set_to_none=replica is None)  # a replica's gradients lie in its messages
    penalty = None
    with ti.monitor(model) as log:
        with scheme.autocast(images.device):
            logits, jacobian = (
                with_penalty(model, images) if scheme.jacobian_penalty else ((replica or model)(images), None)
            )
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        wrong = int((logits.detach().argmax(dim=1) != labels).sum())
        if replica is None:
            loss = nn.functional.cross_entropy(logits, labels)
            value, gradient_norm, skipped = loss.item(), None, None
            if jacobian is not None:
                loss, penalty = loss + scheme.jacobian_penalty * jacobian, jacobian.item()
            if not math.isfinite(value) or not math.isfinite(penalty or 0.0):
                skipped = "non-finite loss"
            else:
                _backward(loss, optimizer, scheme)
                gradient_norm, skipped = _step(optimizer, scheme)
            return BatchRecord(
                epoch, number, len(labels), value, wrong, Solves.of(log), gradient_norm, skipped, penalty
            )
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        value = loss.item()
        # The mean over the processes is taken of their gradients. Whatever the loss is, all take a backward pass.
        share = replica.size / (size or len(labels))
        record = BatchRecord(epoch, number, len(labels), value / max(len(labels), 1), wrong, Solves())
        parts = replica.backward(
            lambda: _backward(loss * share, optimizer, scheme),
            lambda: replace(record, solves=Solves.of(log)).numbers(),
            meanwhile,
        )
    record = record.of_all(parts)
    if math.isfinite(record.loss):
        record.gradient_norm, record.skipped = _step(optimizer, scheme)
    else:
        record.skipped = "non-finite loss"
        if scheme.scaler is not None:
            scheme.scaler.update()
    return record


def _backward(loss: Tensor, optimizer: torch.optim.Optimizer, scheme: Scheme) -> None:
    if scheme.scaler is None:
        loss.backward()
    else:
        scheme.scaler.scale(loss).backward()
        scheme.scaler.unscale_(optimizer)


def _step(optimizer: torch.optim.Optimizer, scheme: Scheme) -> tuple[float, str | None]:
    gradient_norm, skipped = _check_step(optimizer)
    if scheme.scaler is None:
        if skipped is None:
            optimizer.step()
        return gradient_norm, skipped
    before = scheme.scaler.get_scale()
    if skipped is None:
        scheme.scaler.step(optimizer)
    scheme.scaler.update()
    if skipped is not None and scheme.scaler.get_scale() < before:
        skipped = OVERFLOW
    return gradient_norm, skipped


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
