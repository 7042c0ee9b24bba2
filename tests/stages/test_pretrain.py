"""`llama2 pretrain`: the numbers against transformers and torch, resuming to the bit, two ranks, what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import resume_harness as harness
import tiny

from llama2cli import cli

ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("pretrain"))


@pytest.fixture(scope="module")
def server() -> Iterator[harness.Server]:
    with harness.server("pretrain") as it:
        yield it


@pytest.fixture(scope="module")
def args(corpus: Path) -> list[str]:
    """A run of 20 steps: two weighted sources, 6 rows in micro-batches of 4 and 2, held-out text."""
    line = f"""pretrain --preset {corpus}/model.json --tokenizer {corpus}/tok.model --seed 7 --quiet
        --data a={corpus}/a:2 --data b={corpus}/b:1 --heldout 0.1
        --batch-size 96 --micro-batch 4 --steps 20 --save-every 3"""
    return line.split()


def changed(args: list[str], **values: object) -> list[str]:
    """The same command line with other values of some flags."""
    out = list(args)
    for name, value in values.items():
        long = "--" + name.replace("_", "-")
        if long in out:
            out[out.index(long) + 1] = str(value)
        else:
            out += [long, str(value)]
    return out


@pytest.fixture(scope="module")
def run(server: harness.Server, args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, finished."""
    folder = tmp_path_factory.mktemp("run")
    return harness.reference(server, args, folder)[0]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def fails(capsys: pytest.CaptureFixture[str], args: list[object]) -> tuple[int, str]:
    """The exit code and the one line of a command that fails."""
    code = cli.invoke([str(a) for a in args])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("llama2 pretrain: "), (out, err)
    return code, err


# --- what a run leaves --------------------------------------------------------------------------------------------


def test_one_record_and_a_run_folder(run: Path) -> None:
    record = json.loads(run.with_suffix(".log.out").read_text())
    last = metrics(run)[-1]
    assert record == {
        "checkpoint": f"{run}/step-000020",
        **{k: last[k] for k in ("step", "loss", "heldout_loss", "tokens")},
    }
    assert record["step"] == 20 and record["tokens"] == 20 * 96
    steps = {f"step-{s:06d}" for s in (3, 6, 9, 12, 15, 18, 20)}
    files = {"settings.json", "metrics.jsonl", "timing.jsonl", "latest", "best", ".lock"}
    assert {p.name for p in run.iterdir()} == steps | files
    assert run.with_suffix(".log.err").read_text() == ""  # --quiet
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    assert [t["step"] for t in timing] == list(range(1, 21)) == [m["step"] for m in metrics(run)]
    assert {"seconds", "tokens_per_second", "mfu", "gpu_hours", "tco2"} < timing[0].keys()
    assert not {"seconds", "mfu"} & metrics(run)[0].keys()
    hours = timing[-1]["seconds"] / 3600
    assert timing[-1]["gpu_hours"] == pytest.approx(hours, abs=1e-6)
    assert timing[-1]["tco2"] == pytest.approx(hours * 100 * 1.1 * 0.385e-6, rel=1e-3)  # 100 W of an unknown CPU


