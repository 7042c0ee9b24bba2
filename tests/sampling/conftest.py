"""Shared by the tests of sampling: a small tokenizer, trained once."""

from __future__ import annotations

import pytest
import sentencepiece

from llama2cli.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Of 380 pieces and single bytes; a file of tests may have another of this name."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the fox number {i} says [INST] </s>" for i in range(300)]),
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
