"""`llama2 sft`: masks and losses against SentencePiece and transformers, exact resume, two ranks, what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import resume_harness as harness
import tiny

from llama2cli import cli

ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
SHAPE = {k: v for k, v in tiny.SHAPE.items() if k not in ("architectures", "model_type")} | {"hidden_size": 64}
Dialogue = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **extra: int) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


def write(path: Path, dialogues: list[Dialogue]) -> Path:
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in dialogues))
    return path


TEXTS = [" ".join(t.split()[:6]) for t in tiny.documents(300)]
A = [[user(TEXTS[i]), assistant(TEXTS[i + 100])] for i in range(40)]
A[5] += [user(TEXTS[240]), assistant(TEXTS[241])]  # several rounds
A[6] = [*A[5][:2], user("and now?"), assistant("no.")]  # begins as another does
B = [[{"role": "system", "content": "be two"}, user(TEXTS[60 + i]), assistant(TEXTS[160 + i])] for i in range(10)]
B[3] += [user("again"), assistant("blue", weight=0), user("once more"), assistant("green")]
B[4][2]["content"] = " ".join(TEXTS[200:212])  # longer than the context


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a checkpoint that transformers made (GQA), dialogues in two files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama2cli.text.tokenizer import train

    kit = tmp_path_factory.mktemp("sft")
    (kit / "tok.model").write_bytes(train(tiny.documents(300), 300))
    write(kit / "a.jsonl", A)
    write(kit / "b.jsonl", B)
    torch.manual_seed(1)
    size = sentencepiece.SentencePieceProcessor(model_file=f"{kit}/tok.model").vocab_size()
    shape: dict[str, Any] = SHAPE | {"vocab_size": size, "max_position_embeddings": 160}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(kit / "ck")
    shutil.copy(kit / "tok.model", kit / "ck/tokenizer.model")
    return kit


@pytest.fixture(scope="module")
def server() -> Iterator[harness.Server]:
    with harness.server("sft") as it:
        yield it


@pytest.fixture(scope="module")
def args(kit: Path) -> list[str]:
    """11 steps of 9 dialogues, the last smaller: two weighted sources, several micro-batches, held-out prompts."""
    line = f"""sft --init {kit}/ck --data a={kit}/a.jsonl --data b={kit}/b.jsonl:2 --heldout 0.15 --quiet --seed 7
        --batch-size 9 --micro-tokens 400 --epochs 2 --lr 0.005 --save-every 3"""
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


def without(args: list[str], *flags: str) -> list[str]:
    """The same command line without some flags and what follows them."""
    out = list(args)
    for flag in flags:
        at = out.index(flag)
        del out[at : at + 2]
    return out


@pytest.fixture(scope="module")
def run(server: harness.Server, args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, finished."""
    return harness.reference(server, args, tmp_path_factory.mktemp("run"))[0]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def fails(capsys: pytest.CaptureFixture[str], args: list[object]) -> tuple[int, str]:
    """The exit code and the one line of a command that fails."""
    code = cli.invoke([*map(str, args), "--quiet"])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("llama2 sft: "), (out, err)
    return code, err


def prepared(args: list[str]) -> Any:
    """What the stage makes of a command line before it trains."""
    import torch

    from llama2cli.stages import sft
    from llama2cli.training.dist import World

    words = [a for a in args if a != "--quiet"][1:]
    values: dict[str, Any] = {"out": "x", "data": []}
    for flag, value in zip(words[::2], words[1::2]):
        name = flag.removeprefix("--").replace("-", "_")
        if name in ("data", "heldout"):
            values.setdefault(name, []).append(value)
        else:
            values[name] = {"epochs": float, "lr": float}.get(name, lambda v: int(v) if v.isdigit() else v)(value)
    return sft.prepare(sft.Settings(**values), World(0, 1, torch.device("cpu")))


def encoded(kit: Path, messages: Dialogue) -> tuple[list[int], list[int]]:
    """(ids, mask) by SentencePiece and the rule of the chat format."""
    sp = sentencepiece.SentencePieceProcessor(model_file=f"{kit}/tok.model")
    system, turns = ("", messages)
    if messages[0]["role"] == "system":
        system, turns = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n", messages[1:]
    ids, mask = [], []
    for asked, answered in zip(turns[::2], turns[1::2]):
        prompt = sp.encode(f"[INST] {(system + asked['content']).strip()} [/INST]")
        whole = sp.encode(f"[INST] {(system + asked['content']).strip()} [/INST] {answered['content'].strip()} ")
        ids += [1, *whole, 2]
        mask += [0] * (1 + len(prompt)) + [answered.get("weight", 1)] * (len(whole) - len(prompt) + 1)
        system = ""
    return ids, mask


