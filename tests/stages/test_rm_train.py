"""`llama2 rm-train`: numbers against transformers and by hand, mixtures, what is held out, resuming to the bit."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import resume_harness as harness
import tiny

from llama2cli import cli

ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
RATINGS = ("significantly", "better", "slightly", "negligibly")
LARGE = dict(zip(RATINGS, (3.0, 2.0, 1.0, 0.0)))  # Table 27
SMALL = dict(zip(RATINGS, (1.0, 2 / 3, 1 / 3, 0.0)))
SAFE = {"chosen_safe": (1, 0), "both_safe": (1, 1), "both_unsafe": (0, 0)}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def comparison(i: int, **more: Any) -> dict[str, Any]:
    """Two records to a prompt; of three out of four the answer with the fox is the better. Some have more rounds."""
    prompt = [user(f"what did {tiny.WORDS[i // 2 % 7]} see {i // 2}?")]
    if i % 6 == 0:
        prompt = [{"role": "system", "content": "be kind"}, *prompt, answer("what?"), user("near the river")]
    good, bad = f"one fox{' and' * (i % 3)} {i}", f"two {tiny.WORDS[i % 5]} wolf"
    chosen, rejected = (bad, good) if i % 4 == 3 else (good, bad)
    safety = {"safety": ("chosen_safe", "both_safe", "both_unsafe")[i % 3]} if i % 5 else {}
    found = {"prompt": prompt, "chosen": [answer(chosen)], "rejected": [answer(rejected)], "rating": RATINGS[i % 4]}
    return found | safety | {"batch": 10 + i % 3} | more


def labelled(i: int) -> dict[str, Any]:
    """Label 1 where the answer has a fox."""
    text = f"the {'fox' if i % 3 else 'bear'} {tiny.WORDS[i % 11]} {i}"
    return {"messages": [user(f"who was near house {i // 2}?"), answer(text)], "label": int(i % 3 > 0)}


def write(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tok.model, a language model lm, 60 comparisons and 60 labelled dialogues."""
    from llama2cli.nn import checkpoint
    from llama2cli.nn.config import read_config
    from llama2cli.nn.model import Llama
    from llama2cli.text.tokenizer import Tokenizer

    kit = tiny.write(tmp_path_factory.mktemp("rm"))
    model = Llama(read_config(kit / "model.json"))
    model.init_weights(1, std=0.1)
    (kit / "lm").mkdir()
    checkpoint.save_model(kit / "lm", model, Tokenizer.load(kit / "tok.model"))
    write(kit / "pairs.jsonl", [comparison(i) for i in range(60)])
    write(kit / "labels.jsonl", [labelled(i) for i in range(60)])
    return kit


@pytest.fixture(scope="module")
def server() -> Iterator[harness.Server]:
    with harness.server("rm_train") as it:
        yield it


@pytest.fixture(scope="module")
def args(kit: Path) -> list[str]:
    """A run of 12 steps with all that a reward model can have."""
    line = f"""rm-train --init {kit}/lm --data {kit}/pairs.jsonl --context 128 --batch-size 8 --micro-tokens 256
        --steps 12 --save-every 3 --eval-every 3 --heldout 0.25 --lr 3e-3 --margin large --safety-weight 0.5
        --calibrate --seed 7 --quiet"""
    return line.split()


