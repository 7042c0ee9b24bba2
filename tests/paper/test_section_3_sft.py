"""Llama 2, section 3.1: what the paper says of supervised fine-tuning, held against `sft` as it prepares a run.

Asserted is what the paper's text says, and what its reference code does of the format of a chat.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama2cli import cli
from llama2cli.errors import DataError
from llama2cli.nn.checkpoint import save_model
from llama2cli.nn.config import PRESETS, ModelConfig
from llama2cli.nn.model import Llama
from llama2cli.stages import chat, generate, sft
from llama2cli.text.chat import encode_conversation, encode_dialogue
from llama2cli.text.tokenizer import Tokenizer
from llama2cli.training import optim
from llama2cli.training.dist import World

CONTEXT = 128
DIALOGUES = 130


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, excerpts: Path) -> Tokenizer:
    """A small tokenizer of Llama's kind."""
    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    text = str(excerpts / "alice.txt.gz")
    assert cli.invoke(["tokenize", "--train", "--vocab-size", "400", "-o", str(path), "--quiet", text]) == 0
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with a small model, `init`, and dialogues, `data.jsonl`."""
    folder = tmp_path_factory.mktemp("sft")
    (folder / "init").mkdir()
    model = Llama(ModelConfig(tokenizer.vocab_size, 32, 64, 2, 4, 2, CONTEXT))
    model.init_weights(0)
    save_model(folder / "init", model, tokenizer)
    lines = [json.dumps({"messages": dialogue(f"What is {i}?", f"It is {i}.")}) + "\n" for i in range(DIALOGUES)]
    (folder / "data.jsonl").write_text("".join(lines))
    return folder


def dialogue(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """User and assistant in turn, after a system message."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return [*([{"role": "system", "content": system}] if system is not None else []), *messages]


def prepared(folder: Path, **settings: Any) -> sft.Job:
    """The run that `llama2 sft` would make with these flags."""
    world = World(rank=0, size=1, device=torch.device("cpu"))
    given = sft.Settings(files=[str(folder / "data.jsonl")], init=str(folder / "init"), out="", **settings)
    return sft.prepare(given, world)


def test_3_1_recipe(folder: Path) -> None:
    """Cosine schedule from 2e-5, weight decay 0.1, batch of 64, 2 epochs: 260 dialogues are 5 steps."""
    resolved = prepared(folder).work.resolved
    assert (resolved["lr"], resolved["weight_decay"], resolved["batch_size"]) == (2e-5, 0.1, 64)
    assert resolved["steps"] == -(-2 * DIALOGUES // 64)
    assert not optim.Schedule(2e-5, 5, 100).constant


def test_3_1_sequences_are_4096_tokens(folder: Path) -> None:
    """The context is the model's own, and that of the paper's models is 4096."""
    assert prepared(folder).work.resolved["context"] == CONTEXT
    assert {PRESETS[name].max_position_embeddings for name in ("7b", "13b", "34b", "70b")} == {4096}


def test_3_1_prompts_and_answers_are_concatenated_to_fill_the_sequence(folder: Path) -> None:
    """--packing concat: the rows of an epoch, one after another, are its dialogues, and none but the last has room."""
    job = prepared(folder, packing="concat")
    rows = job.rows
    items = [(0, i) for i in range(rows.count(0))]
    batch = rows.cut(items)
    ids = np.concatenate([micro["ids_BT"].numpy() for micro in batch.micro])
    whole = np.concatenate([rows.store.ids[int(i)] for i in rows.order.of(0)])
    assert ids.shape == (len(items), CONTEXT)
    np.testing.assert_array_equal(ids.ravel()[: len(whole) - 1], whole[:-1])
    assert ids.size - len(whole) < CONTEXT


def test_3_1_only_answers_are_trained(folder: Path, tokenizer: Tokenizer) -> None:
    """The loss on tokens of the prompt is zero: what is trained of a dialogue, decoded, is its answers."""
    texts = ["Who  are you?", "I am a llama.", "Are\nyou sure?", "Quite sure, 100%."]
    encoded = encode_dialogue(tokenizer, dialogue(*texts, system="Be brief."))
    parts: list[list[int]] = [[]]
    for i, trained in zip(encoded.ids, encoded.mask):
        if trained:
            parts[-1].append(i)
        elif parts[-1]:
            parts.append([])
    assert [tokenizer.decode(part).strip() for part in parts if part] == texts[1::2]
    assert all(part[-1] == tokenizer.eos_id for part in parts if part)


def test_3_1_every_batch_trains_its_answers_only(folder: Path, tokenizer: Tokenizer) -> None:
    """The same of what the loss is given, packed: decoded row by row, the targets are all answers and nothing else."""
    job = prepared(folder)
    batch, _ = next(job.rows.batches(64, None, None))
    trained = torch.cat([m["targets_BT"][m["targets_BT"] != -100] for m in batch.micro]).tolist()
    text = tokenizer.decode([i for i in trained if i != tokenizer.eos_id])
    answers = re.findall(r"It is \d+\.", text)
    assert len(answers) == len(set(answers)) == 64 == trained.count(tokenizer.eos_id)
    assert re.sub(r"It is \d+\.|\s", "", text) == ""


# --- the format of a chat, which is the reference code's -----------------------------------------------------------


def spelt(tokenizer: Tokenizer, *rounds: str) -> list[int]:
    """BOS, the text, EOS for each round."""
    return [i for text in rounds for i in (tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id)]


def test_3_reference_code_chat_format(tokenizer: Tokenizer) -> None:
    """[INST] and [/INST] around the user's text, BOS and EOS around each round, contents stripped."""
    ids = encode_dialogue(tokenizer, dialogue(" Hi there ", "Hello.\n", "And?", " Well.")).ids
    assert ids == spelt(tokenizer, "[INST] Hi there [/INST] Hello. ", "[INST] And? [/INST] Well. ")


def test_3_reference_code_folds_the_system_prompt_into_the_first_turn(tokenizer: Tokenizer) -> None:
    ids = encode_dialogue(tokenizer, dialogue("Hi", "Hello.", "And?", "Well.", system="Be brief.")).ids
    first = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. "
    assert ids == spelt(tokenizer, first, "[INST] And? [/INST] Well. ")


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_3_reference_code_refuses_prompts_with_tags(tokenizer: Tokenizer, tag: str) -> None:
    """`generate` and `chat` refuse what a person typed that holds a tag; a model's answer never stops them."""
    for stage in (generate, chat):
        assert {f.name: f.default for f in dataclasses.fields(stage.Settings)}["tags"] == "refuse"
    with pytest.raises(DataError, match="a tag of the chat format"):
        encode_conversation(tokenizer, dialogue(f"Say {tag}"), tags="refuse")
    encode_conversation(tokenizer, dialogue("Hi", f"Say {tag}", "Well?"), tags="refuse")


def test_3_updates_there_is_no_default_system_prompt() -> None:
    """The reference code's UPDATES of August 2023 took it away."""
    for stage in (generate, chat):
        assert {f.name: f.default for f in dataclasses.fields(stage.Settings)}["system"] is None
