"""Llama's tokenizer: SentencePiece BPE with digits split, byte fallback and no normalisation (Llama 2, section 2.2).

Ids are SentencePiece's own, through the segment cache where the vocabulary allows it. BOS and EOS are never made from
text: who wants them adds the numbers.

How the paper's words became options of the trainer: "splits all numbers into individual digits" is `split_digits`,
"uses bytes to decompose unknown UTF-8 characters" is `byte_fallback`. The rest is what Meta's published tokenizer.model
says of itself: identity normalisation, character coverage 0.99995, a dummy space before the text, whitespace kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from llama2cli import console
from llama2cli.errors import DataError, Misuse
from llama2cli.text import sentencepiece_proto as sp_proto
from llama2cli.text.folders import POINTERS, resolve_model
from llama2cli.text.segments import MARK, Code, SegmentCache, cuttable, unpack

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

UNK, BOS, EOS = 0, 1, 2
FIXED = 3 + 256  # <unk>, <s>, </s> and the bytes
FLOOR = FIXED + 1  # and the space mark: as three bytes it would be decoded to itself, not to a space
COVERAGE = 0.99995  # as in Meta's tokenizer.model
MAX_WORD = 4096  # characters of one word that the trainer looks at; its own counters overflow at 65536
MAX_WORDS = 1 << 22  # distinct words counted at once, about 0.6 GB; then the rarest are dropped


class Tokenizer:
    """Text to ids and back. Load it with `Tokenizer.load`; it holds a cache of some 100 MB at most."""

    def __init__(self, proto: bytes, name: str = "tokenizer.model") -> None:
        """proto: the bytes of a `.model` file; name: how errors call it. Raises DataError for another family's."""
        self.proto, self.name = proto, name
        self.foreign_template: Path | None = None  # the file with a chat template that is not Llama 2's
        self.spec = check(proto, name)
        self.sha256 = hashlib.sha256(proto).hexdigest()
        self.vocab_size = len(self.spec.pieces)
        self.unk_id, self.bos_id, self.eos_id = UNK, BOS, EOS
        self.pad_id = self.spec.pad_id if 0 <= self.spec.pad_id < self.vocab_size else None
        self.code: Code = "H" if self.vocab_size <= 1 << 16 else "I"
        self._sp = processor(proto, name)
        self._ids = {piece.text: i for i, piece in enumerate(self.spec.pieces)}
        self._cache: SegmentCache | None = None
        if cuttable(self.spec):
            bare = processor(sp_proto.edit(proto, dummy_prefix=False), name)
            self._cache = SegmentCache(partial(bare.encode, num_threads=1), self.code)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """A tokenizer from a `.model` file, or from a folder (checkpoint, step, run) that holds `tokenizer.model`.

        Raises DataError when there is none, or when it is another family's.
        """
        file = find(Path(path))
        try:
            tokenizer = cls(file.read_bytes(), str(file))
        except OSError as e:
            raise DataError(e.strerror or "cannot be read", file) from None
        tokenizer.foreign_template = foreign_template(file.parent)
        return tokenizer

    @property
    def exact(self) -> bool:
        """Whether the segment cache is used; if not, each text goes through SentencePiece as a whole."""
        return self._cache is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS."""
        return unpack(self.pack([text])[0], self.code)

    def pack(self, texts: list[str]) -> list[bytes]:
        """Ids of each text as native-endian unsigned integers: 2 bytes each where the vocabulary fits, else 4."""
        try:
            if self._cache is not None:
                return self._cache.pack(texts)
            return [array(self.code, ids).tobytes() for ids in self._sp.encode(texts, num_threads=1)]
        except (RuntimeError, TypeError, UnicodeEncodeError):  # what the binding says to a str that UTF-8 cannot hold
            raise DataError("the text holds half of a surrogate pair, which is no character") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control ids give nothing, bytes that are no UTF-8 give U+FFFD, <unk> gives " \u2047 ".

        Raises DataError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"id {i} is outside the vocabulary of {self.vocab_size}", self.name)
        return self._sp.decode(ids)

    def id_to_piece(self, i: int) -> str:
        """The piece of an id, with U+2581 for spaces."""
        return self.spec.pieces[i].text

    def piece_to_id(self, piece: str) -> int:
        """The id of a piece; <unk>'s where there is none."""
        return self._ids.get(piece, UNK)

    def id_to_bytes(self, i: int) -> bytes:
        """What an id adds to the text, as UTF-8; nothing for control ids. The space before a text is there."""
        piece = self.spec.pieces[i]
        if piece.kind == sp_proto.BYTE:
            return bytes([int(piece.text[1:-1], 16)])
        if piece.kind == sp_proto.CONTROL:
            return b""
        return " \u2047 ".encode() if piece.kind == sp_proto.UNKNOWN else piece.text.replace(MARK, " ").encode()


