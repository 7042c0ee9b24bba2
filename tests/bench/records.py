"""Records per second on one core, JSON and checks included, beside bare decoders: `python tests/bench/records.py`."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import zstandard

from llama2cli.text.streams import encode, read_lines, read_records

N = 200_000
DOCUMENT = {"text": "Once upon a time there was a small dog: it ran. " * 3, "source": "tiny"}
ASK = {"role": "user", "content": "Tell me a story about a dog"}
ANSWER = {"role": "assistant", "content": "Once upon a time there was a small dog. The end."}
DIALOGUE = {"messages": [ASK, ANSWER], "id": "a1"}


def show(name: str, items: Callable[[], Iterable[object]]) -> None:
    """Print the best of three rounds, in CPU time."""
    seconds = []
    for _ in range(3):
        began = time.process_time()
        for _ in items():
            pass
        seconds.append(time.process_time() - began)
    print(f"{name:32} {N / min(seconds):>12,.0f} /s")


def main() -> None:
    """Write the files, then read them each way."""
    with tempfile.TemporaryDirectory() as folder:
        documents, dialogues = Path(folder, "d.jsonl"), Path(folder, "m.jsonl")
        documents.write_bytes(encode(DOCUMENT) * N)
        dialogues.write_bytes(encode(DIALOGUE) * N)
        Path(folder, "d.gz").write_bytes(gzip.compress(documents.read_bytes()))
        Path(folder, "d.zst").write_bytes(zstandard.compress(documents.read_bytes()))
        show("json.loads on each line", lambda: map(json.loads, documents.open("rb")))
        show("msgspec on each line", lambda: map(msgspec.json.decode, documents.open("rb")))
        show("read_lines", lambda: read_lines([documents]))
        show("read_records, documents", lambda: read_records([documents], "document"))
        for suffix in ("gz", "zst"):
            show(f"read_records, documents .{suffix}", lambda s=suffix: read_records([f"{folder}/d.{s}"], "document"))
        show("read_records, dialogues", lambda: read_records([dialogues], "dialogue"))
        show("encode, documents", lambda: (encode(DOCUMENT) for _ in range(N)))


if __name__ == "__main__":
    main()
