"""Meta's checkpoints: read as torch writes them, computed as Meta's code computes them, and nothing in them runs."""

from __future__ import annotations

import collections
import io
import json
import math
import os
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama2cli.errors import DataError, Misuse
from llama2cli.nn import checkpoint, meta
from llama2cli.nn.config import PRESETS, ModelConfig, ffn_size
from llama2cli.nn.model import Llama

PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
CONFIG = ModelConfig(60, 32, 96, 2, 8, 4, 64)  # 2/3 * 4 * 32 = 85, rounded up to a multiple of 16: 96
AXES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "tok_embeddings": 1, "output": 0}


def meta_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under Meta's names."""
    g = torch.Generator().manual_seed(3)
    dim, kv, ffn, vocab = 32, 16, 96, 60
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,)}
    for i in range(2):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (dim, dim),
            f"layers.{i}.attention.wk.weight": (kv, dim),
            f"layers.{i}.attention.wv.weight": (kv, dim),
            f"layers.{i}.attention.wo.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (ffn, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, ffn),
            f"layers.{i}.feed_forward.w3.weight": (ffn, dim),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    shapes["output.weight"] = (vocab, dim)
    weights = {n: torch.randn(s, generator=g) * 0.2 + (1.0 if len(s) == 1 else 0.0) for n, s in shapes.items()}
    return {n: w.to(dtype) for n, w in weights.items()}


def axis_of(name: str) -> int | None:
    return AXES.get(name.split(".")[-2])


def split(weights: dict[str, Tensor], group: int) -> list[dict[str, Tensor]]:
    """The parts of a model-parallel group."""
    return [
        {n: w if axis_of(n) is None else w.chunk(group, axis_of(n))[r].clone() for n, w in weights.items()}
        for r in range(group)
    ]


def write(folder: Path, shards: list[dict[str, Tensor]], **params: Any) -> Path:
    """A folder of Meta's, by torch itself."""
    folder.mkdir(exist_ok=True)
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    merged = {k: v for k, v in (PARAMS | params).items() if v is not None}
    (folder / "params.json").write_text(json.dumps(merged))
    return folder


def load(folder: Path, context: int = 64) -> Llama:
    """Our model of a folder of Meta's."""
    config, tensor_of = meta.open_meta(folder, context)
    model = Llama(config)
    state = {part.name: tensor_of(part).float() for part in checkpoint.parts(config)}
    model.load_state_dict(checkpoint.state_from_hf(state, config))
    return model


