"""`llama2 tokenize`: documents to token folders or id lines, ids to texts, and the training of a tokenizer. No torch.

Choices where the paper is silent:
1. Documents of a token folder have BOS before and EOS after them; id lines have neither, unless asked.
2. The tokenizer is trained on words as they will be encoded: only the first line of a text begins with a space. Meta's
   training text, its order and its sampling are not known; the options of its trainer stand in the published model.
3. Sites with much personal information were removed (section 2.1): which, and how they were found, is not told.
   --exclude-source and --exclude-pattern leave out what you name, and count it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llama2cli import console, provenance
from llama2cli.errors import DataError, Misuse
from llama2cli.settings import Filter, flag

if TYPE_CHECKING:
    from llama2cli.text.documents import Chunk, Item, Selector, Tally
    from llama2cli.text.streams import Place
    from llama2cli.text.tokenizer import Tokenizer

R = TypeVar("R")
CHUNK = 1 << 20  # bytes of documents that one worker takes at once
RECORD_FILES = (".jsonl", ".ndjson", ".json", ".zst", ".gz")
VOCAB_SIZE = 32_000  # Llama 2, section 2.2
COVERAGE = 0.99995  # what Meta's tokenizer.model says of itself
SHARD_TOKENS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Settings(Filter):
    """Documents to token folders or id lines; --train makes a tokenizer.

    Documents are JSON records ({"text": ..., "source": ...}; --field makes the text of others) or .txt files, each one
    document (--txt-split cuts them). With -o DIR they become a folder for `llama2 pretrain`: BOS and EOS around each,
    one subfolder per source where there are several. With -o FILE.jsonl, or nothing, each becomes a line {"ids": [...]}
    that keeps its other fields; --decode goes back. With --train, -o is the new tokenizer.model.

    Example:
      llama2 tokenize --train --vocab-size 2048 -o tokenizer.model examples/data/alice.txt.gz
      llama2 tokenize --tokenizer tokenizer.model -o tokens examples/data/alice.txt.gz
      echo "Down, down, down." | llama2 tokenize --tokenizer tokenizer.model --text
    """

    tokenizer: str | None = flag(default=None, help="tokenizer.model, or a checkpoint with one", complete="checkpoint")
    train: bool = flag(default=False, help="train a tokenizer (SentencePiece BPE) and write it to -o")
    decode: bool = flag(default=False, help='{"ids"} records to {"text"} records')
    out: str = flag("-o", default="-", help="token folder, file of records, or model of --train", complete="file")
    resume: bool | None = flag(  # type: ignore[assignment]  # None: as the form of the output has it
        rename="--resume/--no-resume",
        default=None,
        help="continue a killed command (files: by default); a finished folder of the same inputs is done at once",
    )
    text: bool = flag(default=False, help="each line of the input is a document, not a record")
    field: str | None = flag(default=None, metavar="A,B,C?", help="make the text of these fields ('?': may be missing)")
    txt_split: str | None = flag(default=None, metavar="REGEX", help="cut .txt files into documents before each match")
    source: str | None = flag(default=None, metavar="NAME", help="the source of all documents, whatever they say")
    exclude_source: list[str] = flag(default=[], metavar="NAME", help="leave out documents of this source")
    exclude_pattern: list[str] = flag(default=[], metavar="REGEX", help="leave out documents that hold a match")
    bos: bool = flag(default=False, help="BOS before each line of ids (a folder always has it)")
    eos: bool = flag(default=False, help="EOS after each line of ids (a folder always has it)")
    shard_tokens: int = flag(default=SHARD_TOKENS, low=1024, high=1 << 33, help="tokens in one file of a folder")
    vocab_size: int = flag(default=VOCAB_SIZE, low=1, high=1 << 24, help="pieces of the new tokenizer")
    character_coverage: float = flag(
        default=COVERAGE, low=0.98, high=1, help="share of characters that become pieces; the rest is bytes"
    )
    sample: float = flag(default=1.0, low=0, high=1, help="share of the lines that --train looks at")
    workers: int | None = flag(default=None, low=1, help="processes; one per core when not given")


def run(settings: Settings) -> dict[str, Any] | None:
    """Train, write a folder, or filter records."""
    form = form_of(settings)
    refuse_unused(settings, form)
    if form == "train":
        return train(settings)
    from llama2cli.text.tokenizer import Tokenizer

    if settings.tokenizer is None:
        raise Misuse("is needed: a tokenizer.model (--train makes one), or a checkpoint that holds one", "--tokenizer")
    if form == "folder":
        check_free(settings)
    tokenizer = Tokenizer.load(settings.tokenizer)
    if form == "folder":
        return to_folder(settings, tokenizer)
    (to_texts if form == "decode" else to_lines)(settings, tokenizer)
    return None


# --- which form ---------------------------------------------------------------------------------------------------

# The flags that only some forms read.
USED_BY = {
    "train": {"train", "resume", "vocab_size", "character_coverage", "sample", "text", "field", "txt_split", "source"},
    "folder": {"tokenizer", "shard_tokens", "text", "field", "txt_split", "source", "resume"},
    "lines": {"tokenizer", "bos", "eos", "text", "field", "txt_split", "source", "resume"},
    "decode": {"tokenizer", "decode", "resume"},
}
for _form in ("train", "folder", "lines"):
    USED_BY[_form] |= {"exclude_source", "exclude_pattern"}


def form_of(settings: Settings) -> str:
    """ "train", "decode", "lines" or "folder": a folder is what -o names unless it looks like a file of records."""
    if settings.train:
        return "train"
    if settings.decode:
        return "decode"
    out = settings.out
    is_file = out == "-" or out.lower().endswith(RECORD_FILES) or (Path(out).exists() and not Path(out).is_dir())
    return "lines" if is_file else "folder"


def refuse_unused(settings: Settings, form: str) -> None:
    """Raise Misuse for a flag that was given and that this form does not read."""
    what = {"train": "--train", "decode": "--decode", "folder": "-o DIR", "lines": "records"}
    optional = set().union(*USED_BY.values())
    for f in fields(settings):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if f.name in optional - USED_BY[form] and getattr(settings, f.name) != default:
            raise Misuse(f"has no meaning with {what[form]}", "--" + f.name.replace("_", "-"))
    if form == "train" and settings.out == "-":
        raise Misuse("is needed: where the new tokenizer.model goes", "-o")
    if form == "decode" and settings.out != "-" and not settings.out.lower().endswith(RECORD_FILES):
        raise Misuse(f"a file of records ends in one of {', '.join(RECORD_FILES)}", "-o", settings.out)


# --- documents ----------------------------------------------------------------------------------------------------


def selector(settings: Settings) -> Selector:
    """What decodes and selects, as the flags have it. Raises Misuse for flags that are wrong, or of no use here."""
    from llama2cli.text.documents import Selector, is_text

    s = settings
    texts = [is_text(f) for f in s.files] or [False]
    if s.field and (s.text or all(texts)):
        raise Misuse("has no meaning for plain text, which has no fields", "--field")
    if s.txt_split and (s.text or not any(texts)):
        raise Misuse("has no meaning without .txt files that are documents", "--txt-split")
    excluded = dict(exclude_sources=s.exclude_source, exclude_patterns=s.exclude_pattern)
    return Selector(fields=s.field, source=s.source, **excluded)


def items(settings: Settings) -> Iterator[tuple[Place, Item]]:
    """The documents, not decoded yet; the files are seen to be there now."""
    from llama2cli.text.documents import compiled, read_items

    s = settings
    split = compiled(s.txt_split, "--txt-split") if s.txt_split else None
    return read_items(s.files, lines=s.text, split=split, max_line=s.max_line)


def spread(settings: Settings, work: Callable[[Chunk], R], items: Iterable[tuple[Place, Item]]) -> Iterator[R]:
    """work(chunk) of all items in order, computed by --workers processes."""
    from llama2cli.text.documents import chunked
    from llama2cli.text.workers import cores, ordered

    found = chunked(items, most=settings.window, size=CHUNK)
    return ordered(work, found, workers=settings.workers or cores())


def report(settings: Settings, tally: Tally) -> dict[str, Any]:
    """Say what was left out, and return the counts for a manifest."""
    from llama2cli.text.documents import EMPTY

    sources = {n: tally.left_out["source", n] for n in settings.exclude_source}
    patterns = {p: tally.left_out["pattern", p] for p in settings.exclude_pattern}
    for name, n in sources.items():
        if n:
            console.say(f"left out: {n:,} documents of source {name}")
        else:
            console.warn(f"--exclude-source {name}: no document is of that source")
    for pattern, n in patterns.items():
        console.say(f'left out: {n:,} documents that match "{pattern}"')
    if tally.left_out[EMPTY]:
        console.warn(f"{tally.left_out[EMPTY]:,} documents are empty and left out")
    if tally.marked:
        console.warn(f"{tally.marked:,} documents hold U+2581, which SentencePiece reads as a space")
    return {"sources": sources, "patterns": patterns, "empty": tally.left_out[EMPTY]}


# --- --train ------------------------------------------------------------------------------------------------------


def train(settings: Settings) -> dict[str, Any]:
    """Train a tokenizer on the documents and write it."""
    from llama2cli.text.documents import Tally
    from llama2cli.text.folders import atomic_write
    from llama2cli.text.tokenizer import FLOOR, Tokenizer, count_words, fit, forget_rare

    if settings.vocab_size < FLOOR:
        why = "3 control pieces, 256 bytes and the space"
        raise Misuse(f"expected at least {FLOOR} ({why}), got {settings.vocab_size}", "--vocab-size")
    if Path(settings.out).is_dir():
        raise Misuse("is a folder; name the file to write, such as DIR/tokenizer.model", settings.out)
    select, found = selector(settings).select, items(settings)

    def work(chunk: Chunk) -> tuple[Counter[str], Tally]:
        kept, tally = select(chunk)
        return count_words((d.text for d in kept), sample=settings.sample, seed=settings.seed), tally

    # 1. Count the words. 2. Train on the counts. 3. Write.
    words: Counter[str] = Counter()
    total = Tally()
    with console.Progress("reading", plain_megabytes(settings.files), "MB") as progress:
        for counts, tally in spread(settings, work, found):
            words.update(counts)
            forget_rare(words)
            total.add(tally)
            progress.advance(tally.bytes / 1e6)
    excluded = report(settings, total)
    if not total.kept:
        raise DataError("there is no text to train on", ", ".join(settings.files) or "stdin")
    size = f"{total.kept:,} documents, {total.bytes / 1e6:,.1f} MB, {len(words):,} different words"
    console.say(f"training {settings.vocab_size:,} pieces on {size}")
    proto = fit(words, settings.vocab_size, character_coverage=settings.character_coverage)
    tokenizer = Tokenizer(proto, settings.out)
    if tokenizer.vocab_size < settings.vocab_size:
        console.warn(f"the text gives {tokenizer.vocab_size:,} pieces, not {settings.vocab_size:,}: it is too small")
    atomic_write(settings.out, proto)
    write_provenance(settings)
    made = {"tokenizer": settings.out, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    return {**made, "documents": total.kept, "bytes": total.bytes, "excluded": excluded}


# --- -o DIR -------------------------------------------------------------------------------------------------------


def check_free(settings: Settings) -> None:
    """Raise Misuse where -o names something that must not be replaced."""
    from llama2cli.text.shards import is_token_folder

    out = Path(settings.out)
    if out.exists() and not settings.resume:
        raise Misuse("exists; with --resume it is kept if it was made of the same inputs, else made again", out)
    if out.exists() and not is_token_folder(out):
        raise Misuse("exists and is not a token folder; it is left as it is", out)


def to_folder(settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokenize the documents into a folder, or find that it is there already."""
    from llama2cli.text.documents import Tally
    from llama2cli.text.shards import ShardWriter

    select, found = selector(settings).select, items(settings)
    key = key_of(settings, tokenizer)
    if (manifest := finished(settings, key)) is not None:
        return result(settings, manifest)

    def work(chunk: Chunk) -> tuple[dict[str, tuple[list[bytes], int]], Tally]:
        kept, tally = select(chunk)
        packed = dict(zip(map(id, kept), tokenizer.pack([d.text for d in kept])))
        by_source = {}
        for source in dict.fromkeys(d.source for d in kept):
            own = [d for d in kept if d.source == source]
            by_source[source] = [packed[id(d)] for d in own], sum(len(d.text.encode()) for d in own)
        return by_source, tally

    # 1. Tokenize, in as many processes as asked. 2. Finish the shards and publish the folder.
    total = Tally()
    writer = ShardWriter(settings.out, tokenizer, shard_tokens=settings.shard_tokens)
    with writer, console.Progress("tokenize", plain_megabytes(settings.files), "MB") as progress:
        for by_source, tally in spread(settings, work, found):
            for source, (documents, n_bytes) in by_source.items():
                writer.add(source, documents, n_bytes)
            total.add(tally)
            progress.advance(tally.bytes / 1e6)
        about = {"excluded": report(settings, total), "with_u2581": total.marked, "key": key}
        if not writer.sources:
            raise DataError("holds no document that is not left out", ", ".join(settings.files) or "stdin")
        about["provenance"] = provenance.collect(settings, [*settings.files, str(settings.tokenizer)])
        manifest = writer.publish(about, replace=bool(settings.resume))
    write_provenance(settings)
    rows = [(s.name, f"{s.documents:,}", f"{s.tokens:,}", f"{s.bytes:,}") for s in writer.sources.values()]
    console.table("", ("source", "documents", "tokens", "bytes"), rows)
    return result(settings, manifest)