def processor(proto: bytes, name: str) -> SentencePieceProcessor:
    """SentencePiece itself. Raises DataError when it does not take the model."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, ValueError, OSError) as e:
        raise DataError(f"is no SentencePiece model ({e})", name) from None


def check(proto: bytes, name: str) -> sp_proto.Spec:
    """Parse a model and refuse what is not Llama's kind, by name."""
    try:
        spec = sp_proto.read(proto)
    except ValueError as e:
        what = f"is no SentencePiece model ({e})"
        if proto.startswith(b"version https://git-lfs"):
            what = "is a Git LFS pointer, not the tokenizer itself"
        elif re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", proto):
            what = "is a tiktoken vocabulary (Llama 3's), not Llama 2's tokenizer, which is SentencePiece BPE"
        raise DataError(what, name) from None
    kind = sp_proto.MODEL_TYPES.get(spec.model_type, str(spec.model_type))
    if spec.model_type != sp_proto.BPE:
        raise DataError(f"is a SentencePiece {kind} model; Llama 2's tokenizer is SentencePiece BPE", name)
    held = {p.text for p in spec.pieces if p.kind == sp_proto.BYTE}
    missing = [b for b in range(256) if f"<0x{b:02X}>" not in held]
    if not spec.byte_fallback or missing:
        raise DataError(
            "is SentencePiece BPE without byte fallback; Llama 2's tokenizer has the 256 bytes as pieces", name
        )
    if (spec.unk_id, spec.bos_id, spec.eos_id) != (UNK, BOS, EOS):
        got = f"unk {spec.unk_id}, bos {spec.bos_id}, eos {spec.eos_id}"
        raise DataError(f"has {got}; Llama 2's tokenizer has unk 0, bos 1, eos 2", name)
    kinds = [p.kind for p in spec.pieces[:3]]
    if kinds != [sp_proto.UNKNOWN, sp_proto.CONTROL, sp_proto.CONTROL]:
        raise DataError("ids 0, 1, 2 are not the control pieces <unk>, <s>, </s>", name)
    return spec


def foreign_template(folder: Path) -> Path | None:
    """The file of a checkpoint's folder that holds a chat template other than Llama 2's, None where there is none.

    Encoding dialogues for such a model in Llama 2's format would be quietly wrong; `text.chat` refuses to.
    """
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        file = folder / name
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if file.suffix == ".json":
            try:
                held = json.loads(text)
                text = json.dumps(held.get("chat_template") or "")
            except (ValueError, AttributeError, RecursionError):
                continue
        if len(text) > 2 and not ("[INST]" in text and "<<SYS>>" in text):
            return file
    return None


def find(path: Path) -> Path:
    """The `.model` file of a path that a user gave. Raises DataError."""
    if path.is_file():
        if path.name in POINTERS:
            return find(resolve_model(path))
        if path.suffix == ".json":
            raise DataError(
                "is a tokenizer of the `tokenizers` library; Llama 2's is a SentencePiece tokenizer.model", path
            )
        return path
    if not path.exists():
        raise DataError("no such tokenizer: a tokenizer.model file, or a folder that holds one, is needed", path)
    if not (path / "tokenizer.model").is_file():
        path = path if (path / "tokenizer.json").is_file() else resolve_model(path)
    if (path / "tokenizer.model").is_file():
        return path / "tokenizer.model"
    if (path / "tokenizer.json").is_file():
        why = "has tokenizer.json but no tokenizer.model: not Llama 2's tokenizer (Llama 3's and others' are so)"
        raise DataError(why, path)
    raise DataError("has no tokenizer.model", path)


