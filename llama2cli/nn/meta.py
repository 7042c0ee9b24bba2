"""Meta's checkpoints: `params.json` and `consolidated.NN.pth`, one file for each part of a model-parallel group.

A .pth file is a zip archive (stored, not compressed) of one pickle, which says what the tensors are called, and one
entry of raw numbers per tensor. **This is the one file of the project that reads a pickle**, and it does so without the
pickle module: `run_pickle` knows the opcodes that such a file needs and five names, keeps strings, whole numbers,
tuples and dictionaries, and calls nothing. Every other opcode and name is refused. Sizes are checked against the
archive before a tensor is mapped, and shapes against the model's own list before anything is allocated.

Meta turns neighbouring pairs (2i, 2i + 1) of a head by the rotary embedding, Hugging Face's layout halves (i, i + K/2):
the rows of wq and wk are permuted.

Not in Meta's format, therefore decided here:
1. The context: `--context`, 4096 as Llama 2's by default.
2. Tied tables: a head equal to the embedding is read as a tied one; a tied model is written with both.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeGuard

import torch
from torch import Tensor

from llama2cli.errors import DataError, Misuse, did_you_mean
from llama2cli.nn.checkpoint import DTYPES, EMBED, HEAD, Part, check_finite, parts, raw_bytes, to_json
from llama2cli.nn.config import CONTEXT, LIMITS, ModelConfig, check_heads, ffn_size, read_json, real, whole

STORAGES = {  # names of element types in a pickle
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
}
REBUILD, ORDERED = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
MAX_PICKLE = 2 << 20  # bytes; that of a 70B shard has 0.1 million
PARAMS = "params.json"


# --- the pickle machine -------------------------------------------------------------------------------------------


class Name(NamedTuple):
    """One of the allowed names, as a value on the stack; it is compared, never called."""

    text: str


class Storage(NamedTuple):
    """An entry of the archive: `data/KEY` holds `numel` numbers."""

    dtype: torch.dtype
    key: str
    numel: int


class View(NamedTuple):
    """A tensor: a strided view of a storage. Offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def run_pickle(data: bytes, place: object) -> dict[str, View]:
    """The tensors that a pickle names. Raises DataError for everything that a file of plain tensors does not need."""
    frames: list[list[Any]] = [[]]  # the stack; each mark begins another list
    memo: dict[Any, Any] = {}

    def refuse(what: str) -> NoReturn:
        raise DataError(f"{what}, which tensors do not need: refused, nothing was run", place)

    def pop(kind: type | None = None) -> Any:
        value = frames[-1].pop()
        if kind is not None and type(value) is not kind:
            raise TypeError
        return value

    def set_items(items: list[Any]) -> None:
        if type(frames[-1][-1]) is not dict or len(items) % 2 or not all(type(key) is str for key in items[::2]):
            raise TypeError
        frames[-1][-1].update(zip(items[::2], items[1::2]))

    try:
        argument: Any
        for opcode, argument, _ in pickletools.genops(data):
            stack, name = frames[-1], opcode.name
            if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name in LITERALS:
                stack.append(argument)
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "MARK":
                frames.append([])
            elif name == "TUPLE":
                frames.pop()
                frames[-1].append(tuple(stack))
            elif name in TUPLES:
                stack.append(tuple([pop() for _ in range(TUPLES[name])][::-1]))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "SETITEM":
                set_items([pop(), pop()][::-1])
            elif name == "SETITEMS":
                frames.pop()
                set_items(stack)
            elif name == "GLOBAL":
                if argument not in (REBUILD, ORDERED, *STORAGES):
                    refuse(f"wants to use {argument[:60].replace(' ', '.')!r}")
                stack.append(Name(argument))
            elif name == "BINPERSID":
                stack.append(as_storage(*pop(tuple)))
            elif name == "REDUCE":
                arguments, function = pop(tuple), pop(Name).text
                stack.append({} if (function, arguments) == (ORDERED, ()) else as_view(function, *arguments))
            elif name == "BUILD":  # state_dict() hangs the versions of the modules on its dictionary: dropped
                pop(dict)
                stack.append(pop(dict))
            elif name == "STOP":
                break
            elif name != "PROTO":
                refuse(f"has the pickle opcode {name}")
        (tensors,) = frames[0] if len(frames) == 1 else []
    except (ValueError, TypeError, IndexError, KeyError, OverflowError):
        raise DataError("is not a pickle of plain tensors", place) from None
    if type(tensors) is not dict or not all(type(value) is View for value in tensors.values()):
        raise DataError("expected one dictionary of tensors", place)
    return tensors


