"""Batches that may be fetched before they are wanted."""

from torchimplicit.experiments.feed import Feed


def test_a_prepared_batch_is_fetched_once_and_the_others_when_they_are_taken() -> None:
    fetched: list[int] = []

    def fetch(number: int) -> str:
        fetched.append(number)
        return f"batch {number}"

    feed = Feed(fetch, 3)
    assert feed.take(0) == "batch 0"
    feed.prepare(1)
    feed.prepare(3)
    assert fetched == [0, 1]
    assert [feed.take(1), feed.take(2)] == ["batch 1", "batch 2"]
    assert fetched == [0, 1, 2]