def key_of(settings: Settings, tokenizer: Tokenizer) -> str | None:
    """What a folder depends on, hashed: text, tokenizer and flags; None where stdin is read, which may be anything."""
    if not settings.files or "-" in settings.files:
        return None
    said = {k: v for k, v in asdict(settings).items() if k in USED_BY["folder"] - {"tokenizer", "resume"}}
    inputs = [(Path(f).name, provenance.fingerprint(f)) for f in settings.files]
    return sha256(repr((tokenizer.sha256, sorted(said.items()), inputs)).encode()).hexdigest()


def finished(settings: Settings, key: str | None) -> dict[str, Any] | None:
    """The manifest of the folder that is there, if it was made of the same inputs. Warns if it will be made again."""
    from llama2cli.text.shards import TokenFolder, read_manifest

    out = Path(settings.out)
    if not out.exists():
        return None
    try:
        manifest = read_manifest(out)
        if key is not None and manifest.get("key") == key:
            TokenFolder.open(out).document_starts()  # every shard is there and has its size
            console.say(f"{out}: made of the same inputs already")
            return manifest
        why = "it was made of other inputs, or with other flags" if key is not None else "stdin is read"
    except DataError as e:
        why = str(e)
    console.warn(f"{out} is made again: {why}")
    return None


def result(settings: Settings, manifest: dict[str, Any]) -> dict[str, Any]:
    """What is printed at the end."""
    counts = {k: manifest[k] for k in ("documents", "tokens", "bytes", "vocab_size")}
    sources = list(manifest["sources"]) if "sources" in manifest else [manifest["source"]]
    return {"folder": settings.out, "sources": sources, **counts, "excluded": manifest["excluded"]}


