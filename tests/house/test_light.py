"""The installation stays light: at most 20 packages and 120 MB beside torch, triton and what those two bring.

Counted from the metadata of what is installed here: the requirements of llama2cli without extras, and theirs in turn.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

MOST_PACKAGES = 20
MOST_BYTES = 120e6


def canonical(name: str) -> str:
    """The one spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str, requires: dict[str, list[str]] | None = None) -> set[str]:
    """All distributions that an installation of `name` brings, itself included.

    requires: the metadata, name -> requirements; the installed one when None. A name that is not installed is counted
    but not followed.
    """
    found: set[str] = set()
    waiting = [(canonical(name), frozenset[str]())]
    done = set()
    while waiting:
        current, extras = waiting.pop()
        if (current, extras) in done:
            continue
        done.add((current, extras))
        found.add(current)
        if requires is not None:
            lines = requires.get(current, [])
        else:
            try:
                lines = metadata.requires(current) or []
            except metadata.PackageNotFoundError:
                lines = []
        for line in lines:
            r = Requirement(line)
            wanted = r.marker is None or any(r.marker.evaluate({"extra": e}) for e in (extras or {""}))
            if wanted:
                waiting.append((canonical(r.name), frozenset(r.extras)))
    return found


def size(name: str) -> int:
    """Bytes of the installed files of a distribution, pip's compiled caches among them."""
    paths = [Path(str(f.locate())) for f in metadata.files(name) or []]
    return sum(p.stat().st_size for p in paths if p.is_file())


def extra_packages() -> set[str]:
    """What llama2cli brings beside torch, triton and theirs."""
    return closure("llama2cli") - closure("torch") - closure("triton") - {"llama2cli"}


def test_few_packages() -> None:
    """A fresh installation resolves to few packages."""
    packages = extra_packages()
    assert {"safetensors", "sentencepiece", "typer"} <= packages, "the metadata of llama2cli were not found"
    assert len(packages) <= MOST_PACKAGES, sorted(packages)


def test_small_packages() -> None:
    """And they are small."""
    sizes = {name: size(name) for name in extra_packages()}
    assert all(sizes.values()), f"no files recorded: {[n for n, s in sizes.items() if not s]}"
    assert sum(sizes.values()) <= MOST_BYTES, sizes


def test_the_closure_follows_requirements() -> None:
    """Requirements of requirements count, extras only when asked for, markers are evaluated."""
    requires = {
        "a": ["b>=1", "c[fast]", "x; extra == 'test'", "y; python_version < '3'"],
        "c": ["d", "e; extra == 'fast'", "f; extra == 'slow'"],
        "d": ["A_Long.Name", "a"],
    }
    assert closure("a", requires) == {"a", "b", "c", "d", "e", "a-long-name"}


def test_a_planted_heavy_dependency_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 21 packages, or 121 MB, the checks fail."""
    many = {"llama2cli"} | {f"p{i}" for i in range(MOST_PACKAGES + 1)} | {"safetensors", "sentencepiece", "typer"}
    real = closure
    monkeypatch.setitem(globals(), "closure", lambda name, requires=None: many if name == "llama2cli" else real(name))
    with pytest.raises(AssertionError):
        test_few_packages()
    monkeypatch.setitem(globals(), "size", lambda name: MOST_BYTES)
    with pytest.raises(AssertionError):
        test_small_packages()
