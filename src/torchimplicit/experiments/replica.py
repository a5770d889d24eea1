"""A model that several processes train: one message a step carries the gradients and the step's numbers."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from torchimplicit.experiments.mailbox import Mailbox


class Replica:
    """A model in `DistributedDataParallel`, which gathers numbers with the last of its gradients.

    A message between processes costs about as much as a dozen steps of a small layer, however short it is.

    Args:
        model: with parameters in single precision, the same in every process.
        rank: of this process.
        size: how many processes there are.
    """

    def __init__(self, model: nn.Module, rank: int, size: int) -> None:
        self.size = size
        self._exchange = _Exchange(rank, size)
        self._model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self._model.register_comm_hook(None, self._exchange.take)

    def __call__(self, x: Tensor) -> Any:
        """The model's output."""
        self._exchange.samples = len(x)
        return self._model(x)

    @property
    def speeds(self) -> list[float]:
        """Of every process, in samples per second, in the step before the last one; 0 where that is not known.

        The time for which a process waited for the others does not count.
        """
        return self._exchange.speeds

    def pause(self) -> None:
        """Say that something else than training comes before the next step."""
        self._exchange.ended = None

    def backward(
        self,
        backward: Callable[[], None],
        numbers: Callable[[], list[float]],
        meanwhile: Callable[[], object] | None = None,
    ) -> list[list[float]]:
        """Take the backward pass, which leaves the mean of all processes' gradients in each.

        Args:
            backward: the pass.
            numbers: those to gather, at most 2^24 where they count something; called when the pass is through the
                model. As many in every process.
            meanwhile: what there is to do while the message is under way.

        Returns:
            The numbers of every process, in order.
        """
        exchange = self._exchange
        exchange.numbers, exchange.meanwhile, exchange.parts = numbers, meanwhile or list, []
        backward()
        return exchange.parts


class _Exchange:
    """What goes from process to process; it must not know the model, which would keep itself alive through it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.numbers: Callable[[], list[float]] = list
        self.meanwhile: Callable[[], object] = list
        self.parts: list[list[float]] = []
        self.samples = 0
        self.speeds = [0.0] * size
        self.ended: float | None = None  # when the last step did
        self._speed = 0.0
        self._mailbox: Mailbox | None = None
        self._opened_for = 0

    def take(self, _: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Begin to take the mean of some gradients; with the last ones, end it, and gather the numbers."""
        gradients = bucket.buffer().div_(self.size)
        if not bucket.is_last():
            return _sum(gradients).get_future().then(lambda summed: summed.value()[0])
        mine = gradients.new_tensor([self._speed, *self.numbers()])
        # Each in a place of its own, so that the sum is all of them.
        places = gradients.new_zeros(self.size, mine.numel())
        places[self.rank] = mine
        end = self._send(torch.cat([gradients, places.flatten()]))
        self.meanwhile()
        began = time.perf_counter()
        total = end()
        self._measure(began)
        columns = total[gradients.numel() :].view_as(places).tolist()
        self.speeds, self.parts = [row[0] for row in columns], [row[1:] for row in columns]
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(total[: gradients.numel()])
        return done

    def _send(self, message: Tensor) -> Callable[[], Tensor]:
        """Begin to sum over all processes; returns what ends it."""
        if self.size > 1 and message.device.type == "cpu" and self._opened_for != message.numel():
            # Once or twice: DDP deals the gradients out anew after the first step.
            self._mailbox, self._opened_for = Mailbox.open(self.rank, self.size, message.numel()), message.numel()
        if self._mailbox is not None:
            self._mailbox.post(message)
            return self._mailbox.collect
        under_way = _sum(message)

        def end() -> Tensor:
            under_way.wait()
            return message

        return end

    def _measure(self, began: float) -> None:
        """How fast this process was, after a wait that began then."""
        busy = 0.0 if self.ended is None else began - self.ended
        self._speed = self.samples / busy if busy > 0 else 0.0
        self.ended = time.perf_counter()


def _sum(message: Tensor) -> Any:
    return dist.all_reduce(message, async_op=True)
