"""`llama2 convert` from the command line: both directions, bitwise there and back, misuse and damage in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llama2cli.cli import invoke
from llama2cli.text.tokenizer import train

SIZES = dict(hidden_size=48, intermediate_size=100, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2)


@pytest.fixture(scope="module")
def proto() -> bytes:
    return train([f"a tokenizer for {i} tests" for i in range(100)], 300)


@pytest.fixture
def hf(tmp_path: Path, proto: bytes) -> Path:
    """A folder as transformers writes it, with a tokenizer.model."""
    return hugging_face(tmp_path / "hf", proto)


def hugging_face(folder: Path, proto: bytes, **more: Any) -> Path:
    torch.manual_seed(2)
    config = LlamaConfig(**(SIZES | {"vocab_size": 300, "max_position_embeddings": 64, "rms_norm_eps": 1e-5} | more))
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(proto)
    return folder


def convert(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> tuple[dict[str, Any], str]:
    """Run the command; its record and what it said."""
    capsys.readouterr()
    assert invoke(["convert", *map(str, args)]) == code
    out, err = capsys.readouterr()
    assert bool(out) == (code == 0) and len(out.splitlines()) <= 1
    return (json.loads(out) if out else {}), err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_is_bitwise(
    group: int, tied: bool, tmp_path: Path, proto: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    source = hugging_face(tmp_path / "hf", proto, tie_word_embeddings=tied)
    meta, back = tmp_path / "meta", tmp_path / "back"
    record, err = convert(capsys, source, "-o", meta, "--model-parallel", group)
    n = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())
    size = sum(f.stat().st_size for f in meta.glob("*.pth"))
    want = {"checkpoint": str(meta), "format": "meta", "parameters": n, "files": group, "bytes": size}
    assert record == want and err == ""
    names = [f"consolidated.{i:02}.pth" for i in range(group)]
    assert sorted(f.name for f in meta.iterdir()) == [*names, "params.json", "provenance.json", "tokenizer.model"]
    record, err = convert(capsys, meta, "-o", back, "--context", 64)
    assert (record["format"], record["parameters"], record["files"]) == ("hf", n, 1) and err == ""
    a, b = weights(source), weights(back)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f) for f in (back, source))
    ids = torch.arange(1, 40)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.config.max_position_embeddings == 64 and ours.config.tie_word_embeddings == tied
    assert (back / "tokenizer.model").read_bytes() == proto and not list(tmp_path.glob(".*"))


def test_the_same_format_in_other_types_and_files(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hf / "generation_config.json").write_text('{"temperature": 0.3}')
    record, _ = convert(
        capsys, hf, "-o", tmp_path / "a", "--to", "hf", "--save-dtype", "bf16", "--max-shard-bytes", 30000
    )
    assert record["files"] > 1 and json.loads((tmp_path / "a" / "generation_config.json").read_text()) == {
        "temperature": 0.3
    }
    a, b = weights(hf), weights(tmp_path / "a")
    assert all(torch.equal(a[k].to(torch.bfloat16), b[k]) for k in a)
    convert(capsys, hf, "-o", tmp_path / "m1")
    convert(capsys, hf, "-o", tmp_path / "m2", "--model-parallel", 2)
    convert(capsys, tmp_path / "m2", "-o", tmp_path / "m3", "--to", "meta", "--context", 64)
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        assert (tmp_path / "m1" / name).read_bytes() == (tmp_path / "m3" / name).read_bytes()


def test_a_run_folder_and_a_tokenizer_beside(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(hf, run / "step-000003")
    (run / "latest").write_text("step-000003\n")
    convert(capsys, run, "-o", tmp_path / "download" / "7b")
    tokenizer = tmp_path / "download" / "7b" / "tokenizer.model"
    tokenizer.rename(tmp_path / "download" / "tokenizer.model")  # as Meta's download has it
    record, err = convert(capsys, tmp_path / "download" / "7b", "-o", tmp_path / "back")
    assert "does not say the context; 4096 is assumed" in err
    assert json.loads((tmp_path / "back" / "config.json").read_text())["max_position_embeddings"] == 4096
    assert record["parameters"] == sum(t.numel() for t in weights(hf).values())


def test_what_exists_is_not_overwritten(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    record, _ = convert(capsys, hf, "-o", out)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    _, err = convert(capsys, hf, "-o", out, code=2)
    assert err.startswith(f"llama2 convert: --out:{out}: exists") and err.count("\n") == 1
    again, err = convert(capsys, hf, "-o", out, "--resume")
    assert again == record and err == ""
    _, err = convert(capsys, hf, "-o", out, "--resume", "--model-parallel", 2, code=2)
    assert "something else" in err
    (hf / "tokenizer.model").write_bytes(b"another")
    _, err = convert(capsys, hf, "-o", out, "--resume", code=2)
    assert "something else" in err
    assert before == {f.name: f.read_bytes() for f in out.iterdir()}
    shutil.rmtree(out)
    out.mkdir()
    _, err = convert(capsys, hf, "-o", out, code=2)
    assert "exists" in err
    (out / "mine.txt").write_text("keep")
    _, err = convert(capsys, hf, "-o", out, "--resume", code=2)
    assert [f.name for f in out.iterdir()] == ["mine.txt"]


def test_resume_with_nothing_there_starts(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "half.pth").write_bytes(b"left by a killed process")
    record, _ = convert(capsys, hf, "-o", tmp_path / "out", "--resume")
    assert record["files"] == 1 and not stale.exists() and not (tmp_path / "out" / "half.pth").exists()


def test_resume_fills_an_empty_folder(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    convert(capsys, hf, "-o", tmp_path / "out", "--resume")
    assert (tmp_path / "out" / "params.json").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--context", "64"], "--context: a Hugging Face folder says its context"),
        (["--to", "hf", "--model-parallel", "2"], "--model-parallel: only Meta's format"),
        (["--max-shard-bytes", "9"], "--max-shard-bytes: only a Hugging Face folder"),
        (["--model-parallel", "0"], "--model-parallel: expected at least 1"),
        (["--model-parallel", "3"], "--model-parallel: 2 key-value heads are not 3 equal parts"),
        (["--to", "gguf"], "gguf"),
        (["--savedtype", "bf16"], "--save-dtype"),
    ],
)
def test_misuse(flags: list[str], expected: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = convert(capsys, hf, "-o", tmp_path / "out", *flags, code=2)
    assert expected in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def damage(folder: Path, case: str) -> None:
    if case == "no tokenizer":
        (folder / "tokenizer.model").unlink()
    elif case == "tokenizer too large":
        config = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
        from safetensors.torch import save_file

        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][:299].clone()
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 299}))
    elif case == "llama 3":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 128256}))
    elif case == "no weights":
        (folder / "model.safetensors").unlink()
    elif case == "nothing":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("no tokenizer", "has no tokenizer.model in it; name the file with --tokenizer"),
        ("tokenizer too large", "the tokenizer has 300 pieces, the model 299"),
        ("llama 3", "is Llama 3's"),
        ("no weights", "has no model.safetensors"),
        ("nothing", "no such folder"),
    ],
)
def test_damaged_sources(
    case: str, expected: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(hf, case)
    _, err = convert(capsys, hf, "-o", tmp_path / "out", code=1)
    assert err.startswith(f"llama2 convert: {tmp_path}") and expected in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_value_that_is_not_finite_leaves_nothing(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found while writing: the half-written folder goes."""
    from safetensors.torch import save_file

    state = load_file(hf / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][5, 5] = float("nan")
    save_file(state, hf / "model.safetensors")
    _, err = convert(capsys, hf, "-o", tmp_path / "out", code=1)
    assert "model.layers.1.mlp.up_proj.weight: 1 of 4,800 values are not finite" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_full_disk_is_one_line(hf: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk; in a process of its own, for it cannot be lifted again."""
    for flags in ([], ["--to", "hf"]):
        code = (
            "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000));"
            "from llama2cli.cli import main; main(sys.argv[1:])"
        )
        out = tmp_path / "out"
        command = [sys.executable, "-c", code, "convert", str(hf), "-o", str(out), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(f"llama2 convert: {out}") and "cannot be written (File too large)" in done.stderr
        assert done.stderr.count("\n") == 1 and sorted(f.name for f in tmp_path.iterdir()) == ["hf"]


def test_a_pickle_that_would_run_is_one_line(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(capsys, hf, "-o", tmp_path / "meta")

    class Evil:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit('it ran')",)

    torch.save({"norm.weight": Evil()}, tmp_path / "meta" / "consolidated.00.pth")
    _, err = convert(capsys, tmp_path / "meta", "-o", tmp_path / "out", code=1)
    assert "consolidated.00.pth: wants to use '__builtin__.exec'" in err and err.count("\n") == 1
