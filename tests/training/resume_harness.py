"""Kill a training command at any instant, resume it, and compare with a run that was left alone, bit for bit.

For every training stage. A fork server (this file as a program) has torch and the stage imported and has run no
operation on tensors, whose threads would not survive a fork: a trial costs a fork and the training, not the import.

    server = Server("pretrain")
    check_kills(server, ["pretrain", "--preset", ...], folder, kills=5, seed=0)
    check_every_step(server, [...], folder, steps=20)
    check_crash_points(server, [...], folder, every=7)

`args` is a command line without -o and --resume. The file is imported by its path:
`sys.path.insert(0, str(Path(__file__).parents[1] / "training"))`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class Server:
    """The fork server of one stage, and one running child of it at a time."""

    def __init__(self, stage: str) -> None:
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.cache = tempfile.TemporaryDirectory()  # where the machine's choice of kernels is remembered
        env["XDG_CACHE_HOME"] = self.cache.name
        self.process = subprocess.Popen(
            [sys.executable, __file__, stage], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.read()  # ready

    def read(self) -> Any:
        """The server's next message."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the fork server has ended"
        return json.loads(line)

    def start(self, args: Sequence[object], log: Path, crash: int | None = None) -> int:
        """Run a command line in a new process and return its id; its stdout and stderr go to log.out and log.err.

        crash: kill it (-9) just before its n-th change to the file system; 0 counts these changes into log.count.
        """
        assert self.process.stdin is not None
        message = {"args": [str(a) for a in args], "log": str(log), "crash": crash}
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return self.read()

    def wait(self) -> int:
        """The exit code of the running child, -9 when it was killed."""
        return self.read()

    def run(self, args: Sequence[object], log: Path, crash: int | None = None) -> int:
        """Start and wait."""
        self.start(args, log, crash)
        return self.wait()

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.cache.cleanup()


def torchrun(arguments: Sequence[object], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A command line on two processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "llama2cli"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=env, check=False)


@contextlib.contextmanager
def server(stage: str) -> Iterator[Server]:
    """A fork server for the time of a block."""
    it = Server(stage)
    try:
        yield it
    finally:
        it.close()


# --- what must be equal -------------------------------------------------------------------------------------------


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of every safetensors file in a step folder, read by the safetensors library."""
    import torch
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                value = f.get_tensor(name)
                data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
                found[f"{path.relative_to(folder)}:{name}"] = (str(value.dtype), tuple(value.shape), data)
    return found


def assert_same_run(run: Path, reference: Path) -> None:
    """Two run folders end with the same step, weights, optimizer, state, metrics and pointers."""
    for name in ("latest", "best"):
        assert (run / name).exists() == (reference / name).exists(), name
        if (run / name).exists():
            assert (run / name).read_text() == (reference / name).read_text(), name
    step = (reference / "latest").read_text().strip()
    ours, theirs = tensors(run / step), tensors(reference / step)
    assert ours.keys() == theirs.keys() and len(ours) > 0
    different = [name for name in ours if ours[name] != theirs[name]]
    assert not different, f"{len(different)} of {len(ours)} tensors differ, the first is {different[0]}"
    assert (run / step / "trainer/state.json").read_text() == (reference / step / "trainer/state.json").read_text()
    assert (run / "metrics.jsonl").read_text() == (reference / "metrics.jsonl").read_text()
    leftovers = [p.name for p in run.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    assert not leftovers, leftovers


def assert_loadable(run: Path) -> None:
    """Whatever happened, each step folder is whole by its manifest, and `latest` names one of them, if it is there."""
    from llama2cli.text.folders import resolve_model, verify_manifest

    for step in run.glob("step-*"):
        verify_manifest(step)
    if (run / "latest").exists():
        assert resolve_model(run).name == (run / "latest").read_text().strip()


def finish(server: Server, args: Sequence[object], run: Path) -> None:
    """Resume a run to its end."""
    code = server.run([*args, "-o", run, "--resume"], run.with_suffix(".log"))
    assert code == 0, run.with_suffix(".log.err").read_text()


def reference(server: Server, args: Sequence[object], folder: Path) -> tuple[Path, float]:
    """A run that is left alone, and the seconds that it took."""
    run = folder / "reference"
    began = time.monotonic()
    code = server.run([*args, "-o", run], folder / "reference.log")
    assert code == 0, (folder / "reference.log.err").read_text()
    return run, time.monotonic() - began


# --- trials -------------------------------------------------------------------------------------------------------


def check_kills(server: Server, args: Sequence[object], folder: Path, *, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill -9 a run this many times, every other time while it saves; each finished run equals the one left alone.

    Returns how many kills hit, and how many runs were finished after them.
    """
    plain, seconds = reference(server, args, folder)
    draw = random.Random(seed)
    run, hit, finished, tries = folder / "killed", 0, 0, 0
    while hit < kills:
        tries += 1
        assert tries < 6 * kills + 10, "most runs end before they are killed"
        pid = server.start([*args, "-o", run, "--resume"], folder / "killed.log")
        aimed = wait_for_save(run, pid, draw) if hit % 2 == 0 else wait_a_while(draw.uniform(0, seconds), pid)
        if aimed:
            os.kill(pid, signal.SIGKILL)
        code = server.wait()
        hit += code == -9
        assert code in (0, -9), (folder / "killed.log.err").read_text()
        if run.exists():
            assert_loadable(run)
        if code == 0:
            assert_same_run(run, plain)
            shutil.rmtree(run)
            finished += 1
    finish(server, args, run)
    assert_same_run(run, plain)
    return {"kills": hit, "finished": finished + 1}


