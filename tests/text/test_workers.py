"""The ordered map over worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from llama2cli.errors import DataError, Failure
from llama2cli.text.workers import AHEAD, INLINE, ordered


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, INLINE, INLINE + 1, 60])
def test_results_come_in_order(workers: int, n: int) -> None:
    """Whatever the number of workers and of chunks."""
    assert list(ordered(lambda i: i * i, iter(range(n)), workers=workers)) == [i * i for i in range(n)]


def test_several_processes_work() -> None:
    """After the first chunks, which this process does itself."""
    pids = list(ordered(lambda i: (time.sleep(0.01), os.getpid())[1], range(30), workers=3))
    assert pids[:INLINE] == [os.getpid()] * INLINE
    assert len(set(pids[INLINE:])) > 1 and os.getpid() not in pids[INLINE:]


def test_memory_is_bounded() -> None:
    """Chunks are read a little ahead of the results, not all at once."""
    read = 0

    def chunks() -> Iterator[int]:
        nonlocal read
        for i in range(500):
            read = i + 1
            yield i

    for i, _ in enumerate(ordered(lambda c: c, chunks(), workers=2)):
        assert read <= i + 2 * AHEAD + 3


def test_big_chunks_do_not_block() -> None:
    """Chunks and results larger than a pipe holds."""
    sizes = list(ordered(lambda c: c + c, [b"x" * 300_000] * 12, workers=2))
    assert sizes == [b"x" * 600_000] * 12


def fail_at(n: int) -> Iterator[int]:
    """Chunks, and then a record that cannot be read."""
    yield from range(n)
    raise DataError("cannot be read", "file", n)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("n", [1, 3, 20])
def test_failures_of_the_reader(workers: int, n: int) -> None:
    """They come after the results of what was read before."""
    done = []
    with pytest.raises(DataError, match=f"file:{n}: cannot be read"):
        for result in ordered(lambda i: i, fail_at(n), workers=workers):
            done.append(result)  # noqa: PERF402
    assert done == list(range(n))


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_of_the_function(workers: int) -> None:
    """The first in order is raised, its place with it, before one of the reader that lies behind it."""

    def function(i: int) -> int:
        if i in (7, 9):
            raise DataError("is wrong", "file", i)
        return i

    with pytest.raises(DataError) as error:
        list(ordered(function, fail_at(11), workers=workers))
    assert str(error.value) == "file:7: is wrong" and error.value.exit_code == 1


def test_bugs_come_through() -> None:
    """An exception that nobody expected is not swallowed."""
    with pytest.raises(ZeroDivisionError):
        list(ordered(lambda i: 1 // (5 - i), range(20), workers=2))


def test_a_killed_worker() -> None:
    """As by the kernel, for lack of memory: one line."""

    def function(i: int) -> int:
        if i == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    with pytest.raises(Failure, match="a worker process died"):
        list(ordered(function, range(30), workers=2))


ORPHANS = """
import os, signal, sys, time
from llama2cli.text.workers import ordered
for i, pid in enumerate(ordered(lambda i: (time.sleep(0.01), os.getpid())[1], range(1000), workers=3)):
    print(pid, flush=True)
    if i == 20:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_leave_when_their_parent_dies() -> None:
    """Nobody stops them, and they are not left behind."""
    done = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, timeout=60)
    pids = set(map(int, done.stdout.split()[3:]))
    assert len(pids) > 1
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:  # noqa: PTH110
        time.sleep(0.02)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]  # noqa: PTH110