def plain_megabytes(files: list[str]) -> float | None:
    """The size of the inputs in MB, where it says how much text there is: none is compressed or a pipe."""
    if not files or any(f.lower().endswith((".gz", ".zst")) or not Path(f).is_file() for f in files):
        return None
    return sum(Path(f).stat().st_size for f in files) / 1e6


# --- records ------------------------------------------------------------------------------------------------------


def to_lines(settings: Settings, tokenizer: Tokenizer) -> None:
    """Documents in, {"ids"} records out, in input order."""
    from llama2cli.text.segments import unpack
    from llama2cli.text.streams import encode

    select, found = selector(settings).select, items(settings)
    before, after = [tokenizer.bos_id] * settings.bos, [tokenizer.eos_id] * settings.eos

    def work(chunk: Chunk) -> tuple[list[bytes], Tally]:
        kept, tally = select(chunk, keep_empty=True)
        out = []
        for document, packed in zip(kept, tokenizer.pack([d.text for d in kept])):
            rest = {k: v for k, v in document.record.items() if k not in ("text", "ids")}
            out.append(encode({"ids": [*before, *unpack(packed, tokenizer.code), *after], **rest}))
        return out, tally

    report(settings, stream(settings, tokenizer, found, work))


def to_texts(settings: Settings, tokenizer: Tokenizer) -> None:
    """{"ids"} records in, {"text"} records out, in input order."""
    from llama2cli.text.documents import Item, Tally
    from llama2cli.text.records import checker
    from llama2cli.text.streams import decode, encode, read_json

    check = checker("ids")

    def work(chunk: Chunk) -> tuple[list[bytes], Tally]:
        out = []
        for place, item in chunk:
            record = check(decode(item.payload, place), place)  # type: ignore[arg-type]
            try:
                text = tokenizer.decode(record["ids"])
            except DataError as e:
                raise DataError(f"ids: {e.message}", *place) from None
            out.append(encode({"text": text, **{k: v for k, v in record.items() if k not in ("text", "ids")}}))
        return out, Tally(inputs=len(chunk))

    lines = read_json(settings.files, max_line=settings.max_line)
    stream(settings, tokenizer, ((place, Item(line, "")) for place, line in lines), work)


def stream(
    settings: Settings,
    tokenizer: Tokenizer,
    items: Iterable[tuple[Place, Item]],
    work: Callable[[Chunk], tuple[list[bytes], Tally]],
) -> Tally:
    """Items to lines by `work`, chunk by chunk in worker processes, and the lines to the output, in order."""
    import msgspec

    from llama2cli.text.documents import Tally
    from llama2cli.text.streams import open_output, some

    items = some(items, settings.files, "documents")
    total = Tally()
    with open_output(settings, tokenizer.sha256) as out:
        total.inputs = out.skip
        with console.Progress("tokenize", unit="records") as progress:
            progress.start_at(out.skip)
            for lines, tally in spread(settings, work, out.rest(items)):
                for line in lines:
                    out.write(msgspec.Raw(line.rstrip()))
                total.add(tally)
                out.commit(total.inputs)
                progress.advance(tally.inputs)
    write_provenance(settings)
    return total


def write_provenance(settings: Settings) -> None:
    """The side record that --provenance asks for."""
    if settings.provenance:
        tokenizer = [settings.tokenizer] if settings.tokenizer else []
        provenance.write(settings.provenance, settings, [*settings.files, *tokenizer])
