"""Expected failures. Each becomes one line on stderr and an exit code; anything else that escapes is a bug.

Exit codes: 0 done, 1 the data or the run failed, 2 misuse, 130 interrupted after saving.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class Failure(Exception):
    """The data or the run failed (exit 1). The message is one line that says what is wrong and what to do.

    place: where it went wrong, joined by ":" in front of the message: a file, a line number, a field.
    """

    exit_code = 1

    def __init__(self, message: str, *place: object) -> None:
        self.place = tuple(str(p) for p in place if p is not None and p != "")
        self.message = " ".join(message.split())
        super().__init__(self.message)

    def __str__(self) -> str:
        return ": ".join([":".join(self.place), self.message]) if self.place else self.message


class DataError(Failure):
    """A record, file or checkpoint is not what it should be (exit 1)."""


class Misuse(Failure):
    """The command line or a setting is wrong (exit 2)."""

    exit_code = 2


class Interrupted(Failure):
    """SIGINT or SIGTERM, after the work was saved (exit 130)."""

    exit_code = 130


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean "x"?` for the closest known word, or nothing."""
    close = get_close_matches(word, list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
