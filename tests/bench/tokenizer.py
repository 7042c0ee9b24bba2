"""Tokenizing: our cache beside sentencepiece and the `tokenizers` library, on the same texts and vocabulary.

    python tests/bench/tokenizer.py [FILE...] [--vocab 32000] [--rounds 5] [--core 0]

FILE: .txt or JSON documents (.gz, .zst too); without any, the pretraining texts of the folder of public data beside
the checkout, or the excerpts. A vocabulary is trained on them; they are cut into documents of about 2.5 kB. All sides
run in this one process on one core, in turns (A B C A B C ...), and their ids are compared, document by document: only
where a text spells a control piece ("<unk>") may the `tokenizers` library differ. Figures are medians, with the range.
"first" is a pass with an empty cache, "warm" one that has seen the texts. Prints JSON lines, and tables on stderr.
Not named tokenize.py: Python would import it in place of its own module of that name.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
BARS = {("warm", "sentencepiece"): 4.5, ("warm", "tokenizers"): 4.5, ("first", "sentencepiece"): 2.0}
TEXTS = ("tinyshakespeare/*", "gutenberg/*", "wikitext2/*", "tinystories/*", "codegen_instruct/*")
DOCUMENT = 2500  # characters, about


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--core", default="0", help="core to pin to; empty: not pinned")
    parser.add_argument("--field", default="instruction,input,response", help="fields of JSON documents without text")
    return parser.parse_args()


def corpus(files: list[str]) -> list[str]:
    """The files to read."""
    shared = Path(os.environ.get("LLAMA2_SHARED", ROOT.parent / "shared")) / "data"
    found = [str(p) for pattern in TEXTS for p in sorted(shared.glob(pattern))]
    return files or found or [str(p) for p in sorted((ROOT / "examples" / "data").glob("*.txt.gz"))]


def texts(files: list[str], fields: str) -> list[str]:
    """Texts as they stand in the files."""
    from llama2cli.text.documents import Selector, is_text, read_items

    plain, joined = (Selector(fields=f, source=None, exclude_sources=[], exclude_patterns=[]) for f in (None, fields))
    items = read_items(files, lines=False, split=None, max_line=1 << 30)
    return [(plain if is_text(place.file) else joined).document(place, item).text for place, item in items]


def documents(text: str) -> list[str]:
    """A text cut at line ends."""
    parts: list[list[str]] = [[]]
    size = 0
    for line in text.split("\n"):
        if size > DOCUMENT:
            parts.append([])
            size = 0
        parts[-1].append(line)
        size += len(line) + 1
    return ["\n".join(part) for part in parts]


def emit(**row: Any) -> None:
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def timed(function: Callable[[], Any]) -> float:
    gc.collect()
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    a = arguments()
    all_cores = sorted(os.sched_getaffinity(0))
    if a.core:
        os.sched_setaffinity(0, {int(a.core)})
    import sentencepiece
    import tokenizers

    from llama2cli import console
    from llama2cli.text.segments import unpack
    from llama2cli.text.tokenizer import Tokenizer, train
    from llama2cli.text.tokenizer_json import tokenizer_json

    files = corpus(a.files)
    whole = texts(files, a.field)
    began = time.perf_counter()
    proto = train(whole, a.vocab)
    seconds = time.perf_counter() - began
    docs = [d for text in whole for d in documents(text)]
    mb = sum(len(d.encode()) for d in docs) / 1e6
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
    hf = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(Tokenizer(proto).spec)))
    warm = Tokenizer(proto)
    emit(what="corpus", files=len(files), documents=len(docs), mb=mb, vocab=warm.vocab_size, train_seconds=seconds)
    emit(what="versions", sentencepiece=sentencepiece.__version__, tokenizers=tokenizers.__version__)

    # 1. The same ids, document for document.
    want = sp.encode(docs, num_threads=1)
    ours = [unpack(p, warm.code) for p in warm.pack(docs)]
    theirs = [e.ids for e in hf.encode_batch_fast(docs, add_special_tokens=False)]
    same = {"ours": sum(x == y for x, y in zip(ours, want)), "tokenizers": sum(x == y for x, y in zip(theirs, want))}
    control = sum(any(c in d for c in ("<s>", "</s>", "<unk>")) for d in docs)
    tokens = sum(map(len, want))
    emit(what="same_ids_as_sentencepiece", documents=len(docs), **same, spell_control_pieces=control, tokens=tokens)
    del want, ours, theirs

    # 2. Speed, in turns. `split` is a limit: the text cut at spaces by str.split and joined again, and nothing more.
    sides: dict[str, Callable[[], Any]] = {
        "ours, first": lambda: Tokenizer(proto).pack(docs),
        "ours, warm": lambda: warm.pack(docs),
        "sentencepiece": lambda: sp.encode(docs, num_threads=1),
        "tokenizers": lambda: hf.encode_batch_fast(docs, add_special_tokens=False),
        "str.split and join": lambda: ["".join(d.split(" ")) for d in docs],
    }
    runs: dict[str, list[float]] = {name: [] for name in sides}
    loading = min(timed(lambda: Tokenizer(proto)) for _ in range(3))
    for _ in range(a.rounds):
        for name, side in sides.items():
            runs[name].append(timed(side) - (loading if name == "ours, first" else 0))
    rows = []
    for name, times in runs.items():
        speed = [mb / t for t in times]
        emit(what="tokenize", side=name, mb_s=median(speed), low=min(speed), high=max(speed), rounds=a.rounds)
        rows.append((name, f"{median(speed):.1f}", f"{min(speed):.1f} to {max(speed):.1f}"))
    console.table(f"{mb:.1f} MB, {warm.vocab_size:,} pieces, one core", ("", "MB/s", "range"), rows)
    rows = []
    for (which, peer), bar in BARS.items():
        ratio = median(p / o for p, o in zip(runs[peer], runs[f"ours, {which}"]))
        emit(what="ratio", ours=which, peer=peer, ratio=ratio, bar=bar, reached=ratio >= bar)
        rows.append((f"{which} / {peer}", f"{ratio:.2f}", f"{bar}", "yes" if ratio >= bar else "NO"))
    console.table("", ("ratio", "here", "bar", "reached"), rows)
    os.sched_setaffinity(0, set(all_cores))
    scaling(proto, docs, mb, len(all_cores), a.rounds)


def scaling(proto: bytes, docs: list[str], mb: float, cores: int, rounds: int) -> None:
    """The whole command, records to a folder, with one process and with one for each core; at least 60 MB of text."""
    repeat = max(1, round(60 / mb))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "t.model").write_bytes(proto)
        lines = "".join(json.dumps({"text": d, "source": "x"}, ensure_ascii=False) + "\n" for d in docs)
        Path(folder, "d.jsonl").write_text(lines * repeat, encoding="utf-8")
        speeds: dict[int, list[float]] = {1: [], cores: []}
        for round_ in range(min(rounds, 3)):
            for workers, speed in speeds.items():
                command = [sys.executable, "-m", "llama2cli", "tokenize", "--quiet", "--tokenizer", f"{folder}/t.model"]
                command += ["--workers", str(workers), "-o", f"{folder}/{round_}-{workers}", f"{folder}/d.jsonl"]
                speed.append(mb * repeat / timed(lambda c=command: subprocess.run(c, check=True, capture_output=True)))
        for workers, speed in speeds.items():
            emit(what="command", workers=workers, mb=mb * repeat, mb_s=median(speed), low=min(speed), high=max(speed))


if __name__ == "__main__":
    main()
