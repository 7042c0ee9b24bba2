"""`llama2 ppo`: what a run leaves, resuming to the bit, signals, early stopping, alarms, memory, several processes.

Its numbers are derived a second time in test_ppo_numbers.py.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import ppo_kit
import ranks
import resume_harness as harness
from ppo_kit import given, line, metrics

from llama2cli import cli, console
from llama2cli.training.answers import Answers

ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
HELD = {"heldout": "0.3", "eval_every": 1, "patience": 0}
RUNNING = {"whiten": "running", "save_dtype": "bf16"}


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ppo_kit.write(tmp_path_factory.mktemp("ppo") / "kit")


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """A command takes the fast forms of this machine; other tests find what was there before."""
    from llama2cli.nn import ops

    before = ops.choices()
    yield
    ops.restore(before)


@pytest.fixture(scope="module")
def server() -> Iterator[harness.Server]:
    with harness.server("ppo") as it:
        yield it


def args(kit: Path, **changes: Any) -> list[str]:
    """A command line without -o."""
    return [*line(given(kit, **changes)), "--quiet", "--peak", "1"]


def train(run: Path, arguments: Sequence[object], *more: object) -> Path:
    """A run in this process."""
    assert cli.invoke([*map(str, [*arguments, *more]), "-o", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def run(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five iterations with all that is measured; ten prompts are trained on, six in a batch."""
    return train(tmp_path_factory.mktemp("run") / "run", args(kit, steps=5, judge=f"{kit}/judge", **HELD))