def test_settings_say_everything_and_no_machine(run: Path, corpus: Path) -> None:
    text = (run / "settings.json").read_text()
    content = json.loads(text)
    assert content.keys() == {"settings", "resolved", "provenance"}
    assert content["settings"]["seed"] == 7 and content["resolved"]["warmup"] == 2
    assert content["provenance"]["kernels"] and content["provenance"]["threads"] == 1
    for file in ("settings.json", "step-000020/README.md", "step-000020/lineage.json"):
        text = (run / file).read_text()
        assert str(corpus) not in text.replace("../", "") and not any(w in text for w in ("/work", "202")), file
    card = (run / "step-000020/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "**pretrain**" in card and "heldout.a" in card


def test_settings_can_be_read_back(server: harness.Server, run: Path, tmp_path: Path) -> None:
    again = ["pretrain", "--config", run / "settings.json", "-o", tmp_path / "again"]
    assert server.run(again, tmp_path / "log") == 0
    harness.assert_same_run(tmp_path / "again", run)


def test_the_checkpoint_is_transformers_and_so_is_the_heldout_loss(run: Path, corpus: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from llama2cli.text.shards import TokenFolder
    from llama2cli.training import data

    model = AutoModelForCausalLM.from_pretrained(run / "step-000020")
    assert model.config.max_position_embeddings == 16
    for name in "ab":
        held = data.split(name, TokenFolder.open(corpus / name), 0.1)[1]
        ids = torch.from_numpy(held.read(0, held.n_tokens))
        nll = 0.0
        with torch.no_grad():
            for i in range(0, len(ids) - 1, 16):
                window = ids[i : i + 17]
                logits = model(window[None, :-1]).logits[0].double()
                nll -= float(logits.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]].sum())
        assert metrics(run)[-1]["heldout"][name]["loss"] == pytest.approx(nll / (len(ids) - 1), rel=1e-5)


