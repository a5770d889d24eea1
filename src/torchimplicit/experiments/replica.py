"""A model that several processes train: one message a step carries the gradients and the step's numbers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel


class Replica:
    """A model in `DistributedDataParallel`, which gathers numbers with the last of its gradients.

    A message between processes costs about as much as a dozen steps of a small layer, however short it is.

    Args:
        model: with parameters in single precision, the same in every process.
        rank: of this process.
        size: how many processes there are.
    """

    def __init__(self, model: nn.Module, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.model.register_comm_hook(None, self._exchange)
        self._numbers: Callable[[], list[float]] = list
        self._meanwhile: Callable[[], object] = list
        self._parts: list[list[float]] = []

    def __call__(self, x: Tensor) -> Any:
        """The model's output."""
        return self.model(x)

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
        self._numbers, self._meanwhile = numbers, meanwhile or list
        backward()
        return self._parts

    def _exchange(self, _: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        gradients = bucket.buffer().div_(self.size)
        if not bucket.is_last():
            return _sum(gradients).then(lambda summed: summed.value()[0])
        mine = gradients.new_tensor(self._numbers())
        # Each in a place of its own, so that the sum is all of them.
        places = gradients.new_zeros(self.size, mine.numel())
        places[self.rank] = mine
        under_way = _sum(torch.cat([gradients, places.flatten()]))
        self._meanwhile()

        def apart(summed: torch.futures.Future[list[Tensor]]) -> Tensor:
            gradients, parts = summed.value()[0].split([bucket.buffer().numel(), places.numel()])
            self._parts = parts.view_as(places).tolist()
            return gradients

        return under_way.then(apart)


def _sum(message: Tensor) -> torch.futures.Future[list[Tensor]]:
    under_way: Any = dist.all_reduce(message, async_op=True)
    return under_way.get_future()
