"""Hugging Face Llama folders: `config.json`, `model.safetensors` or shards with an index, tokenizer files.

A language model is a LlamaForCausalLM, a reward model (`scorer`) a LlamaForSequenceClassification with one label, whose
score transformers reads at the last token that is not padding.

Both directions stream: one matrix of the model at a time is held beside the model. Files are memory-mapped, their
headers checked (`text.tensorfile`), names and shapes compared with the model's own list before anything is allocated,
and values that are not finite refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from llama2cli import console
from llama2cli.errors import DataError, did_you_mean
from llama2cli.nn.config import (
    BOS,
    EOS,
    LM,
    MAX_SHARD_BYTES,
    PAD,
    SCORER,
    ModelConfig,
    config_to_json,
    read_config,
    read_json,
    shown,
)
from llama2cli.nn.model import Llama, fill
from llama2cli.text import tensorfile
from llama2cli.text.tokenizer import Tokenizer
from llama2cli.text.tokenizer_json import write_tokenizer_files

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors names them
EMBED, HEAD, SCORE = "model.embed_tokens.weight", "lm_head.weight", "score.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Part(NamedTuple):
    """A tensor of a Hugging Face folder: its name, and the rows of our parameter that it is."""

    name: str
    ours: str
    start: int
    shape: tuple[int, ...]


def parts(config: ModelConfig, scorer: bool = False) -> list[Part]:
    """All tensors of a Hugging Face folder, in our order; consecutive ones make a fused parameter.

    scorer: of a reward model, which has no output table, tied or not.
    """
    D, width, V = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = config.num_key_value_heads * config.head_dim
    out = [Part(EMBED, "embed", 0, (V, D))]
    for i in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        out += [
            Part(theirs + "input_layernorm.weight", ours + "attn_norm", 0, (D,)),
            Part(theirs + "self_attn.q_proj.weight", ours + "qkv", 0, (D, D)),
            Part(theirs + "self_attn.k_proj.weight", ours + "qkv", D, (kv, D)),
            Part(theirs + "self_attn.v_proj.weight", ours + "qkv", D + kv, (kv, D)),
            Part(theirs + "self_attn.o_proj.weight", ours + "out", 0, (D, D)),
            Part(theirs + "post_attention_layernorm.weight", ours + "mlp_norm", 0, (D,)),
            Part(theirs + "mlp.gate_proj.weight", ours + "gate_up", 0, (width, D)),
            Part(theirs + "mlp.up_proj.weight", ours + "gate_up", width, (width, D)),
            Part(theirs + "mlp.down_proj.weight", ours + "down", 0, (D, width)),
        ]
    out.append(Part("model.norm.weight", "norm", 0, (D,)))
    if scorer:
        out.append(Part(SCORE, "score", 0, (1, D)))
    elif not config.tie_word_embeddings:
        out.append(Part(HEAD, "head", 0, (V, D)))
    return out


def state_to_hf(state: Mapping[str, Tensor], config: ModelConfig, scorer: bool = False) -> dict[str, Tensor]:
    """Our parameters under Hugging Face's names: views of the given tensors."""
    return {p.name: state[p.ours][p.start : p.start + p.shape[0]] for p in parts(config, scorer)}


def state_from_hf(state: Mapping[str, Tensor], config: ModelConfig, scorer: bool = False) -> dict[str, Tensor]:
    """Hugging Face's tensors as our parameters; fused ones are new tensors."""
    joined: dict[str, list[Tensor]] = {}
    for p in parts(config, scorer):
        joined.setdefault(p.ours, []).append(state[p.name])
    return {ours: t[0] if len(t) == 1 else torch.cat(t) for ours, t in joined.items()}


# --- reading ------------------------------------------------------------------------------------------------------


def load_config(folder: str | Path, architecture: str | None = LM) -> ModelConfig:
    """The configuration of a folder: of a language model (LM), a reward model (SCORER), or either (None).

    Raises DataError for what is not Llama 2, or not the wanted architecture.
    """
    return read_config(Path(folder, "config.json"), architecture)


def is_scorer(folder: str | Path) -> bool:
    """Whether a folder says that it holds a reward model. Raises DataError for a config.json that is not Llama 2's."""
    load_config(folder, None)
    named = read_json(Path(folder, "config.json")).get("architectures") or [LM]
    return named[0].replace("LLaMA", "Llama") == SCORER


