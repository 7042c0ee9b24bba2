"""What sft.py and reward.py share: processes in turns, TRL's trainers on a clock, data, tables.

Both sides train from one folder of weights, with one tokenizer, on the same token ids; each measurement is a process
of its own, one thread on one core. Ours is the command itself (`python -m llama2cli ...`), timed by the `seconds` of
its own timing.jsonl; TRL's trainer runs in this file's worker, timed from the end of one step to the end of the next,
so that collating, logging and metrics count on both sides. TRL's optimizer and schedule are ours: torch's fused AdamW,
the paper's numbers, our rates step by step.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import importlib.metadata
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("LLAMA2_SHARED", HERE.parents[2] / "shared")) / "data"
VOCABULARY = {"1m": 2048, "15m": 32000}
TUNED = {"MALLOC_MMAP_THRESHOLD_": 1 << 30, "MALLOC_TRIM_THRESHOLD_": 2**31 - 1, "MALLOC_TOP_PAD_": 256 << 20}
RATE = 1e-4  # peak, of every run
CHECKED = 4  # steps over one batch whose losses are compared
SKIPPED = {"ours": 4, "TRL": 2}  # steps of a run that are not counted
TRAINED = ("gutenberg/*.txt.gz", "wikitext2/*.txt.gz")  # texts of the tokenizers, beside the dialogues
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
Task = dict[str, Any]


def arguments(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6, help="of counted steps in a process")
    parser.add_argument("--core", default="0", help="core to pin to; empty: not pinned")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", default="", help="only these, comma between (default: all)")
    parser.add_argument("--work", default="", help="folder for tokenizers and weights (default: a temporary one)")
    parser.add_argument("-o", "--out", default="", help="write the tables here too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


# --- data ---------------------------------------------------------------------------------------------------------


def records(name: str) -> list[dict[str, Any]]:
    """The records of a file of the public data folder, a JSON list or JSON lines."""
    text = gzip.decompress((SHARED / name).read_bytes()).decode()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line]


def turn(role: str, *texts: str) -> dict[str, str]:
    """A message of several texts with blank lines between."""
    return {"role": role, "content": "\n\n".join(t.strip() for t in texts if t.strip())}


def write_lines(path: Path, lines: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: str | Path) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def tokenizer(work: Path, size: str, texts: Iterable[str]) -> Any:
    """A tokenizer that `llama2 tokenize --train` makes of these texts and some books."""
    from llama2cli.text.tokenizer import Tokenizer

    model = work / f"tokenizer-{size}.model"
    if not model.exists():
        books = (gzip.decompress(p.read_bytes()).decode() for pattern in TRAINED for p in sorted(SHARED.glob(pattern)))
        corpus = write_lines(work / "texts.jsonl", ({"text": t} for t in (*texts, *books)))
        made = ["tokenize", "--train", "--vocab-size", str(VOCABULARY[size]), "-o", str(model), str(corpus), "--quiet"]
        command(made, os.environ)
    return Tokenizer.load(model)


def weights(work: Path, size: str, tokenizer: Any) -> Path:
    """A folder with a random language model, which both sides begin with."""
    from llama2cli.nn import checkpoint
    from llama2cli.nn.config import preset
    from llama2cli.nn.model import Llama

    folder = work / f"base-{size}"
    if not folder.exists():
        model = Llama(preset(size, vocab_size=VOCABULARY[size], context=1024))
        model.init_weights(0)
        folder.mkdir()
        checkpoint.save_model(folder, model, tokenizer)
    return folder


def warm_up(check: bool) -> int:
    """Steps of warm-up of a run."""
    return 2 if check else 5


# --- ours: the command --------------------------------------------------------------------------------------------


def command(arguments: Sequence[str], env: Any) -> None:
    done = subprocess.run([sys.executable, "-m", "llama2cli", *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llama2 {shlex.join(arguments)}\n{done.stderr[-3000:]}")


def ours(arguments: Sequence[str], items: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a run of a training command: loss, seconds (from the end of the step before) and tokens by step.

    items: dialogues or pairs of a step.
    """
    with tempfile.TemporaryDirectory() as out:
        command([*arguments, "-o", f"{out}/run", "--quiet"], environment(args, tuned=False))
        timing, metrics = read_lines(f"{out}/run/timing.jsonl"), read_lines(f"{out}/run/metrics.jsonl")
    ends = [0.0, *(line["seconds"] for line in timing)]
    return [
        {"loss": m["loss"], "seconds": b - a, "tokens": round(t["tokens_per_second"] * items / t["items_per_second"])}
        for m, t, (a, b) in zip(metrics, timing, itertools.pairwise(ends))
    ]


# --- theirs: a trainer on a clock ---------------------------------------------------------------------------------


