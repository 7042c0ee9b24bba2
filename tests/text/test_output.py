"""What goes out: the finished file has the same bytes wherever, and however often, the process was killed."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llama2cli import console
from llama2cli.errors import DataError, Misuse
from llama2cli.settings import Filter
from llama2cli.text import output
from llama2cli.text.output import Output, encode, fingerprint, open_output, open_outputs, write_all
from llama2cli.text.streams import Place, read_lines, read_records, windows

N, WINDOW = 100, 7
INPUTS = [(Place("in.jsonl", i), {"text": f"{i} " + "é" * (i % 5)}) for i in range(1, N + 1)]

FEW = INPUTS[:16]


def expand(record):
    """What the commands of these tests make of an input: none, one or several records."""
    return [{"n": len(record["text"]), "copy": record["text"] * j} for j in range(record["text"].count("é"))]


def run(path, *, inputs=INPUTS, key="k", resume=True, end=None):
    """A command that reads inputs and writes to `path`. Returns the number of inputs that it did itself."""
    did = 0
    with Output(str(path), key=key, resume=resume) as out:
        done = out.skip
        for window in windows(out.rest(iter(inputs)), WINDOW):
            for _, record in window:
                for made in expand(record):
                    out.write(made)
            done += len(window)
            did += len(window)
            out.commit(done)
            if end and done >= end:
                raise KeyboardInterrupt
        out.write({"total": done})
    return did


def child(act):
    """Run `act` in a forked child; returns its exit status as the shell has it (137 when killed)."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException as e:
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def read(path):
    data = Path(path).read_bytes()
    if str(path).endswith(".gz"):
        data = gzip.decompress(data)
    elif str(path).endswith(".zst"):
        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True).read()
    return [json.loads(line) for line in data.splitlines()]