def prompt_of(messages: Dialogue) -> tuple[str, str]:
    """What a dialogue begins with: the system message and the first of the user."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    return system, next(m["content"] for m in messages if m["role"] == "user")


def hf_sum(model: Any, ids: list[int], mask: list[int]) -> tuple[Any, int]:
    """transformers' loss of a dialogue alone with labels outside the answers -100, as a sum, and its tokens."""
    import torch

    labels = torch.tensor([[i if on else -100 for i, on in zip(ids, mask)]])
    n = sum(mask[1:])
    return model(torch.tensor([ids]), labels=labels).loss * n, n


# --- what a run leaves --------------------------------------------------------------------------------------------


def test_one_record_and_a_run_folder(run: Path) -> None:
    record = json.loads(run.with_suffix(".log.out").read_text())
    last = metrics(run)[-1]
    told = ("step", "loss", "heldout_loss", "epochs")
    assert record == {"checkpoint": f"{run}/step-000011", **{k: last[k] for k in told}}
    assert record["step"] == 11 and record["epochs"] == 2.0
    assert run.with_suffix(".log.err").read_text() == ""  # --quiet
    assert {p.name for p in run.glob("step-*")} == {f"step-{s:06d}" for s in (3, 6, 9, 11)}
    assert [m["step"] for m in metrics(run)] == list(range(12)) and "heldout_loss" in metrics(run)[0]
    resolved = json.loads((run / "settings.json").read_text())["resolved"]
    assert resolved["context"] == 160 and resolved["warmup"] == 5 and resolved["packing"] == "blocks"
    assert [d["name"] for d in resolved["data"]] == ["a", "b"] and [d["weight"] for d in resolved["data"]] == [1, 2]
    lineage = json.loads((run / "step-000011/lineage.json").read_text())["stages"]
    assert [s["stage"] for s in lineage] == ["checkpoint", "sft"]
    card = (run / "step-000011/README.md").read_text()
    assert "fine-tuned on dialogues (2.00 epochs)" in card and "**sft**" in card


