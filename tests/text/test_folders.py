"""Files and folders are whole or not there, and a path that is no model says what it is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from llama2cli.errors import DataError
from llama2cli.text import folders
from llama2cli.text.folders import (
    atomic_write,
    check_space,
    publish_folder,
    resolve_model,
    sha256_file,
    verify_manifest,
    write_aside,
    write_manifest,
)


def refused(act, *args, **options):
    with pytest.raises(DataError) as error:
        act(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def killed_at(act, at):
    """Run `act` in a child that dies at its `at`-th system call of those that change names or make them durable."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    calls = [0]

    def dying(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == at:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    os.fsync = dying(os.fsync)
    Path.replace, Path.rename = dying(Path.replace), dying(Path.rename)  # type: ignore[method-assign]
    shutil.rmtree = dying(shutil.rmtree)
    try:
        act()
        os._exit(0)
    finally:
        os._exit(1)


# --- writing ------------------------------------------------------------------------------------------------------


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "latest"
    at = 1
    while True:
        path.write_text("step-000001")
        killed = killed_at(lambda: atomic_write(path, "step-000002"), at)
        assert path.read_text() in (["step-000001", "step-000002"] if killed else ["step-000002"])
        if not killed:
            break
        at += 1
    assert at == 4  # fsync of the file, rename, fsync of the folder
    assert list(tmp_path.iterdir()) == [path]  # what a killed writer left is used and gone


def test_bytes_are_written_as_they_are(tmp_path):
    atomic_write(tmp_path / "a", b"\0\xff\r\n")
    assert (tmp_path / "a").read_bytes() == b"\0\xff\r\n"


def test_an_exception_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a"
    atomic_write(path, "earlier")
    with pytest.raises(KeyError), write_aside(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert refused(atomic_write, tmp_path / "no" / "a", "").endswith("cannot be written (No such file or directory)")
    assert refused(atomic_write, tmp_path / "file" / "a", "").endswith("cannot be written (Not a directory)")
    assert refused(atomic_write, tmp_path / "folder", "").endswith("cannot be written (Is a directory)")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def make(folder, content="new"):
    (folder / "trainer").mkdir(parents=True)
    (folder / "config.json").write_text(content)
    (folder / "trainer" / "rng.safetensors").write_text(content)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


WHOLE = {"config.json": "new", "trainer/rng.safetensors": "new"}


def test_a_published_folder_is_whole_or_not_there(tmp_path):
    aside, final = tmp_path / "step-000001.partial", tmp_path / "step-000001"
    at = 1
    while True:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        make(aside)
        killed = killed_at(lambda: publish_folder(aside, final), at)
        assert not final.exists() or content(final) == WHOLE
        if not killed:
            break
        at += 1
    assert content(final) == WHOLE and not aside.exists()
    assert at >= 6  # two files, two folders, rename, parent


def test_everything_is_durable_before_the_name_is_given(tmp_path, monkeypatch):
    """Files and folders are flushed, then renamed, then the parent is flushed."""
    aside, final = tmp_path / "aside", tmp_path / "final"
    make(aside)
    order = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda d: (order.append(os.readlink(f"/proc/self/fd/{d}")), fsync(d)))  # noqa: PTH115
    monkeypatch.setattr(Path, "rename", lambda s, t: (order.append("rename"), rename(s, t)))
    publish_folder(aside, final)
    before, after = order[: order.index("rename")], order[order.index("rename") + 1 :]
    assert set(before) == {
        str(p) for p in (aside, aside / "config.json", aside / "trainer", aside / "trainer/rng.safetensors")
    }
    assert after == [str(tmp_path)]


def test_a_folder_that_exists_is_replaced_only_when_asked(tmp_path):
    aside, final = tmp_path / "aside", tmp_path / "final"
    make(final, "old")
    make(aside)
    assert refused(publish_folder, aside, final) == f"{final}: exists already"
    assert content(final)["config.json"] == "old"
    publish_folder(aside, final, replace=True)
    assert content(final) == WHOLE and list(tmp_path.iterdir()) == [final]


def test_publishing_where_nothing_can_be_written(tmp_path):
    make(tmp_path / "aside")
    final = tmp_path / "no" / "final"
    assert refused(publish_folder, tmp_path / "aside", final).startswith(f"{final}: cannot be written (")


def test_disk_space(tmp_path):
    check_space(tmp_path / "not" / "there" / "yet", 1000)
    line = refused(check_space, tmp_path / "run", 10**18)
    assert line.startswith(f"{tmp_path / 'run'}: needs 1000000.0 TB of disk space, ") and line.endswith("B is free")
    assert [folders._size(n) for n in (999, 1500, 2_340_000, 5 * 10**9)] == ["999 bytes", "1.5 kB", "2.3 MB", "5.0 GB"]


# --- manifests ----------------------------------------------------------------------------------------------------


class TestManifest:
    @pytest.fixture
    def folder(self, tmp_path):
        make(tmp_path / "step")
        write_manifest(tmp_path / "step")
        return tmp_path / "step"

    def test_holds_the_hash_of_every_file(self, folder):
        hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
        assert hashes == dict.fromkeys(WHOLE, hashlib.sha256(b"new").hexdigest()) == verify_manifest(folder)
        assert sha256_file(folder / "config.json") == hashes["config.json"]

    def test_is_the_same_bytes_every_time(self, folder):
        before = (folder / "manifest.json").read_bytes()
        write_manifest(folder)
        assert (folder / "manifest.json").read_bytes() == before

    def test_sees_what_changed(self, folder):
        (folder / "trainer/rng.safetensors").write_text("nEw")
        line = f"{folder}/trainer/rng.safetensors: is not the file that was saved: its hash is not the manifest's"
        assert refused(verify_manifest, folder) == line
        (folder / "trainer/rng.safetensors").unlink()
        line = f"{folder}/trainer/rng.safetensors: is missing; the manifest beside it names it"
        assert refused(verify_manifest, folder) == line

    def test_leaves_other_files_alone(self, folder):
        (folder / "notes.txt").write_text("mine")
        verify_manifest(folder)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 3}', "[" * 100_000, "\xff"])
    def test_that_is_none(self, folder, text):
        (folder / "manifest.json").write_text(text, "latin-1")
        assert refused(verify_manifest, folder) == f"{folder}/manifest.json: is not a manifest"

    def test_that_is_missing(self, folder):
        (folder / "manifest.json").unlink()
        assert "manifest.json: cannot be read" in refused(verify_manifest, folder)
        assert "cannot be read" in refused(sha256_file, folder)

    @pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\0"])
    def test_that_names_files_elsewhere(self, folder, name):
        (folder / "manifest.json").write_text(json.dumps({"sha256": {name: ""}}))
        assert "names a file outside the folder" in refused(verify_manifest, folder)