def test_the_loss_curve_is_that_of_transformers_and_torch(run: Path, corpus: Path) -> None:
    """The same rows through transformers' model, torch's AdamW and clipping, and the paper's schedule by hand."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama2cli.nn.checkpoint import state_to_hf
    from llama2cli.nn.config import read_config
    from llama2cli.nn.model import Llama
    from llama2cli.text.shards import TokenFolder
    from llama2cli.training import data

    ours = Llama(config := read_config(corpus / "model.json"))
    ours.init_weights(7)
    shape = {k: v for k, v in tiny.SHAPE.items() if k not in ("architectures", "model_type")}
    theirs = LlamaForCausalLM(LlamaConfig(**shape | {"vocab_size": config.vocab_size}))
    theirs.load_state_dict(state_to_hf(dict(ours.named_parameters()), config))

    streams = [data.split(n, TokenFolder.open(corpus / n), 0.1)[0] for n in "ab"]
    rows = data.batches(data.sources(streams, [2.0, 1.0], 16), 7, data.Shape(6, 6))
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    gains = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-5)
    peak = json.loads((run / "settings.json").read_text())["resolved"]["lr"]
    for line in metrics(run):
        batch, _ = next(rows)
        step, [micro] = line["step"], batch.micro
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 18)) / 2
        lr = peak * (step / 2 if step <= 2 else cosine)
        logits = theirs(micro["ids_BT"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), micro["targets_BT"].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert line["lr"] == pytest.approx(lr, rel=1e-9)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert metrics(run)[-1]["loss"] < metrics(run)[0]["loss"] - 0.5


# --- resuming -----------------------------------------------------------------------------------------------------


def test_killed_five_times(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    assert harness.check_kills(server, args, tmp_path, kills=5)["kills"] == 5


def test_resumed_at_every_step(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    harness.check_every_step(server, changed(args, save_every=1), tmp_path, steps=20)


def test_killed_at_file_operations(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    few = changed(args, steps=3, save_every=1, keep=1)
    assert harness.check_crash_points(server, few, tmp_path, first=5, every=37) >= 5


@pytest.mark.slow
def test_killed_fifty_times(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    assert harness.check_kills(server, args, tmp_path, kills=50, seed=1)["kills"] == 50


@pytest.mark.slow
def test_killed_at_every_file_operation(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    assert harness.check_crash_points(server, changed(args, steps=3, save_every=1, keep=1), tmp_path) > 100


def test_rounded_weights_resume_exactly(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    from safetensors import safe_open

    few = changed(args, steps=4, save_every=1, save_dtype="bf16")
    harness.check_every_step(server, few, tmp_path, steps=4)
    with safe_open(tmp_path / "reference/step-000004/model.safetensors", "pt") as f:
        assert {str(f.get_tensor(k).dtype) for k in f.keys()} == {"torch.bfloat16"}  # noqa: SIM118


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves(
    server: harness.Server, args: list[str], run: Path, tmp_path: Path, number: signal.Signals
) -> None:
    stopped = tmp_path / "run"
    pid = server.start([*args, "-o", stopped], tmp_path / "log")
    while not (stopped / "metrics.jsonl").exists() or not (stopped / "metrics.jsonl").read_bytes():
        time.sleep(0.002)
    os.kill(pid, number)
    assert server.wait() == 130
    done = metrics(stopped)[-1]["step"]
    assert 1 <= done < 20
    assert (stopped / "latest").read_text() == f"step-{done:06d}\n"
    said = (tmp_path / "log.err").read_text()
    assert said == f"llama2 pretrain: stopped by a signal, saved step {done}; the same command with --resume goes on\n"
    harness.finish(server, args, stopped)
    harness.assert_same_run(stopped, run)


def test_a_finished_run_prints_its_record_again(
    server: harness.Server, args: list[str], run: Path, tmp_path: Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert server.run([*args, "-o", run, "--resume"], tmp_path / "log") == 0
    assert (tmp_path / "log.out").read_text() == run.with_suffix(".log.out").read_text()
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_more_steps_go_on(server: harness.Server, args: list[str], run: Path, tmp_path: Path) -> None:
    longer = tmp_path / "run"
    shutil.copytree(run, longer)
    more = [a for a in changed(args, steps=24) if a != "--quiet"]
    assert server.run([*more, "-o", longer, "--resume"], tmp_path / "log") == 0
    assert "--steps was 20" in (tmp_path / "log.err").read_text()
    assert metrics(longer)[:20] == metrics(run) and metrics(longer)[-1]["step"] == 24
    assert metrics(longer)[-1]["lr"] == pytest.approx(0.1 * max(m["lr"] for m in metrics(longer)), rel=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "--seed: the run has 7, now it would be 8"),
        ({"batch_size": 64}, "--batch-size: the run has 96, now it would be 64"),
        ({"micro_batch": 3}, "--micro-batch"),
        ({"context": 8}, "--context: the run has 16"),
        ({"heldout": 0.2}, "--heldout: heldout.fraction: the run has 0.1, now it would be 0.2"),
        ({"lr": 0.1}, "--lr"),
        ({"warmup": 5}, "--warmup"),
        ({"clip": 2.0}, "--clip"),
        ({"dtype": "bf16"}, "--dtype"),
        ({"kernels": "plain"}, "--kernels"),
        ({"steps": 10}, "--steps: the run has done 20 steps already"),
    ],
)
def test_other_settings_are_refused(
    args: list[str], run: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    code, err = fails(capsys, [*changed(args, **change), "-o", run, "--resume"])
    assert code == 2 and message in err and str(run) in err


def test_other_data_are_refused(
    args: list[str], corpus: Path, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    swapped = [a.replace("a=", "c=").replace("b=", "a=").replace("c=", "b=") for a in args]
    code, err = fails(capsys, [*swapped, "-o", run, "--resume"])
    assert code == 2 and "data[0].name: the run has a, now it would be b" in err
    shutil.copytree(corpus / "a", tmp_path / "moved")
    moved = [a.replace(f"{corpus}/a", f"{tmp_path}/moved") for a in args]
    assert cli.invoke([*moved, "-o", str(run), "--resume"]) == 0  # the same data elsewhere are the same data


def test_what_is_kept_may_change(server: harness.Server, args: list[str], run: Path, tmp_path: Path) -> None:
    early = tmp_path / "run"
    shutil.copytree(run, early)
    (early / "latest").write_text("step-000009\n")
    assert server.run([*changed(args, save_every=5, keep=1), "-o", early, "--resume"], tmp_path / "log") == 0
    assert [p.name for p in early.glob("step-*")] == ["step-000020"]
    assert harness.tensors(early / "step-000020") == harness.tensors(run / "step-000020")


# --- several processes --------------------------------------------------------------------------------------------


def torchrun(arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    return harness.torchrun(arguments, ENV)


def test_two_ranks_train_as_one_does(args: list[str], run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    two = tmp_path / "two"
    done = torchrun([*args, "-o", two])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and json.loads(done.stdout)["step"] == 20
    for ours, theirs in zip(metrics(two), metrics(run), strict=True):
        for key in ("loss", "grad_norm", "heldout_loss"):
            assert (key in ours) == (key in theirs)
            assert abs(ours.get(key, 0) - theirs.get(key, 0)) < 1e-5
        assert ours["epochs"] == theirs["epochs"]
    step = two / "step-000020"
    assert {p.name for p in (step / "trainer").iterdir()} == {f"rank-0000{r}.safetensors" for r in (0, 1)} | {
        "state.json"
    }
    assert sorted(p.name for p in step.iterdir()) == sorted(p.name for p in (run / step.name).iterdir())
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f / step.name).state_dict() for f in (two, run))
    assert all(float((ours[k] - theirs[k]).abs().max()) < 1e-5 for k in theirs)

    (two / "latest").write_text("step-000012\n")
    before = (metrics(two), harness.tensors(step))
    done = torchrun([*args, "-o", two, "--resume"])
    assert done.returncode == 0, done.stderr
    assert (metrics(two), harness.tensors(step)) == before


def test_another_number_of_ranks_is_refused(
    args: list[str], run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    two = tmp_path / "two"
    shutil.copytree(run, two)
    (two / "latest").write_text("step-000009\n")
    state = two / "step-000009/trainer/state.json"
    state.write_text(state.read_text().replace('"ranks": 1', '"ranks": 2'))
    code, err = fails(capsys, [*args, "-o", two, "--resume"])
    assert code == 2 and "has 2 processes, now there are 1; resume it with torchrun --nproc-per-node 2" in err


# --- where training starts ----------------------------------------------------------------------------------------


def test_init_goes_on_with_a_longer_context(
    server: harness.Server, args: list[str], run: Path, corpus: Path, tmp_path: Path
) -> None:
    at = args.index("--preset")
    more = changed([*args[:at], *args[at + 2 :]], init=run, context=32, steps=2, lr=1e-4)
    at = more.index("--tokenizer")
    more = [*more[:at], *more[at + 2 :]]  # the checkpoint has one
    assert server.run([*more, "-o", tmp_path / "more"], tmp_path / "log") == 0, (tmp_path / "log.err").read_text()
    config = json.loads((tmp_path / "more/step-000002/config.json").read_text())
    assert config["max_position_embeddings"] == 32
    assert metrics(tmp_path / "more")[0]["loss"] < metrics(run)[0]["loss"] - 0.5
    lineage = json.loads((tmp_path / "more/step-000002/lineage.json").read_text())["stages"]
    assert [s["stage"] for s in lineage] == ["pretrain", "pretrain"]
    assert lineage[0]["metrics"] == metrics(run)[-1]


def test_stdin(server: harness.Server, args: list[str], corpus: Path, tmp_path: Path) -> None:
    from llama2cli.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(corpus / "tok.model")
    lines = "".join(json.dumps({"ids": tokenizer.encode(t)}) + "\n" for t in tiny.documents(25))
    flags = f"""--preset {corpus}/model.json --tokenizer {corpus}/tok.model --batch-size 96 --steps 10
        --heldout v={corpus}/b --seed 7""".split()
    command = [sys.executable, "-m", "llama2cli", "pretrain", "-", *flags, "-o", str(tmp_path / "run"), "--resume"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 0, done.stderr
    flat = [i for t in tiny.documents(25) for i in (1, *tokenizer.encode(t), 2)]
    steps = (len(flat) - 1) // 96
    assert 3 < steps < 10 and json.loads(done.stdout)["step"] == steps
    assert f"the data ended after {steps} of 10 steps" in done.stderr
    other = [*command[3:-2], str(tmp_path / "few"), "--resume"]
    assert server.run(other, tmp_path / "log") == 1  # its stdin is empty
    assert "the data ended before the first step" in (tmp_path / "log.err").read_text()
    bad = '{"ids": [5]}\n{"ids": [5, 300]}\n'
    done = subprocess.run([*command[:3], *other], input=bad, capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 1 and "stdin:2:ids: id 300 is outside the vocabulary" in done.stderr
    again = subprocess.run(command, input=lines, capture_output=True, text=True, env=ENV, check=False)
    assert again.returncode == 2 and "data from stdin cannot be continued" in again.stderr


def test_switches_of_the_arithmetic(server: harness.Server, args: list[str], run: Path, tmp_path: Path) -> None:
    few = changed(args, steps=3)
    for name, flags in (("check", ["--activation-checkpointing"]), ("bf16", ["--dtype", "bf16"])):
        assert server.run([*few, *flags, "-o", tmp_path / name], tmp_path / "log") == 0, name
    assert server.run([*few, "-o", tmp_path / "plain"], tmp_path / "log") == 0
    for name, tolerance in (("check", 1e-6), ("bf16", 0.05)):
        for ours, theirs in zip(metrics(tmp_path / name), metrics(tmp_path / "plain"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
    assert metrics(tmp_path / "bf16") != metrics(tmp_path / "plain")


@pytest.mark.slow
def test_compiled_layers_compute_the_same(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    few = changed(args, steps=3)
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        assert server.run([*few, *flags, "-o", tmp_path / name], tmp_path / "log") == 0, (
            tmp_path / "log.err"
        ).read_text()
    for ours, theirs in zip(metrics(tmp_path / "compiled"), metrics(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    wild = changed(args, lr=1e30, warmup=0, save_every=1)
    at = wild.index("--heldout")
    assert server.run([*wild[:at], *wild[at + 2 :], "-o", tmp_path / "run"], tmp_path / "log") == 1
    err = (tmp_path / "log.err").read_text()
    assert err.count("\n") == 1 and "stopped before the update" in err
    harness.assert_loadable(tmp_path / "run")
    saved = harness.tensors(tmp_path / "run" / (tmp_path / "run/latest").read_text().strip())
    assert all(np.isfinite(np.frombuffer(v, np.float32)).all() for t, _, v in saved.values() if t == "torch.float32")


def test_a_disk_that_fills_up(server: harness.Server, args: list[str], run: Path, tmp_path: Path) -> None:
    """The process may write no file above 40 kB, which ends a save as a full disk does."""
    import resource

    full = tmp_path / "run"
    shutil.copytree(run, full)
    (full / "latest").write_text("step-000006\n")
    command = [sys.executable, "-m", "llama2cli", *args, "-o", str(full), "--resume"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, preexec_fn=limit, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "File too large" in done.stderr, done.stderr
    assert (full / "latest").read_text() == "step-000006\n"
    harness.assert_loadable(full)
    harness.finish(server, args, full)
    harness.assert_same_run(full, run)


BAD = [
    (2, "give one of --preset SIZE (from scratch) and --init", "--data {c}/a"),
    (2, "give one of --preset SIZE (from scratch) and --init", "--data {c}/a --preset 1m --init {c}/run"),
    (2, "--tokenizer: needed with --preset", "--data {c}/a --preset 1m"),
    (2, "no data", "{p}"),
    (2, "fp16 is for inference only", "{p} --data {c}/a --dtype fp16"),
    (2, "give one of --steps and --epochs", "{p} --data {c}/a --steps 3 --epochs 1"),
    (2, "--warmup: 9 steps of warm-up in a run of 9", "{p} --data {c}/a --steps 9 --warmup 9"),
    (2, "--eval-every: there is nothing to measure", "{p} --data {c}/a --eval-every 3"),
    (2, 'source "b" has no weight', "{p} --data {c}/a:1 --data {c}/b"),
    (2, "a weight is a positive number", "{p} --data a={c}/a:-1"),
    (1, 'source "a" has 11', "{p} --data {c}/a --context 99999"),
    (1, "no such token folder; did you mean", "{p} --data {c}/aa"),
    (1, "is not a token folder", "{p} --data {c}/model.json"),
    (1, "is not a token folder", "{p} --data {c}"),
    (1, "no such tokenizer", "--preset 1m --tokenizer {c}/nope.model --data {c}/a"),
    (2, 'no size "2m"', "--preset 2m --tokenizer {c}/tok.model --data {c}/a"),
    (1, "they do not belong together", "--preset {c}/small.json --tokenizer {c}/tok.model --data {c}/a"),
    (1, "no such folder", "--init {c}/nope --data {c}/a"),
    (2, "a fraction is between 0 and 1", "{p} --data {c}/a --heldout 1.5"),
    (1, "no such token folder", "{p} --data {c}/a --heldout {c}/nope"),
    (2, "torch sees no CUDA device", "{p} --data {c}/a --device cuda"),
    (2, "the length of stdin is not known", "{p} -"),
    (2, "nothing can be set apart from stdin", "{p} - --steps 3 --heldout 0.1"),
    (2, "stdin cannot be mixed", "{p} - {c}/a --steps 3"),
    (2, "exists; --resume continues it", "{p} --data {c}/a --steps 1 -o {c}"),
    (2, "is no run folder", "{p} --data {c}/a --steps 1 -o {c} --resume"),
    (2, "expected at least 1, got 0", "{p} --data {c}/a --steps 0"),
]


@pytest.mark.parametrize(("code", "message", "line"), BAD, ids=[b[1] for b in BAD])
def test_misuse_is_one_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, message: str, line: str
) -> None:
    import torch

    if "CUDA" in message and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    (corpus / "small.json").write_text(json.dumps(tiny.SHAPE | {"vocab_size": 280}))
    preset = f"--preset {corpus}/model.json --tokenizer {corpus}/tok.model"
    words = line.format(c=corpus, p=preset).split()
    out = [] if "-o" in words else ["-o", str(tmp_path / "run")]
    got, err = fails(capsys, ["pretrain", *words, *out])
    assert (got, message in err) == (code, True), err
    assert not (tmp_path / "run").exists()


def test_stdin_under_torchrun_names_the_fix(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from llama2cli.errors import Misuse
    from llama2cli.stages import pretrain
    from llama2cli.training.dist import World

    settings = pretrain.Settings(files=["-"], out="x", preset="1m", tokenizer=str(corpus / "tok.model"), steps=3)
    with pytest.raises(
        Misuse, match=r"stdin reaches one process, and there are 2; write a folder \(llama2 tokenize -o"
    ):
        pretrain.prepare(settings, World(0, 2, torch.device("cpu")))


def test_dry_run_says_what_would_be(args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loud = [a for a in changed(args, batch_size=100) if a != "--quiet"]
    assert cli.invoke([*loud, "-o", str(tmp_path / "run"), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert not (tmp_path / "run").exists()
    assert told["resolved"]["batch_size"] == 96 and "--batch-size 100 is rounded to 96 tokens: 6 rows of 16" in err
    assert told["tokens"] == 20 * 96 and {d["name"] for d in told["resolved"]["data"]} == {"a", "b"}
    vocab, D, F = told["resolved"]["model"]["vocab_size"], 32, 64
    assert told["parameters"] == 2 * vocab * D + 2 * (2 * D * D + 2 * D * 16 + 3 * D * F + 2 * D) + D
    assert told["memory"]["total"] > 16 * told["parameters"] and "epochs" in err


def test_disk_needed_is_what_a_step_takes(
    args: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.invoke([*args, "-o", str(tmp_path / "run"), "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)["disk"]
    size = sum(p.stat().st_size for p in (run / "step-000020").rglob("*"))
    assert size < told["step"] < size + (2 << 20)


def test_an_epoch_is_the_default_length(args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = args.index("--steps")
    for flags, passes in (([], 1), (["--epochs", "3"], 3)):
        assert cli.invoke([*args[:at], *args[at + 2 :], *flags, "-o", str(tmp_path / "run"), "--dry-run"]) == 0
        told = json.loads(capsys.readouterr().out)["resolved"]
        whole, held = (sum(d["tokens"] for d in part) for part in (told["data"], told["heldout"]["sources"]))
        assert told["steps"] == pytest.approx(passes * (whole - held) / 96, abs=1)
