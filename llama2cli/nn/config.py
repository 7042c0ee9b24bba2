"""What a Llama 2 model is made of: the numbers, the sizes that have a name, and `config.json`.

Choices that the paper leaves open:
1. 34b's feed-forward width is what the reference formula gives without a multiplier (22016).
2. Sizes that the paper does not have: 1m, 15m and 110m tie the embedding and the head (at these sizes the table is most
   of the model); 1b has the shape of TinyLlama.
3. Their learning rate: 3e-4 * (1e9 / parameters) ^ (1/3), at most 3e-3, below a billion parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llama2cli.errors import DataError, Misuse, did_you_mean

BOS, EOS = 1, 2
PAD = 0  # of transformers' batches: <unk>, which no text has a use for; Llama 2's tokenizer has no padding
CONTEXT = 4096  # Llama 2's (Table 1)
MAX_SHARD_BYTES = 5_000_000_000  # of one safetensors file; a larger model is saved in several
LM, SCORER = "LlamaForCausalLM", "LlamaForSequenceClassification"


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama 2 model, in the names of a Hugging Face `config.json`. Sizes count elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


def ffn_size(hidden_size: int, multiplier: float | None = None, multiple_of: int = 256) -> int:
    """Feed-forward width by the reference formula: two thirds of 4 * hidden, times the multiplier, rounded up."""
    width = int(2 * (4 * hidden_size) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def _paper(dim: int, layers: int, heads: int, kv: int, ffn: int) -> ModelConfig:
    return ModelConfig(32000, dim, ffn, layers, heads, kv, CONTEXT)


def _small(vocab: int, dim: int, ffn: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(vocab, dim, ffn, layers, heads, heads, 256, tie_word_embeddings=True)


PRESETS: dict[str, ModelConfig] = {
    "1m": _small(2048, 128, 352, 5, 4),
    "15m": _small(32000, 288, 768, 6, 6),
    "110m": _small(32000, 768, 2048, 12, 12),
    "1b": ModelConfig(32000, 2048, 5632, 22, 32, 4, CONTEXT),
    # Llama 2, section 2.2 and Table 1; grouped-query attention with 8 key-value heads in the two largest only
    "7b": _paper(4096, 32, 32, 32, ffn_size(4096)),
    "13b": _paper(5120, 40, 40, 40, ffn_size(5120)),
    "34b": _paper(8192, 48, 64, 8, ffn_size(8192)),
    "70b": _paper(8192, 80, 64, 8, ffn_size(8192, multiplier=1.3, multiple_of=4096)),
}


def preset(name: str, *, vocab_size: int | None = None, context: int | None = None) -> ModelConfig:
    """The configuration of a named size, or of a `config.json`, with another vocabulary or context where one is given.

    Raises Misuse for an unknown name, DataError for a file that is not a Llama 2 configuration.
    """
    if name.lower() in PRESETS:
        config = PRESETS[name.lower()]
    elif name.endswith(".json") or Path(name).exists():
        config = read_config(Path(name, "config.json") if Path(name).is_dir() else Path(name))
    else:
        choice = f"one of {', '.join(PRESETS)}, or the path of a config.json"
        raise Misuse(f'no size "{name}"{did_you_mean(name, PRESETS)} ({choice})', "--preset")
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size if vocab_size is None else vocab_size,
        max_position_embeddings=config.max_position_embeddings if context is None else context,
    )


def n_params(config: ModelConfig, *, scorer: bool = False) -> int:
    """Number of parameters; a tied table counts once. scorer: of the reward model of this shape."""
    dim, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * dim * dim + 2 * dim * kv + 3 * dim * config.intermediate_size + 2 * dim
    table = config.vocab_size * dim
    head = dim if scorer else 0 if config.tie_word_embeddings else table
    return table + config.num_hidden_layers * layer + dim + head


def learning_rate(config: ModelConfig) -> float:
    """Peak learning rate of pretraining: 3e-4 at 7B and 13B, 1.5e-4 at 34B and 70B (Llama 2, section 2.2).

    The paper has nothing below 7B; there the rate grows with the cube root of the size, which gives about 6e-4 at 110M,
    as GPT-3 used (its Table 2.1), and 1.2e-3 at 15M.
    """
    size = n_params(config)
    if size > 20e9:
        return 1.5e-4
    return 3e-4 if size >= 1e9 else min(3e-3, float(f"{3e-4 * (1e9 / size) ** (1 / 3):.2g}"))


# --- config.json --------------------------------------------------------------------------------------------------

LIMITS = {  # a hostile file must not make us allocate: largest accepted value of each size
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "max_position_embeddings": 1 << 24,
}


def read_config(path: Path, architecture: str | None = LM) -> ModelConfig:
    """The configuration in a `config.json`. Raises DataError naming the file and the key."""
    return config_from_json(read_json(path), str(path), architecture)


def read_json(path: Path, largest: int = 64 << 20) -> dict[str, Any]:
    """The object in a small JSON file. Raises DataError for what is missing, too large or no JSON object."""
    import msgspec

    try:
        if path.stat().st_size > largest:
            raise DataError(f"is larger than {largest:,} bytes", path)
        decoded = msgspec.json.decode(path.read_bytes())
    except OSError as e:
        raise DataError(e.strerror or "cannot be read", path) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise DataError(f"is not JSON ({e})", path) from None
    if not isinstance(decoded, dict):
        raise DataError("expected a JSON object", path)
    return decoded


def config_from_json(data: Mapping[str, Any], place: str, architecture: str | None = LM) -> ModelConfig:
    """Check the content of a `config.json` and return what our model needs of it.

    architecture: the class that the caller can use, None for any Llama head. Keys that do not change what the model
    computes are ignored; absent ones have the defaults of transformers. Raises DataError naming file and key for a
    wrong type or range, and for every architecture that is not Llama 2's.
    """
    refuse_foreign(data, place, architecture)

    def size(key: str, default: int | None = None) -> int:
        return whole(data, key, default, LIMITS[key], place)

    heads = size("num_attention_heads")
    tied = False if data.get("tie_word_embeddings") is None else data["tie_word_embeddings"]
    if type(tied) is not bool:
        raise DataError(f"expected true or false, got {shown(tied)}", place, "tie_word_embeddings")
    config = ModelConfig(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", heads),
        max_position_embeddings=size("max_position_embeddings", 2048),
        rms_norm_eps=real(data.get("rms_norm_eps"), 1e-6, 1e-12, 0.1, place, "rms_norm_eps"),
        rope_theta=rope_theta(data, place),
        tie_word_embeddings=tied,
    )
    check_heads(config, place)
    head_dim = data.get("head_dim")
    if head_dim is not None and (type(head_dim) is not int or head_dim != config.head_dim):
        wanted = f"hidden_size / num_attention_heads = {config.head_dim}"
        raise DataError(f"Llama 2 has {wanted}, this model {shown(head_dim)}: not supported", place, "head_dim")
    return config


def check_heads(
    config: ModelConfig, place: str, heads_key: str = "num_attention_heads", kv_key: str = "num_key_value_heads"
) -> None:
    """Raise DataError where the heads do not divide the width, or a head cannot be rotated."""
    dim, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if dim % heads or (dim // heads) % 2:
        raise DataError(f"{heads} heads do not divide a width of {dim} into even parts", place, heads_key)
    if heads % kv:
        raise DataError(f"{kv} key-value heads do not divide {heads} heads", place, kv_key)


def shown(value: object) -> str:
    """A value from a file, short enough for one line."""
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def whole(data: Mapping[str, Any], key: str, default: int | None, high: int, place: str) -> int:
    """A positive whole number of a file, at most `high`. Raises DataError."""
    value = default if data.get(key) is None else data[key]
    if value is None:
        raise DataError(f"is missing{did_you_mean(key, data)}", place, key)
    if type(value) is not int or not 1 <= value <= high:
        raise DataError(f"expected a whole number from 1 to {high:,}, got {shown(value)}", place, key)
    return value


def real(value: Any, default: float, low: float, high: float, place: str, key: str) -> float:
    """A number of a file within bounds. Raises DataError."""
    value = default if value is None else value
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise DataError(f"expected a number from {low:g} to {high:g}, got {shown(value)}", place, key)
    return float(value)


def refuse_foreign(data: Mapping[str, Any], place: str, architecture: str | None) -> None:
    """Raise DataError, by name, for a model that is not Llama 2's architecture, or not of the wanted head."""

    def refuse(message: str, key: str) -> NoReturn:
        raise DataError(f"{message}: not supported", place, key)

    kind = data.get("model_type")
    if kind is None:
        raise DataError('is missing; a Llama 2 configuration has "model_type": "llama"', place, "model_type")
    if kind != "llama":
        raise DataError(f'is a model of type {shown(kind)}; only Llama 2\'s architecture ("llama") is supported', place)
    named = data.get("architectures")
    named = [LM] if named is None else named
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise DataError(f"expected a list of one name, got {shown(named)}", place, "architectures")
    known = [LM, SCORER] if architecture is None else [architecture]
    if named[0].replace("LLaMA", "Llama") not in known:
        hint = ": this is a reward model or classifier, a language model is wanted" if named[0] == SCORER else ""
        hint = ": this is a language model, a reward model is wanted" if known == [SCORER] and named[0] == LM else hint
        raise DataError(f"expected {' or '.join(known)}, got {shown(named[0])}{hint}", place, "architectures")
    if known == [SCORER]:
        check_labels(data, place)
    if data.get("vocab_size") == 128256:
        refuse("a vocabulary of 128256 is Llama 3's", "vocab_size")
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse(f"Llama 2 has silu, this model {shown(data['hidden_act'])}", "hidden_act")
    for key in ("attention_bias", "mlp_bias", "bias", "qkv_bias", "use_bias"):
        if data.get(key) not in (None, False):
            refuse("Llama 2's linear layers have no biases", key)
    if data.get("quantization_config") is not None:
        refuse("the weights are quantized; use the fp32, fp16 or bf16 model", "quantization_config")
    if data.get("sliding_window") is not None and data.get("use_sliding_window") is not False:
        refuse("Llama 2 attends to the whole context, this model to a sliding window", "sliding_window")
    if data.get("bos_token_id") not in (None, BOS):
        refuse(f"Llama 2's is {BOS}, this model's {shown(data['bos_token_id'])}", "bos_token_id")
    if data.get("eos_token_id") not in (None, EOS, [EOS]):
        refuse(f"Llama 2's is {EOS}, this model's {shown(data['eos_token_id'])}", "eos_token_id")


