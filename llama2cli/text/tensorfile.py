"""Safetensors without the library's trust: a checked header, memory-mapped arrays, a plain writer. No torch.

The library (0.8) accepts duplicate keys, where the last one wins, and names like ../../x. Here a file is refused unless
its tensors tile the data exactly, every size follows from shape and type, and every name is a plain name.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama2cli.errors import DataError
from llama2cli.text.folders import write_aside

MAX_HEADER = 32 << 20  # the header of a 70B model takes 0.1 MB; the library allows 100 MB
MAX_AXES = 16
MAX_NAME = 512

# The numpy type that holds each, in the order in which the library writes them (large items first, so that all are
# aligned). Those that numpy lacks (BF16, F8) are unsigned integers with the same bits.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "I32": "<i4", "BF16": "<u2", "F16": "<f2",
        "U16": "<u2", "I16": "<i2", "F8_E4M3": "u1", "F8_E5M2": "u1", "I8": "i1", "U8": "u1", "BOOL": "?",
    }.items()
}  # fmt: skip
OF_NUMPY = {"f8": "F64", "f4": "F32", "f2": "F16", "b1": "BOOL"}
OF_NUMPY |= {f"{kind}{n}": f"{kind.upper()}{8 * n}" for kind in "iu" for n in (1, 2, 4, 8)}


class TensorInfo(NamedTuple):
    """What the header says of a tensor; its bytes are [start, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


# --- the header ---------------------------------------------------------------------------------------------------


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their data. Raises DataError for what is not in order."""
    return _read(Path(path))[0]


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free text that a safetensors file carries (`__metadata__`). Raises what `read_header` raises."""
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        with path.open("rb") as file:
            there = os.fstat(file.fileno()).st_size - 8
            length = int.from_bytes(file.read(8), "little")
            if there < 2:
                raise DataError("is not a safetensors file, or cut: it is too short", path)
            if length > there:
                what = f"its header should have {length:,} bytes, {there:,} are there"
                raise DataError(f"is not a safetensors file, or cut: {what}", path)
            if length > MAX_HEADER:
                raise DataError(f"has a header of {length:,} bytes; up to {MAX_HEADER:,} are read", path)
            header = file.read(length)
    except OSError as e:
        raise DataError(f"cannot be read ({e.strerror})", path) from None
    return _check(_parse(header, path), 8 + length, there - length, path)


def _parse(header: bytes, path: Path) -> dict[str, Any]:
    """The JSON object of a header. Raises DataError if it is none or names a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise DataError(f"the header has {ascii(key)[:80]} twice", path)
            table[key] = value
        return table

    try:
        if header[:1] == b"{":
            return json.loads(header.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError):
        pass
    raise DataError("is not a safetensors file: its header is not a JSON object", path)


def _check(table: dict[str, Any], base: int, n_bytes: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a parsed header whose data are the `n_bytes` bytes from `base` on."""
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DataError("__metadata__ is not a table of strings", path)
    tensors = [(name, _tensor(name, entry, base, path)) for name, entry in table.items()]
    tensors.sort(key=lambda item: (item[1].start, item[1].end))
    at = base
    for name, info in tensors:
        if info.start < at:
            raise DataError(f"{name}: overlaps the tensor before it", path)
        if info.start > at:
            raise DataError(f"{name}: {info.start - at:,} bytes before it belong to no tensor", path)
        at = info.end
    if at != base + n_bytes:
        what = "is cut" if at > base + n_bytes else "holds bytes that belong to no tensor"
        raise DataError(f"{what}: the tensors have {at - base:,} bytes, {n_bytes:,} are there", path)
    return dict(tensors), metadata


def _tensor(name: str, entry: Any, base: int, path: Path) -> TensorInfo:
    """The checked entry of one tensor."""
    if not name or len(name) > MAX_NAME or not name.isprintable() or ".." in name or "/" in name or "\\" in name:
        raise DataError(f"the tensor name {ascii(name)[:80]} is refused", path)

    def wrong(message: str) -> DataError:
        return DataError(f"{name}: {message}", path)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("expected dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"unknown dtype {ascii(dtype)[:40]}")
    if not _naturals(shape) or len(shape) > MAX_AXES:
        raise wrong(f"the shape {ascii(shape)[:80]} is refused")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"the data offsets {ascii(offsets)[:80]} are refused")
    size = math.prod(shape) * DTYPES[dtype].itemsize  # Python's integers do not overflow
    if offsets[1] - offsets[0] != size:
        raise wrong(f"{dtype} of shape {ascii(shape)[:80]} has not the {offsets[1] - offsets[0]:,} bytes it is given")
    return TensorInfo(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(value: Any) -> bool:
    """Whether this is a list of integers from 0 to 2^63 - 1; true and 1.0 are none."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


# --- the data -----------------------------------------------------------------------------------------------------


def open_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors as read-only views of the memory-mapped file, in the order of their data; see `DTYPES` for BF16.

    Raises what `read_header` raises.
    """
    path = Path(path)
    header = read_header(path)
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: np.frombuffer(data, DTYPES[t.dtype], math.prod(t.shape), min(t.start, len(data) - 1)).reshape(t.shape)
        for name, t in header.items()
    }


def open_array(path: str | Path, name: str) -> np.ndarray:
    """One tensor as a read-only view of the memory-mapped file. Raises DataError also if there is none of that name."""
    arrays = open_arrays(path)
    if name not in arrays:
        raise DataError(f'has no tensor "{name}"', path)
    return arrays[name]


def write_arrays(
    path: str | Path,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file: aside, fsync, rename. The bytes are those that the library writes for these arrays.

    dtypes: the type of arrays that hold the bits of one that numpy lacks ({"x": "BF16"} for uint16). Raises DataError
    where the file cannot be written, ValueError for a type or a name that the reader refuses.
    """
    path = Path(path)
    types = {name: (dtypes or {}).get(name) or OF_NUMPY.get(a.dtype.str[1:], a.dtype.str) for name, a in arrays.items()}
    for name, kind in types.items():
        if kind not in DTYPES or DTYPES[kind].itemsize != arrays[name].itemsize:
            raise ValueError(f"{name}: an array of {arrays[name].dtype} cannot be written as {kind}")
    rank = {kind: i for i, kind in enumerate(DTYPES)}
    order = sorted(arrays, key=lambda name: (rank[types[name]], name))
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in order:
        a = arrays[name]
        table[name] = {"dtype": types[name], "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    try:
        _check(dict(table), 0, at, path)
    except DataError as e:
        raise ValueError(str(e)) from None
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with write_aside(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            little = np.ascontiguousarray(arrays[name], dtype=arrays[name].dtype.newbyteorder("<"))
            file.write(little.reshape(-1).view(np.uint8).data)