# --- models -------------------------------------------------------------------------------------------------------


def model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("")
    return folder


class TestModels:
    @pytest.fixture
    def run(self, tmp_path):
        for step in ("step-000001", "step-000002"):
            model(tmp_path / "run" / step)
        (tmp_path / "run" / "settings.json").write_text("{}")
        (tmp_path / "run" / "latest").write_text("step-000002\n")
        (tmp_path / "run" / "best").write_text("step-000001")
        return tmp_path / "run"

    def test_folder_step_and_run(self, run):
        assert resolve_model(run) == resolve_model(f"{run}/") == run / "step-000002"
        assert resolve_model(run / "latest") == run / "step-000002"
        assert resolve_model(run / "best") == run / "step-000001"
        assert resolve_model(run / "step-000001") == run / "step-000001"
        assert resolve_model(str(model(run.parent / "hf"))) == run.parent / "hf"

    def test_relative_paths_stay_relative(self, run, monkeypatch):
        monkeypatch.chdir(run.parent)
        assert resolve_model("run") == Path("run/step-000002")

    @pytest.mark.parametrize("name", ["../elsewhere", "/etc", "", "..", ".", "a\0b", "a\nb", "x" * 300, "\udcff"])
    def test_a_pointer_that_names_no_step(self, run, name):
        model(run.parent / "elsewhere")
        (run / "latest").write_text(name, "utf-8", "surrogateescape")
        assert "names" in refused(resolve_model, run) or "does not name a step folder" in refused(resolve_model, run)

    def test_a_pointer_to_a_step_that_is_gone(self, run):
        shutil.rmtree(run / "step-000002")
        assert refused(resolve_model, run) == f'{run}/latest: names "step-000002", which is not a saved step'

    def test_a_run_that_has_saved_nothing(self, run):
        (run / "latest").unlink()
        assert refused(resolve_model, run).endswith('is a run folder that has saved nothing yet (it has no "latest")')

    def test_misspelt(self, run):
        assert refused(resolve_model, run.parent / "rnu").endswith('no such folder; did you mean "run"?')
        line = refused(resolve_model, "meta-llama/Llama-2-7b-hf")
        assert (
            line == "meta-llama/Llama-2-7b-hf: no such folder; a model is a folder on this disk, nothing is downloaded"
        )

    def test_a_file_in_it(self, run):
        path = run / "step-000001" / "model.safetensors"
        assert refused(resolve_model, path) == f'{path}: is a file; name the folder that holds it, "{path.parent}"'

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (
                ["params.json", "consolidated.00.pth"],
                'is a Meta checkpoint; make a Hugging Face folder of it: "llama2 conv',
            ),
            (["consolidated.00.pth"], "is a Meta checkpoint"),
            (["adapter_config.json", "adapter_model.safetensors"], "is an adapter (LoRA), not a model"),
            (["model.Q4_K_M.gguf"], "holds GGUF weights"),
            (["config.json", "pytorch_model-00001-of-00002.bin"], "has its weights in a pickle (pytorch_model.bin)"),
            (["snapshots/x/config.json"], "is a download cache"),
            (["deeper/config.json"], 'is not a model: it has no config.json; did you mean "{}/deeper"?'),
            ([], "is not a model: it has no config.json"),
        ],
    )
    def test_folders_of_other_kinds_are_named(self, tmp_path, files, message):
        folder = tmp_path / "m"
        folder.mkdir()
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("")
        assert refused(resolve_model, folder).startswith(f"{folder}: {message.format(folder)}")

    def test_old_pickles_beside_safetensors_do_no_harm(self, tmp_path):
        folder = model(tmp_path / "m")
        (folder / "pytorch_model.bin").write_text("")
        assert resolve_model(folder) == folder

    def test_names_that_no_file_can_have(self, tmp_path):
        for name in ("x" * 300, "a\0b"):
            assert refused(resolve_model, tmp_path / name).startswith(f"{tmp_path}/")