def alive(pid: int) -> bool:
    """Whether the child still runs; one that has ended is a zombie until the server has waited for it, then gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_a_while(seconds: float, pid: int) -> bool:
    """Sleep; False when the child has ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not alive(pid):
            return False
        time.sleep(0.001)
    return alive(pid)


def wait_for_save(run: Path, pid: int, draw: random.Random) -> bool:
    """Wait until a save has begun, a few saves from now, and then up to 30 ms more; False when the child ends first."""
    for _ in range(draw.randrange(1, 4)):
        for saving in (False, True):
            while any(p.startswith(".step-") for p in names(run)) != saving:
                if not alive(pid):
                    return False
    return wait_a_while(draw.uniform(0, 0.03), pid)


def names(run: Path) -> list[str]:
    """The names in a folder that may not be there yet."""
    try:
        return os.listdir(run)  # noqa: PTH208
    except OSError:
        return []


def check_every_step(server: Server, args: Sequence[object], folder: Path, *, steps: int) -> None:
    """Resume at every step of a run (which must save every step); each ends as the run that was left alone."""
    plain, _ = reference(server, args, folder)
    for k in range(1, steps):
        run = folder / f"from-{k}"
        run.mkdir()
        for name in ("settings.json", "metrics.jsonl", "timing.jsonl"):
            shutil.copy(plain / name, run / name)
        for step in sorted(plain.glob("step-*"))[:k]:
            shutil.copytree(step, run / step.name, copy_function=os.link)
        last = f"step-{k:06d}"
        assert (run / last).is_dir()
        (run / "latest").write_text(last + "\n")
        finish(server, args, run)
        assert_same_run(run, plain)
        shutil.rmtree(run)


def check_crash_points(server: Server, args: Sequence[object], folder: Path, *, every: int = 1, first: int = 1) -> int:
    """Kill a run just before each (or every n-th) change that it makes to the file system; return how many trials."""
    plain, _ = reference(server, args, folder)
    run = folder / "counted"
    assert server.run([*args, "-o", run], folder / "counted.log", crash=0) == 0
    points = int((folder / "counted.log.count").read_text())
    trials = range(first, points + 1, every)
    for point in trials:
        run = folder / f"crash-{point}"
        assert server.run([*args, "-o", run], folder / "crash.log", crash=point) == -9
        if run.exists():
            assert_loadable(run)
        finish(server, args, run)
        assert_same_run(run, plain)
        shutil.rmtree(run)
    return len(trials)


# --- the server ---------------------------------------------------------------------------------------------------

CHANGES = ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "remove", "truncate")


def serve(stage: str) -> None:
    """Import a stage, then fork a child for each message."""
    import torch._dynamo
    import torch.distributed.tensor  # noqa: F401 (the optimizer imports both when it is made: 1 s)

    from llama2cli import cli

    rooms = ["nn", "text", "training"]
    module = importlib.import_module(f"llama2cli.stages.{stage}")
    if hasattr(module, "__path__"):  # a folder of modules, which the stage imports when it runs
        rooms += ["rlhf", "sampling", f"stages.{stage}"]
    for room in rooms:
        for path in sorted(Path(cli.__file__).parent.joinpath(*room.split(".")).glob("[!_]*.py")):
            importlib.import_module(f"llama2cli.{room}.{path.stem}")
    tell("ready")
    for line in sys.stdin:
        message = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(message)
        tell(pid)
        _, status = os.waitpid(pid, 0)
        tell(os.waitstatus_to_exitcode(status))


def tell(message: object) -> None:
    """Send a message to the test."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def child(message: dict[str, Any]) -> None:
    """Run a command line; never returns."""
    import torch

    from llama2cli import cli

    torch.seed()  # as every new process has it: no child inherits the server's
    log, code = message["log"], 1
    for fd, suffix in ((0, None), (1, ".out"), (2, ".err")):
        path = log + suffix if suffix else os.devnull
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
    count = crash_before(message["crash"]) if message["crash"] is not None else lambda: 0
    sys.argv = ["llama2", *message["args"]]
    try:
        code = cli.invoke(message["args"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if message["crash"] == 0:
            n = count()
            Path(log + ".count").write_text(str(n))
        os._exit(code)


def crash_before(point: int) -> Any:
    """Kill this process before its point-th call that changes files; return a function that tells the calls so far."""
    calls = 0

    def wrapped(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, wrapped(getattr(os, name)))
    return lambda: calls


if __name__ == "__main__":
    serve(sys.argv[1])
