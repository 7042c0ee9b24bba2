"""`llama2 convert`: checkpoints of Meta's to Hugging Face folders and back."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llama2cli import console, provenance
from llama2cli.errors import DataError, Misuse
from llama2cli.nn.config import CONTEXT, LIMITS, MAX_SHARD_BYTES, n_params, read_json
from llama2cli.settings import Base, flag

if TYPE_CHECKING:
    from torch import Tensor

    from llama2cli.nn.checkpoint import Part

PROVENANCE, TOKENIZER = "provenance.json", "tokenizer.model"


@dataclass(frozen=True, kw_only=True)
class Settings(Base):
    """Convert a checkpoint: Meta's consolidated.NN.pth to a Hugging Face folder, or the other way.

    SRC is a folder of Meta's (params.json, consolidated.00.pth, ...; its tokenizer.model may lie beside the folder), a
    Hugging Face folder, or a run folder of ours. The direction follows from what it is; --to hf or --to meta writes
    the same format again, in another type or number of files. Nothing in a .pth file is executed.

    Prints one JSON record: {"checkpoint", "format", "parameters", "files", "bytes"}.

    Example:

      llama2 convert llama-2-7b -o llama-2-7b-hf --save-dtype bf16

      llama2 convert run/ -o run-meta --model-parallel 2
    """

    source: str = flag(positional=True, metavar="SRC", help="the checkpoint to read", complete="checkpoint")
    out: str = flag("-o", help="the folder to write; it must not exist", complete="file")
    to: Literal["hf", "meta"] | None = flag(
        default=None, help="format to write; the default is the other one than SRC's"
    )
    model_parallel: int = flag(default=1, low=1, help="number of consolidated.NN.pth files (GPUs of Meta's code)")
    save_dtype: Literal["fp32", "bf16", "fp16"] = flag(default="fp32", help="type of the written weights")
    max_shard_bytes: int = flag(
        default=MAX_SHARD_BYTES, low=1, help="largest safetensors file; a larger model becomes shards with an index"
    )
    context: int | None = flag(
        default=None,
        low=1,
        high=LIMITS["max_position_embeddings"],
        help="context of a checkpoint of Meta's, which does not say (default: 4096)",
    )
    tokenizer: str | None = flag(
        default=None, help="tokenizer.model where it is not in SRC or beside it", complete="file"
    )
    resume: bool = flag(default=False, help="do nothing where --out is already this conversion")


def run(settings: Settings) -> dict[str, Any]:
    """Convert, publish the folder in one step, and return the record that is printed.

    Raises DataError for a checkpoint that is not a whole Llama 2, Misuse for flags that do not fit it.
    """
    from llama2cli.nn import checkpoint, meta
    from llama2cli.text import folders
    from llama2cli.text.tokenizer import Tokenizer

    # 1. What is there, and what is wanted.
    source, out = Path(settings.source), Path(settings.out).absolute()
    if out.exists() and not settings.resume:
        hint = "name another folder, or give --resume to accept a finished conversion"
        raise Misuse(f"exists; {hint}", "--out", settings.out)
    from_meta = source.is_dir() and meta.is_meta(source) and not (source / "config.json").is_file()
    source = source if from_meta else folders.resolve_model(source)
    to = settings.to or ("hf" if from_meta else "meta")
    refuse_unused(settings, from_meta, to)
    tokenizer_file = find_tokenizer(settings, source, from_meta)
    origin = provenance_of(settings, source, tokenizer_file)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        return finished(settings, origin)

    # 2. Names, shapes and types of every tensor; the values follow one by one while they are written.
    if from_meta:
        config, tensor_of = meta.open_meta(source, settings.context or CONTEXT)
        if settings.context is None:
            console.warn(f"{source}: Meta's format does not say the context; {CONTEXT} is assumed (--context)")
    else:
        config, tensor_of = checkpoint.open_folder(source)
    tokenizer = Tokenizer.load(tokenizer_file)
    checkpoint.check_tokenizer(config, tokenizer, tokenizer_file)
    numbers = n_params(replace(config, tie_word_embeddings=False) if to == "meta" else config)
    folders.check_space(out, numbers * checkpoint.DTYPES[settings.save_dtype].itemsize)

    # 3. Write aside, then publish.
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        total = numbers * settings.model_parallel
        with console.Progress(f"convert to {to}", total=total, unit="numbers") as progress:

            def counted(part: Part) -> Tensor:
                tensor = tensor_of(part)
                progress.advance(tensor.numel())
                return tensor

            if to == "hf":
                kept = {} if from_meta else generation_config(source)
                checkpoint.write_folder(
                    aside, config, counted, tokenizer, settings.save_dtype, settings.max_shard_bytes, kept
                )
            else:
                group = settings.model_parallel
                meta.write_meta(aside, config, counted, group=group, save_dtype=settings.save_dtype)
                (aside / "tokenizer.model").write_bytes(tokenizer.proto)
        weights = [*aside.glob("*.safetensors"), *aside.glob("*.pth")]
        counts = {"files": len(weights), "bytes": sum(f.stat().st_size for f in weights)}
        result = {"format": to, "parameters": n_params(config), **counts}
        (aside / PROVENANCE).write_bytes(checkpoint.to_json(origin | {"result": result}))
        folders.publish_folder(aside, out, replace=out.is_dir())
    except BaseException as e:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(e, DataError):  # name the folder that was asked for, not the one aside
            raise DataError(e.message, *(place.replace(str(aside), settings.out) for place in e.place)) from None
        raise
    return {"checkpoint": settings.out, **result}


def refuse_unused(settings: Settings, from_meta: bool, to: str) -> None:
    """Raise Misuse for a flag that this direction has no use for."""
    if settings.context is not None and not from_meta:
        raise Misuse(
            "a Hugging Face folder says its context in config.json; only a checkpoint of Meta's needs it", "--context"
        )
    if settings.model_parallel != 1 and to == "hf":
        raise Misuse(
            "only Meta's format is split by it; --max-shard-bytes splits a Hugging Face folder", "--model-parallel"
        )
    if settings.max_shard_bytes != MAX_SHARD_BYTES and to == "meta":
        raise Misuse(
            "only a Hugging Face folder is split by it; --model-parallel splits Meta's format", "--max-shard-bytes"
        )


def find_tokenizer(settings: Settings, source: Path, from_meta: bool) -> Path:
    """The tokenizer.model of a checkpoint; Meta's download has it beside the folder. Raises DataError for none."""
    if settings.tokenizer is not None:
        return Path(settings.tokenizer)
    places = [source, source.absolute().parent] if from_meta else [source]
    for place in places:
        if (place / TOKENIZER).is_file():
            return place / TOKENIZER
    where = "in it or beside it" if from_meta else "in it"
    raise DataError(f"has no {TOKENIZER} {where}; name the file with --tokenizer", source)


