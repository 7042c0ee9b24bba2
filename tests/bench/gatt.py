"""How many instructions it takes until Ghost Attention holds for those that it was not trained on.

    python tests/bench/gatt.py --words 12:8 --words 60:8 --words 60:20 --words 60:40 --words 200:150

A small world: questions about eight animals, and the instruction "say WORD", where WORD is made of two syllables. A
model trained from nothing (3 layers) obeys it in the turn that it stands in, and in no other. `--words 60:40`: 60 words
are in that training; `gatt-synth` has 40 of them for the dialogues that `sft` then trains (1,200 records of 160
dialogues of 20 turns, and 300 ordinary ones). Obedience by turn, instruction in the first turn alone, is measured by
`eval gatt` on 48 dialogues of 22 turns for words of three sorts: trained with Ghost Attention, held out of it, and
never seen at all. Prints a table; some minutes a row on one core.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from llama2cli import cli
from llama2cli.nn.checkpoint import load_config, save_model
from llama2cli.nn.model import Llama
from llama2cli.text.tokenizer import Tokenizer, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--words", action="append", metavar="N:TAUGHT", help="words, and how many of them GAtt has")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--base", type=int, default=3000, help="dialogues that the model is first trained on")
parser.add_argument("--epochs", type=int, default=6, help="passes over them")
parser.add_argument("--gatt-epochs", type=int, default=1)
parser.add_argument("--records", type=int, default=1200, help="records of Ghost Attention")
parser.add_argument("--dim", type=int, default=64)

FACTS = {"cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "pig": "oink", "bee": "buzz", "owl": "hoot",
         "frog": "croak"}  # fmt: skip
QUESTIONS = ("what says the {} ?", "the {} says ?")
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
TURNS = (1, 2, 4, 10, 20, 22)
NEVER = 8  # words of the third sort; of the second as many at most


def instruction(word: str) -> str:
    return f"say {word} ."


def question(rng: random.Random) -> tuple[str, str]:
    animal = rng.choice(list(FACTS))
    return rng.choice(QUESTIONS).format(animal), FACTS[animal]


def talk(rng: random.Random, words: list[str]) -> dict[str, Any]:
    """An ordinary dialogue: half have the instruction in every turn, a tenth in the first alone, and forget it."""
    n, kind, word = rng.randint(1, 6), rng.random(), rng.choice(words)
    messages = []
    for i in range(n):
        asked, answer = question(rng)
        told = kind < 0.5 or (i == 0 and kind < 0.6)
        user = f"{instruction(word)}\n\n{asked}" if told else asked
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": f"{answer} {word}" if told else answer})
    return {"messages": messages}


def questions(rng: random.Random, turns: int) -> dict[str, Any]:
    """User turns; the answers are replaced."""
    users = [{"role": "user", "content": question(rng)[0]} for _ in range(turns)]
    return {"messages": [m for u in users for m in (u, {"role": "assistant", "content": "?"})][:-1]}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def rules(path: Path, words: list[str]) -> Path:
    check = {"predicate": "contains_word"}
    return write(path, [{"kind": "word", "instruction": instruction(w), "check": {**check, "text": w}} for w in words])


def run(*args: object) -> None:
    with redirect_stdout(io.StringIO()):
        code = cli.invoke([*map(str, args), "--quiet"])
    if code != 0:
        raise SystemExit(f"failed: llama2 {' '.join(map(str, args))}")


def untrained(folder: Path, texts: list[str], dim: int, seed: int) -> Path:
    """A model with the weights that training begins with."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train(texts, 330))
    tokenizer = Tokenizer.load(folder)
    shape = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=dim,
        intermediate_size=2 * dim, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    model = Llama(load_config(folder))
    model.init_weights(seed)
    save_model(folder, model, tokenizer)
    return folder


def world(folder: Path, n_words: int, taught: int, args: argparse.Namespace) -> list[tuple[str, str, dict[int, float]]]:
    """(sort of words, model, obedience by turn) for one number of words."""
    rng = random.Random(args.seed)
    words: list[str] = []
    while len(words) < n_words + NEVER:
        word = rng.choice(SYLLABLES) + rng.choice(SYLLABLES)
        words += [word] if word not in words else []
    words, never = words[:n_words], words[n_words:]
    shown = random.Random(99)
    texts = [m["content"] for _ in range(400) for m in talk(shown, words)["messages"]]
    start = untrained(folder / "start", texts + [instruction(w) for w in words + never] * 2, args.dim, args.seed)
    base, after = folder / "sft", folder / "gatt"
    talks = write(folder / "talks.jsonl", [talk(rng, words) for _ in range(args.base)])
    run("sft", "--init", start, "--data", talks, "--context", 512, "--batch-size", 32, "--lr", 3e-3,
        "--epochs", args.epochs, "--seed", args.seed, "-o", base)  # fmt: skip
    how = ("--max-new-tokens", 16, "--temperature", 0.7, "--top-p", 1)
    made = folder / "gatt.jsonl"
    run("gatt-synth", write(folder / "users.jsonl", [questions(rng, 20) for _ in range(160)]), "--policy", base, *how,
        "--constraints", rules(folder / "taught.jsonl", words[:taught]), "--turn-window", 4, "--check", "--expand",
        "--seed", args.seed, "-o", made)  # fmt: skip
    records = [json.loads(line) for line in made.read_text().splitlines()]
    rng.shuffle(records)
    mixed = write(folder / "mixed.jsonl", records[: args.records] + [talk(rng, words) for _ in range(300)])
    run("sft", "--init", base, "--data", mixed, "--context", 1024, "--batch-size", 16, "--lr", 1e-3,
        "--epochs", args.gatt_epochs, "--seed", args.seed, "-o", after)  # fmt: skip
    asked = write(folder / "asked.jsonl", [questions(rng, 22) for _ in range(48)])
    sorts = {"trained": words[:taught], "held out": words[taught:][:NEVER], "never seen": never}
    found = []
    for sort, mine in sorts.items():
        if mine:
            measured = folder / "measured.jsonl"
            given = rules(folder / "asked-for.jsonl", mine)
            run("eval", "gatt", asked, "--model", base, "--model", after, "--constraints", given, "--each", 1, *how,
                "--json", "--no-resume", "-o", measured)  # fmt: skip
            metrics = [json.loads(line) for line in measured.read_text().splitlines()]
            for model in ("sft", "gatt"):
                mean = {
                    m["turn"]: m["value"]
                    for m in metrics
                    if m["measure"] == "gatt.obedience" and m["model"] == model and set(m) & {"task", "source"} == set()
                }
                found.append((sort, model, mean))
    return found


def main() -> None:
    args = parser.parse_args()
    print("| words | with GAtt | asked for | model | " + " | ".join(f"turn {t}" for t in TURNS) + " |")
    print("| ---: | ---: | --- | --- |" + " ---: |" * len(TURNS), flush=True)
    for spec in args.words or ["12:8", "60:40"]:
        n, taught = map(int, spec.split(":"))
        with tempfile.TemporaryDirectory() as folder:
            for sort, model, mean in world(Path(folder), n, taught, args):
                cells = " | ".join(f"{mean.get(t, float('nan')):.2f}" for t in TURNS)
                print(f"| {n} | {taught} | {sort} | {model} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