EXPECTED = [made for _, record in INPUTS for made in expand(record)] + [{"total": N}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
class TestKilled:
    @pytest.fixture
    def whole(self, tmp_path, name):
        """The bytes of a run that nobody kills."""
        (tmp_path / "whole").mkdir()
        assert run(tmp_path / "whole" / name) == N
        assert read(tmp_path / "whole" / name) == EXPECTED
        return (tmp_path / "whole" / name).read_bytes()

    def test_at_every_system_call(self, tmp_path, name, whole, monkeypatch):
        """Each write, fsync, rename and removal is the last thing done: not yet begun, half done, or done."""
        path = tmp_path / name
        path.write_text("an earlier output")
        calls = [0]

        def dying(function, at):
            def call(*args, **kwargs):
                calls[0] += 1
                if calls[0] == at:
                    if kind == "half" and function is write:
                        args[0].write(args[1][: len(args[1]) // 2])
                    elif kind == "after":
                        function(*args, **kwargs)
                    os._exit(137)
                return function(*args, **kwargs)

            return call

        write, fsync, replace, unlink = output._write_all, os.fsync, Path.replace, Path.unlink
        kinds, at = ("before", "half", "after"), 0
        while True:
            at += 1
            kind = kinds[at % 3]

            def act(at=at):
                output._write_all = dying(write, at)
                os.fsync = dying(fsync, at)
                Path.replace = dying(replace, at)  # type: ignore[method-assign]
                Path.unlink = dying(unlink, at)  # type: ignore[method-assign]
                run(path, inputs=FEW)

            if child(act) == 0:
                break
            assert path.read_bytes() == b"an earlier output" or len(read(path)) > 1  # old or whole, never part
            assert child(lambda: run(path, inputs=FEW)) == 0
            if at == 1:
                short = path.read_bytes()
            assert path.read_bytes() == short
            assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "whole"])
            path.write_text("an earlier output")
        assert at > 20

    def test_with_sigkill_at_random_moments(self, tmp_path, name, whole, monkeypatch):
        path = tmp_path / name
        rng = random.Random(name)
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.001), fsync(descriptor)))
        kills = 0
        while kills < 12:
            pid = os.fork()
            if pid == 0:
                run(path)
                os._exit(0)
            time.sleep(rng.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
            kills += killed
            if path.exists():
                assert path.read_bytes() == whole
                path.unlink()
            assert killed or not (tmp_path / f"{name}.journal").exists()
        run(path)
        assert path.read_bytes() == whole

    def test_what_is_done_is_not_done_again(self, tmp_path, name, whole, capsys):
        console.configure("llama2 x", quiet=False)
        path = tmp_path / name
        with pytest.raises(KeyboardInterrupt):
            run(path, end=50)
        assert not path.exists()
        assert run(path) == N - 56  # eight windows of seven
        assert "continuing after 56 inputs" in capsys.readouterr().err
        assert path.read_bytes() == whole

    def test_a_large_window_leaves_memory_and_comes_out_the_same(self, tmp_path, name, whole, monkeypatch):
        monkeypatch.setattr(output, "SPILL", 50)
        path = tmp_path / name
        with pytest.raises(KeyboardInterrupt):
            run(path, end=50)
        run(path)
        assert read(path) == EXPECTED
        if name == "a.jsonl":
            assert path.read_bytes() == whole

    def test_an_empty_output_can_be_read(self, tmp_path, name):
        with Output(str(tmp_path / name), key=""):
            pass
        assert read(tmp_path / name) == []
        assert (tmp_path / name).read_bytes()[:2] == {"a.jsonl": b"", "a.jsonl.gz": b"\x1f\x8b"}.get(name, b"\x28\xb5")


class TestJournal:
    def interrupted(self, path, **options):
        with pytest.raises(KeyboardInterrupt):
            run(path, end=50, **options)

    def test_of_other_settings_is_not_continued(self, tmp_path, capsys):
        console.configure("llama2 x", quiet=False)
        path = tmp_path / "a.jsonl"
        self.interrupted(path, key="other")
        assert run(path, key="k") == N
        assert "is of other settings or inputs; starting over" in capsys.readouterr().err
        assert read(path) == EXPECTED

    def test_of_a_longer_output_leaves_nothing_behind(self, tmp_path):
        path = tmp_path / "a.jsonl"
        self.interrupted(path, key="other")
        run(path, inputs=FEW)
        assert len(read(path)) == 1 + sum(len(expand(record)) for _, record in FEW)

    def test_is_not_continued_without_resume(self, tmp_path, capsys):
        path = tmp_path / "a.jsonl"
        self.interrupted(path)
        assert run(path, resume=False) == N
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("damage", ["journal", "torn", "partial", "no partial", "empty"])
    def test_that_is_damaged_costs_work_and_nothing_else(self, tmp_path, damage):
        path, journal, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.journal", tmp_path / "a.jsonl.partial"
        run(tmp_path / "whole")
        self.interrupted(path)
        if damage == "journal":
            journal.write_text("{}\nx\n")
        elif damage == "torn":
            journal.write_bytes(journal.read_bytes()[:-3])
        elif damage == "partial":
            partial.write_bytes(partial.read_bytes()[:-3])
        elif damage == "no partial":
            partial.unlink()
        else:
            journal.write_bytes(b"")
        did = run(path)
        assert did == {"torn": N - 49, "partial": N - 49}.get(damage, N)
        assert path.read_bytes() == (tmp_path / "whole").read_bytes()

    def test_a_command_finds_its_state_again(self, tmp_path):
        path, state = str(tmp_path / "a.jsonl"), {"sums": [0.1 + 0.2, 1e-17], "n": 3}
        with pytest.raises(KeyboardInterrupt), Output(path, key="k") as out:
            assert out.state is None
            out.commit(2, {"n": 1})
            out.commit(4, state)
            raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt), Output(path, key="k") as out:
            assert (out.skip, out.state) == (4, state)
            out.commit(6)
            raise KeyboardInterrupt
        with Output(path, key="k") as out:
            assert (out.skip, out.state) == (6, None)

    @pytest.mark.parametrize(("most", "found"), [(None, 6), (6, 6), (5, 4), (4, 4), (1, 0), (0, 0)])
    def test_a_second_output_goes_back_to_the_first(self, tmp_path, most, found):
        path = tmp_path / "a.jsonl"
        with pytest.raises(KeyboardInterrupt), Output(str(path), key="k") as out:
            for done in (2, 4, 6):
                out.write({"n": done})
                out.commit(done, done)
            raise KeyboardInterrupt
        with Output(str(path), key="k", most=most) as out:
            assert (out.skip, out.state) == (found, found or None)
            for done in range(found + 2, 10, 2):
                out.write({"n": done})
                out.commit(done)
        assert [record["n"] for record in read(path)] == [2, 4, 6, 8]

    def test_other_inputs_are_seen(self, tmp_path):
        path = tmp_path / "a.jsonl"
        self.interrupted(path)
        others = [*INPUTS[:20], (INPUTS[20][0], {"text": "another"}), *INPUTS[21:]]
        for inputs in (others, INPUTS[:30], []):
            with pytest.raises(DataError) as error:
                run(path, inputs=inputs)
            what = "the first 56 inputs are not those of the command that was killed; --no-resume starts over"
            assert str(error.value) == f"{path}: {what}"
        assert run(path) == N - 56  # and nothing was lost by it

    def test_more_inputs_are_fine(self, tmp_path):
        path = tmp_path / "a.jsonl"
        self.interrupted(path, inputs=INPUTS[:60])
        run(path)
        assert read(path) == EXPECTED

    def test_a_command_that_fails_at_once_leaves_nothing(self, tmp_path):
        with pytest.raises(KeyError), Output(str(tmp_path / "a.jsonl"), key="k") as out:
            out.write(1)
            raise KeyError
        assert list(tmp_path.iterdir()) == []

    def test_a_finished_output_is_made_anew(self, tmp_path):
        path = tmp_path / "a.jsonl"
        assert run(path) == run(path) == N
        assert list(tmp_path.iterdir()) == [path]

    def test_inputs_that_wrote_nothing_are_done_too(self, tmp_path):
        path = tmp_path / "a.jsonl"
        nothing = [(place, {"text": "no"}) for place, _ in INPUTS]
        self.interrupted(path, inputs=nothing)
        assert run(path, inputs=nothing) == N - 56


