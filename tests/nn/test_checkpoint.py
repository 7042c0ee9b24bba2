"""Hugging Face folders: read as transformers writes them, written as transformers reads them, refused when wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from llama2cli.errors import DataError
from llama2cli.nn import checkpoint
from llama2cli.nn.checkpoint import (
    check_tokenizer,
    is_scorer,
    load_config,
    load_into,
    load_model,
    save_model,
    score_offset,
)
from llama2cli.nn.config import SCORER, ModelConfig
from llama2cli.nn.model import KVCache, Llama
from llama2cli.text.tokenizer import Tokenizer, train

GQA = ModelConfig(300, 48, 96, 3, 6, 2, 64, rope_theta=500.0)
TIED = ModelConfig(300, 32, 64, 2, 4, 4, 64, tie_word_embeddings=True)


def transformers_model(config: ModelConfig = GQA, kind: Any = LlamaForCausalLM, **more: Any) -> Any:
    torch.manual_seed(5)
    model = kind(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
            tie_word_embeddings=config.tie_word_embeddings,
            **more,
        )
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if p.dim() == 1 else 0.0))
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train([f"the quick fox {i} and the lazy dog {i * i}" for i in range(200)], 300), "tokenizer.model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as transformers writes it."""
    transformers_model().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


IDS = torch.tensor([[1, 20, 33, 4, 250, 99, 6, 7], [1, 2, 3, 299, 5, 6, 7, 8]])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.logits(model(IDS)) if isinstance(model, Llama) else model(IDS).logits


# --- reading what transformers writes -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GQA, TIED], ids=["GQA", "tied"])
def test_reads_one_file(config: ModelConfig, tmp_path: Path) -> None:
    theirs = transformers_model(config)
    theirs.save_pretrained(tmp_path)
    assert load_config(tmp_path) == config
    torch.testing.assert_close(logits(load_model(tmp_path)), logits(theirs), rtol=1e-5, atol=1e-5)


def test_reads_shards(tmp_path: Path) -> None:
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    torch.testing.assert_close(logits(load_model(tmp_path)), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
def test_reads_other_types(stored: torch.dtype, wanted: str, tmp_path: Path) -> None:
    theirs = transformers_model().to(stored)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=wanted)
    assert {p.dtype for p in ours.parameters()} == {checkpoint.DTYPES[wanted]}
    want = theirs.state_dict()["model.layers.1.mlp.down_proj.weight"].to(checkpoint.DTYPES[wanted])
    assert torch.equal(ours.layers[1].down, want)


def test_reads_what_old_versions_left(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64)}
    save_file(tensors, file)
    load_model(folder)


def test_a_loaded_model_does_not_hang_on_the_file(folder: Path) -> None:
    model = load_model(folder)
    before = logits(model)
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)


def test_load_into(folder: Path) -> None:
    model = Llama(ModelConfig(**{**GQA.__dict__, "max_position_embeddings": 128}))  # a longer context is no other model
    load_into(model, folder)
    assert torch.equal(logits(model), logits(load_model(folder)))
    with pytest.raises(DataError, match=r"config\.json:num_hidden_layers: is 3, the model being loaded has 2"):
        load_into(Llama(ModelConfig(**{**GQA.__dict__, "num_hidden_layers": 2})), folder)


# --- writing what transformers reads ------------------------------------------------------------------------------


def saved(model: Llama, folder: Path, tokenizer: Tokenizer | None = None, **options: Any) -> Path:
    folder.mkdir()
    save_model(folder, model, tokenizer, **options)
    return folder


@torch.no_grad()
def greedy(model: Llama, prompt: list[int], count: int, cached: bool) -> list[int]:
    cache = KVCache(model.config, 1, len(prompt) + count, dtype=torch.float32, device="cpu") if cached else None
    ids = list(prompt)
    new = ids
    for _ in range(count):
        hidden = model(torch.tensor([new if cached else ids]), cache=cache)
        ids.append(int(model.logits(hidden[:, -1]).argmax()))
        new = ids[-1:]
        if ids[-1] == 2:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("config", [GQA, TIED], ids=["GQA", "tied"])