def test_the_mask_report(
    kit: Path, run: Path, args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens of each role by SentencePiece, in the metrics of the first step and on stderr."""
    both = [encoded(kit, m) for m in A + B]
    lost = [max(0, len(ids) - 160) for ids, _ in both]
    trained = sum(sum(mask[:160]) for _, mask in both)
    weighted = [encoded(kit, [{k: v for k, v in m.items() if k != "weight"} for m in d]) for d in A + B]
    answers = sum(sum(mask[:160]) for _, mask in weighted)
    system = sum(len(encoded(kit, m)[0]) - len(encoded(kit, m[1:])[0]) for m in B)
    total = sum(len(ids) for ids, _ in both) - sum(lost)
    first = metrics(run)[1]["masks"]
    assert first == {
        "tokens": {
            "system": {"total": system, "trained": 0},
            "user": {"total": total - system - answers, "trained": 0},
            "assistant": {"total": answers, "trained": trained},
        },
        "dialogues": 50, "cut": 1, "cut_answers": 1, "cut_tokens": sum(lost), "long": 0, "untrained": 0, "tags": 0,
        "empty": 0,
    }  # fmt: skip
    assert not any("masks" in m for m in metrics(run)[2:]) and sum(lost) > 5 and answers > trained
    loud = [a for a in args if a != "--quiet"]
    assert cli.invoke([*loud, "-o", str(tmp_path / "x"), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["masks"] == first and not (tmp_path / "x").exists()
    assert "masks of 50 dialogues" in err and f" ({sum(lost)} tokens lost; see --long)" in err
    assert f"{trained:,}" in next(line for line in err.splitlines() if line.startswith("assistant"))


def test_show_mask(kit: Path, args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke([*args, "-o", str(tmp_path / "x"), "--show-mask", "48"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 48 and not (tmp_path / "x").exists()
    for line, messages in zip(lines, A + B):
        ids, mask = encoded(kit, messages)
        assert line == {"ids": ids[:160], "trained": mask[:160]}


def test_show_mask_in_colours(kit: Path) -> None:
    from llama2cli.stages import sft
    from llama2cli.text.tokenizer import Tokenizer

    ids, mask = encoded(kit, [user("a\x1b[31m"), assistant("blue\nfox")])
    shown = sft.coloured(Tokenizer.load(kit / "ck"), ids, mask)
    parts = [p.split("\x1b[0m")[0].partition("m") for p in shown.split("\x1b[")[1:] if not p.startswith("0m")]
    assert {p[0] for p in parts} == {"2", "32;4"}
    assert "".join(p[2] for p in parts if p[0] == "32;4") == " blue\\n\nfox </s>"
    assert "<0x1B>" in shown and "\x1b[31m" not in shown


def test_the_checkpoint_is_transformers_and_so_is_the_heldout_loss(kit: Path, run: Path, args: list[str]) -> None:
    """Held out is what the stage says; each dialogue alone, each source by itself."""
    import torch
    from transformers import AutoModelForCausalLM

    job = prepared(args)
    for step, folder in ((0, kit / "ck"), (11, run / "step-000011")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        nll, count = 0.0, 0
        for part in job.heldout:
            with torch.no_grad():
                both = [encoded(kit, (A + B)[i]) for i in part.index]
                sums = [hf_sum(model, ids[:160], mask[:160]) for ids, mask in both]
            loss, n = sum(float(s) for s, _ in sums), sum(k for _, k in sums)
            told = metrics(run)[step]["heldout"][part.name]
            assert told["loss"] == pytest.approx(loss / n, rel=1e-5) and told["tokens"] == n
            nll, count = nll + loss, count + n
        assert metrics(run)[step]["heldout_loss"] == pytest.approx(nll / count, rel=1e-5)


def test_no_prompt_is_on_both_sides(args: list[str]) -> None:
    texts = A + B
    for seed in (7, 8):
        job = prepared(changed(args, seed=seed))
        trained, held = (
            {prompt_of(texts[i]) for p in parts for i in p.index} for parts in (job.rows.order.parts, job.heldout)
        )
        assert not trained & held and all(len(p.index) for p in job.heldout)
        assert (5 in job.heldout[0].index) == (6 in job.heldout[0].index)
        before = prepared(args)
        assert [p.index.tolist() for p in job.heldout] == [p.index.tolist() for p in before.heldout]


def test_the_loss_curve_is_that_of_transformers_and_torch(kit: Path, run: Path, args: list[str]) -> None:
    """Each dialogue alone through transformers' model, torch's AdamW and clipping, the paper's schedule by hand."""
    import torch
    from transformers import AutoModelForCausalLM

    job = prepared(args)
    an_epoch = job.rows.count(0)
    total = 2 * an_epoch
    assert total % 9 and -(-total // 9) == 11
    order = [int(i) for e in range(2) for i in job.rows.order.of(e)]
    assert all(order.count(int(i)) == 2 * p.weight for p in job.rows.order.parts for i in p.index)
    model = AutoModelForCausalLM.from_pretrained(kit / "ck")
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-5)
    for line in metrics(run)[1:]:
        step = line["step"]
        rows = [encoded(kit, (A + B)[i]) for i in order[9 * step - 9 : 9 * step]]
        count = sum(sum(mask[:160]) for _, mask in rows)
        loss = sum(hf_sum(model, ids[:160], mask[:160])[0] for ids, mask in rows) / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 5) / 6)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 0.005 * (step / 5 if step <= 5 else cosine)
        optimizer.step()
        optimizer.zero_grad()
        assert line["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert line["seen"] == min(9 * step, total) and line["epochs"] == pytest.approx(line["seen"] / an_epoch)
    assert metrics(run)[-1]["loss"] < metrics(run)[1]["loss"] - 0.5


# --- resuming -----------------------------------------------------------------------------------------------------


def test_killed_three_times(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    assert harness.check_kills(server, changed(args, save_every=2), tmp_path, kills=3)["kills"] == 3


@pytest.mark.parametrize("packing", ["blocks", "concat", "none"])
def test_resumed_at_every_step(server: harness.Server, args: list[str], tmp_path: Path, packing: str) -> None:
    few = changed(without(args, "--epochs"), steps=4, save_every=1, batch_size=16, packing=packing, context=70)
    harness.check_every_step(server, few, tmp_path, steps=4)
    assert metrics(tmp_path / "reference")[-1]["epochs"] > 1  # over the end of an epoch


def test_killed_at_file_operations(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    few = changed(without(args, "--epochs"), steps=3, save_every=1, keep=1)
    assert harness.check_crash_points(server, few, tmp_path, first=5, every=79) >= 2


@pytest.mark.slow
def test_killed_at_every_file_operation(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    few = changed(without(args, "--epochs"), steps=3, save_every=1, keep=1)
    assert harness.check_crash_points(server, few, tmp_path) > 100


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["blocks", "concat", "none"])
def test_killed_thirty_times(server: harness.Server, args: list[str], tmp_path: Path, packing: str) -> None:
    often = changed(args, save_every=1, packing=packing)
    assert harness.check_kills(server, often, tmp_path, kills=30, seed=1)["kills"] == 30


def test_more_epochs_go_on(server: harness.Server, args: list[str], run: Path, tmp_path: Path) -> None:
    longer = tmp_path / "run"
    shutil.copytree(run, longer)
    assert server.run([*changed(args, epochs=3), "-o", longer, "--resume"], tmp_path / "log") == 0
    assert metrics(longer)[:12] == metrics(run) and [m["step"] for m in metrics(longer)] == list(range(17))
    assert 2.9 < metrics(longer)[-1]["epochs"] <= 3.0  # whole batches behind the smaller one that was the last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "--seed: the run has 7, now it would be 8"),
        ({"batch_size": 8}, "--batch-size: the run has 9, now it would be 8"),
        ({"micro_tokens": 160}, "--micro-tokens: the run has 400, now it would be 160"),
        ({"packing": "none"}, "--packing: the run has blocks, now it would be none"),
        ({"context": 90}, "--context: the run has 160, now it would be 90"),
        ({"heldout": 0.3}, "--data: data[0].examples: the run has"),
        ({"long": "drop"}, "--long: the run has cut, now it would be drop"),
        ({"tags": "keep"}, "--tags: the run has escape, now it would be keep"),
        ({"lr": 0.1}, "--lr"),
        ({"epochs": 1}, "the run has done 11 steps already"),
    ],
)
def test_other_settings_are_refused(
    args: list[str], run: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    code, err = fails(capsys, [*changed(args, **change), "-o", run, "--resume"])
    assert code == 2 and message in err and str(run) in err


def test_other_data_are_refused(
    kit: Path, args: list[str], run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A word of an answer, a weight of a message, the file of another name, another order: by name; a copy is none."""
    other = [[dict(m) for m in d] for d in B]
    other[0][2]["content"] += " x"
    untrained = [[dict(m) for m in d] for d in B]
    untrained[3][2]["weight"] = 0
    for many in (other, untrained, B[::-1]):
        write(tmp_path / "b.jsonl", many)
        moved = [a.replace(f"{kit}/b.jsonl", f"{tmp_path}/b.jsonl") for a in args]
        code, err = fails(capsys, [*moved, "-o", run, "--resume"])
        assert code == 2 and "--data: data[1].sha256: the run has " in err, err
    write(tmp_path / "b.jsonl", B)
    assert cli.invoke([*moved, "-o", str(run), "--resume"]) == 0
    capsys.readouterr()
    code, err = fails(capsys, [*(a.replace("b=", "c=") for a in args), "-o", run, "--resume"])
    assert code == 2 and "--data: data[1].name: the run has b, now it would be c" in err


# --- several processes --------------------------------------------------------------------------------------------


def torchrun(arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    return harness.torchrun(arguments, ENV)


def test_two_ranks_train_as_one_does(args: list[str], run: Path, tmp_path: Path) -> None:
    """Within rounding; resumed in the middle to the bit. The ranks have different tokens, and one may have none."""
    from transformers import AutoModelForCausalLM

    two = tmp_path / "two"
    done = torchrun([*args, "-o", two])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and json.loads(done.stdout)["step"] == 11
    for ours, theirs in zip(metrics(two), metrics(run), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss", "grad_norm", "heldout_loss"):
            assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), abs=2e-4)
        assert all(ours.get(k) == theirs.get(k) for k in ("epochs", "seen", "masks", "lr"))
    assert metrics(two)[1]["loss"] == pytest.approx(metrics(run)[1]["loss"], rel=1e-6)
    step = two / "step-000011"
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f / step.name).state_dict() for f in (two, run))
    assert all(float((ours[k] - theirs[k]).abs().max()) < 1e-3 for k in theirs)

    (two / "latest").write_text("step-000009\n")
    before = (metrics(two), harness.tensors(step))
    done = torchrun([*args, "-o", two, "--resume"])
    assert done.returncode == 0, done.stderr
    assert (metrics(two), harness.tensors(step)) == before


def test_masks_are_shown_by_one_rank(kit: Path, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    import torch

    from llama2cli.stages import sft
    from llama2cli.training.dist import World

    job = prepared(args)
    for rank, lines in ((0, 2), (1, 0)):
        work = dataclasses.replace(job.work, world=World(rank, 2, torch.device("cpu")))
        sft.show_mask(dataclasses.replace(job, work=work), 2)
        assert capsys.readouterr().out.count("\n") == lines


def test_stdin_under_torchrun_names_the_fix(kit: Path) -> None:
    import torch

    from llama2cli.errors import Misuse
    from llama2cli.stages import sft
    from llama2cli.training.dist import World

    settings = sft.Settings(files=["-"], out="x", init=f"{kit}/ck")
    with pytest.raises(Misuse, match="stdin reaches one process, and there are 2; write the records to a file"):
        sft.prepare(settings, World(0, 2, torch.device("cpu")))


# --- data ---------------------------------------------------------------------------------------------------------


def test_stdin(kit: Path, server: harness.Server, run: Path, tmp_path: Path) -> None:
    """A pipe is a file: the same run, and it can be resumed with the same records."""
    flags = f"--init {kit}/ck --batch-size 16 --steps 3 --seed 2 --quiet".split()
    command = [sys.executable, "-m", "llama2cli", "sft", *flags, "-o", str(tmp_path / "piped"), "--resume"]
    lines = (kit / "a.jsonl").read_text()
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["step"] == 3, done.stderr
    named = [f"stdin={kit}/a.jsonl"]
    assert server.run(["sft", *flags, *named, "-o", tmp_path / "file"], tmp_path / "log") == 0
    assert metrics(tmp_path / "piped") == metrics(tmp_path / "file")
    assert server.run(["sft", *flags, *named, "-o", tmp_path / "piped", "--resume"], tmp_path / "log") == 0


def test_heldout_by_file(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its prompts are not trained on, and what became of its dialogues is in the report."""
    held = write(tmp_path / "held.jsonl", [[user(f" {TEXTS[5]}"), assistant("two")], [user("new"), assistant("one")]])
    line = f"sft --init {kit}/ck --data {kit}/a.jsonl --heldout {held} --batch-size 9"
    job = prepared(line.split())
    kept = {prompt_of(A[i]) for p in job.rows.order.parts for i in p.index}
    assert ("", TEXTS[5]) not in kept and len(job.rows.order.parts[0].index) == 38  # two begin with it
    assert job.rows.count(0) == 38 and [len(p.index) for p in job.heldout] == [2]
    assert cli.invoke([*line.split(), "-o", str(tmp_path / "x"), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "2 dialogues are not trained on: --heldout has their prompts" in err and "masks of 42 dialogues" in err
    assert json.loads(out)["masks"]["dialogues"] == 42


def test_paths_of_a_tree_stay_together(kit: Path, tmp_path: Path) -> None:
    """OASST: the dialogues of a tree share their first turn, and are on one side."""
    reply = lambda text: {"role": "assistant", "text": text, "replies": []}  # noqa: E731
    trees = [
        {"prompt": {"role": "prompter", "text": TEXTS[i], "replies": [reply(TEXTS[100 + i + k]) for k in range(3)]}}
        for i in range(30)
    ]
    (tmp_path / "trees.jsonl").write_text("".join(json.dumps(t) + "\n" for t in trees))
    job = prepared(f"sft --init {kit}/ck --data {tmp_path}/trees.jsonl --heldout 0.4 --batch-size 9".split())
    sides = [sorted(i // 3 for p in parts for i in p.index) for parts in (job.rows.order.parts, job.heldout)]
    assert not set(sides[0]) & set(sides[1]) and all(side.count(t) == 3 for side in sides for t in side)
    assert len(sides[0]) + len(sides[1]) == 90 and 12 <= len(sides[1]) <= 66


def test_dry_run_says_what_would_be(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"sft --init {kit}/ck --data {kit}/a.jsonl -o {tmp_path}/x --dry-run"
    tokens = sum(len(encoded(kit, m)[0]) for m in A)
    for flags, steps, passes in (("", 2, 2), ("--epochs 0.5", 1, 0.5), ("--steps 3 --batch-size 20", 3, 1.5)):
        assert cli.invoke([*line.split(), *flags.split()]) == 0
        out, err = capsys.readouterr()
        told = json.loads(out)
        assert told["resolved"]["steps"] == steps and told["tokens"] == pytest.approx(passes * tokens, abs=1)
        assert f"{passes:.2f}" in err.splitlines()[-1] and "one step reads" not in err
    assert cli.invoke([*line.split(), "--epochs", "60", "--batch-size", "1600"]) == 0
    assert "one step reads the data 30.0 times; a smaller --batch-size?" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


BAD = [
    (2, "no data: give files", ""),
    (2, "give one of --steps and --epochs", "{d} --steps 3 --epochs 1"),
    (2, "--epochs: expected more than 0", "{d} --epochs 0"),
    (2, "--epochs: 0.01 epochs of 40 are less than one", "{d} --epochs 0.01"),
    (2, "fp16 is for inference only", "{d} --dtype fp16"),
    (2, "--eval-every: there is nothing to measure", "{d} --eval-every 3"),
    (2, "a fraction is between 0 and 1, got 1.5", "{d} --heldout 1.5"),
    (2, 'two sources are called "a"; tell them apart with NAME=PATH', "{d} {k}/a.jsonl"),
    (2, "a weight is a positive number, got 0", "{d}:0"),
    (2, "not one of 'blocks', 'concat', 'none'", "{d} --packing all"),
    (1, "no such file", "--data {k}/nothing.jsonl"),
    (1, "no such folder", "{d} --init {k}/nothing"),
    (1, 'source "a" has no dialogue to train on: --heldout has all of its prompts', "{d} --heldout {k}/a.jsonl"),
    (1, 'leaves no prompt of source "a" to train on', "{d} --heldout 0.9999999"),
    (2, "--warmup: 9 steps of warm-up in a run of 9", "{d} --steps 9 --warmup 9"),
    (2, "exists; --resume continues it", "{d} -o {k}"),
    (2, "is no run folder", "{d} -o {k} --resume"),
]


@pytest.mark.parametrize(("code", "message", "line"), BAD, ids=[b[1] for b in BAD])
def test_misuse_is_one_line(
    kit: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    message: str,
    line: str,
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    words = line.format(k=kit, d=f"--data {kit}/a.jsonl").split()
    out = [] if "-o" in words else ["-o", str(tmp_path / "run")]
    init = [] if "--init" in words else ["--init", str(kit / "ck")]
    got, err = fails(capsys, ["sft", *init, *words, *out])
    assert (got, message in err) == (code, True), err
    assert not (tmp_path / "run").exists()


# --- what it is for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["blocks", "none"])
def test_answers_that_were_trained_are_given(
    kit: Path, server: harness.Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], packing: str
) -> None:
    """Five answers are learned by heart, given by `llama2 generate`, and by transformers from the step's folder."""
    import torch
    from transformers import AutoModelForCausalLM

    write(tmp_path / "five.jsonl", A[10:15])
    line = f"sft --init {kit}/ck --data {tmp_path}/five.jsonl --batch-size 5 --steps 70 --lr 0.01 --packing {packing}"
    assert server.run([*line.split(), "--save-every", 70, "-o", tmp_path / "run"], tmp_path / "log") == 0
    write(tmp_path / "prompts.jsonl", [m[:1] for m in A[10:15]])
    line = f"generate --model {tmp_path}/run --temperature 0 --max-new-tokens 60 {tmp_path}/prompts.jsonl --quiet"
    assert cli.invoke(line.split()) == 0
    answered = [json.loads(x)["messages"][-1] for x in capsys.readouterr().out.splitlines()]
    assert [m["content"] for m in answered] == [m[1]["content"].strip() for m in A[10:15]]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/step-000070")
    for messages in A[10:15]:
        ids, mask = encoded(kit, messages)
        prompt = torch.tensor([ids[: mask.index(1)]])
        told = model.generate(prompt, do_sample=False, max_new_tokens=60, eos_token_id=2, pad_token_id=0)
        assert told[0].tolist() == ids