def optimizer_of(model: Any, task: Task) -> tuple[Any, Any]:
    """AdamW and the schedule as the commands have them."""
    import torch

    from llama2cli.training import optim

    schedule = optim.Schedule(RATE, warm_up(task["check"]), task["steps"])
    adamw = optim.adamw(model.named_parameters(), lr=RATE)
    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, lambda done: schedule.lr(done + 1) / RATE)


def common(task: Task, folder: str) -> dict[str, Any]:
    """Arguments of every trainer."""
    return dict(
        output_dir=folder, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        bf16=task["dtype"] == "bf16", max_steps=task["steps"], gradient_checkpointing=False, max_grad_norm=1.0,
        dataloader_num_workers=0, per_device_train_batch_size=task["batch"], seed=0,
    )  # fmt: skip


def clocked(trainer: type, count: Callable[[dict[str, Any]], dict[str, int]], task: Task, **arguments: Any) -> Task:
    """Train; seconds, loss and counts (of its inputs) of each step. Ends after `seconds` of counted steps."""
    import transformers

    rows: list[dict[str, Any]] = []

    class Counted(trainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            counts = count(inputs)
            loss = super().compute_loss(model, inputs, *rest, **named)
            rows.append({**counts, "loss": float(loss.detach())})
            return loss

    class Clock(transformers.TrainerCallback):
        at = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.at = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now = time.perf_counter()
            rows[-1]["seconds"], self.at = now - self.at, now
            times = [row["seconds"] for row in rows[SKIPPED["TRL"] :]]
            if len(times) >= 3 and sum(times) >= task["seconds"]:
                control.should_training_stop = True

    loop = Counted(callbacks=[Clock()], optimizers=optimizer_of(arguments["model"], task), **arguments)
    loop.train()
    return {"rows": rows}


def as_worker(task: Task, measure: Callable[[Task, str], Task]) -> None:
    """The process of one measurement with TRL: its result is the last line of stdout."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        import datasets

        datasets.disable_progress_bars()
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(task, folder)
    print(json.dumps(found))


def theirs(script: str, task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a run of TRL in a process of its own: loss, seconds, counts by step."""
    env = environment(args, tuned="tuned" in task["side"])
    done = subprocess.run(
        [sys.executable, script, "--worker", json.dumps(task)], env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{task['side']}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])["rows"]


def environment(args: argparse.Namespace, *, tuned: bool) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    env |= {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    return env | QUIET | ({k: str(v) for k, v in TUNED.items()} if tuned else {})


def pin(args: argparse.Namespace) -> None:
    """Keep this process, and those that it starts, on the core; and quiet."""
    os.environ.update(QUIET)
    if args.core and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(c) for c in args.core.split(",")})


# --- tables -------------------------------------------------------------------------------------------------------


def told(row: dict[str, Any]) -> dict[str, Any]:
    """A row printed as a JSON line."""
    print(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return row


def rates(values: Sequence[float], name: str) -> dict[str, Any]:
    """The median, named, its spread (IQR over median), and how many there were."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {name: middle, "iqr": (high - low) / middle, "n": len(values)}


def listed(rows: Sequence[dict[str, Any]], key: str, form: str) -> str:
    return " / ".join(format(row[key], form) for row in rows)


def lowest(top: Sequence[dict[str, Any]], bottom: Sequence[dict[str, Any]], key: str) -> float:
    """The lowest ratio within a round."""
    return min(a[key] / b[key] for a, b in zip(top, bottom))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown."""
    return ["", *(f"| {' | '.join(r)} |" for r in (columns, ["---"] * len(columns), *rows))]


def losses(found: Sequence[float]) -> str:
    return ", ".join(f"{x:.5f}" for x in found)


def machine(args: argparse.Namespace) -> str:
    """Where and with what this was measured."""
    name = "unknown processor"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x for x in lines if x.startswith("model name")).split(":")[1].strip()
        family = next(x for x in lines if x.startswith("cpu family")).split(":")[1].strip()
        name += f" (family {family})"
    packages = ("torch", "transformers", "trl", "accelerate")
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    return (
        f"{datetime.date.today()}, {name}, {os.cpu_count()} cores, of which {args.threads} used; "
        f"Python {sys.version.split()[0]}, {versions}; load {os.getloadavg()[0]:.1f} at the start"
    )


def report(args: argparse.Namespace, title: str, notes: str, tables: Sequence[str]) -> None:
    """The page, on stderr and in the file that was asked for."""
    called = shlex.join(["python", f"tests/bench/{Path(sys.argv[0]).name}", *without_paths(sys.argv[1:])])
    page = "\n".join([f"# {title}", "", f"    {called}", "", notes, *tables, ""])
    print(page, file=sys.stderr)
    if args.out:
        Path(args.out).write_text(page)


def without_paths(words: Sequence[str]) -> list[str]:
    """A command line without --work and -o, which name places on this machine."""
    keep = [i for i in range(len(words)) if words[i] not in ("--work", "-o", "--out")]
    return [words[i] for i in keep if i == 0 or words[i - 1] not in ("--work", "-o", "--out")]