def as_storage(tag: object, kind: object, key: object, location: object, numel: object) -> Storage:
    """The storage that a persistent id means. Raises ValueError."""
    if tag != "storage" or type(kind) is not Name or kind.text not in STORAGES:
        raise ValueError
    if type(key) is not str or type(location) is not str or not natural(numel):
        raise ValueError
    return Storage(STORAGES[kind.text], key, numel)


def as_view(
    function: str,
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    grad: object,
    hooks: object,
    *extra: object,
) -> View:
    """The tensor that a call of `_rebuild_tensor_v2` means. Raises ValueError where it leaves its storage."""
    if (
        function != REBUILD
        or type(storage) is not Storage
        or not natural(offset)
        or type(grad) is not bool
        or hooks != {}
    ):
        raise ValueError
    if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride) or len(shape) > 2 or extra:
        raise ValueError
    if not all(natural(n) and n for n in shape) or not all(natural(n) for n in stride):
        raise ValueError
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if last >= storage.numel or math.prod(shape) > storage.numel:
        raise ValueError
    return View(storage, offset, shape, stride)


def natural(value: object) -> TypeGuard[int]:
    """Whether this is a whole number from 0 to 2^63 - 1 (True and False are not)."""
    return type(value) is int and 0 <= value < 1 << 63


# --- the archive --------------------------------------------------------------------------------------------------


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, mapped: nothing is read before it is used.

    Raises DataError for what is not a stored zip archive of plain tensors, or whose sizes do not agree.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            fix = "load it with a torch that you trust and save it again"
            raise DataError(f"is not a zip archive: empty, cut, or in the format of torch before 1.6 ({fix})", path)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        entries = read_entries(file, mapped, path)
    roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise DataError("is not a checkpoint of torch: it has no data.pkl", path)
    start, end = entries[roots[0] + "data.pkl"]
    if end - start > MAX_PICKLE:
        raise DataError(f"names its tensors in {end - start:,} bytes; more than {MAX_PICKLE:,} is refused", path)
    order = entries.get(roots[0] + "byteorder")
    if order is not None and mapped[slice(*order)] != b"little":
        raise DataError("was written on a big-endian machine: not supported", path)
    views = run_pickle(mapped[start:end], path)
    tensors = {}
    for name, view in views.items():
        dtype, key, numel = view.storage
        start, end = entries.get(f"{roots[0]}data/{key}", (0, 0))
        if end - start != numel * dtype.itemsize:
            raise DataError(f"{name!r}: {numel:,} numbers of {dtype} are not in {end - start:,} bytes", path)
        flat = numbers(mapped, start, numel, dtype)
        tensors[name] = flat.as_strided(view.shape, view.stride, view.offset)
    return tensors


