"""Safetensors: the library is the judge of what is right; what it lets pass and we refuse is written out by hand."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from llama2cli.errors import DataError
from llama2cli.text.tensorfile import TensorInfo, open_array, open_arrays, read_header, read_metadata, write_arrays

ARRAYS = {
    "model.embed_tokens.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "half": np.array([1.5, -2], dtype=np.float16),
    "ids": np.arange(5, dtype=np.uint16),
    "step": np.array(7, dtype=np.int64),
    "none": np.zeros((0, 3), dtype=np.float64),
    "flags": np.array([True, False, True]),
    **{f"of.{t}": np.ones(3, t) for t in ("f8", "i4", "i2", "i1", "u8", "u4", "u1")},
}


def raw(header, data=b"", length=None):
    """The bytes of a file with this header: text, bytes, or a table."""
    if not isinstance(header, (str, bytes)):
        header = json.dumps(header)
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


HOSTILE = {
    "empty file": (b"", "is not a safetensors file, or cut: it is too short"),
    "seven bytes": (b"\0" * 7, "it is too short"),
    "length only": (raw(b""), "it is too short"),
    "length beyond the file": (raw("{}", length=3), "its header should have 3 bytes, 2 are there"),
    "length of 2^63": (raw("{}", length=2**63), "its header should have 9,223,372,036,854,775,808 bytes"),
    "length of 2^64 - 1": (raw("{}", length=2**64 - 1), "is not a safetensors file, or cut"),
    "a header of 100 MB": (raw(b"{" + b" " * 100_000_000 + b"}"), "has a header of 100,000,002 bytes; up to"),
    "not JSON": (raw("{a"), "its header is not a JSON object"),
    "not an object": (raw('["a"]'), "its header is not a JSON object"),
    "space before": (raw(' {"a":1}'), "its header is not a JSON object"),
    "not UTF-8": (raw(b'{"\xff":1}'), "its header is not a JSON object"),
    "something behind": (raw("{}{}"), "its header is not a JSON object"),
    "nested deeply": (raw('{"a":' * 100_000), "its header is not a JSON object"),
    "a pickle": (b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x8c", "is not a safetensors file, or cut"),
    "a name twice": (raw('{"a":%s,"a":%s}' % ((json.dumps(entry()),) * 2), b"\0" * 8), "the header has 'a' twice"),
    "a key twice": (raw('{"a":{"dtype":"F32","dtype":"F64","shape":[],"data_offsets":[0,4]}}', b"\0" * 4), "twice"),
    "metadata twice": (raw('{"__metadata__":{},"__metadata__":{"a":"b"}}'), "the header has '__metadata__' twice"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__ is not a table of strings"),
    "metadata a list": (raw({"__metadata__": ["a"]}), "__metadata__ is not a table of strings"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "b: overlaps the tensor before it"),
    "the same bytes": (raw({"a": entry(), "b": entry()}, b"\0" * 8), "b: overlaps the tensor before it"),
    "hole": (raw({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20), "b: 4 bytes before it belong to no tensor"),
    "hole at the start": (raw({"a": entry(offsets=(4, 12))}, b"\0" * 12), "a: 4 bytes before it belong to no tensor"),
    "bytes behind": (raw({"a": entry()}, b"\0" * 9), "holds bytes that belong to no tensor: the tensors have 8"),
    "cut": (raw({"a": entry()}, b"\0" * 7), "is cut: the tensors have 8 bytes, 7 are there"),
    "no data": (raw({"a": entry()}), "is cut: the tensors have 8 bytes, 0 are there"),
    "backwards": (raw({"a": entry(offsets=(8, 0))}, b"\0" * 8), "a: the data offsets [8, 0] are refused"),
    "negative offset": (raw({"a": entry(offsets=(-8, 0))}, b"\0" * 8), "a: the data offsets [-8, 0] are refused"),
    "three offsets": (raw({"a": entry(offsets=(0, 4, 8))}, b"\0" * 8), "a: the data offsets [0, 4, 8] are refused"),
    "offsets of floats": (raw({"a": entry(offsets=(0.0, 8.0))}, b"\0" * 8), "a: the data offsets [0.0, 8.0] are"),
    "size and shape differ": (raw({"a": entry(shape=(3,))}, b"\0" * 8), "a: F32 of shape [3] has not the 8 bytes"),
    "negative shape": (raw({"a": entry(shape=(-1, -2))}, b"\0" * 8), "a: the shape [-1, -2] is refused"),
    "shape of true": (raw({"a": entry(shape=(True, 2))}, b"\0" * 8), "a: the shape [True, 2] is refused"),
    "shape of strings": (raw({"a": entry(shape="2")}, b"\0" * 8), "a: the shape ['2'] is refused"),
    "shape null": (raw({"a": {**entry(), "shape": None}}, b"\0" * 8), "a: the shape None is refused"),
    "product wraps to 0": (raw({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}), "a: F32 of shape [4294967296, 42"),
    "product wraps to 8": (raw({"a": entry(shape=(2**61 + 1, 2))}, b"\0" * 8), "a: F32 of shape"),
    "product huge": (raw({"a": entry(shape=(2**62,) * 16, offsets=(0, 0))}), "a: F32 of shape"),
    "2^63 elements": (raw({"a": entry(shape=(2**63,), offsets=(0, 0))}), "is refused"),
    "an integer of 5000 digits": (raw('{"a":{"shape":[%s]}}' % ("9" * 5000)), "its header is not a JSON object"),
    "17 axes": (raw({"a": entry(shape=(1,) * 17, offsets=(0, 4))}, b"\0" * 4), "a: the shape [1, 1, "),
    "unknown type": (raw({"a": entry(dtype="F128")}, b"\0" * 8), "a: unknown dtype 'F128'"),
    "type of a list": (raw({"a": {**entry(), "dtype": ["F32"]}}, b"\0" * 8), "a: unknown dtype ['F32']"),
    "type missing": (raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8), "a: expected dtype, shape and"),
    "more fields": (raw({"a": entry(path="/etc/passwd")}, b"\0" * 8), "a: expected dtype, shape and data_offsets, and"),
    "entry null": (raw({"a": None}), "a: expected dtype, shape and data_offsets"),
    "entry a number": (raw({"a": 8}), "a: expected dtype, shape and data_offsets"),
    "a path": (raw({"../../x": entry()}, b"\0" * 8), "the tensor name '../../x' is refused"),
    "an absolute path": (raw({"/x": entry()}, b"\0" * 8), "the tensor name '/x' is refused"),
    "a path of Windows": (raw({"..\\x": entry()}, b"\0" * 8), r"the tensor name '..\\x' is refused"),
    "dots": (raw({"..": entry()}, b"\0" * 8), "the tensor name '..' is refused"),
    "no name": (raw({"": entry()}, b"\0" * 8), "the tensor name '' is refused"),
    "a name with NUL": (raw({"a\0": entry()}, b"\0" * 8), r"the tensor name 'a\x00' is refused"),
    "a name over lines": (raw({"a\nb": entry()}, b"\0" * 8), r"the tensor name 'a\nb' is refused"),
    "a name with colours": (raw({"a\x1b[31m": entry()}, b"\0" * 8), r"the tensor name 'a\x1b[31m' is refused"),
    "a name from right to left": (raw({"a\u202eb": entry()}, b"\0" * 8), r"the tensor name 'a\u202eb' is refused"),
    "half of a pair as name": (raw({"a\ud800": entry()}, b"\0" * 8), r"the tensor name 'a\ud800' is refused"),
    "a long name": (raw({"a" * 600: entry()}, b"\0" * 8), "the tensor name 'aaa"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_line(tmp_path, case):
    data, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    for read in (read_header, read_metadata, open_arrays, lambda p: open_array(p, "a")):
        with pytest.raises(DataError) as error:
            read(path)
        line = str(error.value)
        assert line.startswith(f"{path}: ") and message in line
        assert "\n" not in line and len(line) < len(str(path)) + 250


def test_what_the_library_accepts_of_these_is_why_we_check(tmp_path):
    """If this changes, the library has become stricter, and the module's first lines are out of date."""
    accepted = set()
    for case, (data, _) in HOSTILE.items():
        path = tmp_path / "x"
        path.write_bytes(data)
        try:
            with safe_open(path, "numpy") as file:
                [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
            accepted.add(case)
        except Exception:
            pass
    assert {"a name twice", "a path", "an absolute path", "a name over lines"} <= accepted


def test_missing_and_unreadable_files(tmp_path):
    for path, reason in ((tmp_path / "no", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(DataError, match=f"{path}: cannot be read .{reason}"):
            read_header(path)


def test_what_the_library_writes_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, {"format": "pt", "é": "中"})
    assert read_metadata(path) == {"format": "pt", "é": "中"}
    arrays = open_arrays(path)
    assert arrays.keys() == ARRAYS.keys() == read_header(path).keys()
    for name, expected in ARRAYS.items():
        assert arrays[name].dtype == expected.dtype and arrays[name].shape == expected.shape
        np.testing.assert_array_equal(arrays[name], expected)
        np.testing.assert_array_equal(open_array(path, name), expected)
        assert not arrays[name].flags.writeable
    with pytest.raises(DataError, match='has no tensor "nothing"'):
        open_array(path, "nothing")


def test_we_write_what_the_library_writes(tmp_path):
    for metadata in (None, {"format": "é"}):  # of several, the library's order is that of a hash table
        safetensors.numpy.save_file(ARRAYS, tmp_path / "theirs", metadata)
        write_arrays(tmp_path / "ours", dict(reversed(ARRAYS.items())), metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    write_arrays(tmp_path / "none", {})
    assert safetensors.numpy.load_file(tmp_path / "none") == open_arrays(tmp_path / "none") == {}


def test_the_order_of_arguments_does_not_matter(tmp_path):
    write_arrays(tmp_path / "a", ARRAYS, {"b": "1", "a": "2"})
    write_arrays(tmp_path / "b", dict(reversed(ARRAYS.items())), {"a": "2", "b": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_header_says_where(tmp_path):
    write_arrays(tmp_path / "x", {"b": np.ones((2, 2), np.float32), "a": np.ones(3, np.int8)})
    data, header = (tmp_path / "x").read_bytes(), read_header(tmp_path / "x")
    n = 8 + struct.unpack("<Q", data[:8])[0]
    assert header == {"b": TensorInfo("F32", (2, 2), n, n + 16), "a": TensorInfo("I8", (3,), n + 16, n + 19)}
    assert n % 8 == 0 and data[header["a"].start : header["a"].end] == b"\1\1\1"


def test_arrays_of_any_layout_are_written(tmp_path):
    arrays = {
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "strided": np.arange(10)[::-2],
        "big endian": np.array([1, 2], dtype=">i4"),
        "scalar": np.float64(2.5).reshape(()),
    }
    write_arrays(tmp_path / "x", arrays)
    loaded = safetensors.numpy.load_file(tmp_path / "x")
    for name, expected in arrays.items():
        np.testing.assert_array_equal(loaded[name], expected)


def test_types_that_numpy_lacks_keep_their_bits(tmp_path):
    bits = np.array([0x3F80, 0xC000], dtype=np.uint16)  # 1 and -2 as bfloat16
    write_arrays(tmp_path / "x", {"w": bits}, dtypes={"w": "BF16"})
    with safe_open(tmp_path / "x", "numpy") as file:
        assert file.get_slice("w").get_dtype() == "BF16"
    assert read_header(tmp_path / "x")["w"].dtype == "BF16"
    np.testing.assert_array_equal(open_array(tmp_path / "x", "w"), bits)


@pytest.mark.parametrize("arrays", [
    {"../x": np.ones(1)}, {"": np.ones(1)}, {"c": np.ones(1, np.complex64)}, {"s": np.array(["a"])},
    {"o": np.array([None])},
])  # fmt: skip
def test_we_do_not_write_what_we_would_refuse(tmp_path, arrays):
    with pytest.raises(ValueError):
        write_arrays(tmp_path / "x", arrays)
    with pytest.raises(ValueError):
        write_arrays(tmp_path / "x", {"a": np.ones(3)}, {"a": 1})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "x"
    write_arrays(path, ARRAYS)
    before = path.read_bytes()

    def act():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(DataError, match=r"x: cannot be written .File too large"):
            write_arrays(path, {"a": np.ones(10_000)})
        os._exit(0)

    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match="cannot be written"):
        write_arrays(tmp_path / "no" / "x", ARRAYS)


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    """Old files, and other people's writers, do not pad the header."""
    values = np.array([1.5, -2.5], dtype="<f4")
    (tmp_path / "x").write_bytes(raw(json.dumps({"a": entry()}) + "   ", values.tobytes()))
    np.testing.assert_array_equal(open_array(tmp_path / "x", "a"), values)


VALID = raw({"a": entry(), "b": entry("I8", (3,), (8, 11)), "__metadata__": {"k": "v"}}, b"\0" * 11)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.binary(max_size=6), st.integers(0, 6))
def test_any_damage_is_seen_or_leaves_a_file_in_order(tmp_path_factory, at, new, n_old):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(VALID[:at] + new + VALID[at + n_old :])
    try:
        header = read_header(path)
    except DataError as e:
        assert str(e).startswith(f"{path}: ")
        return
    size = path.stat().st_size
    assert sum(info.end - info.start for info in header.values()) <= size - 8
    assert all(0 <= info.start <= info.end <= size for info in header.values())
    assert {name: a.shape for name, a in open_arrays(path).items()} == {name: i.shape for name, i in header.items()}
    assert set(safetensors.numpy.load_file(path)) == set(header)
