"""Safetensors without the library's trust: a checked header, memory-mapped arrays, a plain writer. No torch.

The library (0.8) accepts duplicate keys and names like ../../x. Here a header is refused unless the tensors tile
the data exactly, every size follows from shape and type, and every name is a plain name.
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

MAX_HEADER = 32 << 20  # a 70B model's is 0.1 MB; the library allows 100 MB
MAX_AXES = 16
MAX_NAME = 512

# The numpy type that holds each; those numpy lacks are held as unsigned integers of their size.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "BOOL": "?",
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
    }.items()
}  # fmt: skip
OF_NUMPY = {"f8": "F64", "f4": "F32", "f2": "F16", "b1": "BOOL", **{f"i{n}": f"I{8 * n}" for n in (1, 2, 4, 8)},
            **{f"u{n}": f"U{8 * n}" for n in (1, 2, 4, 8)}}  # fmt: skip


class TensorInfo(NamedTuple):
    """What the header says of a tensor; its bytes are [start, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their data. Raises DataError for anything that is not in order."""
    return _read(Path(path))[0]


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free text that a safetensors file carries ("__metadata__"). Raises what `read_header` raises."""
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise DataError(f"is not a safetensors file: it has {size} bytes", path)
            if length > MAX_HEADER and length <= size - 8:
                raise DataError(f"has a header of {length:,} bytes; more than {MAX_HEADER:,} is refused", path)
            if length > size - 8:
                raise DataError(
                    f"is cut, or not a safetensors file: the header should have {length:,} bytes, {size - 8:,} are there",
                    path,
                )
            header = file.read(length)
    except OSError as e:
        raise DataError(f"cannot be read ({e.strerror})", path) from None
    return _check(_parse(header, path), size - 8 - length, 8 + length, path)


def _parse(header: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [k for k, _ in pairs]
            raise DataError(f"the header names {max(names, key=names.count)!r} twice", path)
        return table

    try:
        if header[:1] != b"{":
            raise ValueError
        return json.loads(header.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise DataError("is not a safetensors file: its header is not a JSON object", path) from None


def _check(table: dict[str, Any], n_data: int, base: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a parsed header, of `n_data` bytes of data that begin at `base`."""
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DataError("__metadata__ is not a table of strings", path)
    tensors = {name: _tensor(name, entry, base, path) for name, entry in table.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    at = base
    for name, info in ordered.items():
        if info.start != at:
            what = (
                "overlaps the tensor before it"
                if info.start < at
                else f"leaves {info.start - at} bytes unused before it"
            )
            raise DataError(f"{name}: {what}", path)
        at = info.end
    if at > base + n_data:
        raise DataError(f"is cut: its tensors need {at - base:,} bytes, {n_data:,} are there", path)
    if at < base + n_data:
        raise DataError(f"has {base + n_data - at:,} bytes after its last tensor", path)
    return ordered, metadata


def _tensor(name: str, entry: Any, base: int, path: Path) -> TensorInfo:
    if not name or len(name) > MAX_NAME or ".." in name or not name.isprintable() or set(name) & set("/\\"):
        raise DataError(f"the tensor name {name[:80]!r} is refused", path)

    def wrong(message: str) -> DataError:
        return DataError(f"{name}: {message}", path)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > MAX_AXES:
        raise wrong(f"the shape {str(shape)[:80]} is refused")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"the data offsets {str(offsets)[:80]} are refused")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise wrong(
            f"{dtype} of shape {str(shape)[:80]} needs {str(needed)[:40]} bytes, the header gives it {end - begin}"
        )
    return TensorInfo(dtype, tuple(shape), base + begin, base + end)


def _naturals(value: Any) -> bool:
    """Whether this is a list of integers from 0 to 2^63 - 1 (true and false are not)."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def open_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a file as read-only views of one memory map, in the order of their data (see `DTYPES` for BF16, F8)."""
    path = Path(path)
    header = read_header(path)
    if not any(info.end > info.start for info in header.values()):
        return {name: _frozen(np.empty(info.shape, DTYPES[info.dtype])) for name, info in header.items()}
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {name: _view(mapped, info) for name, info in header.items()}


def open_array(path: str | Path, name: str) -> np.ndarray:
    """One tensor as a read-only view of the memory-mapped file. Raises DataError if there is none of that name."""
    arrays = open_arrays(path)
    if name not in arrays:
        raise DataError(f'has no tensor "{name}"', path)
    return arrays[name]


def _view(mapped: mmap.mmap, info: TensorInfo) -> np.ndarray:
    return np.frombuffer(mapped, DTYPES[info.dtype], math.prod(info.shape), info.start).reshape(info.shape)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def write_arrays(
    path: str | Path,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file: aside, fsync, rename. The same arrays give the same bytes, those that the library writes.

    dtypes: names a type that numpy lacks for arrays that hold its bits ({"x": "BF16"} for uint16). Raises DataError
    where the file cannot be written, ValueError for a type or name that the reader would refuse.
    """
    path = Path(path)
    dtypes = dtypes or {}
    kinds = {name: dtypes.get(name) or OF_NUMPY.get(a.dtype.str[1:], a.dtype.str) for name, a in arrays.items()}
    order = sorted(arrays, key=lambda name: (-DTYPES[kinds[name]].itemsize if kinds[name] in DTYPES else 0, name))
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in order:
        array = arrays[name]
        table[name] = {"dtype": kinds[name], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    try:
        _check(dict(table), at, 0, path)
    except DataError as e:
        raise ValueError(str(e)) from None
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in order:
                little = np.ascontiguousarray(arrays[name], dtype=arrays[name].dtype.newbyteorder("<"))
                file.write(little.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as e:
        aside.unlink(missing_ok=True)
        raise DataError(f"cannot be written ({e.strerror})", path) from None
