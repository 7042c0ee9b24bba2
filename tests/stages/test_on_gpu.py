"""The commands on a CUDA device: the same training and the same text as on the CPU, and a resumed run bit for bit.

    python -m pytest -m gpu

LLAMA2_TEST_DEVICE=cpu tries the tests themselves where there is no such device.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama2cli import cli

DEVICE = os.environ.get("LLAMA2_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
TEXTS = [f"the {('red', 'green', 'blue')[i % 3]} fox saw {i} of {i * 7 % 31} lazy dogs" for i in range(800)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, a tokenizer and a token folder."""
    home = tmp_path_factory.mktemp("gpu")
    (home / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    run("tokenize", "--train", "--vocab-size", "400", "-o", f"{home}/tok.model", f"{home}/d.jsonl")
    run("tokenize", "--tokenizer", f"{home}/tok.model", "-o", f"{home}/toks", f"{home}/d.jsonl")
    return home


def run(*args: str) -> None:
    assert cli.invoke([*args, "--quiet"]) == 0, args


def train(home: Path, out: str, *more: str) -> list[dict[str, float]]:
    """Train a small model for 12 steps; the metrics by step."""
    fixed = ["--preset", "1m", "--tokenizer", f"{home}/tok.model", "--context", "64", "--batch-size", "1024"]
    data = ["--data", f"x={home}/toks:1", "--steps", "12", "--save-every", "4", "--heldout", "0.1"]
    run("pretrain", *fixed, *data, "-o", f"{home}/{out}", *more)
    return [json.loads(line) for line in (home / out / "metrics.jsonl").read_text().splitlines()]


def test_training_follows_the_cpu(home: Path) -> None:
    """fp32 on the device gives the losses of the CPU; bf16 stays near them."""
    cpu = train(home, "cpu", "--device", "cpu", "--dtype", "fp32")
    here = train(home, "fp32", "--device", DEVICE, "--dtype", "fp32")
    rough = train(home, "bf16", "--device", DEVICE, "--dtype", "bf16")
    assert [m["loss"] for m in here] == pytest.approx([m["loss"] for m in cpu], rel=1e-4)
    assert [m["loss"] for m in rough] == pytest.approx([m["loss"] for m in cpu], rel=2e-2)
    assert here[-1]["heldout_loss"] == pytest.approx(cpu[-1]["heldout_loss"], rel=1e-4)


@pytest.mark.parametrize("more", [[], ["--activation-checkpointing"], ["--dtype", "fp32"]])
def test_a_resumed_run_is_the_same(home: Path, more: list[str]) -> None:
    """A run that lost its last steps ends with the same bytes."""
    name = f"resumed{len(more)}{more[-1] if more else ''}"
    train(home, name, "--device", DEVICE, *more)
    last = home / name / "step-000012"
    whole = load_file(last / "model.safetensors")
    last.rename(home / f"{name}-old")
    (home / name / "latest").write_text("step-000008\n")
    train(home, name, "--device", DEVICE, "--resume", *more)
    again = load_file(last / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_greedy_text_is_that_of_the_cpu(home: Path) -> None:
    """fp32, temperature 0: the same continuations from the device."""
    train(home, "text", "--device", "cpu", "--dtype", "fp32")
    (home / "p.jsonl").write_text("".join(json.dumps({"text": t[:12]}) + "\n" for t in TEXTS[:8]))
    answers = []
    for device in ("cpu", DEVICE):
        out = home / f"{device}-{len(answers)}.jsonl"
        fixed = ["--model", f"{home}/text", "--max-new-tokens", "24", "--temperature", "0", "--dtype", "fp32"]
        run("generate", *fixed, "--device", device, "-o", str(out), f"{home}/p.jsonl")
        answers.append([json.loads(line)["completion"] for line in out.read_text().splitlines()])
    assert answers[0] == answers[1]


def test_compiled_layers(home: Path) -> None:
    """--compile gives the losses of the same run without it."""
    plain = train(home, "plain", "--device", DEVICE, "--dtype", "fp32")
    compiled = train(home, "compiled", "--device", DEVICE, "--dtype", "fp32", "--compile")
    assert [m["loss"] for m in compiled] == pytest.approx([m["loss"] for m in plain], rel=1e-4)
