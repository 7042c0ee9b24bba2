"""Named sizes, and config.json: what is Llama 2 is read, what is not is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama2cli.errors import DataError, Misuse
from llama2cli.nn.config import (
    LM,
    PRESETS,
    SCORER,
    ModelConfig,
    config_from_json,
    config_to_json,
    ffn_size,
    learning_rate,
    n_params,
    preset,
)

# Parameters of the released models, and of those that share their shape, as their publishers count them.
PARAMETERS = {
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "70b": 68_976_648_192,
    "1b": 1_100_048_384,  # TinyLlama
    # by hand: 2 * 32000 * 8192 + 48 * (2 * 8192^2 + 2 * 8192 * 1024 + 3 * 8192 * 22016 + 2 * 8192) + 8192
    "34b": 524_288_000 + 48 * (134_217_728 + 16_777_216 + 541_065_216 + 16_384) + 8_192,
    # by hand, one table: V * d + L * (4 * d^2 + 3 * d * f + 2 * d) + d
    "1m": 2048 * 128 + 5 * (4 * 128**2 + 3 * 128 * 352 + 256) + 128,
    "15m": 32000 * 288 + 6 * (4 * 288**2 + 3 * 288 * 768 + 576) + 288,
    "110m": 32000 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048 + 1536) + 768,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters(name: str) -> None:
    assert n_params(PRESETS[name]) == PARAMETERS[name]


def test_table_1_and_section_2_2() -> None:
    ffn = {"7b": 11008, "13b": 13824, "34b": 22016, "70b": 28672}
    for name, width in ffn.items():
        config = PRESETS[name]
        assert config.intermediate_size == width
        assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (32000, 4096, 1e-5)
        assert config.num_key_value_heads == (8 if name in ("34b", "70b") else config.num_attention_heads)
        assert config.head_dim == 128 and not config.tie_word_embeddings
        assert learning_rate(config) == (1.5e-4 if name in ("34b", "70b") else 3e-4)
    assert ffn_size(4096) == 11008 and ffn_size(8192, 1.3, 4096) == 28672


def test_learning_rate_grows_as_models_shrink() -> None:
    rates = [learning_rate(PRESETS[n]) for n in ("1m", "15m", "110m", "1b", "7b")]
    assert rates == sorted(rates, reverse=True) and rates[0] <= 3e-3 and rates[2] == pytest.approx(6e-4, rel=0.1)


def test_preset_by_path_and_with_changes(tmp_path: Path) -> None:
    small = preset("15m", vocab_size=400, context=512)
    assert (small.vocab_size, small.max_position_embeddings, small.hidden_size) == (400, 512, 288)
    path = tmp_path / "my.json"
    path.write_text(json.dumps(config_to_json(small)))
    assert preset(str(path)) == small
    assert preset(str(path), context=64).max_position_embeddings == 64
    assert preset("7B") == PRESETS["7b"]
    with pytest.raises(Misuse, match=r'--preset: no size "70m"; did you mean "70b"\?'):
        preset("70m")
    with pytest.raises(DataError, match="No such file"):
        preset(str(tmp_path / "none.json"))
    path.write_text("{]")
    with pytest.raises(DataError, match=r"my\.json: is not JSON"):
        preset(str(path))
    path.write_text("[1]")
    with pytest.raises(DataError, match=r"my\.json: expected a JSON object"):
        preset(str(path))


def valid(**changes: Any) -> dict[str, Any]:
    """A config.json as transformers 5 writes it, with changes (None as in JSON; `...` takes a key away)."""
    data: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": 100,
    }
    return {k: v for k, v in (data | changes).items() if v is not ...}


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_of_presets(name: str) -> None:
    assert config_from_json(json.loads(json.dumps(config_to_json(PRESETS[name]))), "c") == PRESETS[name]


def test_reads_what_transformers_writes() -> None:
    want = ModelConfig(100, 32, 64, 2, 4, 2, 128, 1e-6, 50000.0)
    assert config_from_json(valid(), "c") == want
    old = valid(rope_parameters=..., rope_theta=50000, rope_scaling=None, head_dim=..., pretraining_tp=1)
    assert config_from_json(old, "c") == want
    both = valid(rope_theta=50000.0, rope_scaling={"type": "default"})
    assert config_from_json(both, "c") == want
    assert config_from_json(valid(num_key_value_heads=...), "c").num_key_value_heads == 4
    assert config_from_json(valid(rope_parameters=...), "c").rope_theta == 10000.0
    assert config_from_json(valid(eos_token_id=[2], bos_token_id=None, some_new_key=[1]), "c") == want


def test_defaults_are_those_of_transformers() -> None:
    from transformers import LlamaConfig

    theirs = LlamaConfig()
    ours = config_from_json(valid(rms_norm_eps=..., max_position_embeddings=..., tie_word_embeddings=...), "c")
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


def test_transformers_reads_ours(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = ModelConfig(100, 32, 64, 2, 4, 2, 128, 3e-5, 50000.0, True)
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(config)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 50000.0 and theirs.rope_parameters["rope_type"] == "default"
    assert (theirs.rms_norm_eps, theirs.tie_word_embeddings, theirs.head_dim) == (3e-5, True, 8)
    assert (theirs.num_key_value_heads, theirs.max_position_embeddings) == (2, 128)


FOREIGN = {
    "mistral": (valid(model_type="mistral"), '"mistral"'),
    "no type": (valid(model_type=...), "model_type"),
    "another class": (valid(architectures=["QWenLMHeadModel"]), "QWenLMHeadModel"),
    "reward model": (valid(architectures=[SCORER]), "reward model"),
    "two classes": (valid(architectures=[LM, LM]), "architectures"),
    "llama 3": (valid(vocab_size=128256), "Llama 3"),
    "linear scaling": (valid(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    "llama 3.1 scaling": (valid(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), '"llama3"'),
    "yarn": (valid(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "yarn"),
    "partial rotary": (valid(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "partial rotary, 5": (valid(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "whole heads"),
    "two thetas": (valid(rope_theta=10000.0), "which one"),
    "attention bias": (valid(attention_bias=True), "attention_bias"),
    "mlp bias": (valid(mlp_bias=True), "mlp_bias"),
    "gelu": (valid(hidden_act="gelu"), "gelu"),
    "wide heads": (valid(head_dim=16), "head_dim"),
    "quantized": (valid(quantization_config={"quant_method": "gptq"}), "quantized"),
    "sliding window": (valid(sliding_window=4096), "sliding_window"),
    "other BOS": (valid(bos_token_id=128000), "bos_token_id"),
    "other EOS": (valid(eos_token_id=[2, 32007]), "eos_token_id"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_models_are_refused_by_name(case: str) -> None:
    data, word = FOREIGN[case]
    with pytest.raises(DataError) as caught:
        config_from_json(data, "folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json") and word in message and "\n" not in message


HOSTILE = {
    "negative": ("hidden_size", -32),
    "zero": ("num_hidden_layers", 0),
    "text": ("vocab_size", "100"),
    "float": ("vocab_size", 100.0),
    "true": ("num_hidden_layers", True),
    "huge": ("vocab_size", 10**30),
    "many layers": ("num_hidden_layers", 10**6),
    "list": ("intermediate_size", [64]),
    "absent": ("hidden_size", ...),
    "null": ("num_attention_heads", None),
    "heads do not divide": ("num_attention_heads", 5),
    "odd heads": ("num_attention_heads", 32),
    "kv heads do not divide": ("num_key_value_heads", 3),
    "eps 0": ("rms_norm_eps", 0),
    "eps text": ("rms_norm_eps", "1e-5"),
    "eps nan": ("rms_norm_eps", float("nan")),
    "theta negative": ("rope_theta", -1.0),
    "theta infinite": ("rope_theta", float("inf")),
    "tie as text": ("tie_word_embeddings", "yes"),
    "rope as list": ("rope_parameters", [1]),
    "context": ("max_position_embeddings", 2**40),
    "head_dim text": ("head_dim", "8"),
    "architectures text": ("architectures", "LlamaForCausalLM"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_values_name_file_and_key(case: str) -> None:
    key, value = HOSTILE[case]
    with pytest.raises(DataError) as caught:
        config_from_json(valid(**({"head_dim": ...} | {key: value})), "c.json")
    message = str(caught.value)
    assert message.startswith(f"c.json:{key}:") and len(message) < 200


def test_a_misspelt_key_gets_a_hint() -> None:
    with pytest.raises(DataError, match=r'hidden_size: is missing; did you mean "hiden_size"\?'):
        config_from_json(valid(hidden_size=..., hiden_size=32), "c.json")


def test_a_reward_model_is_read_where_one_is_wanted() -> None:
    data = valid(architectures=[SCORER])
    assert config_from_json(data, "c", SCORER) == config_from_json(data, "c", None) == config_from_json(valid(), "c")
    with pytest.raises(DataError, match="a reward model is wanted"):
        config_from_json(valid(), "c", SCORER)
