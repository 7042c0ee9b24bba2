"""From `--data` and `--heldout` to sources that can be trained on and parts that are held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2cli.errors import DataError, Misuse
from llama2cli.provenance import fingerprint
from llama2cli.text.shards import TokenFolder
from llama2cli.text.tokenizer import Tokenizer
from llama2cli.training.data import Source, Stream, sources, split, whole

STDIN = "-"


@dataclass(frozen=True)
class Named:
    """What a user wrote as NAME=PATH:WEIGHT."""

    name: str
    path: str
    weight: float | None


def parse(text: str, flag: str = "--data") -> Named:
    """PATH, NAME=PATH, PATH:WEIGHT or NAME=PATH:WEIGHT. Raises Misuse for a weight that is not a positive number."""
    if text == STDIN:
        return Named("stdin", STDIN, None)
    name, path = "", text
    if "=" in text and "/" not in text.partition("=")[0] and not Path(text).exists():
        name, _, path = text.partition("=")
    weight = None
    before, colon, after = path.rpartition(":")
    if colon and not Path(path).exists():
        try:
            weight = float(after)
        except ValueError:
            raise Misuse(f'expected a number after ":", got "{after}"', flag, text) from None
        if not (math.isfinite(weight) and weight > 0):
            raise Misuse(f"a weight is a positive number, got {after}", flag, text)
        path = before
    if not path or ("=" in text and name == "" and path != text):
        raise Misuse("expected PATH or NAME=PATH:WEIGHT", flag, text)
    return Named(name or Path(path).absolute().name, path, weight)


def parse_sources(texts: Sequence[str], flag: str = "--data") -> list[Named]:
    """All sources of a command. Raises Misuse: none, a name twice, weights for some only, stdin among others."""
    named = [parse(t, flag) for t in texts]
    if not named:
        raise Misuse("no data: give token folders, or '-' for {\"ids\"} lines from stdin", flag)
    names = [n.name for n in named]
    for name in names:
        if names.count(name) > 1:
            raise Misuse(f'two sources are called "{name}"; tell them apart with NAME=PATH', flag)
    if len(named) > 1 and STDIN in (n.path for n in named):
        raise Misuse("stdin cannot be mixed with other sources", flag)
    if len({n.weight is None for n in named}) > 1:
        without = next(n.name for n in named if n.weight is None)
        raise Misuse(f'source "{without}" has no weight and others have one; give a weight to all or none', flag)
    return named


def parse_heldout(texts: Sequence[str]) -> float | list[Named]:
    """A share of the training documents, or held-out folders. Raises Misuse."""
    shares = [s for s in map(as_share, texts) if s is not None]
    if not shares:
        named = parse_sources(texts, "--heldout") if texts else []
        if weighted := next((n for n in named if n.weight is not None), None):
            raise Misuse(f'"{weighted.name}" has a weight; what is held out is measured whole', "--heldout")
        return named
    if len(texts) > 1:
        raise Misuse("expected one fraction, or folders", "--heldout")
    if not 0 < shares[0] < 1:
        raise Misuse(f"a fraction is between 0 and 1, got {texts[0]}", "--heldout")
    return shares[0]


def as_share(text: str) -> float | None:
    """The number that a text is, None where it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def open_folder(named: Named, tokenizer: Tokenizer) -> TokenFolder:
    """A token folder that was made with this tokenizer. Raises DataError where it was not."""
    folder = TokenFolder.open(named.path)
    if folder.tokenizer_sha256 != tokenizer.sha256:
        made = f"made with the tokenizer {folder.tokenizer_sha256[:12]}, this one is {tokenizer.sha256[:12]}"
        raise DataError(f'source "{named.name}" was {made} (sha256); tokenize it again', named.path)
    return folder


@dataclass(frozen=True, eq=False)
class Corpus:
    """What is trained on and what is held out. described: as it is written into settings.json."""

    mixed: list[Source]
    heldout: list[Stream]
    described: dict[str, Any]


def open_corpus(named: Sequence[Named], heldout: float | Sequence[Named], tokenizer: Tokenizer, context: int) -> Corpus:
    """Open all folders and split off what is held out. Raises DataError naming the source that will not do."""
    opened = [open_folder(n, tokenizer) for n in named]
    if isinstance(heldout, float):
        pairs = [split(n.name, folder, heldout) for n, folder in zip(named, opened)]
        streams, held = [p[0] for p in pairs], [p[1] for p in pairs]
    else:
        streams = [whole(n.name, folder) for n, folder in zip(named, opened)]
        held = [whole(n.name, open_folder(n, tokenizer)) for n in heldout]
    mixed = sources(streams, [n.weight for n in named], context)
    told = [
        {"name": s.name, "share": s.share, "tokens": f.n_tokens, "documents": f.n_documents}
        | {"sha256": fingerprint(n.path)}
        for s, f, n in zip(mixed, opened, named)
    ]
    fraction = heldout if isinstance(heldout, float) else None
    apart = [{"name": h.name, "tokens": h.n_tokens, "documents": h.documents} for h in held]
    if not isinstance(heldout, float):
        apart = [a | {"sha256": fingerprint(n.path)} for a, n in zip(apart, heldout)]
    return Corpus(mixed, held, {"data": told, "heldout": {"fraction": fraction, "sources": apart}})