@pytest.mark.parametrize("shard", [10**9, 50_000], ids=["one file", "shards"])
def test_transformers_reads_ours_and_generates_the_same(
    config: ModelConfig, shard: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    ours = Llama(config)
    ours.init_weights(seed=1, std=0.3)
    folder = saved(ours, tmp_path / "ours", tokenizer, max_shard_bytes=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard < 10**9)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert theirs.dtype == torch.float32 and theirs.config.rope_parameters["rope_theta"] == config.rope_theta
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    text = AutoTokenizer.from_pretrained(folder)
    for line in ("the quick fox", "lazy dog 16", "and"):
        prompt = [tokenizer.bos_id, *tokenizer.encode(line)]
        assert text(line).input_ids == prompt
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0][len(prompt) :].tolist()
        assert len(set(want)) > 5
        assert greedy(ours, prompt, 30, cached=True) == greedy(ours, prompt, 30, cached=False) == want


def test_generation_config(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ours = Llama(GQA)
    ours.init_weights()
    config = AutoModelForCausalLM.from_pretrained(saved(ours, tmp_path / "a", tokenizer)).generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.6, 0.9)
    other = saved(ours, tmp_path / "b", extra_files={"generation_config.json": b"{}", "README.md": b"card"})
    assert (other / "generation_config.json").read_bytes() == b"{}" and (other / "README.md").read_bytes() == b"card"


@pytest.mark.parametrize("shard", [10**9, 50_000], ids=["one file", "shards"])
def test_round_trip_is_bitwise_and_bytes_repeat(shard: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    ours = Llama(GQA)
    ours.init_weights(seed=2)
    a = saved(ours, tmp_path / "a", tokenizer, max_shard_bytes=shard)
    again = load_model(a)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters()))
    b = saved(again, tmp_path / "b", tokenizer, max_shard_bytes=shard)
    assert sorted(f.name for f in a.iterdir()) == sorted(f.name for f in b.iterdir())
    assert all(f.read_bytes() == (b / f.name).read_bytes() for f in a.iterdir())


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_save_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ours = Llama(TIED)
    ours.init_weights(seed=2)
    folder = saved(ours, tmp_path / "a", save_dtype=name)
    with safe_open(folder / "model.safetensors", "pt") as f:
        kept = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    want = checkpoint.state_to_hf(ours.state_dict(), TIED)
    assert kept.keys() == want.keys() and all(torch.equal(kept[k], want[k].to(dtype)) for k in want)
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == dtype


def test_fp16_overflow_is_an_error(tmp_path: Path) -> None:
    ours = Llama(TIED)
    ours.init_weights()
    with torch.no_grad():
        ours.layers[1].down[0, :2] = 70000.0
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.down_proj\.weight: 2 values do not fit fp16"):
        saved(ours, tmp_path / "a", save_dtype="fp16")


def test_the_index_is_that_of_transformers(tmp_path: Path) -> None:
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    folder = saved(load_model(tmp_path / "hf"), tmp_path / "ours", max_shard_bytes=60_000)
    ours, want = (json.loads((f / checkpoint.INDEX).read_text()) for f in (folder, tmp_path / "hf"))
    assert ours["metadata"]["total_size"] == want["metadata"]["total_size"]
    assert ours["weight_map"].keys() == want["weight_map"].keys()


def test_writing_holds_one_matrix_at_a_time(tmp_path: Path) -> None:
    """The tensors are asked for one after another, in the order of the file: nothing is collected."""
    config = TIED
    model = Llama(config)
    model.init_weights()
    state = checkpoint.state_to_hf(model.state_dict(), config)
    alive: list[Any] = []
    worst = 0

    def tensor_of(part: checkpoint.Part) -> Tensor:
        import weakref

        nonlocal worst
        worst = max(worst, sum(ref() is not None for ref in alive))
        tensor = state[part.name].clone()
        alive.append(weakref.ref(tensor))
        return tensor

    checkpoint.write_folder(tmp_path, config, tensor_of, None)
    assert len(alive) == len(state) and worst <= 1


