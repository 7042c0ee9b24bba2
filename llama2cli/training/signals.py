"""SIGINT and SIGTERM: the first asks to save and stop, the second stops at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a person or a scheduler has asked this process to stop, and by which signal."""

    def __init__(self) -> None:
        self.name = ""
        self.saving = False  # until the loop begins there is nothing to save: stop at once

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return bool(self.name)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.asked:
            os._exit(130)
        self.name = signal.Signals(number).name
        if not self.saving:
            raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Catch both signals for the time of the block."""
    stop = Stop()
    before = {s: signal.signal(s, stop.handle) for s in SIGNALS}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