def check_labels(data: Mapping[str, Any], place: str) -> None:
    """Raise DataError for a classifier of several labels. One that names none is known by the shape of its head."""
    names = data.get("id2label")
    counts = {"num_labels": data.get("num_labels"), "id2label": len(names) if isinstance(names, dict) else names}
    for key, count in counts.items():
        if count is not None and (type(count) is not int or count != 1):
            raise DataError(f"a reward model has one label, this classifier {shown(count)}", place, key)


def rope_theta(data: Mapping[str, Any], place: str) -> float:
    """The base of the rotary embedding: `rope_theta`, or inside `rope_parameters` as transformers 5 writes it.

    Raises DataError for scaled or partial rotary embeddings and for two different bases.
    """
    found: dict[str, float] = {}
    if data.get("rope_theta") is not None:
        found["rope_theta"] = real(data["rope_theta"], 0, 1, 1e12, place, "rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        entry = data.get(key)
        if entry is None:
            continue
        if not isinstance(entry, dict):
            raise DataError(f"expected an object, got {shown(entry)}", place, key)
        kind = entry.get("rope_type", entry.get("type", "default"))
        if kind != "default":
            what = f"Llama 2 has no scaled rotary embedding, this model has {shown(kind)}"
            raise DataError(f"{what}: not supported", place, key)
        if entry.get("rope_theta") is not None:
            found[key] = real(entry["rope_theta"], 0, 1, 1e12, place, f"{key}.rope_theta")
        part = entry.get("partial_rotary_factor")
        if part not in (None, 1):
            raise DataError(f"Llama 2 rotates whole heads, not {shown(part)} of them: not supported", place, key)
    if data.get("partial_rotary_factor") not in (None, 1):
        raise DataError("Llama 2 rotates whole heads: not supported", place, "partial_rotary_factor")
    if len(set(found.values())) > 1:
        raise DataError(" and ".join(f"{k} says {v:g}" for k, v in found.items()) + ": which one?", place)
    return next(iter(found.values()), 10000.0)


def config_to_json(
    config: ModelConfig, architecture: str = LM, dtype: str = "float32", *, score_offset: float = 0.0
) -> dict[str, Any]:
    """The content of `config.json`, as transformers 4 and 5, vLLM and llama.cpp's converter read it.

    dtype: of the saved tensors, in torch's name. `rope_theta` stands at the top, where every reader looks. A reward
    model (SCORER) has one label, and padding that is not EOS: transformers reads the score at the last token that is
    not padding. score_offset: written where it is not 0; it is ours, others leave it unread.
    """
    shape = dataclasses.asdict(config)
    scorer: dict[str, Any] = {}
    if architecture == SCORER:
        scorer = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": PAD}
        if score_offset:
            scorer["score_offset"] = score_offset
    return {
        "architectures": [architecture],
        "model_type": "llama",
        **shape,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_scaling": None,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pretraining_tp": 1,
        "torch_dtype": dtype,
        "use_cache": True,
        **scorer,
    }