def test_a_sharded_model(folder: Path, tmp_path: Path) -> None:
    """DTensors of FSDP2 are filled, initialised and saved as whole parameters are (on one rank)."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    whole, plain = load_model(folder), Llama(GQA)
    plain.init_weights(seed=9)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = Llama(GQA)
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        model.to_empty(device="cpu")
        assert all(isinstance(p, DTensor) for p in model.parameters())
        model.init_weights(seed=9)
        assert all(torch.equal(p.full_tensor(), q) for p, q in zip(model.parameters(), plain.parameters()))
        load_into(model, folder)
        torch.testing.assert_close(logits(model), logits(whole))
        a, b = saved(model, tmp_path / "a"), saved(whole, tmp_path / "b")
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    finally:
        dist.destroy_process_group()


# --- what is refused ----------------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 1:4] = torch.tensor(
        [float("nan"), float("inf"), -float("inf")]
    )


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "config.json: No such file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickle only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
    "not finite": (lambda f: edit(f, poison), "model.layers.2.self_attn.k_proj.weight: 3 of 768 values are not finite"),
    "missing": (lambda f: edit(f, lambda t: t.pop("model.norm.weight")), "tensor 'model.norm.weight' is missing"),
    "several missing": (lambda f: edit_config(f, num_hidden_layers=4), "and 8 more are missing"),
    "head missing": (lambda f: edit(f, lambda t: t.pop("lm_head.weight")), "tie_word_embeddings"),
    "unexpected": (
        lambda f: edit(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})),
        'did you mean "model.layers.0.self_attn.',
    ),
    "more layers": (lambda f: edit_config(f, num_hidden_layers=2), "is not a tensor of Llama 2"),
    "wrong shape": (
        lambda f: edit_config(f, intermediate_size=97),
        "down_proj.weight: expected shape [48, 97] by config.json, got [48, 96]",
    ),
    "integers": (
        lambda f: edit(f, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)})),
        "got I32",
    ),
    "tied, but not": (lambda f: edit_config(f, tie_word_embeddings=True), "differs from model.embed_tokens.weight"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors",
    ),
    "text": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "model.safetensors"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders_are_refused_in_one_line(case: str, folder: Path) -> None:
    change, expected = WRONG[case]
    change(folder)
    with pytest.raises(DataError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert str(folder) in message and expected in message and "\n" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_kind_of_value_that_is_not_finite(value: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 5, dtype=dtype)
    assert checkpoint.check_finite(tensor, "x") is tensor
    tensor[1, 2] = value
    with pytest.raises(DataError, match="x: 1 of 15 values are not finite"):
        checkpoint.check_finite(tensor, "x")


HOSTILE_INDEX: dict[str, tuple[Any, str]] = {
    "outside": ({"x": "../../x.safetensors"}, "expected a safetensors file of this folder"),
    "absolute": ({"x": "/etc/passwd"}, "expected a safetensors file of this folder"),
    "pickle": ({"x": "pytorch_model.bin"}, "expected a safetensors file of this folder"),
    "number": ({"x": 3}, "expected a safetensors file of this folder"),
    "list": (["x"], "expected an object"),
    "empty": ({}, "expected an object"),
    "absent file": ({"x": "y.safetensors"}, "y.safetensors: does not exist"),
    "other names": ({"model.norm.weight": "model-1.safetensors"}, "is in only one of this file and"),
}


@pytest.mark.parametrize("case", HOSTILE_INDEX)
def test_a_hostile_index(case: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    weight_map, expected = HOSTILE_INDEX[case]
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DataError) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value) and expected in str(caught.value)


def test_a_reward_model_is_refused_by_name(tmp_path: Path) -> None:
    transformers_model(kind=LlamaForSequenceClassification, num_labels=1, pad_token_id=0).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="reward model or classifier, a language model is wanted"):
        load_model(tmp_path)


# --- reward models ------------------------------------------------------------------------------------------------


def reward_model(config: ModelConfig = GQA, **more: Any) -> Any:
    return transformers_model(config, LlamaForSequenceClassification, **{"num_labels": 1, "pad_token_id": 0} | more)


def reward(config: ModelConfig = GQA) -> Llama:
    model = Llama(config, scorer=True)
    model.init_weights(seed=1, std=0.3)
    return model


DIALOGUES = [[1, 20, 33, 2], [1, 7, 2, 1, 250, 99, 6, 7, 2], [1, 299, 5, 6, 0, 8]]  # the last has no EOS


@torch.no_grad()
def their_scores(model: Any) -> Tensor:
    """One by one, which has to be what a padded batch gives."""
    alone = torch.cat([model(torch.tensor([ids])).logits[:, 0] for ids in DIALOGUES])
    width = max(map(len, DIALOGUES)) + 2
    ids = torch.tensor([row + [0] * (width - len(row)) for row in DIALOGUES])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in DIALOGUES])
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 0], alone, rtol=1e-5, atol=1e-6)
    return alone


@torch.no_grad()
def our_scores(model: Llama) -> Tensor:
    return torch.stack([model.scores(model(torch.tensor([ids]))[0, -1]) for ids in DIALOGUES])


@pytest.mark.parametrize("config", [GQA, TIED], ids=["GQA", "tied"])
@pytest.mark.parametrize("shard", [10**9, 50_000], ids=["one file", "shards"])
def test_transformers_scores_ours_the_same(
    config: ModelConfig, shard: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    ours = reward(config)
    folder = saved(ours, tmp_path / "ours", tokenizer, max_shard_bytes=shard, score_offset=0.25)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard < 10**9)
    theirs, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(theirs) is LlamaForSequenceClassification and theirs.dtype == torch.float32
    assert (theirs.config.num_labels, theirs.config.pad_token_id, theirs.config.problem_type) == (1, 0, None)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 0
    torch.testing.assert_close(their_scores(theirs), our_scores(ours), rtol=1e-5, atol=1e-6)  # without the offset
    assert not (folder / "generation_config.json").exists()


@pytest.mark.parametrize("config", [GQA, TIED], ids=["GQA", "tied"])
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_scores_transformers_models_the_same(config: ModelConfig, shard: str, tmp_path: Path) -> None:
    theirs = reward_model(config)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert load_config(tmp_path, SCORER) == config and is_scorer(tmp_path) and score_offset(tmp_path) == 0.0
    ours = load_model(tmp_path, scorer=True)
    torch.testing.assert_close(our_scores(ours), their_scores(theirs), rtol=1e-5, atol=1e-6)
    assert {p.name: p.shape for p in checkpoint.parts(config, scorer=True)} == {
        n: tuple(p.shape) for n, p in theirs.named_parameters()
    }


def test_a_reward_model_s_round_trip_is_bitwise(tmp_path: Path) -> None:
    ours = reward(TIED)
    a = saved(ours, tmp_path / "a", score_offset=-1.5)
    again = load_model(a, scorer=True)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters(), strict=True))
    b = saved(again, tmp_path / "b", score_offset=score_offset(a))
    assert all(f.read_bytes() == (b / f.name).read_bytes() for f in a.iterdir())
    half = load_model(saved(ours, tmp_path / "half", save_dtype="bf16"), scorer=True)
    assert torch.equal(half.score, ours.score.bfloat16().float())


def test_a_language_model_becomes_a_reward_model(folder: Path, tmp_path: Path) -> None:
    model = reward()
    score = model.score.clone()
    assert load_into(model, folder) is False
    assert torch.equal(model.score, score)
    torch.testing.assert_close(model(IDS), load_model(folder)(IDS))
    other = reward(ModelConfig(**{**GQA.__dict__, "tie_word_embeddings": True}))  # means nothing without a head
    other.init_score(seed=8)
    assert load_into(other, saved(model, tmp_path / "rm")) is True
    assert torch.equal(other.score, score) and torch.equal(our_scores(other), our_scores(model))
    assert load_into(load_model(folder), folder) is True
    with pytest.raises(DataError, match="reward model or classifier, a language model is wanted"):
        load_into(Llama(GQA), tmp_path / "rm")
    with pytest.raises(DataError, match="language model, a reward model is wanted"):
        load_model(folder, scorer=True)


def test_a_sharded_reward_model(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    whole = reward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = Llama(GQA, scorer=True)
        fully_shard(model)
        model.to_empty(device="cpu")
        model.init_weights(seed=1, std=0.3)
        model.init_score(seed=9)
        whole.init_score(seed=9)
        a, b = saved(model, tmp_path / "a"), saved(whole, tmp_path / "b")
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
        model.init_score(seed=1)
        assert load_into(model, b) is True
        assert torch.equal(model.score.full_tensor(), whole.score)
    finally:
        dist.destroy_process_group()


SCORE = "score.weight"
WRONG_REWARD: dict[str, tuple[Callable[[Path], object], str]] = {
    "two labels by the shape": (  # transformers leaves its default of two out of config.json
        lambda f: edit(f, lambda t: t.update({SCORE: torch.ones(2, 48)})),
        "score.weight: a reward model has one label, this classifier 2",
    ),
    "three names": (
        lambda f: edit_config(f, id2label={"0": "a", "1": "b", "2": "c"}),
        "config.json:id2label: a reward model has one label, this classifier 3",
    ),
    "five labels": (lambda f: edit_config(f, num_labels=5), "config.json:num_labels: a reward model has one label"),
    "labels are no number": (lambda f: edit_config(f, num_labels="one"), 'this classifier "one"'),
    "no score": (lambda f: edit(f, lambda t: t.pop(SCORE)), "tensor 'score.weight' is missing"),
    "score of another width": (
        lambda f: edit(f, lambda t: t.update({SCORE: torch.ones(1, 47)})),
        "score.weight: expected shape [1, 48] by config.json, got [1, 47]",
    ),
    "a head": (
        lambda f: edit(f, lambda t: t.update({"lm_head.weight": torch.ones(300, 48)})),
        "'lm_head.weight' is not a tensor of a Llama 2 reward model",
    ),
    "a bias": (lambda f: edit(f, lambda t: t.update({"score.bias": torch.ones(1)})), "did you mean"),
    "not finite": (
        lambda f: edit(f, lambda t: t.update({SCORE: torch.full((1, 48), float("nan"))})),
        "score.weight: 48 of 48 values are not finite",
    ),
}


@pytest.mark.parametrize("case", WRONG_REWARD)
@pytest.mark.parametrize("tied", [False, True])
def test_wrong_reward_models_are_refused_in_one_line(case: str, tied: bool, tmp_path: Path) -> None:
    reward_model(ModelConfig(**{**GQA.__dict__, "tie_word_embeddings": tied})).save_pretrained(tmp_path)
    change, expected = WRONG_REWARD[case]
    change(tmp_path)
    for read in (lambda: load_model(tmp_path, scorer=True), lambda: load_into(Llama(GQA, scorer=True), tmp_path)):
        with pytest.raises(DataError) as caught:
            read()
        message = str(caught.value)
        assert str(tmp_path) in message and expected in message and "\n" not in message


def test_a_classifier_of_two_labels_from_transformers(tmp_path: Path) -> None:
    reward_model(num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="a reward model has one label, this classifier 2"):
        load_model(tmp_path, scorer=True)


@pytest.mark.parametrize("value", ["0.5", True, None, [1.0]])
def test_a_score_offset_is_a_finite_number(value: Any, tmp_path: Path) -> None:
    folder = saved(reward(), tmp_path / "a", score_offset=0.5)
    assert score_offset(folder) == json.loads((folder / "config.json").read_text())["score_offset"] == 0.5
    assert "score_offset" not in json.loads((saved(reward(), tmp_path / "b") / "config.json").read_text())
    edit_config(folder, score_offset=value)
    with pytest.raises(DataError, match=r"config\.json:score_offset: expected a finite number, got"):
        score_offset(folder)
    edit_config(folder, score_offset=3)
    assert score_offset(folder) == 3.0
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"score_offset": 3', '"score_offset": 1e999'))
    with pytest.raises(DataError, match=r"config\.json"):
        score_offset(folder)


def test_an_offset_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="score_offset"):
        saved(reward(), tmp_path / "a", score_offset=float("nan"))
    with pytest.raises(ValueError, match="score_offset"):
        saved(Llama(GQA), tmp_path / "b", score_offset=1.0)


def test_padding_by_eos_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There transformers reads the score before EOS: it is another model than ours, and nobody would see why."""
    theirs = reward_model(pad_token_id=2)
    theirs.save_pretrained(tmp_path)
    capsys.readouterr()
    ours = load_model(tmp_path, scorer=True)
    told = capsys.readouterr().err
    assert "pad_token_id is 2" in told and told.count("\n") == 1
    with torch.no_grad():
        ids = torch.tensor([DIALOGUES[0]])
        assert torch.allclose(theirs(ids).logits[0], ours.scores(ours(ids))[0, -2], atol=1e-5)


def test_a_tokenizer_of_another_size(tokenizer: Tokenizer) -> None:
    check_tokenizer(GQA, tokenizer, "x")
    with pytest.raises(DataError, match=r"x: the tokenizer has 300 pieces, the model 299"):
        check_tokenizer(ModelConfig(**{**GQA.__dict__, "vocab_size": 299}), tokenizer, "x")


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    model = Llama(TIED)
    model.init_weights()
    with pytest.raises(DataError, match=r"none: cannot be written \(No such file or directory\)"):
        save_model(tmp_path / "none", model, None)
