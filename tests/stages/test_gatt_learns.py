"""Ghost Attention works, at the smallest size: an instruction given once is obeyed longer after it than before.

A model that is trained from nothing on a world of a few facts obeys "say WORD" in the turn that it stands in, and
forgets it in the next (as the paper's baseline does, Table 30). `gatt-synth | sft` on its own answers changes that.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from llama2cli import cli
from llama2cli.nn.checkpoint import load_config, save_model
from llama2cli.nn.model import Llama
from llama2cli.text.tokenizer import Tokenizer, train

FACTS = {"cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack"}
WORDS = ("ahoy", "yes", "well", "so")
TURNS = 8
SHAPE = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=48, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)  # fmt: skip


def talk(rng: random.Random) -> dict:
    """A dialogue of the base model's training: half with the instruction in every turn, a few in the first alone."""
    kind, word, messages = rng.random(), rng.choice(WORDS), []
    for i in range(rng.randint(1, 4)):
        animal = rng.choice(list(FACTS))
        told = kind < 0.5 or (i == 0 and kind < 0.7)
        rule, obeyed = (f"say {word} .\n\n", f" {word}") if told else ("", "")
        messages += [
            {"role": "user", "content": f"{rule}what says the {animal} ?"},
            {"role": "assistant", "content": FACTS[animal] + obeyed},
        ]
    return {"messages": messages}


def asked(rng: random.Random) -> dict:
    """A dialogue whose answers are to be given."""
    animals = [rng.choice(list(FACTS)) for _ in range(TURNS)]
    turns = [
        m for a in animals for m in (("user", f"what says the {a} ?"), ("assistant", "?"))
    ]  # fmt: skip
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def run(*args: object) -> None:
    assert cli.invoke([str(a) for a in args]) == 0, args


def untrained(folder: Path, texts: list[str]) -> Path:
    """A model of the world's tokens with the weights that training begins with."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train(texts, 300))
    tokenizer = Tokenizer.load(folder)
    (folder / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": tokenizer.vocab_size}))
    model = Llama(load_config(folder))
    model.init_weights(0)
    save_model(folder, model, tokenizer)
    return folder


def test_an_instruction_is_obeyed_longer(tmp_path: Path) -> None:
    rng = random.Random(0)
    talks = [talk(rng) for _ in range(1000)]
    start = untrained(tmp_path / "start", [m["content"] for t in talks[:300] for m in t["messages"]])
    rules = write(
        tmp_path / "rules.jsonl",
        [
            {"kind": "word", "instruction": f"say {w} .", "check": {"predicate": "contains_word", "text": w}}
            for w in WORDS
        ],
    )
    base, after = tmp_path / "base", tmp_path / "after"
    talks_file = write(tmp_path / "talks.jsonl", talks)
    flags = ("--batch-size", 16, "--lr", 3e-3, "--quiet")
    run("sft", "--init", start, "--data", talks_file, *flags, "--epochs", 3, "-o", base)
    how = ("--constraints", rules, "--max-new-tokens", 20, "--temperature", 0.7, "--top-p", 1)
    made, measured = tmp_path / "gatt.jsonl", tmp_path / "measured.jsonl"
    users = [write(tmp_path / f"users-{i}.jsonl", [asked(rng) for _ in range(40)]) for i in range(2)]
    run("gatt-synth", users[0], *how, "--policy", base, "--turn-window", 3, "--check", "--expand", "-o", made)
    run("sft", "--init", base, "--data", made, *flags, "--epochs", 2, "-o", after)
    run("eval", "gatt", users[1], *how, "--model", base, "--model", after, "--each", 1, "--json", "-o", measured)
    found = {(m["model"], m["measure"], m.get("turn")): m for m in map(json.loads, measured.read_text().splitlines())}
    assert found["base", "gatt.obedience", 1]["value"] > 0.8
    for turn in (2, 4, 8):
        assert found["base", "gatt.obedience", turn]["high"] < 0.2 < found["after", "gatt.obedience", turn]["low"], turn
    assert found["after", "gatt.later", None]["value"] > 0.5