class TestCommit:
    def test_counts_from_the_first_input(self, tmp_path):
        with Output(str(tmp_path / "a"), key="") as out:
            out.write(1)
            out.commit(10)
            out.commit(10)  # nothing new
            with pytest.raises(ValueError, match="counts all inputs"):
                out.commit(9)
            out.write(2)
            with pytest.raises(ValueError, match="counts all inputs"):
                out.commit(10)  # a resumed process would write the second record again
            out.commit(20)
        assert (tmp_path / "a").read_text() == "1\n2\n"

    def test_stdout_is_flushed_with_every_window(self):
        code = """
import sys
from llama2cli.text.streams import *
with Output("-", key="") as out:
    for n, (place, text) in enumerate(read_texts([]), 1):
        out.write({"line": text})
        out.commit(n)
"""
        with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as process:
            assert process.stdin and process.stdout
            for _ in range(3):
                process.stdin.write(b"a\n")
                process.stdin.flush()
                assert process.stdout.readline() == b'{"line":"a"}\n'


# --- places that cannot be written --------------------------------------------------------------------------------


def refused(act, kind):
    with pytest.raises(kind) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_output_that_is_an_input(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("x\n")
    (tmp_path / "link").symlink_to(path)
    for out in (path, tmp_path / "link"):
        line = refused(lambda out=out: Output(str(out), key="", inputs=["-", path]), Misuse)
        assert line == f"{out}: is an input and the output; write to another file"
    code = "import sys; from llama2cli.text.output import Output; Output('-', key='', inputs=sys.argv[1:])"
    with path.open("a") as file:
        process = subprocess.run(
            [sys.executable, "-c", code, str(path)], stdout=file, stderr=subprocess.PIPE, text=True
        )
    assert "stdout: is an input and the output" in process.stderr
    assert path.read_text() == "x\n" and len(list(tmp_path.iterdir())) == 2


def test_folders(tmp_path):
    assert refused(lambda: Output(str(tmp_path), key=""), Misuse) == f"{tmp_path}: is a folder; name a file"
    path = tmp_path / "no" / "a.jsonl"
    line = f'{path}: cannot be written: there is no folder "{path.parent}"'
    assert refused(lambda: Output(str(path), key=""), DataError) == line


@pytest.mark.parametrize("suffix", ["xz", "bz2", "zip", "parquet"])
def test_formats_that_are_not_written(tmp_path, suffix):
    line = refused(lambda: Output(str(tmp_path / f"a.jsonl.{suffix}"), key=""), Misuse)
    assert line.endswith("cannot be written in that format; .jsonl, .jsonl.zst and .jsonl.gz can")


def test_a_second_writer(tmp_path):
    path = tmp_path / "a.jsonl"
    with Output(str(path), key="k") as out:
        out.write(1)
        out.commit(1)
        assert refused(lambda: Output(str(path), key="other"), DataError) == f"{path}: another process is writing it"
        out.write(2)
    assert path.read_text() == "1\n2\n"


def test_a_name_that_the_first_writer_gives_away_while_the_second_waits(tmp_path, monkeypatch):
    """The second opened the partial file; before it has the lock, the first renames that very file."""
    path = tmp_path / "a.jsonl"
    first = Output(str(path), key="k")
    first.write(1)
    flock = output.fcntl.flock

    def late(file, how):
        first.close()
        flock(file, how)

    monkeypatch.setattr(output.fcntl, "flock", late)
    assert refused(lambda: Output(str(path), key="k"), DataError) == f"{path}: another process is writing it"
    assert path.read_text() == "1\n"


def test_a_folder_that_is_read_only():
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: above it, only root may look
        folder, earlier = Path(name), Path(name, "a.jsonl")
        earlier.write_text("earlier\n")
        folder.chmod(0o555)

        def act():
            if os.geteuid() == 0:
                os.setuid(65534)
            assert refused(lambda: run(earlier), DataError) == f"{earlier}: cannot be written (Permission denied)"

        assert child(act) == 0
        folder.chmod(0o755)
        assert earlier.read_text() == "earlier\n" and list(folder.iterdir()) == [earlier]


def test_a_disk_that_fills_up_and_is_cleared(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("earlier\n")

    def act():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        assert refused(lambda: run(path), DataError) == f"{path}: cannot be written (File too large)"

    assert child(act) == 0
    assert path.read_text() == "earlier\n"
    assert 0 < run(path) < N  # what the disk held is not done again
    assert read(path) == EXPECTED


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_real_disk_that_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        path = disk / "a.jsonl"
        path.write_text("earlier\n")
        big = [(place, {"text": "é" * 40 + str(place.line)}) for place, _ in INPUTS]
        assert refused(lambda: run(path, inputs=big), DataError).endswith("cannot be written (No space left on device)")
        assert path.read_text() == "earlier\n"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("out", ["-", "/dev/full"])
def test_dev_full(out, unbuffered):
    code = """
import sys
from llama2cli.errors import Failure
from llama2cli.text.output import Output
try:
    with Output(sys.argv[1], key="") as out:
        out.write("x" * 100)
        out.commit(1)
except Failure as e:
    print(e, file=sys.stderr)
    sys.exit(1)
"""
    command, env = [sys.executable, "-c", code, out], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:  # noqa: PTH123
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    name = "stdout" if out == "-" else out
    assert (process.returncode, process.stderr) == (1, f"{name}: cannot be written (No space left on device)\n")


def test_a_reader_that_goes_away_is_no_data_error(monkeypatch, tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with Output(f"/dev/fd/{write_end}", key="") as out:
        out.write(1)
        with pytest.raises(BrokenPipeError):
            out.commit(1)
    os.close(write_end)


def test_files_that_are_called_as_the_standard_streams(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("stdout")
    assert read("stdout") == EXPECTED
    os.rename("stdout", "stdin")  # noqa: PTH104
    assert len(list(read_lines(["stdin"]))) == len(EXPECTED)


@pytest.mark.parametrize("name", ["fifo", "fifo.zst"])
def test_pipes_and_links(tmp_path, name):
    fifo, target = tmp_path / name, tmp_path / "target"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", str(fifo)], stdout=(tmp_path / f"copy-{name}").open("wb")):
        run(fifo)
    assert read(tmp_path / f"copy-{name}") == EXPECTED
    target.write_text("earlier")
    target.chmod(0o640)
    (tmp_path / "link").symlink_to(target)
    run(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and read(target) == EXPECTED
    assert target.stat().st_mode & 0o777 == 0o640


# --- records as bytes ---------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3),
    max_leaves=8,
)


@given(values)
def test_what_is_written_reads_back_exactly(value):
    line = encode(value)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    back = json.loads(line)
    assert back == value and repr(back) == repr(value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), np.array([1.0, math.nan])])
def test_what_json_cannot_hold_is_named(tmp_path, bad):
    with pytest.raises(ValueError, match=r"x\.y\[1\]"):
        encode({"x": {"y": [None, bad]}})
    with (
        Output(str(tmp_path / "a"), key="") as out,
        pytest.raises(DataError, match=r"a: a record cannot be written.*x is"),
    ):
        out.write({"x": math.nan})


def test_other_things_that_json_cannot_hold():
    for bad, kind in ((object(), TypeError), ("\ud800", ValueError)):
        with pytest.raises(kind):
            encode({"x": bad})
    assert encode({"x": None}) == b'{"x":null}\n'
    assert encode({"i": 2**80, "j": np.int64(3)}) == b'{"i":1208925819614629174706176,"j":3}\n'
    assert encode({"a": np.float32(0.5), "b": np.arange(3)}) == b'{"a":0.5,"b":[0,1,2]}\n'
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(DataError, match="cannot be written as JSON"):
        Output("-", key="").write(deep)


# --- keys ---------------------------------------------------------------------------------------------------------


class TestFingerprint:
    def test_settings_that_change_no_record_do_not_count(self):
        key = fingerprint(Filter(files=["a"]))
        same = dict(out="b", quiet=True, debug=True, resume=False, provenance="p", config="c", max_line=5)
        assert fingerprint(Filter(files=["a"], **same)) == key
        assert len({key, fingerprint(Filter(files=["b"])), fingerprint(Filter(files=["a"], seed=1)),
                    fingerprint(Filter(files=["a"], window=2)), fingerprint(Filter(files=["a"]), 1)}) == 5  # fmt: skip

    def test_names_that_are_not_utf8(self):
        assert fingerprint(Filter(files=["a\udcff"]), paths=["a\udcff"]) != fingerprint(
            Filter(files=["a"]), paths=["a"]
        )

    def test_files_count_by_size_and_time(self, tmp_path):
        path = tmp_path / "weights"
        path.write_text("one")
        keys = {fingerprint(paths=[path])}
        assert fingerprint(paths=[path]) in keys
        os.utime(path, (1, 1))
        keys.add(fingerprint(paths=[path]))
        assert fingerprint(paths=[tmp_path]) in keys  # a folder is its files
        path.write_text("longer")
        keys |= {fingerprint(paths=[path]), fingerprint(paths=["-"]), fingerprint(paths=[tmp_path / "missing"])}
        assert len(keys) == 5

    def test_a_command_goes_on_only_with_the_same_inputs(self, tmp_path):
        source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_bytes(b"".join(encode(record) for _, record in INPUTS[:30]))
        flags = Filter(files=[str(source)], out=str(out))

        def command(stop=False):
            with open_output(flags, "a model") as sink:
                for place, record in sink.rest(read_records(flags.files, "document")):
                    sink.write(record)
                    sink.commit(place.line)
                    if stop and place.line == 10:
                        raise KeyboardInterrupt
                return sink.skip

        with pytest.raises(KeyboardInterrupt):
            command(stop=True)
        assert command() == 10
        assert out.read_bytes() == source.read_bytes()
        with pytest.raises(KeyboardInterrupt):
            command(stop=True)
        os.utime(source, (1, 1))
        assert command() == 0


class TestTogether:
    """Several outputs of one command."""

    @staticmethod
    def command(folder: Path, stop: int | None = None, **flags: bool) -> int:
        """Copy records to three files, in windows of one; interrupted before the commit of input `stop`."""
        settings = Filter(files=[str(folder / "in.jsonl")], out=str(folder / "a"), **flags)
        with open_outputs(settings, {"--b": str(folder / "b"), "--c": None, "--d": str(folder / "d")}) as outputs:
            assert set(outputs.beside) == {"--b", "--d"}
            skip = outputs.main.skip
            for place, record in outputs.main.rest(read_records(settings.files, "document")):
                for each in (outputs.main, *outputs.beside.values()):
                    each.write(record)
                if place.line == stop:
                    outputs.beside["--b"].commit(place.line)  # and then the process is killed
                    raise KeyboardInterrupt
                outputs.commit(place.line, {"n": place.line})
        return skip

    @pytest.fixture
    def source(self, tmp_path) -> bytes:
        data = b"".join(encode(record) for _, record in FEW)
        (tmp_path / "in.jsonl").write_bytes(data)
        return data

    def test_all_go_back_to_what_all_have(self, tmp_path, source):
        with pytest.raises(KeyboardInterrupt):
            self.command(tmp_path, stop=9)
        assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
        assert self.command(tmp_path) == 8
        assert {(tmp_path / name).read_bytes() for name in "abd"} == {source}
        assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "a", "b", "d"}

    def test_one_that_is_lost_makes_all_start_over(self, tmp_path, source, capsys):
        with pytest.raises(KeyboardInterrupt):
            self.command(tmp_path, stop=9)
        (tmp_path / "d.partial").unlink()
        assert self.command(tmp_path) == 0
        assert (
            f"{tmp_path / 'd'}: what belongs to {tmp_path / 'a'} is not there; all outputs" in capsys.readouterr().err
        )
        assert {(tmp_path / name).read_bytes() for name in "abd"} == {source}

    def test_a_file_of_its_own(self, tmp_path, source):
        write_all(None, iter([1]), [])
        write_all(str(tmp_path / "m"), ({"n": n} for n in (1, 2)), [tmp_path / "in.jsonl"])
        assert (tmp_path / "m").read_bytes() == b'{"n":1}\n{"n":2}\n'
        with pytest.raises(Misuse, match="is an input and the output"):
            write_all(str(tmp_path / "in.jsonl"), [], [tmp_path / "in.jsonl"])