def score_offset(folder: str | Path) -> float:
    """What is to be added to the raw scores of a reward model, 0.0 where its config.json has no `score_offset`.

    The ranking loss leaves the origin of the scores open; a calibrated one is kept here, outside of the weights, so
    that transformers gives the raw score. Raises DataError where it is not a finite number.
    """
    place = Path(folder, "config.json")
    value = read_json(place).get("score_offset", 0.0)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise DataError(f"expected a finite number, got {shown(value)}", place, "score_offset")
    return float(value)


def load_model(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "fp32",
    device: str | torch.device = "cpu",
    scorer: bool = False,
) -> Llama:
    """A model from a Hugging Face folder, its weights rounded to `dtype` on `device`.

    scorer: a reward model is wanted, else a language model. Raises DataError naming file, tensor or key for whatever is
    not a whole Llama 2 checkpoint of that kind.
    """
    config = load_config(folder, SCORER if scorer else LM)
    with torch.device("meta"):
        model = Llama(config, scorer=scorer)
    files = find_tensors(Path(folder), config, scorer)
    if scorer:
        check_padding(folder)
    model.to(DTYPES[dtype] if isinstance(dtype, str) else dtype).to_empty(device=device)
    read_into(model, files, config, scorer)
    return model


def load_into(model: Llama, folder: str | Path) -> bool:
    """Load the weights of a folder into a model of the same shape; a sharded one (FSDP2) takes each rank's part.

    The folder may differ in `max_position_embeddings`, for a reward model also in `tie_word_embeddings`. A reward model
    takes a language model's folder too, without its head: `score` is left as it is. Returns whether all parameters were
    filled. Raises DataError.
    """
    scorer = model.scorer and is_scorer(folder)
    config = load_config(folder, SCORER if scorer else LM)
    free = {"max_position_embeddings"} | ({"tie_word_embeddings"} if model.scorer else set())
    for key, ours in dataclasses.asdict(model.config).items():
        theirs = getattr(config, key)
        if ours != theirs and key not in free:
            raise DataError(f"is {theirs}, the model being loaded has {ours}", Path(folder, "config.json"), key)
    files = find_tensors(Path(folder), config, scorer)
    if scorer:
        check_padding(folder)
    read_into(model, files, config, scorer)
    return scorer or not model.scorer


def check_padding(folder: str | Path) -> None:
    """Warn of a reward model whose padding is EOS: there transformers reads the score one token before EOS."""
    place = Path(folder, "config.json")
    if read_json(place).get("pad_token_id") == EOS:
        told = "transformers would read its scores at the token before EOS; here they are read at EOS"
        console.warn(f"{place}: pad_token_id is {EOS}, which is EOS: {told}")


