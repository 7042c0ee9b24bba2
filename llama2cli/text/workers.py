"""Map a function over chunks of work in child processes, in order, with bounded memory.

The children are forked, so the function and all it refers to (a tokenizer, say) need not be sent; only chunks and
results go through pipes. A child whose parent has died reads the end of its pipe and leaves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from llama2cli import console
from llama2cli.errors import Failure

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # chunks in flight for each worker
INLINE = 2  # chunks that this process does itself before it forks: small inputs never pay for workers


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered(function: Callable[[T], R], chunks: Iterable[T], *, workers: int) -> Iterator[R]:
    """function(chunk) for each chunk, in order, computed by `workers` processes; by this one where that is 1.

    At most AHEAD chunks a worker are read in advance. Raises what the function raises, in the order of the chunks, and
    Failure when a worker dies.
    """
    waiting = iter(chunks)
    yield from map(function, islice(waiting, INLINE))
    if workers == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(function, waiting)
        return
    failures: list[Failure] = []
    guarded = _until_failure(waiting, failures)  # what is wrong with earlier chunks is told first
    first = list(islice(guarded, workers))
    if first:
        yield from _spread(function, chain(first, guarded), len(first))
    if failures:
        raise failures[0]


def _until_failure(chunks: Iterator[T], failures: list[Failure]) -> Iterator[T]:
    try:
        yield from chunks
    except Failure as e:
        failures.append(e)


def _spread(function: Callable[[T], R], chunks: Iterable[T], workers: int) -> Iterator[R]:
    pool: list[_Worker] = []
    for _ in range(workers):
        pool.append(_Worker(function, [w.pipe for w in pool]))
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in pool:
        idle.put(worker)

    def call(chunk: T) -> R:
        worker = idle.get()
        try:
            return worker.call(chunk)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(workers)
    pending: deque[Future[R]] = deque()
    try:
        for chunk in chunks:
            pending.append(threads.submit(call, chunk))
            if len(pending) > AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for worker in pool:
            worker.stop()
        threads.shutdown(wait=False)


class _Worker:
    """One child process and the pipe to it."""

    def __init__(self, function: Callable[[Any], Any], siblings: list[Connection]) -> None:
        """siblings: our ends of the pipes to the children before; this one inherits them and must close them."""
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs, [*siblings, self.pipe]), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, chunk: Any) -> Any:
        try:
            self.pipe.send(chunk)
            failed, result = self.pipe.recv()
        except (EOFError, OSError):
            raise Failure("a worker process died, for lack of memory it may be; fewer --workers need less") from None
        if failed:
            raise result
        return result

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def _serve(function: Callable[[Any], Any], pipe: Connection, not_ours: list[Connection]) -> None:
    """Life of a child: answer each chunk until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and stops us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    console.configure("worker", quiet=True)
    for other in not_ours:
        other.close()
    try:
        while True:
            chunk = pipe.recv()
            try:
                answer = (False, function(chunk))
            except Exception as e:
                answer = (True, e)
            pipe.send(answer)
    except (EOFError, OSError):
        pass