def numbers(mapped: mmap.mmap, start: int, numel: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor of mapped bytes; of copied ones where they do not lie on a multiple of their size."""
    if start % dtype.itemsize:
        return torch.frombuffer(bytearray(mapped[start : start + numel * dtype.itemsize]), dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # and nobody writes to it
        return torch.frombuffer(mapped, dtype=dtype, count=numel, offset=start)


def read_entries(file: BinaryIO, mapped: mmap.mmap, path: Path) -> dict[str, tuple[int, int]]:
    """First and last byte of each entry of a zip archive. Raises DataError unless all are stored, whole and apart."""
    entries: dict[str, tuple[int, int]] = {}
    try:
        infos = zipfile.ZipFile(file).infolist()
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise DataError(f"{info.filename[:80]!r} is compressed or encrypted; torch stores it plainly", path)
            at = info.header_offset
            magic, name_size, extra_size = struct.unpack("<4s22xHH", mapped[at : at + 30])
            start = at + 30 + name_size + extra_size
            if magic != b"PK\x03\x04" or start + info.file_size > len(mapped) or info.filename in entries:
                raise zipfile.BadZipFile
            entries[info.filename] = (start, start + info.file_size)
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OSError):
        raise DataError("is a damaged zip archive: cut, or changed", path) from None
    spans = sorted(span for span in entries.values() if span[0] < span[1])
    if any(before[1] > after[0] for before, after in pairwise(spans)):
        raise DataError("has entries that overlap", path)
    return entries


def write_pth(
    path: Path, tensors: Iterable[tuple[str, tuple[int, ...]]], tensor_of: Callable[[str], Tensor], dtype: torch.dtype
) -> None:
    """Write the named tensors, of the given shapes and asked for one after another, as `torch.save` would.

    The same tensors give the same bytes. Numbers begin on a multiple of 64 bytes, so that they can be mapped.
    """
    tensors = list(tensors)
    with zipfile.ZipFile(path, "w") as archive:

        def entry(name: str, content: bytes | memoryview) -> None:
            info = zipfile.ZipInfo(f"consolidated/{name}", (1980, 1, 1, 0, 0, 0))
            assert archive.fp is not None
            head = archive.fp.tell() + 30 + len(info.filename) + 4 + 20  # a long entry's header has 20 bytes more
            padding = -head % 64
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(info, "w", force_zip64=True) as f:
                f.write(content)

        entry("data.pkl", pickle_of(tensors, dtype))
        entry("byteorder", b"little")
        for i, (name, shape) in enumerate(tensors):
            entry(f"data/{i}", raw_bytes(tensor_of(name), dtype, shape, name))
        entry("version", b"3\n")


def pickle_of(tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> bytes:
    """The pickle (protocol 2) of a dictionary of contiguous tensors; tensor i is in the entry data/i."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def number(value: int) -> bytes:
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def name(value: str) -> bytes:
        return b"c" + value.replace(" ", "\n").encode() + b"\n"

    def row(*items: bytes) -> bytes:
        return b"(" + b"".join(items) + b"t"

    kind = next(k for k, v in STORAGES.items() if v == dtype)
    out = b"\x80\x02}("
    for i, (key, shape) in enumerate(tensors):
        storage = row(text("storage"), name(kind), text(str(i)), text("cpu"), number(math.prod(shape))) + b"Q"
        stride = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        hooks = name(ORDERED) + b")R"
        arguments = row(storage, number(0), row(*map(number, shape)), row(*map(number, stride)), b"\x89", hooks)
        out += text(key) + name(REBUILD) + arguments + b"R"
    return out + b"u."


# --- Meta's names and layout --------------------------------------------------------------------------------------

TOP = {EMBED: ("tok_embeddings.weight", 1), "model.norm.weight": ("norm.weight", None), HEAD: ("output.weight", 0)}
LAYER: dict[str, tuple[str, int | None]] = {  # the axis along which a model-parallel group splits the matrix
    "input_layernorm.weight": ("attention_norm.weight", None),
    "self_attn.q_proj.weight": ("attention.wq.weight", 0),
    "self_attn.k_proj.weight": ("attention.wk.weight", 0),
    "self_attn.v_proj.weight": ("attention.wv.weight", 0),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
}


class MetaPart(NamedTuple):
    """A tensor of Meta's: its name, the Hugging Face tensor that it is, its whole shape, the axis that is split."""

    name: str
    part: Part
    axis: int | None

    def shape(self, group: int) -> tuple[int, ...]:
        """Shape in one of `group` files."""
        return tuple(n // group if axis == self.axis else n for axis, n in enumerate(self.part.shape))


def meta_parts(config: ModelConfig) -> list[MetaPart]:
    """All tensors of a checkpoint of Meta's; there is always a head."""
    out = []
    for part in parts(dataclasses.replace(config, tie_word_embeddings=False)):
        if part.name in TOP:
            out.append(MetaPart(TOP[part.name][0], part, TOP[part.name][1]))
        else:
            _, _, layer, rest = part.name.split(".", 3)
            out.append(MetaPart(f"layers.{layer}.{LAYER[rest][0]}", part, LAYER[rest][1]))
    return out


def heads_of(part: Part, config: ModelConfig) -> int | None:
    """Number of heads of a projection that the rotary embedding turns, None for any other tensor."""
    last = part.name.removesuffix(".weight").rpartition(".")[2]
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(last)


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads * K, D] from neighbouring pairs (Meta) to halves (Hugging Face)."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads * K, D] from halves (Hugging Face) to neighbouring pairs (Meta)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def uneven(config: ModelConfig, group: int) -> str:
    """What keeps a model from being split into `group` equal files; empty where nothing does."""
    sizes = {"attention heads": config.num_attention_heads, "key-value heads": config.num_key_value_heads}
    sizes |= {"feed-forward columns": config.intermediate_size, "pieces of the vocabulary": config.vocab_size}
    return next((f"{n:,} {what} are not {group} equal parts" for what, n in sizes.items() if n % group), "")


# --- reading ------------------------------------------------------------------------------------------------------


def is_meta(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of Meta's."""
    return (folder / PARAMS).is_file() or any(folder.glob("consolidated.*.pth"))


def open_meta(folder: Path, context: int = CONTEXT) -> tuple[ModelConfig, Callable[[Part], Tensor]]:
    """A checkpoint of Meta's: its configuration, and a function that gives each Hugging Face tensor.

    Names and shapes of all files are checked here; values (finite, norms equal in all files) when a tensor is asked
    for. Raises DataError.
    """
    files = sorted(folder.glob("consolidated.*.pth"))
    if [f.name for f in files] != [f"consolidated.{i:02}.pth" for i in range(len(files))] or not files:
        have = ", ".join(f.name for f in files) or "none"
        raise DataError(f"expected consolidated.00.pth and so on, without a gap, found {have}", folder)
    shards = [read_pth(f) for f in files]
    config = params_to_config(folder, shards[0], context)
    if message := uneven(config, len(files)):
        raise DataError(message, folder)
    wanted = {m.name: m for m in meta_parts(config)}
    for file, shard in zip(files, shards):
        check_names(file, shard, wanted, len(files))

    def tensor_of(part: Part) -> Tensor:
        meta = by_part[part.name]
        pieces = [check_finite(shard[meta.name], file, meta.name) for file, shard in zip(files, shards)]
        if meta.axis is None:
            for file, piece in zip(files, pieces):
                if not torch.equal(piece, pieces[0]):
                    raise DataError(
                        f"differs from that of {files[0].name}; all files should have the same", file, meta.name
                    )
            return pieces[0]
        whole_ = pieces[0] if len(pieces) == 1 else torch.cat(pieces, meta.axis)
        heads = heads_of(part, config)
        return whole_ if heads is None else to_halves(whole_, heads)

    by_part = {m.part.name: m for m in wanted.values()}
    tied = torch.equal(tensor_of(by_part[EMBED].part), tensor_of(by_part[HEAD].part))
    return dataclasses.replace(config, tie_word_embeddings=tied), tensor_of


def check_names(file: Path, shard: Mapping[str, Tensor], wanted: Mapping[str, MetaPart], group: int) -> None:
    """Raise DataError where a file has other tensors, or other shapes, than a model-parallel group of this size."""
    for name, tensor in shard.items():
        if name == "rope.freqs":  # a constant
            continue
        if name not in wanted:
            raise DataError(f"{name[:80]!r} is not a tensor of Llama 2{did_you_mean(name, wanted)}", file)
        shape = wanted[name].shape(group)
        if tuple(tensor.shape) != shape:
            by = f"expected shape {list(shape)} by {PARAMS} and {group} files"
            raise DataError(f"{by}, got {list(tensor.shape)}", file, name)
    missing = [name for name in wanted if name not in shard]
    if missing:
        more = f" and {len(missing) - 1} more are missing" if len(missing) > 1 else " is missing"
        raise DataError(f"tensor {missing[0]!r}{more}", file)


FOREIGN = ("use_scaled_rope", "moe", "moe_args", "quantization_args", "lora_args", "vision_args", "vision_chunk_size")


def params_to_config(folder: Path, shard: Mapping[str, Tensor], context: int) -> ModelConfig:
    """The configuration that `params.json` means; the vocabulary is -1 in Meta's and read from the embedding.

    shard: tensors of the first file. Raises DataError naming file and key.
    """
    params, place = read_json(folder / PARAMS), str(folder / PARAMS)
    for key in FOREIGN:
        if params.get(key) not in (None, False):
            raise DataError("Llama 2 has nothing of the kind: not supported", place, key)
    dim = whole(params, "dim", None, LIMITS["hidden_size"], place)
    heads = whole(params, "n_heads", None, LIMITS["num_attention_heads"], place)
    table = shard.get("tok_embeddings.weight")
    if table is None or table.dim() != 2:
        raise DataError("has no matrix tok_embeddings.weight", folder / "consolidated.00.pth")
    vocab = table.shape[0]
    stated = params.get("vocab_size", -1)
    if type(stated) is not int or (stated != -1 and stated != vocab):
        raise DataError(f"is {stated}, but the embedding has {vocab:,} rows", place, "vocab_size")
    if vocab == 128256:
        raise DataError("a vocabulary of 128256 is Llama 3's: not supported", place, "vocab_size")
    multiplier = params.get("ffn_dim_multiplier")
    if multiplier is not None:
        multiplier = real(multiplier, 1.0, 1e-3, 1e3, place, "ffn_dim_multiplier")
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=ffn_size(dim, multiplier, whole(params, "multiple_of", 256, 1 << 16, place)),
        num_hidden_layers=whole(params, "n_layers", None, LIMITS["num_hidden_layers"], place),
        num_attention_heads=heads,
        num_key_value_heads=whole(params, "n_kv_heads", heads, LIMITS["num_key_value_heads"], place),
        max_position_embeddings=context,
        rms_norm_eps=real(params.get("norm_eps"), 1e-5, 1e-12, 0.1, place, "norm_eps"),
        rope_theta=real(params.get("rope_theta"), 10000.0, 1, 1e12, place, "rope_theta"),
    )
    check_heads(config, place, "n_heads", "n_kv_heads")
    return config


# --- writing ------------------------------------------------------------------------------------------------------


def config_to_params(config: ModelConfig) -> dict[str, Any]:
    """The content of `params.json`; keys that Meta's reference code does not know only where they matter."""
    multiple, multiplier = ffn_numbers(config.hidden_size, config.intermediate_size)
    params: dict[str, Any] = {"dim": config.hidden_size, "multiple_of": multiple}
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params |= {"n_heads": config.num_attention_heads, "n_layers": config.num_hidden_layers}
    if config.num_key_value_heads != config.num_attention_heads:
        params["n_kv_heads"] = config.num_key_value_heads
    params |= {"norm_eps": config.rms_norm_eps, "vocab_size": config.vocab_size}
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    return params


def ffn_numbers(dim: int, width: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` for which the reference formula gives this width."""
    for multiple, multiplier in ((256, None), (4096, 1.3)):  # 7B and 13B; 70B
        if ffn_size(dim, multiplier, multiple) == width:
            return multiple, multiplier
    return min(width & -width, 256), (width + 0.5) / int(2 * (4 * dim) / 3)


def write_meta(
    folder: Path, config: ModelConfig, tensor_of: Callable[[Part], Tensor], *, group: int = 1, save_dtype: str = "fp32"
) -> None:
    """Write `params.json` and one .pth file per part of a model-parallel group into `folder`, which exists.

    tensor_of gives each Hugging Face tensor. Raises Misuse where the model cannot be split into `group` parts.
    """
    if message := uneven(config, group):
        raise Misuse(message, "--model-parallel")
    Path(folder, PARAMS).write_bytes(to_json(config_to_params(config)))
    names = {m.name: m for m in meta_parts(config)}
    for rank in range(group):

        def tensor(name: str, rank: int = rank) -> Tensor:
            meta = names[name]
            part = meta.part
            if part.name == HEAD and config.tie_word_embeddings:
                part = names["tok_embeddings.weight"].part
            weight = tensor_of(part)
            heads = heads_of(part, config)
            weight = weight if heads is None else to_pairs(weight, heads)
            return weight if meta.axis is None else weight.chunk(group, meta.axis)[rank]

        shapes = [(m.name, m.shape(group)) for m in names.values()]
        path = Path(folder, f"consolidated.{rank:02}.pth")
        try:
            write_pth(path, shapes, tensor, DTYPES[save_dtype])
        except OSError as e:
            raise DataError(f"cannot be written ({e.strerror})", path) from None