def tensor_files(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files of a folder, each with the names that the index gives it (None: no index).

    Raises DataError where there are none, or where the index is not what it should be.
    """
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    index = folder / INDEX
    if not index.is_file():
        if any(folder.glob("pytorch_model*.bin")):
            fix = "save it again with save_pretrained(..., safe_serialization=True) of transformers"
            raise DataError(f"has only pytorch_model.bin, a pickle, which is not read; {fix}", folder)
        raise DataError(f"has no {SINGLE} and no {INDEX}", folder)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError("expected an object of tensor names and files", index, "weight_map")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or PurePosixPath(file).name != file or not file.endswith(".safetensors"):
            raise DataError(f"{name!r}: expected a safetensors file of this folder, got {file!r}", index, "weight_map")
        names = files.setdefault(folder / file, set())
        assert names is not None
        names.add(name)
    for path in files:
        if not path.is_file():
            raise DataError(f"does not exist, but {INDEX} names it", path)
    return files


def find_tensors(folder: Path, config: ModelConfig, scorer: bool = False) -> dict[str, Path]:
    """The file that holds each tensor of the model, by name; shapes and types are checked, no value is read.

    Raises DataError for a missing or unexpected tensor, a wrong shape or type, a file that disagrees with the index.
    """
    wanted = {p.name: p.shape for p in parts(config, scorer)}
    optional = {HEAD} if config.tie_word_embeddings and not scorer else set()
    wanted |= dict.fromkeys(optional, wanted[EMBED])
    kind = "a Llama 2 reward model" if scorer else "Llama 2"
    found: dict[str, Path] = {}
    for path, listed in tensor_files(folder).items():
        header = tensorfile.read_header(path)
        if listed is not None and listed != set(header):
            odd = sorted(listed ^ set(header))[0]
            raise DataError(f"{odd!r} is in only one of this file and {INDEX}", path)
        for name, info in header.items():
            if name.endswith("rotary_emb.inv_freq"):  # a constant that old versions of transformers saved
                continue
            if name not in wanted:
                raise DataError(f"{name!r} is not a tensor of {kind}{did_you_mean(name, wanted)}", path)
            if name == SCORE and len(info.shape) == 2 and info.shape[0] != 1:
                raise DataError(f"a reward model has one label, this classifier {info.shape[0]}", path, name)
            if tuple(info.shape) != wanted[name]:
                by = f"expected shape {list(wanted[name])} by config.json"
                raise DataError(f"{by}, got {list(info.shape)}", path, name)
            if info.dtype not in STORED:
                raise DataError(f"expected fp32, fp16 or bf16 (F32, F16, BF16), got {info.dtype}", path, name)
            found[name] = path
    missing = [name for name in wanted if name not in found and name not in optional]
    if missing:
        more = f" and {len(missing) - 1} more are missing" if len(missing) > 1 else " is missing"
        hint = "; config.json does not say tie_word_embeddings" if missing == [HEAD] else ""
        raise DataError(f"tensor {missing[0]!r}{more}{hint}", folder)
    return found


def map_tensors(files: Mapping[str, Path]) -> dict[str, Tensor]:
    """The tensors that `find_tensors` found, in their stored types, mapped: nothing is read before it is used."""
    arrays = {path: tensorfile.open_arrays(path) for path in set(files.values())}
    headers = {path: tensorfile.read_header(path) for path in arrays}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # and nobody writes to it
        return {
            name: torch.from_numpy(arrays[path][name]).view(STORED[headers[path][name].dtype])
            for name, path in files.items()
        }


def check_finite(tensor: Tensor, *place: object) -> Tensor:
    """The tensor. Raises DataError, with a count, where values are NaN or infinite."""
    if tensor.numel():
        low, high = tensor.aminmax()  # one pass without a temporary; both are NaN where any value is
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad = int((~torch.isfinite(tensor)).sum())
            raise DataError(f"{bad:,} of {tensor.numel():,} values are not finite", *place)
    return tensor


def read_into(model: Llama, files: Mapping[str, Path], config: ModelConfig, scorer: bool = False) -> None:
    """Fill a model's parameters, one at a time; what the folder has and the model has not is left unread.

    scorer: the folder is a reward model's.
    """
    tensors = map_tensors(files)
    check_tied(tensors, files, config)
    params = dict(model.named_parameters())
    wanted = [part for part in parts(config, scorer) if part.ours in params]
    for ours, group in groupby(wanted, key=lambda part: part.ours):
        held = [check_finite(tensors[part.name], files[part.name], part.name) for part in group]
        fill(params[ours], held[0] if len(held) == 1 else torch.cat(held))


def open_folder(folder: str | Path) -> tuple[ModelConfig, Callable[[Part], Tensor]]:
    """The configuration of a folder and a function that gives each tensor, mapped, in its stored type, checked."""
    config = load_config(folder)
    files = find_tensors(Path(folder), config)
    tensors = map_tensors(files)
    check_tied(tensors, files, config)
    return config, lambda part: check_finite(tensors[part.name], files[part.name], part.name)


def check_tied(tensors: Mapping[str, Tensor], files: Mapping[str, Path], config: ModelConfig) -> None:
    """Raise DataError where a tied model was saved with a head that is not its embedding."""
    if config.tie_word_embeddings and HEAD in tensors and not torch.equal(tensors[HEAD], tensors[EMBED]):
        raise DataError(f"differs from {EMBED}, but config.json has tie_word_embeddings", files[HEAD], HEAD)


def check_tokenizer(config: ModelConfig, tokenizer: Tokenizer, place: object) -> None:
    """Raise DataError where the tokenizer has ids that the model has no row for."""
    if tokenizer.vocab_size > config.vocab_size:
        had = f"the tokenizer has {tokenizer.vocab_size:,} pieces, the model {config.vocab_size:,}"
        raise DataError(f"{had}: they do not belong together", place)


# --- writing ------------------------------------------------------------------------------------------------------

# Temperature and top-p of Meta's reference example programs; `generate` takes its defaults from here.
GENERATION = {
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
}


def save_model(
    folder: str | Path,
    model: Llama,
    tokenizer: Tokenizer | None,
    *,
    save_dtype: str = "fp32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
    writes: bool = True,
    score_offset: float = 0.0,
    chat_template: str | None = None,
) -> None:
    """Write a model as a Hugging Face folder into `folder`, which exists; the same model gives the same bytes.

    score_offset: of a reward model, see the function of this name. chat_template: for transformers' tokenizer.
    A sharded model (FSDP2) is gathered parameter by parameter: every rank calls this, only one has `writes`. Extra
    files (name and content) replace ours of the same name. The caller publishes the folder (`folders.publish_folder`).
    """
    if not math.isfinite(score_offset) or (score_offset and not model.scorer):
        raise ValueError(f"a score_offset of {score_offset}")
    params = dict(model.named_parameters())
    held: dict[str, Tensor] = {}

    def tensor_of(part: Part) -> Tensor:
        if part.ours not in held:
            held.clear()
            held[part.ours] = gather(params[part.ours].detach())
        return held[part.ours][part.start : part.start + part.shape[0]]

    if writes:
        write_folder(
            folder,
            model.config,
            tensor_of,
            tokenizer,
            save_dtype,
            max_shard_bytes,
            extra_files,
            scorer=model.scorer,
            score_offset=score_offset,
            chat_template=chat_template,
        )
    else:
        for part in parts(model.config, model.scorer):
            tensor_of(part)


def write_folder(
    folder: str | Path,
    config: ModelConfig,
    tensor_of: Callable[[Part], Tensor],
    tokenizer: Tokenizer | None,
    save_dtype: str = "fp32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
    *,
    scorer: bool = False,
    score_offset: float = 0.0,
    chat_template: str | None = None,
) -> None:
    """Write a Hugging Face folder whose tensors are asked for one after another, in the order of `parts`.

    Raises DataError where it cannot be written.
    """
    folder = Path(folder)
    dtype = str(DTYPES[save_dtype]).removeprefix("torch.")
    kind = SCORER if scorer else LM
    files = {"config.json": to_json(config_to_json(config, kind, dtype, score_offset=score_offset))}
    if not scorer:
        files["generation_config.json"] = to_json(GENERATION)
    try:
        for name, data in (files | dict(extra_files or {})).items():
            Path(folder, name).write_bytes(data)
        if tokenizer is not None:
            context = config.max_position_embeddings
            write_tokenizer_files(folder, tokenizer, context=context, chat_template=chat_template)
        write_weights(folder, parts(config, scorer), tensor_of, save_dtype, max_shard_bytes)
    except OSError as e:
        raise DataError(f"cannot be written ({e.strerror})", folder) from None


def to_json(value: object) -> bytes:
    """Indented JSON that ends with a newline."""
    return (json.dumps(value, indent=2) + "\n").encode()


def plan_shards(tensors: Iterable[Part], itemsize: int, max_shard_bytes: int) -> list[list[Part]]:
    """The tensors of each file: consecutive ones, as many as fit; at least one."""
    shards: list[list[Part]] = [[]]
    size = 0
    for part in tensors:
        bytes_ = math.prod(part.shape) * itemsize
        if shards[-1] and size + bytes_ > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += bytes_
    return shards


def write_weights(
    folder: Path, tensors: list[Part], tensor_of: Callable[[Part], Tensor], save_dtype: str, max_shard_bytes: int
) -> None:
    """Write the tensors to one safetensors file, or to shards with an index."""
    dtype = DTYPES[save_dtype]
    stored = next(k for k, v in STORED.items() if v == dtype)
    shards = plan_shards(tensors, dtype.itemsize, max_shard_bytes)
    many = len(shards) > 1
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if many else SINGLE for i in range(len(shards))]
    for file, shard in zip(files, shards):
        with Path(folder, file).open("wb") as f:
            f.write(header(shard, stored, dtype.itemsize))
            for part in shard:
                f.write(raw_bytes(tensor_of(part), dtype, part.shape, part.name))
    if many:
        weight_map = {part.name: file for file, shard in zip(files, shards) for part in shard}
        total = sum(math.prod(part.shape) for part in tensors) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        Path(folder, INDEX).write_bytes(to_json(index))


def raw_bytes(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> memoryview:
    """The bytes of a tensor in another type. Raises DataError where a finite value becomes infinite (fp16)."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    rounded = tensor.detach().to("cpu", dtype).contiguous()
    if dtype == torch.float16 and not torch.isfinite(rounded).all():
        bad = int((~torch.isfinite(rounded)).sum())
        raise DataError(f"{bad:,} values do not fit fp16; use --save-dtype bf16 or fp32", name)
    return rounded.view(-1).view(torch.uint8).numpy().data


def header(shard: list[Part], stored: str, itemsize: int) -> bytes:
    """The header of a safetensors file: its length, then JSON padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in shard:
        start, end = end, end + math.prod(part.shape) * itemsize
        entries[part.name] = {"dtype": stored, "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is sharded over ranks (all of which call this), or the tensor itself."""
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import DTensor

        assert isinstance(tensor, DTensor)
        return tensor.full_tensor()
    return tensor
