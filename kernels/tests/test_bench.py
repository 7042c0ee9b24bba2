"""The bench itself: every form runs and agrees, records are right, and a machine without a GPU is told so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from llama2_kernels import bench, liger, registry

SHAPE = (48, 40, 2, 1)


def clock(prepare: Callable[[], object], work: Callable[[Any], object]) -> list[float]:
    """Works, and says that it took 10, 20, ..., 50 us."""
    work(prepare())
    return [10.0 * n for n in range(1, 6)]


@pytest.fixture
def works(device: str) -> dict[str, bench.Work]:
    return {work.op: work for work in bench.works("tiny", 6, device, SHAPE, 50)}


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "swiglu", "rope", "linear_cross_entropy"])
def test_every_form_agrees(works: dict[str, bench.Work], op: str) -> None:
    records = list(bench.measure(works[op], clock, 1e12, 1 << 12, rows=("eager", "torch", "ours")))
    wanted = ["eager", "eager", "torch", "torch", "ours", "ours"] if op != "rope" else ["eager"] * 2 + ["ours"] * 2
    assert [r["row"] for r in records] == wanted, records
    for r in records:
        assert (r["us"], r["distance"] < bench.CLOSE) == (30.0, True)
        assert r["pass"] in ("forward", "backward") and (r["row"] != "eager" or r["distance"] == 0)


def test_share_of_the_copy(works: dict[str, bench.Work]) -> None:
    forward, backward = bench.measure(works["rms_norm"], clock, 1e9, 1, rows=["eager"])
    assert (forward["bytes"], backward["bytes"]) == (6 * 48 * 4, 6 * 48 * 6)  # x in, y out; x and dy in, dx out
    assert forward["gb_per_s"] == pytest.approx(6 * 48 * 4 / 30e-6 / 1e9, abs=0.06)
    assert forward["share_of_copy"] == pytest.approx(6 * 48 * 4 / 30e-6 / 1e9, abs=1e-3)
    assert bench.copy_bandwidth(clock, "cpu", 3000) == pytest.approx(2 * 3000 / 30e-6)


def test_what_does_not_agree_or_cannot_run_is_left_out(works: dict[str, bench.Work]) -> None:
    work = works["swiglu"]
    work.forms["torch"] = lambda x: work.forms["eager"](x) * 1.1
    work.forms["ours"] = lambda x: 1 // 0
    torch_row, liger_row, our_row = bench.measure(work, clock, 1e12, 1, rows=("torch", "liger", "ours"))
    assert "from the eager result" in torch_row["left_out"] and "us" not in torch_row
    assert "ZeroDivisionError" in our_row["left_out"]
    if liger.version() is None:
        assert liger_row["left_out"] == "liger-kernel is not installed"


def test_inputs_rotate_beyond_the_cache(works: dict[str, bench.Work]) -> None:
    made = []
    work = bench.Work("x", "tiny", lambda: made.append(torch.ones(64, requires_grad=True)) or (made[-1],), {}, 1, 1)
    work.forms["eager"] = lambda x: x * 2
    list(bench.measure(work, clock, 1.0, 1000, rows=["eager"]))
    assert sum(x.nbytes for x in made) >= 4 * 1000


def test_table() -> None:
    about = {"op": "rope", "model": "7b", "pass": "forward"}
    records = [
        {"device": "a"},
        about | {"row": "ours", "us": 70.4, "share_of_copy": 0.912, "peak_bytes": 2_500_000},
        about | {"row": "eager", "us": 1234.0},
        {"op": "rope", "model": "7b", "row": "liger", "left_out": "why"},
    ]
    head, _, line = bench.table(records)
    assert head == "| operator | model | pass | eager | ours |"
    assert line == "| rope | 7b | forward | 1,234 us | 70 us, 91%, 2 MB |"


@pytest.mark.skipif(not registry.INTERPRET, reason="there is a device")
def test_without_a_device(compiler_env: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llama2_kernels.bench"], env=compiler_env, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "CUDA device" in done.stderr