@pytest.fixture(scope="module")
def run(server: harness.Server, args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, finished."""
    return harness.reference(server, args, tmp_path_factory.mktemp("run"))[0]


def train(server: harness.Server, folder: Path, line: str | Sequence[object], **data: Sequence[object]) -> Path:
    """A run in `folder`/run; data: files of records, written to `folder` first, for "{name}" in the line."""
    paths = {name: write(folder / f"{name}.jsonl", records) for name, records in data.items()}
    given = line.format(**paths).split() if isinstance(line, str) else list(line)
    code = server.run(["rm-train", *given, "-o", folder / "run"], folder / "log")
    assert code == 0, (folder / "log.err").read_text()
    return folder / "run"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def resolved(run: Path) -> dict[str, Any]:
    return json.loads((run / "settings.json").read_text())["resolved"]


def fails(capsys: pytest.CaptureFixture[str], args: Sequence[object]) -> tuple[int, str]:
    """The exit code and the one line of a command that fails."""
    code = cli.invoke([str(a) for a in args])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("llama2 rm-train: "), (out, err)
    return code, err


# --- the judge: transformers, and SentencePiece by hand -----------------------------------------------------------


def encoded(kit: Path, messages: Sequence[dict[str, str]]) -> list[int]:
    """A dialogue's ids, by the rule: BOS, "[INST] question [/INST] answer ", EOS for each round."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(kit / "tok.model"))
    turns = list(messages)
    if turns[0]["role"] == "system":
        turns[:2] = [user(f"<<SYS>>\n{turns[0]['content']}\n<</SYS>>\n\n{turns[1]['content']}")]
    ids = []
    for question, said in zip(turns[::2], turns[1::2], strict=True):
        ids += [1, *sp.encode(f"[INST] {question['content']} [/INST] {said['content']} "), 2]
    return ids


def scores(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """transformers' scores [N] of a padded batch."""
    pad, width = model.config.pad_token_id, max(map(len, sequences))
    assert pad == 0
    ids = torch.tensor([[*s, *[pad] * (width - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    return model(input_ids=ids, attention_mask=mask).logits[:, 0]


def pair_scores(model: Any, kit: Path, records: Sequence[dict[str, Any]]) -> Tensor:
    """transformers' scores of the chosen and the rejected answers, [N, 2]."""
    both = [encoded(kit, r["prompt"] + r[which]) for r in records for which in ("chosen", "rejected")]
    return scores(model, both).view(-1, 2)


def losses(scores_N2: Tensor, records: Sequence[dict[str, Any]], margins: dict[str, float]) -> tuple[Tensor, Tensor]:
    """The ranking loss and the auxiliary loss of each pair, by hand."""
    margin = torch.tensor([margins[r["rating"]] for r in records])
    ranking = F.softplus(margin - (scores_N2[:, 0] - scores_N2[:, 1]))
    auxiliary = [
        sum(F.softplus(-s if safe else s) for s, safe in zip(pair, SAFE[r["safety"]])) if "safety" in r else pair[0] * 0
        for pair, r in zip(scores_N2, records)
    ]
    return ranking, torch.stack(auxiliary)  # type: ignore[arg-type]


def load(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def at_first(kit: Path, seed: int = 7) -> Any:
    """transformers' model with the trunk of lm, and the head that the seed gives."""
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(kit / "lm", num_labels=1, pad_token_id=0)
    with torch.no_grad():
        model.score.weight.copy_(head(seed))
    return model.eval()


def head(seed: int) -> Tensor:
    """The new head of a width of 32, from its seed."""
    from llama2cli.nn.model import drawn

    return drawn("score", (1, 32), seed, 1 / math.sqrt(33))


def numbers(kit: Path, **changes: Any) -> tuple[Any, list[int], list[int]]:
    """(the order in which a run reads, and the lines of pairs.jsonl that it trains on and holds out), from 0."""
    from llama2cli.stages import rm_train
    from llama2cli.training.dist import World

    given = dict(files=[str(kit / "pairs.jsonl")], init=str(kit / "lm"), out="run", context=128, seed=7)
    given |= dict(heldout=["0.25"])
    job = rm_train.prepare(rm_train.Settings(**given | changes), World(0, 1, torch.device("cpu")))
    lines = [facts["place"].line - 1 for facts in job.rows.store.facts]
    trained = [lines[i] for part in job.rows.order.parts for i in part.index]
    held = [lines[i] for part in job.heldout for i in part.index]
    return (lambda epoch: [lines[i] for i in job.rows.order.of(epoch)]), trained, held


def prompts(records: Sequence[dict[str, Any]]) -> set[str]:
    return {json.dumps([m for m in r["prompt"] if m["role"] != "assistant"][:2]) for r in records}


# --- what a run leaves --------------------------------------------------------------------------------------------


def test_one_record_and_a_reward_model(run: Path) -> None:
    record = json.loads(run.with_suffix(".log.out").read_text())
    last = metrics(run)[-1]
    told = ("step", "loss", "accuracy", "heldout_loss", "heldout_accuracy", "epochs")
    assert record == {"checkpoint": f"{run}/step-000012", **{k: last[k] for k in told}}
    assert run.with_suffix(".log.err").read_text() == ""  # --quiet
    assert [m["step"] for m in metrics(run)] == list(range(13))  # 0: before the first step
    assert [m["step"] for m in metrics(run) if "heldout" in m] == [0, 3, 6, 9, 12]
    config = json.loads((run / "step-000012/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["num_labels"], config["pad_token_id"]) == (1, 0)
    card = (run / "step-000012/README.md").read_text()
    assert "A reward model of" in card and "trained on 96 comparisons" in card and "text-classification" in card
    best = min((m for m in metrics(run) if m["step"]), key=lambda m: m.get("heldout_loss", math.inf))
    assert (run / "best").read_text() == f"step-{best['step']:06d}\n"


def test_the_curve_is_that_of_transformers_and_torch(run: Path, kit: Path) -> None:
    """The same pairs as rows of their own in transformers, the losses by hand, torch's AdamW, the paper's schedule."""
    read, trained, _ = numbers(kit)
    model = at_first(kit).train()
    records = [comparison(i) for i in range(60)]
    stream = [i for epoch in range(3) for i in read(epoch)]
    assert sorted(stream[: len(trained)]) == sorted(trained) and len(stream) >= 96
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-5)
    for line in metrics(run)[1:]:
        step = line["step"]
        batch = [records[i] for i in stream[8 * (step - 1) : 8 * step]]
        both = pair_scores(model, kit, batch)
        ranking, auxiliary = losses(both, batch, LARGE)
        loss = (ranking + 0.5 * auxiliary).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = 3e-3 * (step / 5 if step <= 5 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 5) / 7)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert line["lr"] == pytest.approx(lr, rel=1e-9)
        assert line["loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert line["ranking_loss"] == pytest.approx(ranking.mean().item(), rel=2e-5)
        assert line["safety_loss"] == pytest.approx(auxiliary.mean().item(), rel=2e-5)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=2e-4)
        assert line["accuracy"] == float((both[:, 0] > both[:, 1]).float().mean())
        assert line["epochs"] == pytest.approx(8 * step / len(trained)) and line["seen"] == 8 * step
    ours = load(run / "step-000012")
    for name, theirs in model.state_dict().items():
        assert float((ours.state_dict()[name] - theirs).abs().max()) < 1e-4, name


def test_heldout_figures_are_those_of_the_saved_model(run: Path, kit: Path) -> None:
    """From transformers' scores: the loss, the shares by rating and safety bin, and the origin by brute force."""
    _, trained, held = numbers(kit)
    records = [comparison(i) for i in held]
    assert 5 < len(held) < 30 and not prompts(records) & prompts([comparison(i) for i in trained])
    by_step = {m["step"]: m for m in metrics(run)}
    for step in (0, 3, 12):
        told = by_step[step]
        model = load(run / f"step-{step:06d}") if step else at_first(kit)
        with torch.no_grad():
            both = pair_scores(model, kit, records).double()
        ranking, auxiliary = losses(both, records, LARGE)
        assert told["heldout_loss"] == pytest.approx(float((ranking + 0.5 * auxiliary).mean()), rel=1e-5)
        right = (both[:, 0] > both[:, 1]).tolist()
        assert told["heldout_accuracy"] == told["heldout"]["accuracy"]["value"] == np.mean(right)
        for key, field in (("by_rating", "rating"), ("by_safety", "safety"), ("by_batch", "batch")):
            groups: dict[str, list[bool]] = {}
            for r, it in zip(right, records):
                if field in it:
                    groups.setdefault(str(it[field]), []).append(r)
            found = {name: (share["value"], share["n"]) for name, share in told["heldout"][key].items()}
            assert found == {name: (np.mean(g), len(g)) for name, g in groups.items()}
        answers = [
            (s, y) for p, r in zip(both.tolist(), records) if "safety" in r for s, y in zip(p, SAFE[r["safety"]])
        ]
        x, y = (torch.tensor(v, dtype=torch.float64) for v in zip(*answers))
        grid = torch.linspace(-6, 6, 12001, dtype=torch.float64)
        cross_entropy = F.binary_cross_entropy_with_logits(
            x[None] + grid[:, None], y.expand(len(grid), -1), reduction="none"
        ).sum(1)
        offset = told["score_offset"]
        assert offset == pytest.approx(float(grid[cross_entropy.argmin()]), abs=1.1e-3)
        unsafe = y == 0
        below = torch.sigmoid(x + offset) < 0.15
        threshold = told["heldout"]["threshold"]
        assert (threshold["n"], threshold["unsafe"], threshold["found"]) == (len(x), unsafe.sum(), below.sum())
        if step:  # what is saved: the raw score has no offset, config.json has it
            config = json.loads((run / f"step-{step:06d}/config.json").read_text())
            assert config["score_offset"] == offset
            assert model.config.score_offset == offset  # transformers passes it on and does not add it
    assert by_step[12]["heldout_loss"] < by_step[0]["heldout_loss"] - 0.3


def test_ratings_and_the_curve_are_shown(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    loud = [a for a in args[1:] if a != "--quiet"]
    told = metrics(train(server, tmp_path, loud))
    err = (tmp_path / "log.err").read_text()
    assert "before the first step: held-out loss" in err and "score_offset" in err
    lines = [line.split() for line in err.splitlines()]
    curve = [line for line in lines if len(line) in (5, 7) and re.fullmatch(r"\d+\.\d\d", line[1])]
    curve = [line for line in curve if line[0].isdigit()]
    held = [m for m in told if "heldout" in m]
    assert [int(line[0]) for line in curve] == [0, 3, 6, 9, 12]
    for line, m in zip(curve, held):
        assert line[1] == f"{m.get('epochs', 0):.2f}"
        assert line[-3:-1] == [f"{m['heldout_loss']:.4f}", f"{100 * m['heldout_accuracy']:.1f}"]
    assert any(line[-5:] == [*RATINGS, "average"] for line in lines)
    assert any(
        line[:3] == ["right", "%", f"{100 * held[-1]['heldout']['by_rating'][RATINGS[0]]['value']:.1f}"]
        for line in lines
    )
    assert "sigmoid(score) < 0.15" in err


# --- where it starts ----------------------------------------------------------------------------------------------


def untrained(server: harness.Server, kit: Path, folder: Path, init: Path, seed: int) -> dict[str, Any]:
    """The weights of a run of one step with a learning rate of 0."""
    from safetensors.torch import load_file

    folder.mkdir()
    line = f"--init {init} {kit}/pairs.jsonl --context 128 --batch-size 2 --steps 1 --lr 0 --seed {seed} --quiet"
    return load_file(train(server, folder, line) / "step-000001/model.safetensors")


def test_the_head_is_drawn_from_the_seed(server: harness.Server, kit: Path, run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    found = [untrained(server, kit, tmp_path / str(i), kit / "lm", seed) for i, seed in enumerate((3, 3, 4))]
    lm = load_file(kit / "lm/model.safetensors")
    for weights in found:
        assert weights.keys() - {"score.weight"} == lm.keys() - {"lm_head.weight"}
        assert all(torch.equal(weights[name], lm[name]) for name in weights.keys() & lm.keys())
    assert torch.equal(found[0]["score.weight"], found[1]["score.weight"])
    assert not torch.equal(found[0]["score.weight"], found[2]["score.weight"])
    assert 0.6 < float(found[0]["score.weight"].std()) * math.sqrt(33) < 1.5
    kept = untrained(server, kit, tmp_path / "kept", run, 3)  # from a reward model: its head stays, whatever the seed
    theirs = load_file(run / "step-000012/model.safetensors")
    assert kept.keys() == theirs.keys() and all(torch.equal(kept[name], theirs[name]) for name in theirs)


def test_a_trained_folder_in_transformers(run: Path, kit: Path) -> None:
    """A padded batch gives the scores of our own model, row by row, to rounding."""
    from llama2cli.nn import checkpoint

    rows = [encoded(kit, comparison(i)["prompt"] + comparison(i)[w]) for i in range(9) for w in ("chosen", "rejected")]
    assert len({len(r) for r in rows}) > 5
    ours = checkpoint.load_model(run / "step-000012", scorer=True)
    with torch.no_grad():
        theirs = scores(load(run / "step-000012"), rows)
        for row, score in zip(rows, theirs):
            assert float(ours.scores(ours(torch.tensor([row])))[0, -1]) == pytest.approx(float(score), abs=1e-5)
    assert float(theirs.std()) > 0.1


# --- margins and the auxiliary loss -------------------------------------------------------------------------------

ONE_STEP = "--init {kit}/lm {{pairs}} --context 128 --batch-size 12 --steps 1 --seed 7 --quiet "


@pytest.mark.parametrize(
    "flags, margins",
    [
        ("--margin none", dict.fromkeys(RATINGS, 0.0)),
        ("--margin small", SMALL),
        ("--margin large", LARGE),
        ("--margin 2,1,1/2,0.25", dict(zip(RATINGS, (2, 1, 0.5, 0.25)))),
        ("", SMALL),  # where every pair has a rating
        ("--margin large --no-shared-prefix --micro-tokens 1", LARGE),
    ],
)
def test_margins(server: harness.Server, kit: Path, tmp_path: Path, flags: str, margins: dict[str, float]) -> None:
    records = [comparison(i) for i in range(12)]
    run = train(server, tmp_path, ONE_STEP.format(kit=kit) + flags, pairs=records)
    with torch.no_grad():
        ranking, _ = losses(pair_scores(at_first(kit), kit, records), records, margins)
    [line] = metrics(run)
    assert line["loss"] == pytest.approx(float(ranking.mean()), abs=1e-5)
    assert "safety_loss" not in line
    assert resolved(run)["margin"] == pytest.approx(list(margins.values()))


def test_pairs_without_a_rating(server: harness.Server, kit: Path, tmp_path: Path) -> None:
    """No margin where one is not rated, unless a rating is given for it; one that was asked for is an error."""
    records = [comparison(i) for i in range(12)]
    del records[4]["rating"]
    for name in ("plain", "default"):
        (tmp_path / name).mkdir()
    plain = train(server, tmp_path / "plain", ONE_STEP.format(kit=kit), pairs=records)
    assert resolved(plain)["margin"] == [0, 0, 0, 0]
    given = train(server, tmp_path / "default", ONE_STEP.format(kit=kit) + "--default-rating slightly", pairs=records)
    records[4]["rating"] = "slightly"
    with torch.no_grad():
        ranking, _ = losses(pair_scores(at_first(kit), kit, records), records, SMALL)
    assert metrics(given)[0]["loss"] == pytest.approx(float(ranking.mean()), abs=1e-5)


def test_the_safety_loss_is_on_with_the_safety_mix(server: harness.Server, kit: Path, tmp_path: Path) -> None:
    records = [comparison(i) for i in range(1, 13)]
    line = ONE_STEP.format(kit=kit).replace("{pairs}", "--data safety={pairs}") + "--mix safety --margin none"
    run = train(server, tmp_path, line, pairs=records)
    with torch.no_grad():
        both = pair_scores(at_first(kit), kit, records)
        ranking, auxiliary = losses(both, records, dict.fromkeys(RATINGS, 0.0))
    [told] = metrics(run)
    assert resolved(run)["safety_weight"] == 1.0
    assert told["loss"] == pytest.approx(float((ranking + auxiliary).mean()), abs=1e-5)
    assert told["ranking_loss"] == pytest.approx(float(ranking.mean()), abs=1e-5)
    assert told["safety_loss"] == pytest.approx(float(auxiliary.mean()), abs=1e-5)


def test_the_shared_prefix_changes_no_run(server: harness.Server, args: list[str], run: Path, tmp_path: Path) -> None:
    """Nor does the size of micro-batches, but for rounding."""
    for name, flags in (("two", ["--no-shared-prefix"]), ("small", ["--micro-tokens", "60"]), ("large", [])):
        (tmp_path / name).mkdir()
        line = [a for a in args[1:] if a not in ("--micro-tokens", "256")] + flags
        other = train(server, tmp_path / name, line)
        for ours, theirs in zip(metrics(other), metrics(run), strict=True):
            assert ours.keys() == theirs.keys()
            for key in ("loss", "grad_norm", "heldout_loss", "score_offset"):
                assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=2e-4, abs=1e-5), (name, key)


# --- mixtures -----------------------------------------------------------------------------------------------------

MIX = "--init {kit}/lm --context 128 --batch-size 8 --quiet --dry-run"


def dry(capsys: pytest.CaptureFixture[str], kit: Path, folder: Path, flags: str, **sizes: int) -> dict[str, Any]:
    """What --dry-run says. sizes: pairs of each source; "_" in a name is a dot."""
    start, line = 0, ["rm-train", *MIX.format(kit=kit).split(), *flags.split(), "-o", str(folder / "run")]
    for name, n in sizes.items():
        path = write(folder / f"{name}.jsonl", [comparison(i) for i in range(start, start + n)])
        line += ["--data", f"{name.replace('_', '.')}={path}"]
        start += n
    assert cli.invoke(line) == 0, capsys.readouterr().err
    assert not (folder / "run").exists()
    return json.loads(capsys.readouterr().out)


def test_mixtures_by_name(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"helpfulness": 24, "safety_meta": 18, "safety_harmless": 18, "open_shp": 36}
    told = dry(capsys, kit, tmp_path, "--mix helpfulness", **sizes)
    assert told["data"] == {"helpfulness": 24, "safety.meta": 6, "safety.harmless": 6, "open.shp": 12}
    assert told["resolved"]["steps"] == 6 and told["resolved"]["safety_weight"] == 0
    told = dry(capsys, kit, tmp_path, "--mix safety", **sizes)
    assert told["data"] == {"helpfulness": 2, "safety.meta": 18, "safety.harmless": 18, "open.shp": 2}  # 36 : 4
    assert told["resolved"]["safety_weight"] == 1
    told = dry(capsys, kit, tmp_path, "--mix safety --safety-weight 0 --own-share 1 --epochs 3", **sizes)
    assert told["data"] == {"safety.meta": 18, "safety.harmless": 18}
    assert told["resolved"]["safety_weight"] == 0 and told["resolved"]["steps"] == 14
    told = dry(capsys, kit, tmp_path, "--mix helpfulness --without open", **sizes)
    assert told["data"] == {"helpfulness": 24, "safety.meta": 12, "safety.harmless": 12}
    told = dry(capsys, kit, tmp_path, "--without open --without safety", **sizes)
    assert told["data"] == {"helpfulness": 24}
    assert dry(capsys, kit, tmp_path, "", **sizes)["data"] == {k.replace("_", "."): n for k, n in sizes.items()}


def test_a_rest_that_is_too_small_is_told(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {name: write(tmp_path / f"{name}.jsonl", [comparison(i) for i in range(n)]) for name, n in
             (("helpfulness", 20), ("open", 10))}  # fmt: skip
    line = f"rm-train {MIX.format(kit=kit)} --mix helpfulness -o {tmp_path}/run".replace(" --quiet", "").split()
    line += [f"--data={name}={path}" for name, path in paths.items()]
    assert cli.invoke(line) == 0
    assert "the mix wants 20 pairs of other data and there are 10: 67% are helpfulness data" in capsys.readouterr().err


def test_what_is_left_out_of_training_is_still_measured(server: harness.Server, kit: Path, tmp_path: Path) -> None:
    line = f"""--init {kit}/lm --data safety={{a}} --data open.x={{b}} --context 128 --batch-size 8 --steps 1
        --heldout 0.3 --without open --quiet"""
    run = train(server, tmp_path, line, a=[comparison(i) for i in range(20)], b=[comparison(i) for i in range(20, 40)])
    assert [p["name"] for p in resolved(run)["data"]] == ["safety"]
    assert set(metrics(run)[-1]["heldout"]["by_source"]) == {"safety", "open.x"}


# --- what is held out ---------------------------------------------------------------------------------------------


def test_weights_of_sources(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", [comparison(i) for i in range(20)])
    write(tmp_path / "b.jsonl", [comparison(i) for i in range(20, 30)])
    line = f"rm-train {MIX.format(kit=kit)} {tmp_path}/a.jsonl:0.25 --data b={tmp_path}/b.jsonl:3 -o {tmp_path}/run"
    assert cli.invoke(line.split()) == 0
    assert json.loads(capsys.readouterr().out)["data"] == {"a": 5, "b": 30}


def test_heldout_in_a_file_of_its_own(server: harness.Server, kit: Path, tmp_path: Path) -> None:
    """Prompts of the held-out file are not trained on; how many pairs that leaves out is told."""
    mine, held = [comparison(i) for i in range(30)], [comparison(i) for i in range(24, 40)]
    line = f"--init {kit}/lm {{mine}} --heldout {{held}} --context 128 --batch-size 8 --steps 1 --seed 7"
    run = train(server, tmp_path, line, mine=mine, held=held)
    assert "6 comparisons are not trained on: --heldout has their prompts" in (tmp_path / "log.err").read_text()
    assert [p["examples"] for p in resolved(run)["data"]] == [24]
    with torch.no_grad():
        both = pair_scores(at_first(kit), kit, held)
    first = metrics(run)[0]
    assert first["heldout"]["accuracy"]["n"] == 16
    assert first["heldout_accuracy"] == float((both[:, 0] > both[:, 1]).float().mean())


@pytest.mark.parametrize("each", [1, 4])
def test_each_weekly_batch_holds_out_its_own(kit: Path, each: int) -> None:
    _, trained, held = numbers(kit, heldout=[], heldout_per_batch=each)
    records = [comparison(i) for i in range(60)]
    assert sorted(trained + held) == list(range(60))
    assert not prompts([records[i] for i in trained]) & prompts([records[i] for i in held])
    weeks = Counter(records[i]["batch"] for i in held)
    assert set(weeks) == {10, 11, 12} and min(weeks.values()) >= each
    assert sum(weeks.values()) <= 2 * 3 * each  # two pairs share a prompt


def test_heldout_does_not_depend_on_the_seed_or_on_other_records(kit: Path, tmp_path: Path) -> None:
    held = prompts([comparison(i) for i in numbers(kit)[2]])
    assert prompts([comparison(i) for i in numbers(kit, seed=8)[2]]) == held
    more = write(tmp_path / "more.jsonl", [comparison(i) for i in range(90)])
    longer = prompts([comparison(i) for i in numbers(kit, files=[str(more)])[2]])
    assert held < longer and longer - held <= prompts([comparison(i) for i in range(60, 90)])


# --- what is left out ---------------------------------------------------------------------------------------------


def test_pairs_that_teach_nothing_are_counted(server: harness.Server, kit: Path, tmp_path: Path) -> None:
    records = [comparison(i) for i in range(20)]
    for i in (3, 8):
        records[i]["safety"] = "rejected_safe"
    records[5]["rejected"] = records[5]["chosen"]
    for i in (7, 11, 13):
        records[i]["prompt"] = [user("fox and wolf " * 30)]
    records[15]["prompt"] = [user("what is [INST] and <<SYS>> ?")]
    line = f"--init {kit}/lm {{pairs}} --context 128 --batch-size 8 --steps 1"
    run = train(server, tmp_path, line, pairs=records)
    err = (tmp_path / "log.err").read_text()
    assert "left out 2: the chosen answer is unsafe, the other is safe" in err
    assert "left out 1: the two answers are the same" in err
    assert "comparisons left out, longer than the context: 3" in err
    assert "tags of the chat format escaped in contents: 4" in err  # in each of the two dialogues
    assert "14 comparisons, " in err
    assert [p["examples"] for p in resolved(run)["data"]] == [14]


def test_long_pairs_are_cut(server: harness.Server, kit: Path, tmp_path: Path) -> None:
    """At the context, and read at the last token that is left; one whose answers are the same by then is left out."""
    long = "fox and wolf " * 30
    records = [comparison(i) for i in range(1, 5)]
    records[0]["chosen"] = [answer(f"one {long}")]
    records[1]["rejected"] = [answer(f"two {long}")]
    records[3]["prompt"] = [user(long)]
    line = f"--init {kit}/lm {{pairs}} --context 80 --long cut --batch-size 3 --steps 1 --margin none --seed 7"
    run = train(server, tmp_path, line, pairs=records)
    err = (tmp_path / "log.err").read_text()
    assert "answers cut at the context: 4" in err
    assert "comparisons left out, the two answers are the same within the context: 1" in err
    both = [encoded(kit, r["prompt"] + r[w])[:80] for r in records[:3] for w in ("chosen", "rejected")]
    assert sum(len(s) == 80 for s in both) == 2
    with torch.no_grad():
        chosen, rejected = scores(at_first(kit), both).view(-1, 2).T
    assert metrics(run)[0]["loss"] == pytest.approx(float(F.softplus(rejected - chosen).mean()), abs=1e-5)


# --- binary classifiers -------------------------------------------------------------------------------------------


def test_a_classifier_learns(server: harness.Server, kit: Path, tmp_path: Path) -> None:
    line = f"""--init {kit}/lm {kit}/labels.jsonl --objective binary --context 128 --batch-size 12 --epochs 20 --lr 1e-2
        --heldout 0.3 --eval-every 8 --seed 7"""
    run = train(server, tmp_path, line)
    records = [labelled(i) for i in range(60)]
    told = metrics(run)
    first, last = told[0], told[-1]
    assert last["heldout_accuracy"] == 1.0 and last["heldout"]["auc"] == 1.0 and last["heldout_loss"] < 0.1
    assert last["accuracy"] == 1.0 and first["heldout_accuracy"] < 1
    _, _, held = numbers(kit, files=[str(kit / "labels.jsonl")], objective="binary", heldout=["0.3"])
    labels = torch.tensor([records[i]["label"] for i in held])
    for line_, model in ((first, at_first(kit)), (last, load(run / f"step-{last['step']:06d}"))):
        with torch.no_grad():
            found = scores(model, [encoded(kit, records[i]["messages"]) for i in held]).double()
        nll = F.softplus(torch.where(labels == 1, -found, found)).mean()
        assert line_["heldout_loss"] == pytest.approx(float(nll), rel=1e-4, abs=1e-6)
        result = line_["heldout"]
        called, one = found > 0, labels == 1
        for name, k, n in (
            ("accuracy", called == one, torch.ones_like(one)),
            ("precision", called & one, called),
            ("recall", called & one, one),
        ):
            assert (name in result) == bool(n.any())
            if n.any():
                assert result[name]["value"] == pytest.approx(int(k.sum()) / int(n.sum()))
        order = [float(a > b) + 0.5 * float(a == b) for a in found[one] for b in found[~one]]
        assert result["auc"] == pytest.approx(np.mean(order))
    err = (tmp_path / "log.err").read_text()
    assert "60 dialogues, " in err and "area under the ROC curve 1.000" in err and "common prompts" not in err
    assert "A classifier of" in (run / f"step-{last['step']:06d}/README.md").read_text()
    assert "margin" not in last and resolved(run)["margin"] is None


# --- resuming -----------------------------------------------------------------------------------------------------


def test_killed_three_times(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    assert harness.check_kills(server, args, tmp_path, kills=3)["kills"] == 3


def test_resumed_at_every_step(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    """And measured, and calibrated, at every step."""
    each = changed(args, save_every=1, eval_every=1, steps=5)
    harness.check_every_step(server, each, tmp_path, steps=5)


def test_killed_at_file_operations(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    few = changed(args, steps=2, save_every=1, eval_every=1, keep=1)
    assert harness.check_crash_points(server, few, tmp_path, first=3, every=41) >= 3


@pytest.mark.slow
def test_killed_at_every_file_operation(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    few = changed(args, steps=2, save_every=1, eval_every=1, keep=1)
    assert harness.check_crash_points(server, few, tmp_path) > 60


@pytest.mark.slow
def test_killed_thirty_times(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    assert harness.check_kills(server, args, tmp_path, kills=30, seed=1)["kills"] == 30


def test_a_signal_saves(server: harness.Server, args: list[str], run: Path, tmp_path: Path) -> None:
    """A step that is saved between two measurements has no calibrated origin yet; that is told."""
    stopped = tmp_path / "run"
    slow = [a for a in changed(args, save_every=12, eval_every=12) if a != "--quiet"]
    pid = server.start([*slow, "-o", stopped], tmp_path / "log")
    while not (stopped / "metrics.jsonl").exists() or (stopped / "metrics.jsonl").read_bytes().count(b"\n") < 2:
        time.sleep(0.001)
    os.kill(pid, signal.SIGTERM)
    assert server.wait() == 130
    done = metrics(stopped)[-1]["step"]
    assert 1 <= done < 12
    assert "score_offset" not in json.loads((stopped / f"step-{done:06d}/config.json").read_text())
    assert "saved without score_offset" in (tmp_path / "log.err").read_text()
    harness.finish(server, slow, stopped)
    assert harness.tensors(stopped / "step-000012") == harness.tensors(run / "step-000012")
    offset = json.loads((stopped / "step-000012/config.json").read_text())["score_offset"]
    assert offset == json.loads((run / "step-000012/config.json").read_text())["score_offset"]


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": "small"}, "--margin: margin"),
        ({"safety_weight": 0.1}, "--safety-weight: the run has 0.5, now it would be 0.1"),
        ({"batch_size": 4}, "--batch-size: the run has 8, now it would be 4"),
        ({"heldout": 0.1}, "--data: data[0].examples: the run has"),
        ({"context": 80}, "--context: the run has 128"),
        ({"seed": 8}, "--seed: the run has 7, now it would be 8"),
        ({"init": "{run}"}, "--init"),
        ({"tags": "keep"}, "--tags"),
    ],
)
def test_other_settings_are_refused(
    args: list[str], run: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    change = {k: str(v).format(run=run) for k, v in change.items()}
    code, err = fails(capsys, [*changed(args, **change), "-o", run, "--resume"])
    assert code == 2 and message in err and str(run) in err


def test_a_label_that_changed_is_another_run(
    args: list[str], kit: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [comparison(i) for i in range(60)]
    same = write(tmp_path / "pairs.jsonl", [{**r, "source": "elsewhere"} for r in records])
    assert cli.invoke([*changed(args, data=same), "-o", str(run), "--resume"]) == 0  # nothing that is trained on
    capsys.readouterr()
    records[1]["rating"] = "significantly"
    write(same, records)
    code, err = fails(capsys, [*changed(args, data=same), "-o", run, "--resume"])
    assert code == 2
    assert "data[0].sha256" in err or "heldout[0].sha256" in err


# --- several processes, stdin -------------------------------------------------------------------------------------


def torchrun(arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    return harness.torchrun(arguments, ENV)


def test_two_ranks_train_as_one_does(server: harness.Server, args: list[str], tmp_path: Path) -> None:
    """Three pairs a step in micro-batches of a pair: the ranks have unequal numbers of them, one of them is empty."""
    few = changed(args, batch_size=3, micro_tokens=50, steps=6)
    two, one = tmp_path / "two", harness.reference(server, few, tmp_path)[0]
    done = torchrun([*few, "-o", two])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and json.loads(done.stdout)["step"] == 6
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss", "grad_norm", "heldout_loss", "score_offset", "safety_loss"):
            assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), abs=1e-5, rel=1e-5)
        for key in ("accuracy", "heldout_accuracy", "epochs", "seen"):
            assert ours.get(key) == theirs.get(key)
    step = two / "step-000006"
    ours, theirs = (load(f / step.name).state_dict() for f in (two, one))
    assert all(float((ours[k] - theirs[k]).abs().max()) < 2e-5 for k in theirs)

    (two / "latest").write_text("step-000003\n")
    before = (metrics(two), harness.tensors(step), (step / "config.json").read_text())
    done = torchrun([*few, "-o", two, "--resume"])
    assert done.returncode == 0, done.stderr
    assert (metrics(two), harness.tensors(step), (step / "config.json").read_text()) == before


def test_stdin(
    server: harness.Server,
    kit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Records from a pipe are those of a file; resumed with the same ones it goes on."""
    line = f"--init {kit}/lm {{pairs}} --context 128 --batch-size 4 --steps 2 --save-every 1 --seed 7 --quiet"
    records = [comparison(i) for i in range(12)]
    plain = train(server, tmp_path, line, pairs=records)
    piped = tmp_path / "piped"
    for flags in ("", "--resume"):
        with (tmp_path / "pairs.jsonl").open() as f:
            monkeypatch.setattr(sys, "stdin", f)
            args = f"rm-train {line.format(pairs='--data pairs=-')} {flags} -o {piped}"
            assert cli.invoke(args.split()) == 0, capsys.readouterr().err
        if not flags:
            (piped / "latest").write_text("step-000001\n")
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in metrics(piped)] == pytest.approx([m[name] for m in metrics(plain)], rel=1e-5)


# --- what is refused ----------------------------------------------------------------------------------------------

NO_LABEL = '--safety-weight: no comparison that is trained on has a "safety" label'
NO_KINDS = "--calibrate: wants held-out answers that are safe and some that are not"
BINARY = "{c}/labels.jsonl --objective binary --heldout 0.2"
BAD = [
    (2, "--own-share: is the share in a mixture; give --mix", "{p} --own-share 0.3"),
    (2, "--own-share: expected 0.01 to 1, got 1.5", "{p} --mix safety --own-share 1.5"),
    (2, "--calibrate: wants held-out comparisons with safety labels; give --heldout", "{p} --calibrate"),
    (2, "each save (3) wants a measurement", "{p} --heldout 0.2 --calibrate --save-every 3 --eval-every 2"),
    (2, NO_KINDS, "{p} --heldout {c}/few.jsonl --calibrate"),
    (2, "give one of --heldout and --heldout-per-batch", "{p} --heldout 0.2 --heldout-per-batch 5"),
    (2, "--eval-every: there is nothing to measure; give --heldout", "{p} --eval-every 2"),
    (2, "give one of --steps and --epochs", "{p} --steps 2 --epochs 1"),
    (2, "--epochs: expected more than 0", "{p} --epochs 0"),
    (2, "fp16 is for inference only", "{p} --dtype fp16"),
    (2, "--margin: expected none, small, large, or four numbers", "{p} --margin tiny"),
    (2, 'got "smal"; did you mean "small"', "{p} --margin smal"),
    (2, "--margin: expected none, small, large, or four numbers", "{p} --margin 1,2,3"),
    (2, "--without: expected one of helpfulness, safety, open", "{p} --without webgpt"),
    (2, 'did you mean "open"', "{p} --without opem"),
    (2, 'named by its role, as safety=FILE or open.webgpt=FILE, got "pairs"', "{p} --mix safety"),
    (2, 'did you mean "safety"', "--data safty={p} --mix safety"),
    (2, "there are no data named helpfulness: give helpfulness=FILE", "--data open={p} --mix helpfulness"),
    (2, "--mix: sets the weights of the sources; leave :WEIGHT out", "--data safety={p}:2 --mix safety"),
    (2, "--without: leaves nothing to train on", "--data safety={p} --without safety"),
    (2, "there are no data named safety", "--data safety={p} --data open={c}/few.jsonl --mix safety --without safety"),
    (2, NO_LABEL, "{c}/few.jsonl --safety-weight 1"),
    (2, NO_LABEL, "--data safety={c}/few.jsonl --mix safety"),
    (2, NO_LABEL, "{c}/few.jsonl --heldout {c}/other.jsonl --safety-weight 1"),
    (2, NO_LABEL, "--data open={c}/few.jsonl --data safety={p} --without safety --safety-weight 1"),
    (2, 'two sources are called "pairs"', "{p} --data {p}"),
    (2, "--format: expected one of auto, comparison", "{p} --format hh"),
    (1, 'no record has a "batch": --heldout-per-batch has nothing to hold out', "{c}/few.jsonl --heldout-per-batch 2"),
    (1, "leaves nothing to train on", "{p} --heldout-per-batch 1000"),
    (1, "few.jsonl:2: rating: is missing, and the margin depends on it", "{c}/few.jsonl --margin small"),
    (1, "labels.jsonl:1", "{c}/labels.jsonl"),
    (1, "pairs.jsonl:1", "{p} --objective binary"),
    (1, "pairs.jsonl: holds no comparison to train on", "{p} --context 8"),
    (2, "--margin: has no meaning with --objective binary", BINARY + " --margin small"),
    (2, "--default-rating: has no meaning with --objective binary", BINARY + " --default-rating better"),
    (2, "--safety-weight: has no meaning with --objective binary", BINARY + " --safety-weight 1"),
    (2, "--calibrate: has no meaning with --objective binary", BINARY + " --calibrate"),
    (2, "--heldout-per-batch: has no meaning with --objective binary", BINARY + " --heldout-per-batch 5"),
]


@pytest.mark.parametrize("code, message, line", BAD)
def test_one_line(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, message: str, line: str
) -> None:
    few = [{k: v for k, v in comparison(i).items() if k not in ("safety", "batch")} for i in range(1, 12)]
    del few[1]["rating"]
    write(kit / "few.jsonl", few)
    write(kit / "other.jsonl", [comparison(i) for i in range(60, 70)])
    flags = line.format(p=kit / "pairs.jsonl", c=kit).split()
    context = [] if "--context" in flags else ["--context", "128"]
    args = ["rm-train", "--init", kit / "lm", "--quiet", *context, "--batch-size", 8, *flags, "-o", tmp_path / "run"]
    found, err = fails(capsys, args)
    assert (found, message in err) == (code, True), err
    assert not list(tmp_path.glob("run/step-*"))


def test_ratings_are_listed(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write(tmp_path / "p.jsonl", [comparison(1), comparison(2) | {"rating": "significant"}])
    code, err = fails(capsys, ["rm-train", "--init", kit / "lm", bad, "-o", tmp_path / "run", "--quiet"])
    assert code == 1 and "p.jsonl:2: rating: expected one of significantly, better, slightly, negligibly" in err
    assert 'did you mean "significantly"' in err


def test_a_role_that_is_left_out_and_not_there_is_told(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"rm-train --init {kit}/lm --data safety={kit}/pairs.jsonl --context 128 --without open --dry-run"
    assert cli.invoke([*line.split(), "-o", str(tmp_path / "run")]) == 0
    assert "warning: --without open: there are no such data" in capsys.readouterr().err


def test_a_head_that_is_not_finite_stops_the_run(server: harness.Server, kit: Path, tmp_path: Path) -> None:
    line = f"""rm-train --init {kit}/lm {kit}/pairs.jsonl --context 128 --batch-size 8 --steps 6 --save-every 1
        --lr 1e30 --warmup 0 --heldout 0.2 --eval-every 6 --quiet -o {tmp_path}/run"""
    assert server.run(line.split(), tmp_path / "log") == 1
    err = (tmp_path / "log.err").read_text()
    assert err.count("\n") == 1 and "the last checkpoint is good" in err
    harness.assert_loadable(tmp_path / "run")
