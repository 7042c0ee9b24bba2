"""Small things to train on: a tokenizer, token folders, a model shape. Nothing random."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = "red green blue fox wolf bear saw ate took one two three of the and near far under over house river".split()  # noqa: SIM905
SHAPE = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)


def documents(n: int, offset: int = 0) -> list[str]:
    """n short texts of few words, with digits, accents and runs of spaces in some."""
    texts = []
    for i in range(offset, offset + n):
        words = [WORDS[(i * 7 + j * j * 3 + i * j) % len(WORDS)] for j in range(3 + i * 5 % 11)]
        texts.append(" ".join(words) + (f" {i}" if i % 4 == 0 else "") + ("  é\n" if i % 9 == 0 else "."))
    return texts


def write(folder: Path) -> Path:
    """tok.model (300 pieces at most), model.json (its shape), token folders a (400 documents) and b (150)."""
    from llama2cli.text.shards import ShardWriter
    from llama2cli.text.tokenizer import Tokenizer, train

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tok.model").write_bytes(train(documents(550), 300))
    tokenizer = Tokenizer.load(folder / "tok.model")
    (folder / "model.json").write_text(json.dumps(SHAPE | {"vocab_size": tokenizer.vocab_size}))
    for name, texts in (("a", documents(400)), ("b", documents(150, 400))):
        with ShardWriter(folder / name, tokenizer, shard_tokens=3000) as writer:
            writer.add(name, tokenizer.pack(texts), sum(len(t.encode()) for t in texts))
            writer.publish({})
    return folder