def fails(capsys: pytest.CaptureFixture[str], arguments: Sequence[object]) -> tuple[int, str]:
    """The exit code and the one line of a command that fails."""
    capsys.readouterr()
    code = cli.invoke([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("llama2 ppo: "), (out, err)
    return code, err


# --- what a run leaves --------------------------------------------------------------------------------------------


def test_one_record(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", args(kit))
    record, last = json.loads(capsys.readouterr().out), metrics(run)[-1]
    told = ("step", "reward", "help", "safe", "kl", "length", "truncated")
    assert record == {"checkpoint": f"{run}/step-000002", **{k: last[k] for k in told}}
    assert [m["step"] for m in metrics(run)] == [1, 2]
    assert not (run / "best").exists()
    timing = [json.loads(text) for text in (run / "timing.jsonl").read_text().splitlines()]
    assert all(t[f"{phase}_seconds"] > 0 for t in timing for phase in ("rollout", "scoring", "update"))


def test_held_out_figures_are_those_of_the_saved_answers(run: Path, kit: Path) -> None:
    """The answers lie in the step folder with their scores; the means of these are the metrics, and `score` gives the
    same ones."""
    for m in metrics(run)[1:]:
        folder = run / f"step-{m['step']:06d}"
        records = [json.loads(text) for text in (folder / "heldout.jsonl").read_text().splitlines()]
        assert len(records) == m["heldout"]["n"] == 3
        for name in ("reward", "help", "safe", "by_safety", "judge", "kl"):
            assert m["heldout"][name] == pytest.approx(sum(r[name] for r in records) / 3, rel=1e-9)
        assert m["heldout"]["length"] == sum(r["n_tokens"] for r in records) / 3
        assert m["heldout"]["cut"] == sum(r["truncated"] for r in records) / 3
        judged = torch.tensor([r["judge"] for r in records], dtype=torch.float64)
        assert m["heldout_loss"] == pytest.approx(-judged.mean().item(), rel=1e-9)
        assert m["heldout"]["judge_error"] == pytest.approx(judged.std().item() / math.sqrt(3), rel=1e-9)
    scored = run.parent / "scored.jsonl"
    asked = ["score", "--rm-help", f"{kit}/rm-help", "--rm-safe", f"{kit}/rm-safe", "--logits", "--quiet"]
    assert cli.invoke([*asked, "-o", str(scored), str(folder / "heldout.jsonl")]) == 0
    for ours, theirs in zip(records, map(json.loads, scored.read_text().splitlines()), strict=True):
        for name in ("help", "safe", "reward"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6)


def test_a_reward_model_of_another_tokenizer(kit: Path, tmp_path: Path) -> None:
    """Reads the text of the answers with its own: `score` gives the same numbers."""
    import dataclasses

    from llama2cli.nn import checkpoint
    from llama2cli.nn.model import Llama
    from llama2cli.text.tokenizer import Tokenizer
    from llama2cli.text.tokenizer import train as train_tokenizer

    (tmp_path / "tok.model").write_bytes(train_tokenizer(["the bear near a house saw a fox"] * 50, 290))
    tokenizer = Tokenizer.load(tmp_path / "tok.model")
    config = dataclasses.replace(checkpoint.load_config(kit / "lm"), vocab_size=tokenizer.vocab_size)
    other = Llama(dataclasses.replace(config, max_position_embeddings=256), scorer=True)
    other.init_weights(5, std=0.1)
    (tmp_path / "rm").mkdir()
    checkpoint.save_model(tmp_path / "rm", other, tokenizer)
    run = train(tmp_path / "run", args(kit, rm_safe=tmp_path / "rm", **HELD))
    held = run / "step-000002/heldout.jsonl"
    asked = ["score", "--rm-help", f"{kit}/rm-help", "--rm-safe", f"{tmp_path}/rm", "--quiet"]
    assert cli.invoke([*asked, "-o", str(tmp_path / "scored.jsonl"), str(held)]) == 0
    texts = (held.read_text(), (tmp_path / "scored.jsonl").read_text())
    for ours, theirs in zip(*(map(json.loads, text.splitlines()) for text in texts), strict=True):
        assert [ours[k] for k in ("help", "safe", "reward")] == pytest.approx(
            [theirs[k] for k in ("help", "safe", "reward")], rel=1e-5
        )


def test_half_precision_begins_near(kit: Path, tmp_path: Path) -> None:
    """The same first answers, rewards that differ by rounding, a KL of nearly 0."""
    plain = metrics(train(tmp_path / "plain", args(kit, steps=1)))[0]
    for name in ("bf16", "fp16"):
        found = metrics(train(tmp_path / name, args(kit, steps=1, frozen_dtype=name)))[0]
        assert found["length"] == plain["length"] and abs(found["kl"]) < 0.1
        assert found["reward"] == pytest.approx(plain["reward"], abs=0.1) and found["reward"] != plain["reward"]
    mixed = metrics(train(tmp_path / "mixed", args(kit, steps=1, dtype="bf16")))[0]
    assert mixed["entropy"] == pytest.approx(plain["entropy"], rel=0.2)  # some answers are others
    assert mixed["ratio_gap"] < 1e-3  # probabilities before the first update come from a forward pass like its own


def test_tags_in_an_answer_are_told(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llama2cli.stages.ppo import rollout

    monkeypatch.setattr(rollout, "answer_text", lambda result, tokenizer, tags: ("fox (INST)", 1))
    mine = args(kit, steps=1)
    mine.remove("--quiet")
    train(tmp_path / "run", mine)
    err = capsys.readouterr().err
    assert "its answer holds tags of the chat format; they are escaped" in err
    assert "6 times: answers with tags of the chat format" in err


def test_no_prompt_is_on_both_sides(run: Path) -> None:
    resolved = json.loads((run / "settings.json").read_text())["resolved"]
    assert [p["examples"] for p in resolved["prompts"] + resolved["heldout"]] == [10, 3]
    assert metrics(run)[-1]["seen"] == 30  # three epochs


def test_the_trained_policy_is_a_checkpoint_for_all(run: Path, kit: Path, tmp_path: Path) -> None:
    """transformers answers greedily as we do; the value model is a reward model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from llama2cli.nn import checkpoint

    out = tmp_path / "out.jsonl"
    asked = ["generate", "--model", run, "--max-new-tokens", 8, "--temperature", 0, "--dtype", "fp32", "--quiet"]
    assert cli.invoke([*map(str, asked), "-o", str(out), f"{kit}/prompts.jsonl"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(run / "step-000005", dtype=torch.float32)
    import test_ppo_numbers as numbers

    for record in map(json.loads, out.read_text().splitlines()):
        ids = numbers.encoded(kit, record["messages"][:-1], None)
        found = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert numbers.text_of(kit, found[0, len(ids) :].tolist()) == record["messages"][-1]["content"].strip()
    value = AutoModelForSequenceClassification.from_pretrained(run / "step-000005/value", dtype=torch.float32)
    ours = checkpoint.load_model(run / "step-000005/value", scorer=True)
    ids = torch.tensor([[1, 5, 9, 14, 2]])
    with torch.no_grad():
        assert float(value(input_ids=ids).logits) == pytest.approx(float(ours.scores(ours(ids))[0, -1]), abs=1e-5)


def test_stages_go_on_from_a_run(run: Path, kit: Path, tmp_path: Path) -> None:
    """sft from a run of ppo, ppo from that, scored by the value model of the first; the card names all of them."""
    from llama2cli.text.folders import resolve_model
    from llama2cli.training import card

    chat = ppo_kit.write_lines(
        tmp_path / "chat.jsonl",
        [{"messages": [*ppo_kit.prompt(1)["messages"], {"role": "assistant", "content": "one fox"}]}] * 2,
    )
    tuned = ["sft", "--init", run, "--data", chat, "--steps", 1, "--batch-size", 2, "--quiet", "--peak", 1]
    train(tmp_path / "sft", tuned)
    value = run / "step-000005/value"
    again = train(tmp_path / "ppo", args(kit, policy=tmp_path / "sft", steps=1, rm_safe=value, value_init=value))
    stages = [entry["stage"] for entry in card.lineage_of(resolve_model(str(again)))]
    assert stages == ["checkpoint", "ppo", "sft", "ppo"]
    text = (again / "step-000001/README.md").read_text()
    assert "iterations of PPO (6 answers)" in text and "text-generation" in text


def test_what_is_no_reward_model_is_refused_before_there_is_a_run(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--dry-run"]):
        code, err = fails(capsys, [*args(kit, rm_safe=f"{kit}/lm"), *more, "-o", tmp_path / "run"])
        assert code == 1 and "lm/config.json" in err and not (tmp_path / "run").exists()


def test_prompts_must_come_from_somewhere(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file and no pipe; a pipe for several processes."""
    from llama2cli.errors import Misuse
    from llama2cli.training.examples import parse_sources

    monkeypatch.setattr(sys, "stdin", None)
    code, err = fails(capsys, [*args(kit, prompts=[]), "-o", tmp_path / "run"])
    assert code == 2 and "--prompts: no data" in err
    with pytest.raises(Misuse, match="stdin reaches one process, and there are 2"):
        parse_sources(["-"], 2, "--prompts")


# --- prompts ------------------------------------------------------------------------------------------------------


def rolled(kit: Path, n: int, **changes: Any) -> tuple[Any, Any]:
    """(the job, its first n answers)."""
    from llama2cli.stages import ppo
    from llama2cli.stages.ppo.job import prepare
    from llama2cli.stages.ppo.roles import load
    from llama2cli.stages.ppo.rollout import roll_out
    from llama2cli.training.dist import World
    from llama2cli.training.signals import Stop

    job = prepare(ppo.Settings(**given(kit, out="run", **changes)), World(0, 1, torch.device("cpu")))
    chosen = [i % len(job.prompts.ids) for i in range(n)]
    return job, roll_out(job, load(job, None), chosen, range(n), {}, Stop())


def test_a_prompt_that_comes_again_is_answered_anew(kit: Path, tmp_path: Path) -> None:
    """Every answer of a run takes random numbers of its own; so do runs of other seeds."""
    one = ppo_kit.write_lines(tmp_path / "one.jsonl", [ppo_kit.prompt(1)])
    _, found = rolled(kit, 12, prompts=[str(one)], rm_safe=None)
    assert len(set(found.texts)) > 6
    _, other = rolled(kit, 12, prompts=[str(one)], rm_safe=None, seed=8)
    assert found.texts != other.texts
    ids = [m["seen"] for m in metrics(train(tmp_path / "run", args(kit, prompts=str(one), steps=3, lr=0)))]
    told = [m["reward"] for m in metrics(tmp_path / "run")]
    assert ids == [6, 12, 18] and len(set(told)) == 3  # the same policy, the same prompt


def test_a_system_prompt_where_there_is_no_other(kit: Path, tmp_path: Path) -> None:
    """--system is what a system message of the record is: to the policy and to the reward models."""
    records = [ppo_kit.prompt(i) for i in range(6)]
    for record in records:
        if record["messages"][0]["role"] != "system":
            record["messages"].insert(0, {"role": "system", "content": "be bold"})
    written = ppo_kit.write_lines(tmp_path / "prompts.jsonl", records)
    plain = ppo_kit.write_lines(tmp_path / "plain.jsonl", [ppo_kit.prompt(i) for i in range(6)])
    (_, one), (_, two) = (
        rolled(kit, 6, prompts=[str(written)]),
        rolled(kit, 6, prompts=[str(plain)], system="be bold"),
    )
    assert one.answers.prompts == two.answers.prompts and one.texts == two.texts
    assert all(torch.equal(one.table[k], two.table[k]) for k in one.table)


def test_lines_of_text_are_prompts(kit: Path, tmp_path: Path) -> None:
    texts = [f"what did {w} see?" for w in ("fox", "wolf", "bear")]
    (tmp_path / "prompts.txt").write_text("".join(t + "\n" for t in texts))
    written = ppo_kit.write_lines(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": t}]} for t in texts])
    (_, one), (_, two) = (
        rolled(kit, 3, prompts=[str(tmp_path / "prompts.txt")], text=True),
        rolled(kit, 3, prompts=[str(written)]),
    )
    assert one.answers.prompts == two.answers.prompts and one.texts == two.texts


def test_answers_end_with_the_context(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is shorter than --max-new-tokens allows, they are cut; prompts that fill it are left out, and told."""
    capsys.readouterr()
    job, found = rolled(kit, 13, context=45, skip_long=True, max_new_tokens=60)
    sizes = [len(p) + len(a) for p, a in zip(found.answers.prompts, found.answers.answers)]
    cut = found.table["cut"].tolist()
    assert max(sizes) == 45 and len(job.prompts.ids) < 13
    for size, was_cut, answer in zip(sizes, cut, found.answers.answers):
        assert was_cut == (answer[-1] != 2) and (size == 45 or len(answer) == 60 or not was_cut)
    assert "left out" in capsys.readouterr().err


def test_sources_are_read_by_their_weight(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ppo_kit.write_lines(tmp_path / "few.jsonl", [ppo_kit.prompt(i) for i in range(20, 24)])
    sources = [f"a={kit}/prompts.jsonl:0.5", f"b={few}:3"]
    told = dry(capsys, args(kit, prompts=sources))["resolved"]["prompts"]
    assert [(p["name"], p["examples"], p["weight"]) for p in told] == [("a", 13, 0.5), ("b", 4, 3.0)]


# --- resuming -----------------------------------------------------------------------------------------------------


def test_killed_three_times(server: harness.Server, kit: Path, tmp_path: Path) -> None:
    every = args(kit, steps=4, judge=f"{kit}/judge", **HELD | {"eval_every": 2, "patience": 9})
    assert harness.check_kills(server, every, tmp_path, kills=3)["kills"] == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"value": "head", **RUNNING},
        {**RUNNING, "kl": "exact", "heldout": "0.3", "eval_every": 2, "patience": 3},
    ],
    ids=["head", "separate"],
)
def test_resumed_at_every_step(server: harness.Server, kit: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Weights rounded in the checkpoint, statistics of all batches, prompts over several epochs."""
    harness.check_every_step(server, args(kit, steps=3, **changes), tmp_path, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["separate", "head"])
def test_killed_at_every_file_operation(server: harness.Server, kit: Path, tmp_path: Path, value: str) -> None:
    few = args(kit, steps=2, keep=1, value=value, judge=f"{kit}/judge", **HELD)
    assert harness.check_crash_points(server, few, tmp_path) > 60


@pytest.mark.slow
@pytest.mark.parametrize("value", ["separate", "head"])
def test_killed_thirty_times(server: harness.Server, kit: Path, tmp_path: Path, value: str) -> None:
    every = args(kit, steps=6, value=value, judge=f"{kit}/judge", **RUNNING, **HELD | {"eval_every": 2, "patience": 9})
    assert harness.check_kills(server, every, tmp_path, kills=30, seed=1)["kills"] == 30


def test_resumed_with_the_kernels_of_the_run(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that would choose other forms of the operations goes on with those of the run."""
    from llama2cli.nn import choice, ops

    plain = train(tmp_path / "plain", args(kit))
    taken = ops.choices()["picks"]
    stopped = tmp_path / "stopped"
    shutil.copytree(plain, stopped)
    shutil.rmtree(stopped / "step-000002")
    (stopped / "latest").write_text("step-000001\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    choice.memory_file().parent.mkdir(parents=True)
    other = {k: "plain" if v == "fast" else "fast" for k, v in taken.items()}
    choice.memory_file().write_text(json.dumps(other))
    train(stopped, args(kit), "--resume")
    assert ops.choices()["picks"] == taken
    harness.assert_same_run(stopped, plain)


OTHER: list[tuple[dict[str, Any], str]] = [
    ({"beta": 0.02}, "--beta: the run has 0.01, now it would be 0.02"),
    ({"kl": "k3"}, "the run has k1, now it would be k3"),
    ({"value": "head"}, "the run has separate, now it would be head"),
    ({"temperature": 1.1}, "--temperature"),
    ({"seed": 8}, "--seed"),
    ({"batch_size": 7}, "--batch-size"),
    ({"heldout": "0.5"}, "--heldout: heldout[0].examples: the run has 3"),
    ({"rm_help": "{kit}/judge"}, "--rm-help"),
    ({"judge": "{kit}/rm-help"}, "--judge"),
    ({"value_init": "safe"}, "--value-init"),
    ({"value_score": "kept"}, "--value-score: the run has zero"),
    ({"system": "be rude"}, "--system"),
    ({"lam": 1.0}, "--lam"),
]


@pytest.mark.parametrize(("change", "message"), OTHER, ids=[next(iter(c)) for c, _ in OTHER])
def test_other_settings_are_refused(
    kit: Path, run: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    mine = {"steps": 5, "judge": f"{kit}/judge", **HELD}
    change = {k: v.format(kit=kit) if isinstance(v, str) else v for k, v in change.items()}
    code, err = fails(capsys, [*args(kit, **mine | change), "-o", run, "--resume"])
    assert code == 2 and message in err and str(run) in err


def test_a_tag_that_changed_is_another_run(
    kit: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts are compared by what is trained on: their ids, and whether they are unsafe."""
    mine: dict[str, Any] = {"steps": 5, "judge": f"{kit}/judge", **HELD}
    records = [ppo_kit.prompt(i) | {"category": "none"} for i in range(13)]
    same = ppo_kit.write_lines(tmp_path / "prompts.jsonl", records)
    assert cli.invoke([*args(kit, **mine | {"prompts": [str(same)]}), "-o", str(run), "--resume"]) == 0
    for i in range(13):
        records[i]["unsafe"] = True
    ppo_kit.write_lines(same, records)
    code, err = fails(capsys, [*args(kit, **mine | {"prompts": [str(same)]}), "-o", run, "--resume"])
    assert code == 2 and "heldout[0].sha256" in err


def test_a_longer_run_goes_on(kit: Path, tmp_path: Path) -> None:
    """--steps may grow: the rate is constant, so that the end is that of a run that was longer from the start."""
    whole = train(tmp_path / "whole", args(kit, steps=3))
    short = train(tmp_path / "short", args(kit, steps=2))
    train(short, args(kit, steps=3), "--resume")
    harness.assert_same_run(short, whole)


def test_stdin(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts from a pipe are those of a file, when the run goes on too."""
    plain = train(tmp_path / "plain", args(kit))
    piped, text = tmp_path / "piped", (kit / "prompts.jsonl").read_text()
    renamed = ppo_kit.write_lines(tmp_path / "stdin.jsonl", [json.loads(t) for t in text.splitlines()])
    plain = train(tmp_path / "named", args(kit, prompts=[str(renamed)]))
    for steps in (1, 2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        train(piped, args(kit, prompts=[], steps=steps), "-", "--resume")
    assert harness.tensors(piped / "step-000002") == harness.tensors(plain / "step-000002")


# --- signals ------------------------------------------------------------------------------------------------------


def at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """SIGTERM just before the n-th call of a function."""
    real, calls = getattr(owner, name), 0

    def wrapped(*a: Any, **k: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*a, **k)

    monkeypatch.setattr(owner, name, wrapped)


def owner_of(where: str) -> tuple[Any, str]:
    from llama2cli.sampling.engine import Engine
    from llama2cli.sampling.scoring import Scorer
    from llama2cli.training import optim
    from llama2cli.training.run import Run

    return {
        "rollout": (Engine, "generate"),
        "scoring": (Scorer, "score"),
        "update": (optim, "step"),
        "save": (Run, "save"),
    }[where]


@pytest.fixture(scope="module")
def left_alone(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three iterations, measured after each, saved at the end and where they are best."""
    return train(tmp_path_factory.mktemp("alone") / "run", args(kit, steps=3, save_every=9, **HELD))


@pytest.mark.parametrize(
    ("where", "call", "done"),
    [
        ("rollout", 1, 0),  # of the measurement before the first step
        ("rollout", 2, 0),
        ("rollout", 4, 1),
        ("rollout", 5, 2),  # of the measurement after step 2: the weights have moved already
        ("scoring", 7, 1),
        ("scoring", 9, 2),  # of that measurement
        ("update", 5, 2),
        ("update", 8, 2),
        ("save", 1, 1),
    ],
)
def test_a_signal_saves(
    kit: Path,
    left_alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    call: int,
    done: int,
) -> None:
    """Wherever it comes, exit code 130, what was done is saved, and the resumed run ends with the same bytes."""
    mine, run = args(kit, steps=3, save_every=9, **HELD), tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_call(patch, *owner_of(where), call)
        code, err = fails(capsys, [*mine, "-o", run])
    assert code == 130 and signal.getsignal(signal.SIGTERM) == before
    assert (f"saved step {done}" if done else "no step was done") in err
    assert not (run / "metrics.jsonl").exists() or [m["step"] for m in metrics(run)] == list(range(done + 1))
    assert (run / "latest").exists() == bool(done)
    train(run, mine, "--resume")
    harness.assert_same_run(run, left_alone)


def test_a_signal_at_the_last_step_ends_the_run(
    kit: Path, left_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_call(monkeypatch, *owner_of("update"), 10)
    harness.assert_same_run(train(tmp_path / "run", args(kit, steps=3, save_every=9, **HELD)), left_alone)


# --- the best step, early stopping, alarms ------------------------------------------------------------------------


@pytest.mark.parametrize("judged", [True, False])
def test_the_best_step_is_that_of_the_judge(kit: Path, run: Path, tmp_path: Path, judged: bool) -> None:
    """Or where there is none, of the reward; the measurement before the first step is no step."""
    folder = run if judged else train(tmp_path / "run", args(kit, steps=5, **HELD))
    by = "judge" if judged else "reward"
    best = max(metrics(folder)[1:], key=lambda m: m["heldout"][by])
    assert (folder / "best").read_text() == f"step-{best['step']:06d}\n"
    assert all(m["heldout_loss"] == -m["heldout"][by] for m in metrics(folder))


def test_the_best_step_is_kept(kit: Path, run: Path, tmp_path: Path) -> None:
    """--keep 1 --save-every 9: the last step and the best one are left, the same as without."""
    few = train(tmp_path / "run", args(kit, steps=5, save_every=9, keep=1, judge=f"{kit}/judge", **HELD))
    best = (run / "best").read_text().strip()
    assert (few / "best").read_text().strip() == best
    assert {p.name for p in few.glob("step-*")} == {best, "step-000005"}
    assert harness.tensors(few / best) == harness.tensors(run / best)


def test_patience_ends_a_run(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate of 0 no measurement is better than the first: the run ends after three. It stays ended."""
    mine = args(kit, steps=9, save_every=9, lr=0, heldout="0.3", eval_every=2, patience=3)
    mine.remove("--quiet")
    run = train(tmp_path / "run", mine)
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 6 and [m["step"] for m in metrics(run)] == list(range(7))
    assert "step 6: ends early" in err
    held = [m["heldout"] for m in metrics(run) if "heldout" in m]
    assert len(held) == 4 and all(h == held[0] for h in held)
    assert (run / "best").read_text() == "step-000002\n"  # the first of those that are equal
    again = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}
    assert cli.invoke([*mine, "-o", str(run), "--resume"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 6 and "ended early at step 6" in err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"} == again


def test_patience_counts_measurements_in_a_row(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up judgements: 0 at first, then 1 (better), 0, 2 (better), 1, 2 (no better), 0: three in a row."""
    from llama2cli.stages.ppo import loop

    told, real = iter([0, 1, 0, 2, 1, 2, 0, 9, 9]), loop.measure

    def made_up(*a: Any, **k: Any) -> Any:
        found, rollout = real(*a, **k)
        value = float(next(told))
        return {"heldout_loss": -value, "heldout": found["heldout"] | {"reward": value}}, rollout

    monkeypatch.setattr(loop, "measure", made_up)
    run = train(tmp_path / "run", args(kit, steps=8, **HELD | {"patience": 3}))
    assert metrics(run)[-1]["step"] == 6 and (run / "best").read_text() == "step-000003\n"


def test_alarms_when_and_only_when(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line of the log against the rules: length beside the first iteration's, KL, held-out reward and judge."""
    bounds: dict[str, Any] = {"alarm_kl": 0.5, "alarm_length": 1.3}
    mine = args(kit, steps=8, seed=5, judge=f"{kit}/judge", **HELD, **bounds)
    mine.remove("--quiet")
    run = train(tmp_path / "run", mine)
    err = capsys.readouterr().err
    lines = metrics(run)
    first, best = lines[1]["length"], lines[0]["heldout"]
    seen = {"length": 0, "far": 0, "judge": 0, "none": 0}
    for m in lines[1:]:
        now = m["heldout"]
        want = []
        if m["length"] > 1.3 * first or first > 1.3 * m["length"]:
            want.append("length")
        if m["kl"] > 0.5:
            want.append("far")
        if now["reward"] > best["reward"] and now["judge"] < best["judge"] - 2 * now["judge_error"]:
            want.append("judge")
        best = now if now["judge"] > best["judge"] else best
        found = m.get("alarms", [])
        assert len(found) == len(want) and all(w in f for w, f in zip(want, found)), (m["step"], want, found)
        for kind, alarm in zip(want, found):  # of each kind the first few, the rest are counted
            assert (f"step {m['step']}: {alarm}" in err) == (seen[kind] < console.WARN_LIMIT)
        for kind in want or ["none"]:
            seen[kind] += 1
    assert all(n > 0 for kind, n in seen.items() if kind != "judge"), seen
    assert f"{sum(len(m.get('alarms', ())) for m in lines)} alarms" in err


def test_the_alarm_of_a_judge_that_turns_away(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward rises from step to step, the judge's opinion falls: beyond twice its error from step 3 on."""
    from llama2cli.stages.ppo import loop

    real, judged = loop.measure, iter([1.0, 1.1, 1.0, 0.8, 0.7])

    def made_up(*args: Any) -> Any:
        found, rollout = real(*args)
        value = next(judged)
        told = {"judge": value, "reward": 2 - value, "judge_error": 0.1}
        return {"heldout_loss": -value, "heldout": found["heldout"] | told}, rollout

    monkeypatch.setattr(loop, "measure", made_up)
    run = train(tmp_path / "run", args(kit, steps=4, judge=f"{kit}/judge", **HELD))
    turned = [m["step"] for m in metrics(run) if any("turns away" in alarm for alarm in m.get("alarms", ()))]
    assert turned == [3, 4]


# --- memory -------------------------------------------------------------------------------------------------------


def dry(capsys: pytest.CaptureFixture[str], arguments: Sequence[object]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.invoke([*map(str, arguments), "--dry-run", "-o", "/nowhere/run"]) == 0
    return json.loads(capsys.readouterr().out)


def test_dry_run_tells_roles_and_writes_nothing(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is named twice is one reward model; weights of what only reads are its parameters."""
    told = dry(capsys, args(kit, judge=f"{kit}/judge", heldout="0.3"))
    n = {"reference": 0, "reward model (help)": 0, "reward model (safe)": 0, "reward model (judge)": 0}
    for name, folder in zip(n, ("lm", "rm-help", "rm-safe", "judge")):
        from safetensors.torch import load_file

        n[name] = sum(4 * t.numel() for t in load_file(kit / folder / "model.safetensors").values())
    roles = told["memory"]["roles"]
    assert {k: roles[k] for k in n} == n
    assert {"policy", "value model", "keys and values"} < roles.keys()
    assert told["memory"]["peak"] == max(told["memory"]["phases"].values())
    assert told["memory"]["phases"].keys() == {"rollout", "scoring", "update"}
    assert told["resolved"]["beta"] == 0.01 and told["resolved"]["steps"] == 2
    one = dry(capsys, args(kit, rm_safe=f"{kit}/rm-help", judge=f"{kit}/rm-help", heldout="0.3", value="head"))
    assert [k for k in one["memory"]["roles"] if "reward" in k] == ["reward model (help and safe and judge)"]
    assert "value model" not in one["memory"]["roles"]
    half = dry(capsys, args(kit, frozen_dtype="bf16"))
    assert half["memory"]["roles"]["reference"] * 2 == n["reference"]


def test_a_reward_model_that_is_named_twice_is_loaded_once(kit: Path) -> None:
    from llama2cli.stages import ppo
    from llama2cli.stages.ppo.job import prepare
    from llama2cli.stages.ppo.roles import load
    from llama2cli.training.dist import World

    named = given(kit, rm_safe=f"{kit}/rm-help", judge=f"{kit}/rm-help", heldout=["0.3"], out="run")
    roles = load(prepare(ppo.Settings(**named), World(0, 1, torch.device("cpu"))), None)
    assert len(roles.judges) == 1 and len({id(s) for s in roles.scorers.values()}) == 1
    assert set(roles.scorers) == {"help", "safe", "judge"}


def test_refused_with_the_arithmetic(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step, and before there is a run folder; --dry-run tells it all the same."""
    from llama2cli.stages.ppo import memory

    peak = dry(capsys, args(kit))["memory"]["peak"]
    monkeypatch.setattr(memory, "available", lambda world: peak - 1)
    code, err = fails(capsys, [*args(kit), "-o", tmp_path / "run"])
    assert code == 2 and "does not fit" in err and "update would hold" in err and "try --value head" in err
    for role in ("policy", "value model", "reference", "reward model (help)", "reward model (safe)"):
        assert re.search(rf"{re.escape(role)} [\d.e-]+", err)
    assert not (tmp_path / "run").exists()
    assert dry(capsys, args(kit))["memory"]["peak"] == peak
    monkeypatch.setattr(memory, "available", lambda world: peak)
    train(tmp_path / "run", args(kit, steps=1))


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at one time, with those that were there before.

    torch's MemTracker gives up where a module runs twice without a step, as it does when answers are sampled.
    """

    def __init__(self, before: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in before:
            self.see(tensor)

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out


@pytest.fixture(scope="module")
def large(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models, 256 wide: what trains weighs more than what is beside it."""
    from llama2cli.nn import checkpoint
    from llama2cli.nn.config import ModelConfig
    from llama2cli.nn.model import Llama
    from llama2cli.text.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("large")
    tokenizer = Tokenizer.load(kit / "tok.model")
    for name in ("lm", "rm-help", "rm-safe"):
        model = Llama(ModelConfig(tokenizer.vocab_size, 256, 512, 4, 4, 2, 256), scorer=name != "lm")
        model.init_weights(1)
        (folder / name).mkdir()
        checkpoint.save_model(folder / name, model, tokenizer)
    shutil.copy(kit / "prompts.jsonl", folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"value": "head"}, marks=pytest.mark.slow),
        pytest.param({"dtype": "bf16", "frozen_dtype": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"activation_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=["separate", "head", "bf16", "checkpointing"],
)
def test_memory_is_what_a_run_holds(large: Path, changes: dict[str, Any]) -> None:
    """The update within 10% of the peak, as other stages' training is; of rollout and scoring, which are bounded from
    above, no less than 95% and no more than 140%."""
    from llama2cli.nn import ops
    from llama2cli.rlhf.ppo import Moments
    from llama2cli.stages import ppo
    from llama2cli.stages.ppo import lesson, memory, rollout
    from llama2cli.stages.ppo.job import prepare
    from llama2cli.stages.ppo.roles import load
    from llama2cli.training.dist import World
    from llama2cli.training.signals import Stop

    ops.force("plain")
    sizes: dict[str, Any] = {"batch_size": 12, "mini_batch": 6, "max_new_tokens": 16, "micro_tokens": 512}
    job = prepare(ppo.Settings(**given(large, out="run", **sizes, **changes)), World(0, 1, torch.device("cpu")))
    roles = load(job, None)
    ops.force("plain")
    chosen = list(range(12))
    answered = rollout.roll_out(job, roles, chosen, chosen, {}, Stop())
    learned = lesson.credit_answers(job, answered, Moments())
    lesson.update(job, roles, answered, learned, 1)  # from here on there are moments
    widest = 0

    def micro(self: Any, *a: Any) -> Any:
        nonlocal widest
        found = whole(self, *a)
        widest = max(widest, *(args["ids_BT"].numel() for args, _ in found))
        return found

    learners = [roles.policy, *([roles.value] if roles.value else [])]
    before = [p for who in learners for p in who.model.parameters()]
    before += [t for who in learners for of in who.optimizer.state.values() for t in of.values()]
    before += [p for model in (roles.reference.model, *roles.judges) for p in model.parameters()]

    def peak(work: Callable[[], object]) -> int:
        with Peak(before) as tracked:
            work()
        return tracked.peak

    def score() -> None:
        rollout.read_learners(job, roles, answered.answers, answered.logprobs_M, values=True)
        job.rows.read(roles.reference, answered.answers, torch.float32, k=2)
        records = [job.prompts.records[i] for i in chosen]
        places = [job.prompts.places[i] for i in chosen]
        for scorer in roles.scorers.values():
            asked = rollout.answered(records, places, answered.texts, [False] * 12)
            rollout.score_answers(scorer, asked)

    prompts = [job.prompts.ids[i].tolist() for i in chosen]
    found = {
        "rollout": peak(lambda: rollout.sample(job, roles, prompts, chosen, lambda _: None)),
        "scoring": peak(score),
    }
    with pytest.MonkeyPatch.context() as patch:
        whole = Answers.micro
        patch.setattr(Answers, "micro", micro)
        found["update"] = peak(lambda: lesson.update(job, roles, answered, learned, 2))
    told = memory.of(dataclasses.replace(job, resolved={**job.resolved, "micro_tokens": widest})).phases
    assert told["update"] == pytest.approx(found["update"], rel=0.1)
    for phase in ("rollout", "scoring"):
        assert 0.95 * found[phase] < told[phase] < 1.4 * found[phase], (phase, told[phase] / found[phase])


def test_offload_changes_no_number(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor, where the device is the host, what is held there; that it does nothing is told."""
    mine = args(kit, offload=True)
    mine.remove("--quiet")
    plain, away = train(tmp_path / "plain", args(kit)), train(tmp_path / "away", mine)
    assert "--offload does nothing on a CPU" in capsys.readouterr().err
    assert dry(capsys, args(kit))["memory"] == dry(capsys, mine)["memory"]
    assert harness.tensors(plain / "step-000002") == harness.tensors(away / "step-000002")
    assert metrics(plain) == metrics(away)


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size"), [(7, 2), (7, 3), (2, 3), (1, 2)])
def test_columns_of_all_ranks(monkeypatch: pytest.MonkeyPatch, n: int, size: int) -> None:
    """Every rank has every n-th answer; together they are all of them, in order, the same everywhere."""
    from llama2cli.stages.ppo.rollout import everyones

    whole = {"reward": [i / 3 - 1 for i in range(n)], "length": [float(i * i) for i in range(n)]}

    def work(world: Any) -> Any:
        mine = list(range(world.rank, n, world.size))
        return everyones(world, {k: [v[i] for i in mine] for k, v in whole.items()}, mine, n)

    for found in ranks.simulate(monkeypatch, size, work):
        assert {k: v.tolist() for k, v in found.items()} == whole


@pytest.mark.parametrize("size", [2, 3, 5])
def test_credit_does_not_depend_on_the_ranks(kit: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """What the tokens of an answer are trained on, and what is told, is that of one process; a rank may have none."""
    from llama2cli.rlhf.ppo import Moments
    from llama2cli.stages.ppo.lesson import credit_answers
    from llama2cli.stages.ppo.rollout import Rollout

    job, one = rolled(kit, 4, whiten="running", whiten_advantages=True, value_score="kept", beta=0.5)
    before = Moments(5, 0.3, 4.0)
    want = credit_answers(job, one, before)
    starts = one.answers.starts

    def tokens(mine: Sequence[int], values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values[:0], *(values[starts[i] : starts[i + 1]] for i in mine)])

    def work(world: Any) -> Any:
        mine = list(range(world.rank, 4, world.size))
        answers = Answers([one.answers.prompts[i] for i in mine], [one.answers.answers[i] for i in mine])
        parts = [tokens(mine, x) for x in (one.logprobs_M, one.kl_M, one.values_M)]
        part = Rollout(mine, answers, [one.texts[i] for i in mine], *parts, one.table)
        return mine, credit_answers(dataclasses.replace(job, world=world), part, before)

    for mine, found in ranks.simulate(monkeypatch, size, work):
        assert found.whitened == want.whitened and found.told == pytest.approx(want.told, rel=1e-9)
        for kind in ("policy", "value"):
            for name, values in getattr(want, kind).items():
                torch.testing.assert_close(getattr(found, kind)[name], tokens(mine, values), atol=1e-6, rtol=1e-5)


def close(two: Path, one: Path, atol: float) -> None:
    """Two runs with the same answers, equal up to rounding."""
    from safetensors.torch import load_file

    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, float):
                assert ours[key] == pytest.approx(value, rel=2e-3, abs=2e-5), (ours["step"], key)
        assert (ours.get("length"), ours.get("truncated")) == (theirs.get("length"), theirs.get("truncated"))
    last = (one / "latest").read_text().strip()
    for name in ("model.safetensors", "value/model.safetensors", "trainer/value_head.safetensors"):
        assert (two / last / name).exists() == (one / last / name).exists()
        if (one / last / name).exists():
            a, b = load_file(two / last / name), load_file(one / last / name)
            assert all(float((a[k] - b[k]).abs().max()) < atol for k in b), name


def held_answers(run: Path) -> list[str]:
    """The held-out answers of all ranks at the last step."""
    files = sorted((run / (run / "latest").read_text().strip()).glob("heldout*.jsonl"))
    return sorted(json.loads(text)["messages"][-1]["content"] for f in files for text in f.read_text().splitlines())


def test_what_the_loss_is_given_is_not_rounded_under_fsdp(kit: Path, tmp_path: Path) -> None:
    """In bf16 on two ranks the ratio is 1 before any update: old log-probabilities reach the loss in fp32."""
    mine = args(kit, steps=1, dtype="bf16", batch_size=8, mini_batch=8)
    done = harness.torchrun([*mine, "-o", tmp_path / "two"], ENV)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "two")[-1]["ratio_gap"] < 1e-5


def check_two_ranks(kit: Path, folder: Path, *, resumed: bool = True, **changes: Any) -> None:
    """As one process does, up to rounding; resumed, to the bit."""
    mine = args(kit, steps=3, lr=1e-4, micro_tokens=100, **changes)
    one, two = train(folder / "one", mine), folder / "two"
    done = harness.torchrun([*mine, "-o", two], ENV)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and json.loads(done.stdout)["step"] == 3
    close(two, one, 1e-5)
    assert held_answers(two) == held_answers(one)
    if not resumed:
        return
    before = (metrics(two), harness.tensors(two / "step-000003"))
    (two / "latest").write_text("step-000001\n")
    done = harness.torchrun([*mine, "-o", two, "--resume"], ENV)
    assert done.returncode == 0, done.stderr
    assert (metrics(two), harness.tensors(two / "step-000003")) == before


def test_two_ranks_train_as_one_does(kit: Path, tmp_path: Path) -> None:
    check_two_ranks(kit, tmp_path, resumed=False, batch_size=5, mini_batch=3, judge=f"{kit}/judge", **HELD)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 5, "mini_batch": 3, **RUNNING, **HELD},
        {"value": "head", **RUNNING, "kl": "exact", "whiten_advantages": True},
        {"batch_size": 1, "mini_batch": 1, "whiten": "none"},  # one of the ranks has no answer at all
        {"mini_batch": 1, "old_logprobs": "recomputed", "ppo_epochs": 2},
    ],
    ids=["separate", "head", "one answer", "recomputed"],
)
def test_two_ranks_in_other_forms(kit: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    check_two_ranks(kit, tmp_path, **changes)


def test_a_padded_vocabulary_is_no_part_of_the_probabilities(kit: Path, tmp_path: Path) -> None:
    """Rows that the tokenizer has no piece for are never sampled: what was sampled from is what is trained."""
    import dataclasses

    from llama2cli.nn import checkpoint
    from llama2cli.nn.model import Llama
    from llama2cli.text.tokenizer import Tokenizer

    small = checkpoint.load_model(kit / "lm")
    policy = Llama(dataclasses.replace(small.config, vocab_size=384))
    policy.init_weights(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            own = dict(small.named_parameters())[name]
            weight[: len(own)] = own
    (tmp_path / "padded").mkdir()
    checkpoint.save_model(tmp_path / "padded", policy, Tokenizer.load(kit / "tok.model"))
    plain = metrics(train(tmp_path / "plain", args(kit)))
    for kl in ("k1", "exact"):
        told = metrics(train(tmp_path / kl, args(kit, policy=tmp_path / "padded", kl=kl, value_init="help")))
        assert all(m["ratio_gap"] < 1e-5 for m in told) and abs(told[0]["kl"]) < 1e-5
        assert told[0]["entropy"] == pytest.approx(plain[0]["entropy"], rel=1e-4)