# --- training -----------------------------------------------------------------------------------------------------

# A word is a run of spaces and what follows it. SentencePiece's trainer never looks across words, and it reads no
# newline, tab or NUL into a piece, nor U+2585, its own mark for what is unknown.
_words = re.compile(r" *[^ \n\t\0\u2585]+| +").findall


def count_words(texts: Iterable[str], *, sample: float = 1.0, seed: int = 0) -> Counter[str]:
    """How often each word stands in the texts, as they will be encoded: with a space before the first line only.

    sample: the share of lines that is looked at; which ones depends on the text and the seed alone.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        draw = random.Random(crc32(text.encode(), seed & 0xFFFFFFFF)).random if sample < 1 else None
        for line in (" " + text.replace(MARK, " ")).split("\n"):
            if line and (draw is None or draw() < sample):
                counts.update(_words(line))
    return counts


def forget_rare(counts: Counter[str], most: int = MAX_WORDS) -> None:
    """Where there are more than `most` words, drop the rarest until half of that is left, with a warning."""
    if len(counts) <= most:
        return
    floor = 0
    while len(counts) > most // 2:
        floor += 1
        for word in [w for w, n in counts.items() if n <= floor]:
            del counts[word]
    console.warn(
        f"more than {most:,} different words: those seen {floor} times or less so far are forgotten", "rare words"
    )


def train(
    texts: Iterable[str],
    vocab_size: int,
    *,
    character_coverage: float = COVERAGE,
    sample: float = 1.0,
    seed: int = 0,
) -> bytes:
    """The bytes of a `.model` file: `fit` of `count_words`."""
    counts = count_words(texts, sample=sample, seed=seed)
    return fit(counts, vocab_size, character_coverage=character_coverage)


def fit(counts: Counter[str], vocab_size: int, *, character_coverage: float = COVERAGE) -> bytes:
    """The bytes of a `.model` file with `vocab_size` pieces, fewer where the words do not give that many.

    The same counts in the same order give the same bytes. Raises Misuse for a size below FLOOR, DataError for no words.
    """
    if vocab_size < FLOOR:
        raise Misuse(f"expected at least {FLOOR} (3 control, 256 bytes, the space), got {vocab_size}", "--vocab-size")
    if not any(word.strip(" ") for word in counts):
        raise DataError("there is no text to train on")
    room = max(vocab_size, FIXED + len(set().union(*counts)))  # SentencePiece fails where its alphabet does not fit
    proto = _fit(counts, room, character_coverage)
    if room == vocab_size:
        return proto
    # A small vocabulary. The alphabet stands last in a model, most frequent first; merges get the room it leaves.
    pieces = sp_proto.read(proto).pieces
    alphabet = [i for i, p in enumerate(pieces) if i >= FIXED and len(p.text) == 1]
    if FIXED + len(alphabet) <= vocab_size:
        return _fit(counts, vocab_size, character_coverage)
    alphabet.sort(key=lambda i: pieces[i].text != MARK)
    return sp_proto.edit(proto, keep=[*range(FIXED), *sorted(alphabet[: vocab_size - FIXED])])


def _fit(counts: Counter[str], vocab_size: int, character_coverage: float) -> bytes:
    from sentencepiece import SentencePieceTrainer

    rows = (f"{word[at : at + MAX_WORD]}\t{n}" for word, n in counts.items() for at in range(0, len(word), MAX_WORD))
    out = io.BytesIO()
    options: dict[str, Any] = dict(
        sentence_iterator=rows,
        model_writer=out,
        input_format="tsv",
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=character_coverage,
        required_chars=MARK,
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,  # the words have their spaces already; set right below
        max_sentence_length=1 << 20,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,  # it stands in the model's bytes
        minloglevel=2,
    )
    try:
        SentencePieceTrainer.train(**options)
    except RuntimeError as e:
        raise DataError(f"SentencePiece cannot train on this text: {e}") from None
    return sp_proto.edit(out.getvalue(), dummy_prefix=True)
