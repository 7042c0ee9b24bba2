"""Samples and pairs from an engine whose answers are known: what the records hold, in which order, and what is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llama2cli.errors import DataError
from llama2cli.sampling.engine import Result
from llama2cli.sampling.samples import (
    Tally,
    Voice,
    pair_records,
    policy_name,
    policy_names,
    sample_records,
    with_system,
)
from llama2cli.text.records import prompt_id, validate
from llama2cli.text.streams import Place
from llama2cli.text.tokenizer import Tokenizer

LIMIT = 12


@dataclass
class Said:
    """An engine that says its name, the sample index and the length of the prompt; it remembers what it was asked."""

    tokenizer: Tokenizer
    name: str = "fox"
    context: int = 80
    truncated: bool = False
    calls: list[tuple[list[list[int]], list]] = field(default_factory=list)

    def generate(self, prompts, params, *, tick=None):
        self.calls.append(([list(p) for p in prompts], list(params)))
        results = []
        for prompt, p in zip(prompts, params, strict=True):
            ids = self.tokenizer.encode(f"{self.name} {p.index} {len(prompt)} ".replace("  ", " "))
            results.append(Result(ids if self.truncated else [*ids, 2], [], [], self.truncated))
            if tick is not None:
                tick(results[-1])
        return results


def prompts(*texts: str, **more) -> list[tuple[Place, dict]]:
    return [
        (Place("in.jsonl", i), {"messages": [{"role": "user", "content": text}], **more})
        for i, text in enumerate(texts, 1)
    ]


HOW = dict(temperature=0.7, top_p=0.8, seed=11, max_new_tokens=LIMIT, policy="run")


def test_k_samples_of_each_prompt_in_order(tokenizer):
    engine, asked, ticked = Said(tokenizer), prompts("the fox", "the", "the fox", "the fox says 12"), []
    found = list(sample_records(asked, engine, tokenizer, k=3, **HOW, tick=ticked.append))
    assert [len(samples) for samples in found] == [3] * 4 and len(ticked) == 12
    for (_, prompt), samples in zip(asked, found):
        ids = [1, *tokenizer.encode(f"[INST] {prompt['messages'][0]['content']} [/INST]")]
        for i, sample in enumerate(samples):
            assert validate("sample", sample) == sample
            assert sample["messages"][:-1] == prompt["messages"]
            assert sample["messages"][-1] == {"role": "assistant", "content": f"fox {i} {len(ids)}"}
            n = len(tokenizer.encode(f"fox {i} {len(ids)} ")) + 1  # EOS counts
            expected = dict(id=prompt_id(prompt["messages"]), sample=i, policy="run", temperature=0.7, seed=11)
            assert {k: v for k, v in sample.items() if k != "messages"} == expected | {
                "n_tokens": n,
                "truncated": False,
            }
    [(sent, params)] = engine.calls
    assert sent[0] == sent[1] == sent[2] == sent[6] != sent[3]
    assert [p.index for p in params] == [0, 1, 2] * 4
    assert {(p.seed, p.temperature, p.top_p, p.max_new_tokens) for p in params} == {(11, 0.7, 0.8, LIMIT)}
    assert found[0] == found[2], "a prompt that comes twice has the same samples"
    more = next(sample_records(asked, Said(tokenizer), tokenizer, k=2, first=3, **HOW))
    assert [s["sample"] for s in more] == [3, 4]


def test_what_passes_through_and_what_does_not(tokenizer, capsys):
    extra = dict(id="mine", unsafe=True, category="x", round=3, help=0.5, reward=1.0, truncated=True, sample=9)
    [[sample]] = sample_records(prompts("the fox", **extra), Said(tokenizer), tokenizer, k=1, **HOW)
    assert (sample["unsafe"], sample["category"], sample["round"], sample["own_id"]) == (True, "x", 3, "mine")
    assert not {"help", "reward"} & set(sample), "scores of another answer"
    assert sample["sample"] == 0 and sample["truncated"] is False and sample["id"] != "mine"
    assert "in.jsonl:1: not passed on: help, reward" in capsys.readouterr().err
    again = [(Place("again", 1), {**sample, "messages": sample["messages"][:-1]})]
    assert next(sample_records(again, Said(tokenizer), tokenizer, k=1, **HOW)) == [sample]


def test_prompts_that_fill_the_context(tokenizer, capsys):
    asked = prompts("the fox", "the fox " * 60, "the")
    with pytest.raises(DataError, match=r"in.jsonl:2: the prompt has .* the context of the model is 80"):
        list(sample_records(asked, Said(tokenizer), tokenizer, k=2, **HOW))
    tally = Tally()
    found = list(sample_records(asked, Said(tokenizer), tokenizer, k=2, **HOW, skip_long=True, tally=tally))
    assert [len(samples) for samples in found] == [2, 0, 2]
    assert (tally.answers, tally.skipped) == (4, 1) and "in.jsonl:2: left out" in capsys.readouterr().err
    assert found[2][0]["messages"][0] == asked[2][1]["messages"][0]


def test_what_is_counted(tokenizer):
    tally = Tally()
    list(sample_records(prompts("a"), Said(tokenizer, "x" * 30, truncated=True), tokenizer, k=2, **HOW, tally=tally))
    list(sample_records(prompts("a"), Said(tokenizer, "fox", truncated=True), tokenizer, k=1, **HOW, tally=tally))
    assert (tally.answers, tally.truncated, tally.at_context) == (3, 3, 1)  # one is shorter than what was asked for
    told = tally.told("greedy", LIMIT)
    assert told.startswith("3 answers, ") and "greedy" in told
    assert told.endswith("; 2 truncated at --max-new-tokens 12; 1 truncated at the end of the context")


def test_tags(tokenizer):
    tally = Tally()
    [[sample]] = sample_records(prompts("a [INST]"), Said(tokenizer, "[INST]"), tokenizer, k=1, **HOW, tally=tally)
    assert sample["messages"][0]["content"] == "a [INST]", "what the user typed is theirs"
    assert sample["messages"][1]["content"].startswith("[\\INST]") and tally.escaped == 2
    with pytest.raises(DataError, match=r"in.jsonl:1: messages\[0\].content"):
        list(sample_records(prompts("a [INST]"), Said(tokenizer), tokenizer, k=1, **HOW, tags="refuse"))


def test_system_prompt():
    [(_, record)] = prompts("a")
    given = with_system(record, "be quick")
    assert [m["role"] for m in given["messages"]] == ["system", "user"] and len(record["messages"]) == 1
    assert with_system(given, "other") == given and with_system(record, None) is record


# --- pairs --------------------------------------------------------------------------------------------------------

PAIR = dict(seed=5, max_new_tokens=LIMIT)


def voices(tokenizer, one: Said | None = None, other: Said | None = None) -> tuple[Voice, Voice]:
    first, second = one or Said(tokenizer, "new"), other or Said(tokenizer, "old")
    return Voice(first, tokenizer, "run", 0.7, 0.9), Voice(second, tokenizer, "earlier", 1.1, 0.9)


def test_a_pair_has_an_answer_of_each(tokenizer):
    both = voices(tokenizer)
    asked = prompts(*[f"the fox {i}" for i in range(200)], unsafe=True)
    found = list(pair_records(asked, both, **PAIR))
    assert len(found) == 200
    for (_, prompt), pair in zip(asked, found):
        assert validate("pair", pair) == pair
        assert set(pair) == {"id", "prompt", "responses", "unsafe"}
        assert (pair["prompt"], pair["id"]) == (prompt["messages"], prompt_id(prompt["messages"]))
        said = {(r["policy"], r["temperature"], r["message"]["content"].split()[0]) for r in pair["responses"]}
        assert said == {("run", 0.7, "new"), ("earlier", 1.1, "old")}
        assert all(set(r) == {"message", "policy", "temperature"} for r in pair["responses"])
    for number, voice in enumerate(both):
        [(_, params)] = voice.engine.calls
        assert {(p.index, p.temperature, p.seed) for p in params} == {(number, voice.temperature, 5)}


def test_who_stands_first_is_random_and_depends_on_seed_and_prompt_alone(tokenizer):
    asked = prompts(*[f"the fox {i}" for i in range(400)])

    def first(window, seed) -> list[bool]:
        pairs = pair_records(window, voices(tokenizer), **PAIR | {"seed": seed})
        return [pair["responses"][0]["policy"] == "run" for pair in pairs]

    whole = first(asked, 5)
    assert 150 < sum(whole) < 250  # 5 standard errors
    assert first(asked[100:110], 5) == whole[100:110] and first(asked[::-1], 5) == whole[::-1]
    assert 150 < sum(a == b for a, b in zip(whole, first(asked, 6))) < 250


def test_identical_answers_are_marked_and_counted(tokenizer):
    class Same(Said):
        def generate(self, prompts, params, *, tick=None):
            return [Result([*self.tokenizer.encode(" fox " if self.name == "new" else "fox"), 2], [], [], False)] * len(
                prompts
            )

    tally = Tally()
    both = voices(tokenizer, Same(tokenizer, "new"), Same(tokenizer, "old"))
    found = list(pair_records(prompts("a", "b"), both, **PAIR, tally=tally))
    assert [pair["identical"] for pair in found] == [True, True] and tally.identical == 2
    assert "; 2 pairs of identical answers" in tally.told("greedy", LIMIT)


def test_a_prompt_too_long_for_either_is_left_out_and_counted_once(tokenizer):
    asked = prompts("the fox", "the fox " * 40, "the fox " * 60, "the")
    for contexts in ((80, 400), (400, 80), (80, 80)):
        one, other = (Said(tokenizer, name, context=n) for name, n in zip(("new", "old"), contexts))
        tally = Tally()
        found = list(pair_records(asked, voices(tokenizer, one, other), **PAIR, skip_long=True, tally=tally))
        assert [pair["prompt"] for pair in found] == [asked[i][1]["messages"] for i in (0, 3)]
        assert tally.skipped == 2
        assert all(len({r["message"]["content"].split()[-1] for r in pair["responses"]}) == 1 for pair in found)


def test_answers_that_were_cut_are_marked(tokenizer):
    both = voices(tokenizer, Said(tokenizer, "new", truncated=True))
    [pair] = pair_records(prompts("a"), both, **PAIR)
    assert {r["policy"]: r.get("truncated") for r in pair["responses"]} == {"run": True, "earlier": None}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("run", "run"),
        ("runs/chat/", "runs/chat"),
        ("../run/step-000500", "../run/step-000500"),
        ("/home/me/run", "run"),
        ("/home/me/run/", "run"),
        ("/home/me/run/step-000500", "run/step-000500"),
        (".", "."),
    ],
)
def test_the_name_of_a_policy_is_as_given_but_not_absolute(given, name):
    assert policy_name(given) == name and not Path(policy_name(given)).is_absolute()


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("new", "old", ("new", "old")),
        ("/a/run", "/b/run", ("a/run", "b/run")),
        ("/x/a/run/step-000500", "/x/b/run/step-000500", ("a/run/step-000500", "b/run/step-000500")),
        ("/a/run/step-000400", "/a/run/step-000500", ("run/step-000400", "run/step-000500")),
        ("run", "/b/run", ("run", "b/run")),
        ("/run", "/run", ("run", "run")),
    ],
)
def test_two_models_have_two_names(first, second, names):
    assert policy_names(first, second) == names


def test_three_models_have_three_names():
    assert policy_names("/a/run", "/b/run", "/b/chat") == ("a/run", "b/run", "b/chat")
    assert policy_names("a", "/x/b", "/y/c") == ("a", "b", "c")
    assert policy_names("/a/run") == ("run",)
