"""Batches by number, of which the next one can be fetched before it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Feed(Generic[Batch]):
    """Gives each of `count` batches once.

    Args:
        fetch: makes the batch of a number.
        count: how many there are.
    """

    def __init__(self, fetch: Callable[[int], Batch], count: int) -> None:
        self._fetch, self._count = fetch, count
        self._ready: dict[int, Batch] = {}

    def prepare(self, number: int) -> None:
        """Fetch a batch, if there is one of this number."""
        if number < self._count:
            self._ready[number] = self._fetch(number)

    def take(self, number: int) -> Batch:
        """The batch, fetched now if it was not prepared."""
        return self._ready.pop(number) if number in self._ready else self._fetch(number)