def meta_forward(w: dict[str, Tensor], ids: Tensor, theta: float = 10000.0) -> Tensor:
    """Logits as Meta's reference computes them: neighbouring pairs are complex numbers, turned by multiplication."""
    heads, kv, size, eps = 8, 4, 4, 1e-5
    B, T = ids.shape
    turn = torch.outer(torch.arange(T).float(), 1.0 / theta ** (torch.arange(0, size, 2).float() / size))
    turn_c = torch.polar(torch.ones_like(turn), turn)[None, :, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn_c).flatten(3)

    hidden = F.embedding(ids, w["tok_embeddings.weight"])
    for i in range(2):
        layer = {n.removeprefix(f"layers.{i}."): t for n, t in w.items() if n.startswith(f"layers.{i}.")}
        x = norm(hidden, layer["attention_norm.weight"])
        q = rotate((x @ layer["attention.wq.weight"].T).view(B, T, heads, size))
        k = rotate((x @ layer["attention.wk.weight"].T).view(B, T, kv, size))
        v = (x @ layer["attention.wv.weight"].T).view(B, T, kv, size)
        k, v = (t.repeat_interleave(heads // kv, dim=2) for t in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(size)
        scores = scores + torch.full((T, T), float("-inf")).triu(1)
        mixed = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).reshape(B, T, -1)
        hidden = hidden + mixed @ layer["attention.wo.weight"].T
        x = norm(hidden, layer["ffn_norm.weight"])
        gated = F.silu(x @ layer["feed_forward.w1.weight"].T) * (x @ layer["feed_forward.w3.weight"].T)
        hidden = hidden + gated @ layer["feed_forward.w2.weight"].T
    return norm(hidden, w["norm.weight"]) @ w["output.weight"].T


IDS = torch.tensor([[1, 5, 7, 9, 11, 59, 3, 2], [1, 1, 2, 2, 3, 3, 4, 4]])

# --- what is read -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("theta", [10000.0, 100.0])
def test_a_converted_model_computes_what_metas_code_does(group: int, theta: float, tmp_path: Path) -> None:
    weights = meta_weights()
    folder = write(tmp_path / "m", split(weights, group), rope_theta=theta if theta != 10000.0 else None)
    model = load(folder)
    assert model.config == ModelConfig(60, 32, 96, 2, 8, 4, 64, rope_theta=theta)
    torch.testing.assert_close(model.logits(model(IDS)), meta_forward(weights, IDS, theta), rtol=1e-5, atol=1e-5)


def test_what_torch_saves_in_other_ways(tmp_path: Path) -> None:
    """An OrderedDict with module versions, a view of a larger storage, a transposed tensor, the constant of RoPE."""
    weights = meta_weights()
    ordered = collections.OrderedDict(weights)
    ordered._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    ordered["rope.freqs"] = torch.ones(2)
    ordered["output.weight"] = weights["output.weight"].T.contiguous().T
    big = torch.zeros(10, 32)
    big[4] = weights["norm.weight"]
    ordered["norm.weight"] = big[4]
    model = load(write(tmp_path / "m", [ordered]))
    assert torch.equal(model.head, weights["output.weight"]) and torch.equal(model.norm, weights["norm.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = meta_weights(dtype)
    tensors = meta.read_pth(write(tmp_path / "m", [weights]) / "consolidated.00.pth")
    assert tensors.keys() == weights.keys()
    assert all(t.dtype == dtype and torch.equal(t, weights[n]) for n, t in tensors.items())


def test_equal_tables_are_tied(tmp_path: Path) -> None:
    weights = meta_weights()
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    config, _ = meta.open_meta(write(tmp_path / "m", split(weights, 2)), 64)
    assert config.tie_word_embeddings


# --- what is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_torch_reads_what_we_write(group: int, dtype: str, tmp_path: Path) -> None:
    """The same tensors, types and names by `torch.load(weights_only=True)`, mapped or not; the same params.json."""
    weights = meta_weights()
    config, tensor_of = meta.open_meta(write(tmp_path / "m", split(weights, 2)), 64)
    out = tmp_path / "out"
    out.mkdir()
    meta.write_meta(out, config, tensor_of, group=group, save_dtype=dtype)
    for rank, want in enumerate(split(weights, group)):
        path = out / f"consolidated.{rank:02}.pth"
        for mapped in (False, True):
            got = torch.load(path, weights_only=True, mmap=mapped)
            assert got.keys() == want.keys()
            assert all(torch.equal(got[n], w.to(checkpoint.DTYPES[dtype])) for n, w in want.items())
            assert all(t.is_contiguous() for t in got.values())
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    assert len(list(out.glob("*.pth"))) == group
    params = json.loads((out / "params.json").read_text())
    assert params.items() >= (PARAMS | {"vocab_size": 60}).items() - {("multiple_of", 16)}
    again, _ = meta.open_meta(out, 64)
    assert again == config


def test_bytes_repeat(tmp_path: Path) -> None:
    config, tensor_of = meta.open_meta(write(tmp_path / "m", [meta_weights()]), 64)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        meta.write_meta(tmp_path / name, config, tensor_of, group=2)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_numbers_lie_on_64_bytes(tmp_path: Path) -> None:
    config, tensor_of = meta.open_meta(write(tmp_path / "m", [meta_weights()]), 64)
    meta.write_meta(tmp_path, config, tensor_of)
    path = tmp_path / "consolidated.00.pth"
    for tensor in meta.read_pth(path).values():
        assert tensor.data_ptr() % 64 == 0


@pytest.mark.parametrize("name", PRESETS)
def test_params_of_presets(name: str) -> None:
    params = meta.config_to_params(PRESETS[name])
    width = ffn_size(params["dim"], params.get("ffn_dim_multiplier"), params["multiple_of"])
    assert width == PRESETS[name].intermediate_size
    if name == "70b":  # as Meta publishes it, but for the vocabulary
        assert params == {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
                          "n_layers": 80, "norm_eps": 1e-5, "vocab_size": 32000}  # fmt: skip
    if name == "7b":
        assert params == {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5,
                          "vocab_size": 32000}  # fmt: skip


def test_any_feed_forward_width_can_be_said() -> None:
    choose = random.Random(0)
    for _ in range(2000):
        dim, width = choose.randrange(2, 9000), choose.randrange(1, 40000)
        multiple, multiplier = meta.ffn_numbers(dim, width)
        multiplier = json.loads(json.dumps(multiplier))
        assert ffn_size(dim, multiplier, multiple) == width


def test_a_model_that_cannot_be_split(tmp_path: Path) -> None:
    config, tensor_of = meta.open_meta(write(tmp_path / "m", [meta_weights()]), 64)
    with pytest.raises(Misuse, match="4 key-value heads are not 8 equal parts"):
        meta.write_meta(tmp_path, config, tensor_of, group=8)


# --- what is refused: other models --------------------------------------------------------------------------------


def drop(name: str) -> Callable[[list[dict[str, Tensor]]], object]:
    return lambda shards: [shard.pop(name) for shard in shards]


def replace(name: str, value: Tensor, shard: int = 1) -> Callable[[list[dict[str, Tensor]]], object]:
    return lambda shards: shards[shard].update({name: value})


WRONG: dict[str, tuple[Callable[[list[dict[str, Tensor]]], object], dict[str, Any], str]] = {
    "missing": (drop("layers.1.attention.wv.weight"), {}, "'layers.1.attention.wv.weight' is missing"),
    "no embedding": (drop("tok_embeddings.weight"), {}, "has no matrix tok_embeddings.weight"),
    "unexpected": (replace("layers.0.attention.wq.bias", torch.zeros(32)), {}, "is not a tensor of Llama 2"),
    "shape": (replace("output.weight", torch.zeros(31, 32)), {}, "expected shape [30, 32]"),
    "not finite": (replace("norm.weight", torch.full((32,), math.nan)), {}, "32 of 32 values are not finite"),
    "norms differ": (replace("norm.weight", torch.ones(32)), {}, "norm.weight: differs from that of"),
    "other width": (lambda s: None, {"multiple_of": 64}, "expected shape"),
    "other layers": (lambda s: None, {"n_layers": 3}, "are missing"),
    "fewer layers": (lambda s: None, {"n_layers": 1}, "is not a tensor of Llama 2"),
    "vocabulary": (lambda s: None, {"vocab_size": 61}, "params.json:vocab_size: is 61, but the embedding has 60 rows"),
    "scaled rope": (lambda s: None, {"use_scaled_rope": True}, "params.json:use_scaled_rope: Llama 2 has nothing"),
    "no dim": (lambda s: None, {"dim": None}, "params.json:dim: is missing"),
    "huge": (lambda s: None, {"n_layers": 10**9}, "params.json:n_layers: expected a whole number"),
    "text": (lambda s: None, {"n_heads": "8"}, "params.json:n_heads: expected a whole number"),
    "heads": (lambda s: None, {"n_heads": 5}, "params.json:n_heads: 5 heads do not divide"),
    "multiplier": (lambda s: None, {"ffn_dim_multiplier": -1}, "params.json:ffn_dim_multiplier: expected a number"),
    "theta": (lambda s: None, {"rope_theta": "x"}, "params.json:rope_theta: expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_other_models_are_refused(case: str, tmp_path: Path) -> None:
    change, params, expected = WRONG[case]
    shards = split(meta_weights(), 2)
    change(shards)
    folder = write(tmp_path / "m", shards, **params)
    with pytest.raises(DataError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message and expected in message and "\n" not in message


def test_a_gap_in_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", split(meta_weights(), 4))
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(
        DataError, match=r"without a gap, found consolidated\.00\.pth, consolidated\.01\.pth, consolidated\.03"
    ):
        load(folder)
    (folder / "consolidated.03.pth").unlink()
    with pytest.raises(DataError, match="expected shape"):  # two files of four
        load(folder)


def test_three_files_of_a_model_that_has_four_heads(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", [meta_weights()] * 3)
    with pytest.raises(DataError, match="8 attention heads are not 3 equal parts"):
        load(folder)


# --- what is refused: files that would run ------------------------------------------------------------------------


def pth(path: Path, data: bytes, entries: dict[str, bytes] | None = None, compress: int = zipfile.ZIP_STORED) -> Path:
    """A .pth file with any pickle."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in (entries or {"data/0": bytes(16)}).items():
            archive.writestr(f"archive/{name}", content)
    return path


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)
GOOD = b"\x80\x02}" + text("x") + TENSOR + b"s."


def test_the_plain_pickle_of_these_tests_is_read(tmp_path: Path) -> None:
    assert torch.equal(meta.read_pth(pth(tmp_path / "x.pth", GOOD))["x"], torch.zeros(4))


MARKER = "it-ran"
TOUCH = f"touch {MARKER}"
RUNS: dict[str, bytes] = {
    "os.system, protocol 0": pickle.dumps(Calls(os.system, TOUCH), 0),
    "os.system, protocol 2": pickle.dumps(Calls(os.system, TOUCH), 2),
    "os.system, protocol 4": pickle.dumps(Calls(os.system, TOUCH), 4),
    "inside a state dict": pickle.dumps({"a": Calls(os.system, TOUCH)}, 2),
    "eval": pickle.dumps(Calls(eval, f"__import__('os').system('{TOUCH}')"), 2),
    "exec": b"\x80\x02c__builtin__\nexec\n" + text(f"import os; os.system('{TOUCH}')") + b"\x85R.",
    "getattr of an allowed name": b"\x80\x02cbuiltins\ngetattr\nccollections\nOrderedDict\n" + text("mro") + b"\x86R.",
    "dotted name": b"\x80\x02ccollections\nOrderedDict.__init__.__globals__\n.",
    "dotted module": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    "allowed name of another module": b"\x80\x02ctorch\n_rebuild_tensor_v2\n.",
    "torch.load again": b"\x80\x02ctorch\nload\n" + text("y") + b"\x85R.",
    "torch.hub": b"\x80\x02ctorch.hub\nload\n" + text("y") + b"\x85R.",
    "storage from bytes": b"\x80\x02ctorch.storage\n_load_from_bytes\n" + text("y") + b"\x85R.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text(TOUCH) + b"\x85R.",
    "INST": b"(" + b"S'" + TOUCH.encode() + b"'\nios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\n" + text(TOUCH) + b"o.",
    "NEWOBJ": b"\x80\x02cos\nsystem\n" + text(TOUCH) + b"\x85\x81.",
    "NEWOBJ of an allowed name": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "PERSID": b"Pos\n.",
    "BUILD of a tensor": b"\x80\x02" + TENSOR + b"}" + text("__dict__") + b"K\x01sb.",
    "BUILD of a name": b"\x80\x02ccollections\nOrderedDict\n}" + text("update") + b"K\x01sb.",
    "REDUCE of a text": b"\x80\x02" + text("os.system") + text(TOUCH) + b"\x85R.",
    "REDUCE of a storage type": b"\x80\x02ctorch\nFloatStorage\nK\x04\x85R.",
    "OrderedDict of arguments": b"\x80\x02ccollections\nOrderedDict\n" + text("a") + b"\x85R.",
    "a whole model": b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b.",
    "bytearray8": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("case", RUNS)
def test_code_is_refused_and_not_run(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for function in ("system", "popen"):
        monkeypatch.setattr(os, function, lambda *a: pytest.fail("it ran"))
    with pytest.raises(DataError) as caught:
        meta.read_pth(pth(tmp_path / "x.pth", RUNS[case]))
    assert "x.pth" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert not (tmp_path / MARKER).exists()


def test_a_refusal_names_what_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wants to use 'posix\.system', .* refused, nothing was run"):
        meta.read_pth(pth(tmp_path / "x.pth", RUNS["os.system, protocol 2"]))
    for opcode in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "EXT1", "EXT2", "EXT4", "PERSID"):
        arguments = {"INST": b"os\nsystem\n", "PERSID": b"os\n", "EXT1": b"1", "EXT2": b"12", "EXT4": b"\1\0\0\0"}
        code = pickletools_code(opcode) + arguments.get(opcode, b"")
        with pytest.raises(DataError, match=f"has the pickle opcode {opcode}, which tensors do not need"):
            meta.read_pth(pth(tmp_path / "x.pth", b"\x80\x02(" + text("os") + text("system") + code + b"."))


def pickletools_code(name: str) -> bytes:
    return next(o.code for o in pickletools.opcodes if o.name == name).encode("latin-1")


def view(offset: bytes, shape: bytes, stride: bytes) -> bytes:
    """A dictionary of one tensor with other numbers."""
    changed = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + shape + stride
    return b"\x80\x02}" + text("x") + changed + b"\x89ccollections\nOrderedDict\n)RtRs."


BIG = b"\x8a\x08" + (2**62).to_bytes(8, "little")
WRONG_SIZES: dict[str, bytes] = {
    "too long": view(b"K\x00", b"K\x05\x85", b"K\x01\x85"),
    "offset past the end": view(b"K\x01", b"K\x04\x85", b"K\x01\x85"),
    "negative offset": view(b"\x8a\x01\xff", b"K\x04\x85", b"K\x01\x85"),
    "negative shape": view(b"K\x00", b"\x8a\x01\xff\x85", b"K\x01\x85"),
    "negative stride": view(b"K\x00", b"K\x04\x85", b"\x8a\x01\xff\x85"),
    "huge": view(b"K\x00", BIG + b"\x85", b"K\x01\x85"),
    "huge by expansion": view(b"K\x00", BIG + b"\x85", b"K\x00\x85"),
    "expansion": view(b"K\x00", b"K\x05\x85", b"K\x00\x85"),
    "empty": view(b"K\x00", b"K\x00\x85", b"K\x01\x85"),
    "text as shape": view(b"K\x00", text("4") + b"\x85", b"K\x01\x85"),
    "true as shape": view(b"K\x00", b"\x88\x85", b"K\x01\x85"),
    "stride of other length": view(b"K\x00", b"K\x04\x85", b"K\x01K\x01\x86"),
    "no such entry": GOOD.replace(text("0"), text("7")),
    "other size": GOOD.replace(b"K\x04tQ", b"K\x03tQ"),
    "outside": GOOD.replace(text("0"), text("../../../etc/passwd")),
    "unknown type": GOOD.replace(b"FloatStorage", b"QInt8Storage"),
    "a number in place of a dictionary": b"\x80\x02K\x01.",
    "numbers in the dictionary": b"\x80\x02}" + text("x") + b"K\x01s.",
    "number as name": b"\x80\x02}K\x01" + TENSOR + b"s.",
    "two values": b"\x80\x02}}.",
    "nothing": b".",
    "no end": GOOD[:-1],
    "an open mark": b"\x80\x02}(}.",
    "no mark": b"\x80\x02}u.",
    "unknown memo": b"\x80\x02h\x05.",
    "a dictionary in itself": b"\x80\x02}q\x00" + text("x") + b"h\x00s.",
}


@pytest.mark.parametrize("case", WRONG_SIZES)
def test_sizes_and_structure(case: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.pth"):
        meta.read_pth(pth(tmp_path / "x.pth", WRONG_SIZES[case]))


def test_bombs_are_cheap(tmp_path: Path) -> None:
    """Tuples of tuples (2^60 leaves when walked), a memo index of 4 billion, a length of 2 GB, a deep stack."""
    nested = b"\x80\x02K\x01K\x01\x86q\x00" + b"h\x00h\x00\x86q\x00" * 60
    bombs = [
        nested + b".",
        nested + b"ccollections\nOrderedDict\nh\x00R.",
        b"\x80\x02}h\x00" + nested[2:] + b"K\x01s.",
        b"\x80\x02}" + nested[2:] + b"K\x01s.",
        nested + b"Q.",
        b"\x80\x02}r\xff\xff\xff\xff" + b"j\xff\xff\xff\xff.",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02" + b"(" * 500_000 + b".",
        b"\x80\x02" + b")\x85" * 250_000 + b".",
        b"\x80\x02)" + b"\x85" * 500_000 + b".",
    ]
    for bomb in bombs:
        with pytest.raises(DataError):
            meta.read_pth(pth(tmp_path / "x.pth", bomb))
    with pytest.raises(DataError, match="is refused"):
        meta.read_pth(pth(tmp_path / "x.pth", b"N" * (meta.MAX_PICKLE + 1)))


def test_any_changed_byte_gives_tensors_or_one_line(tmp_path: Path) -> None:
    """Mutations of a real file: of the pickle, of the archive, cut at any place."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, buffer)
    whole = buffer.getvalue()
    choose = random.Random(1)
    path = tmp_path / "x.pth"
    refused = 0
    for trial in range(600):
        data = bytearray(whole)
        if trial % 3 == 0:
            del data[choose.randrange(len(data)) :]
        else:
            for _ in range(choose.choice([1, 1, 4])):
                data[choose.randrange(len(data))] = choose.randrange(256)
        path.write_bytes(data)
        try:
            tensors = meta.read_pth(path)
        except DataError as e:
            refused += 1
            assert "\n" not in str(e)
        else:
            assert all(t.numel() <= 4 and t.sum() is not None for t in tensors.values())
    assert refused > 200
    for _ in range(2000):
        pickled = bytearray(GOOD)
        pickled[choose.randrange(len(pickled))] = choose.randrange(256)
        with suppress(DataError):
            meta.run_pickle(bytes(pickled), "x.pth")


# --- what is refused: archives ------------------------------------------------------------------------------------


def test_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"

    def refused(expected: str) -> None:
        with pytest.raises(DataError, match=expected) as caught:
            meta.read_pth(path)
        assert "x.pth" in str(caught.value)

    torch.save(meta_weights(), path, _use_new_zipfile_serialization=False)
    refused("format of torch before 1.6")
    path.write_bytes(b"")
    refused("is not a zip archive: empty")
    pth(path, GOOD, compress=zipfile.ZIP_DEFLATED)
    refused("is compressed or encrypted")
    pth(path, GOOD, {"data/0": bytes(16), "byteorder": b"big"})
    refused("big-endian")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/readme", b"")
    refused("has no data.pkl")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", GOOD)
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/data/0", b"\xff" * 16)
    refused("damaged zip archive")
    pth(path, GOOD, {"data/0": bytes(16), "data/1": bytes(16)})
    data = bytearray(path.read_bytes())  # the second entry of the directory points at the first one's bytes
    spots = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    data[spots[2] + 42 : spots[2] + 46] = data[spots[1] + 42 : spots[1] + 46]
    path.write_bytes(data)
    refused("overlap|damaged")
