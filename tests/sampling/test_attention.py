"""The parts of a dialogue among its tokens."""

from __future__ import annotations

import pytest
import sentencepiece

from llama2cli.rlhf.gatt import augment, keep_once
from llama2cli.sampling.attention import dialogue_parts, span
from llama2cli.text.chat import encode_dialogue
from llama2cli.text.tokenizer import Tokenizer

INSTRUCTION = "Act as the fox, number 7: é 🦊!"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"Act as the fox, number {i} says: hello!" for i in range(300)]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return Tokenizer.load(folder)


def dialogue(turns: int) -> list[dict]:
    return [
        {"role": role, "content": f"{role} says {i} the fox"} for i in range(turns) for role in ("user", "assistant")
    ]


@pytest.mark.parametrize("place", ["first", "system", "every"])
def test_parts_cover_the_tokens_and_say_what_they_hold(tokenizer, place):
    shown = augment(dialogue(3), INSTRUCTION) if place == "every" else keep_once(dialogue(3), INSTRUCTION, place)
    ids, parts = dialogue_parts(tokenizer, shown, INSTRUCTION, 4000)
    assert ids == encode_dialogue(tokenizer, shown).ids
    assert [p.begin for p in parts[1:]] == [p.end for p in parts[:-1]] and (parts[0].begin, parts[-1].end) == (
        0,
        len(ids),
    )
    assert [(p.turn, p.name) for p in parts] == [
        (1, "start"), (1, "instruction"), (1, "user"), (1, "answer"),
        (2, "user"), (2, "answer"), (3, "user"), (3, "answer"),
    ]  # fmt: skip
    texts = [tokenizer.decode(ids[p.begin : p.end]).strip() for p in parts]
    assert texts[1] == INSTRUCTION
    assert texts[0] == ("[INST] <<SYS>>" if place == "system" else "[INST]")
    assert texts[3::2] == [f"assistant says {i} the fox" for i in range(3)]
    for p in parts[3::2]:
        assert ids[p.end - 1] == 2, "an answer has its end"


def test_tags_in_an_instruction_are_escaped_as_they_are_in_the_dialogue(tokenizer):
    odd = "Say [INST] now."
    ids, parts = dialogue_parts(tokenizer, keep_once(dialogue(1), odd), odd, 4000)
    assert tokenizer.decode(ids[parts[1].begin : parts[1].end]).strip() == "Say [\\INST] now."
    ids, parts = dialogue_parts(tokenizer, keep_once(dialogue(1), odd), odd, 4000, tags="keep")
    assert tokenizer.decode(ids[parts[1].begin : parts[1].end]).strip() == odd


def test_the_context_ends_the_last_part(tokenizer):
    shown = keep_once(dialogue(2), INSTRUCTION)
    ids, parts = dialogue_parts(tokenizer, shown, INSTRUCTION, 4000)
    for context in range(parts[1].end, len(ids)):
        cut, fewer = dialogue_parts(tokenizer, shown, INSTRUCTION, context)
        assert cut == ids[:context] and fewer[-1].end == context and all(p.begin < p.end for p in fewer)
        assert fewer[:-1] == parts[: len(fewer) - 1]


def test_what_is_not_there_is_not_found(tokenizer):
    assert dialogue_parts(tokenizer, dialogue(1), INSTRUCTION, 4000) is None
    ids = tokenizer.encode("the fox says hello")
    assert span(tokenizer, ids, "") is None and span(tokenizer, ids, "says the") is None
    begin, end = span(tokenizer, ids, "fox says")
    assert tokenizer.decode(ids[begin:end]).strip() == "fox says"
