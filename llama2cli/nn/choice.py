"""The forms of the operations that were chosen on this machine, remembered from the first command to all later ones.

The choice is made by the clock, and two forms that are nearly as fast would be chosen now so, now so: the same command
would not give the same bytes. The file is `llama2cli/kernels-*.json` in the user's cache folder (XDG_CACHE_HOME, else
~/.cache); remove it to have the choice made anew. Where it cannot be written, each process chooses for itself.
"""

from __future__ import annotations

import contextlib
import json
import os
from hashlib import sha256
from pathlib import Path

import torch

from llama2cli import __version__
from llama2cli.nn import ops


def memory_file() -> Path:
    """Where the choices of this machine are: a file per processor, number of threads, and versions of the programs."""
    try:
        about = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        processor = [line for line in about.splitlines() if line.startswith(("model name", "flags", "Features"))]
    except OSError:
        processor = list(os.uname())
    told = [__version__, torch.__version__, torch.get_num_threads(), processor]
    key = sha256(json.dumps(told).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "llama2cli" / f"kernels-{key}.json"


def choose() -> None:
    """Set the process up (`ops.setup_process`) with the forms that this machine took before, and remember new ones.

    For every command that computes with a model; call it once, before the first operation.
    """
    path = memory_file()
    old, known = path.exists(), recall(path)
    if ops.choices()["mode"] == "plain":
        ops.setup_process()
        return
    ops.restore({**ops.choices(), "picks": known})
    ops.setup_process()
    chosen = ops.choices()["picks"]
    if chosen != known:
        remember(path, chosen, replace=old)
        ops.restore({**ops.choices(), "picks": {**chosen, **recall(path)}})  # another process may have been first


def recall(path: Path) -> dict[str, str]:
    """What a file says of each operation, {} where it says nothing that can be read."""
    try:
        picks = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(picks, dict):
        return {}
    return {k: v for k, v in picks.items() if v in ("fast", "plain")}


def remember(path: Path, picks: dict[str, str], *, replace: bool) -> None:
    """Write a file of choices; without `replace`, unless another process has written it meanwhile."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(picks, indent=1) + "\n")
        if replace:
            aside.replace(path)
        else:
            os.link(aside, path)  # fails where another process was first
    with contextlib.suppress(OSError):
        aside.unlink(missing_ok=True)
