"""Several ranks as threads of one process: what they would send each other goes through a list."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch

T = TypeVar("T")


def simulate(monkeypatch: pytest.MonkeyPatch, size: int, work: Callable[[Any], T]) -> list[T]:
    """What `work` gives on each of `size` ranks; it is called with a World."""
    from llama2cli.training import dist

    meet = threading.Barrier(size, timeout=60)
    told: list[Any] = [None] * size

    def everyone(here: Any, value: Any) -> list[Any]:
        told[here.rank] = value
        meet.wait()
        found = list(told)
        meet.wait()  # all have read before one writes again
        return found

    def sums(here: Any, values: Sequence[float]) -> list[float]:
        ranks = everyone(here, list(values))
        assert len({len(r) for r in ranks}) == 1
        return [sum(column) for column in zip(*ranks)]

    monkeypatch.setattr(dist, "sums", sums)
    monkeypatch.setattr(dist, "most", lambda here, value: max(everyone(here, value)))
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(dist.World(rank, size, torch.device("cpu")))
        except BaseException as e:
            errors.append(e)
            meet.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
