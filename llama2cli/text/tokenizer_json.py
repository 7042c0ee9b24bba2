"""Tokenizer files for the readers of other people: transformers, vLLM, llama.cpp's converter.

`tokenizer.model` goes out as it came in. `tokenizer.json` says the same to the `tokenizers` library, and
`tokenizer_config.json` has transformers use it. Choices, each for ids equal to ours:

1. The dummy space is a normalizer (Prepend), not the Metaspace pre-tokenizer that transformers 5 prefers: Metaspace
   puts no space before a text that begins with one, SentencePiece does.
2. So the class is PreTrainedTokenizerFast: LlamaTokenizer of transformers 5 installs Metaspace whatever the file says.
3. A merge is every cut of a piece into two pieces, by the score of the whole, as transformers' own converter has it;
   control and byte pieces take no part, because SentencePiece never makes them from text.

One difference is the library's nature: it parses control pieces in text, so "</s>" becomes id 2 there, never here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama2cli import console
from llama2cli.text.folders import atomic_write
from llama2cli.text.segments import MARK
from llama2cli.text.sentencepiece_proto import CONTROL, NORMAL, UNKNOWN, Spec
from llama2cli.text.tokenizer import BOS, EOS, UNK, Tokenizer


def write_tokenizer_files(
    folder: str | Path, tokenizer: Tokenizer, *, context: int, chat_template: str | None = None
) -> None:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json, so that AutoTokenizer gives our ids after BOS.

    context: positions of the model. chat_template: Jinja for transformers' `apply_chat_template`. Where the model
    normalises text or has user-defined symbols (no Llama tokenizer does), tokenizer.json is left out with a warning.
    """
    folder = Path(folder)
    atomic_write(folder / "tokenizer.model", tokenizer.proto)
    config = tokenizer_config(tokenizer.spec, context, chat_template)
    if tokenizer.exact:
        atomic_write(folder / "tokenizer.json", _dump(tokenizer_json(tokenizer.spec)))
    else:
        config["tokenizer_class"] = "LlamaTokenizer"
        console.warn(
            f"{tokenizer.name} is not quite a Llama tokenizer: no tokenizer.json is written", "no tokenizer.json"
        )
    atomic_write(folder / "tokenizer_config.json", _dump(config))


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def tokenizer_config(spec: Spec, context: int, chat_template: str | None = None) -> dict[str, Any]:
    """What tokenizer_config.json holds: BOS is added and EOS is not, as by Meta's; <unk> pads where there is no pad."""
    pad = spec.pieces[spec.pad_id].text if 0 <= spec.pad_id < len(spec.pieces) else spec.pieces[UNK].text
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": spec.pieces[BOS].text,
        "eos_token": spec.pieces[EOS].text,
        "unk_token": spec.pieces[UNK].text,
        "pad_token": pad,
        "padding_side": "left",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # generate() refuses the token_type_ids of the default
    }
    return config | ({"chat_template": chat_template} if chat_template else {})


def tokenizer_json(spec: Spec) -> dict[str, Any]:
    """What tokenizer.json holds: BPE with byte fallback, BOS in front."""
    bos = spec.pieces[BOS].text
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    prepend = {"type": "Prepend", "prepend": MARK}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": p.text, **added} for i, p in enumerate(spec.pieces) if p.kind in (CONTROL, UNKNOWN)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, spaces]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [BOS], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": spec.pieces[UNK].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {p.text: i for i, p in enumerate(spec.pieces)},
            "merges": [f"{left} {right}" for left, right in merges(spec)],
        },
    }


def merges(spec: Spec) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, best first: SentencePiece prefers the higher score, then the lower id."""
    ids = {p.text: i for i, p in enumerate(spec.pieces) if p.kind == NORMAL}
    out = []
    for text in sorted(ids, key=lambda t: (-spec.pieces[ids[t]].score, ids[t])):
        cuts = [(text[:i], text[i:]) for i in range(1, len(text))]
        out += [(left, right) for left, right in cuts if left in ids and right in ids]
    return out
