"""Training with the Triton kernels, in their interpreter: the losses of torch's own operators, and a resumed run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import tiny

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

SHAPE = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
# The interpreter as the kernels' own tests correct and speed it.
CHILD = """
import os, sys
sys.path.insert(0, sys.argv[1])
if os.environ.get("TRITON_INTERPRET"):
    import conftest
from llama2cli import cli
sys.exit(cli.invoke(sys.argv[2:]))
"""


def pretrain(home: Path, out: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """50 steps of 16 tokens."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LLAMA2_OPS", "RANK")}
    path = os.pathsep.join(filter(None, (str(ROOT / "kernels"), inherited.get("PYTHONPATH"))))
    line = f"""pretrain --preset {home}/model.json --tokenizer {home}/tok.model --data a={home}/a --context 8
        --batch-size 16 --micro-batch 2 --steps 50 --warmup 5 --save-every 48 --lr 0.02 --seed 3 --device cpu
        -o {out}"""
    command = [sys.executable, "-c", CHILD, str(ROOT / "kernels/tests"), *line.split(), *more]
    return subprocess.run(command, env=inherited | {"PYTHONPATH": path} | env, capture_output=True, text=True)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tiny.write(tmp_path_factory.mktemp("triton"))
    shape = json.loads((home / "model.json").read_text())
    (home / "model.json").write_text(json.dumps(shape | SHAPE))
    return home


@pytest.fixture(scope="module")
def by_kernels(home: Path) -> Path:
    done = pretrain(home, home / "triton", TRITON_INTERPRET="1", LLAMA2_OPS="triton")
    assert done.returncode == 0, done.stderr
    return home / "triton"


def test_fifty_steps_follow_the_plain_operators(home: Path, by_kernels: Path) -> None:
    done = pretrain(home, home / "plain", "--kernels", "plain")
    assert done.returncode == 0, done.stderr
    ours, plain = ([m["loss"] for m in metrics(run)] for run in (by_kernels, home / "plain"))
    assert len(ours) == len(plain) == 50
    assert sum(plain[-10:]) / 10 < 0.75 * plain[0]  # it learns
    assert max(abs(a - b) / b for a, b in zip(ours, plain)) < 1e-3
    assert ours != plain  # they are not the same operators
    norms = [[m["grad_norm"] for m in metrics(run)] for run in (by_kernels, home / "plain")]
    assert max(abs(a - b) / b for a, b in zip(*norms)) < 1e-2


def test_the_choice_is_recorded_and_restored(home: Path, by_kernels: Path, tmp_path: Path) -> None:
    """A resumed run takes the kernels of the run, though nothing asks for them; and gives its bits."""
    kernels = json.loads((by_kernels / "settings.json").read_text())["provenance"]["kernels"]
    assert kernels["mode"] == "triton" and kernels["triton"] is True
    stopped = tmp_path / "stopped"
    shutil.copytree(by_kernels, stopped)
    shutil.rmtree(stopped / "step-000050")
    (stopped / "latest").write_text("step-000048\n")
    done = pretrain(home, stopped, "--resume", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert metrics(stopped) == metrics(by_kernels)
    weights = [(run / "step-000050" / "model.safetensors").read_bytes() for run in (stopped, by_kernels)]
    assert weights[0] == weights[1]


def test_resumed_where_they_cannot_run(home: Path, by_kernels: Path, tmp_path: Path) -> None:
    """Said once, and torch's own operators go on."""
    stopped = tmp_path / "stopped"
    shutil.copytree(by_kernels, stopped)
    shutil.rmtree(stopped / "step-000050")
    (stopped / "latest").write_text("step-000048\n")
    done = pretrain(home, stopped, "--resume")
    assert done.returncode == 0 and done.stderr.count("torch's own operators compute instead") == 1, done.stderr
    assert metrics(stopped)[-1]["loss"] == pytest.approx(metrics(by_kernels)[-1]["loss"], rel=1e-3)


def test_refused_where_they_cannot_run(home: Path, tmp_path: Path) -> None:
    done = pretrain(home, tmp_path / "run", "--kernels", "triton")
    assert done.returncode == 2 and "llama2 pretrain: --kernels: triton: " in done.stderr.splitlines()[-1]