def generation_config(folder: Path) -> dict[str, bytes]:
    """The generation_config.json of a folder that is only written anew, by name; nothing where there is none."""
    from llama2cli.nn.checkpoint import to_json

    path = folder / "generation_config.json"
    return {path.name: to_json(read_json(path))} if path.is_file() else {}


def provenance_of(settings: Settings, source: Path, tokenizer_file: Path) -> dict[str, Any]:
    """Settings and provenance, as they are written into the folder."""
    inputs = provenance.collect(settings, [source, tokenizer_file])
    return {"settings": provenance.portable(asdict(settings)), "provenance": inputs}


def finished(settings: Settings, origin: dict[str, Any]) -> dict[str, Any]:
    """The record of a finished conversion, under --resume. Raises Misuse unless --out is that."""
    file = Path(settings.out, PROVENANCE)
    found = read_json(file) if file.is_file() else {}
    if identity(found) != identity(origin) or not isinstance(found.get("result"), dict):
        raise Misuse("exists and is something else than this conversion; name another folder", "--out", settings.out)
    return {"checkpoint": settings.out, **found["result"]}


def identity(record: dict[str, Any]) -> Any:
    """What makes two conversions the same: the settings that change the result, and the hashes of the inputs."""
    settings, origin = record.get("settings"), record.get("provenance")
    if not isinstance(settings, dict) or not isinstance(origin, dict):
        return None
    same = {
        k: v for k, v in settings.items() if k not in ("config", "seed", "quiet", "debug", "out", "resume", "source")
    }
    return same, origin.get("inputs")
