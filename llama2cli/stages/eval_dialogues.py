"""`llama2 eval dialogues`: flaws of data for supervised fine-tuning, by source. Llama 2, section 3.1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING

from llama2cli.settings import Measuring, flag

if TYPE_CHECKING:
    from llama2cli.text.records import Record
    from llama2cli.text.streams import Place


@dataclass(frozen=True, kw_only=True)
class Settings(Measuring):
    """Flaws of dialogues, by source: which vendor delivers what. "Quality is all you need" (the paper, section 3.1).

    Looked for are prompts that were there before, the same answer to many prompts, answers that are empty, the prompt
    again, far too long or far too short, tags of chat formats and texts of control tokens in contents, lost characters.
    The tables go to stderr, the same as metric records to stdout. With --annotate it is a filter instead: each dialogue
    comes out with "flaws": [...], as {"messages": ...} whatever its form was, so that jq 'select(.flaws == [])' keeps
    the good ones.

    Example:
      llama2 eval dialogues examples/data/chat.jsonl --annotate | grep '"flaws":\\[\\]' > good.jsonl
    """

    format: str = flag(default="auto", help="form of the records (auto: by their fields), as alpaca, sharegpt, oasst")
    annotate: bool = flag(default=False, help='write the dialogues with "flaws": [...] in place of metric records')
    same: int = flag(default=3, low=1, help="how often the same answer, of 20 characters or more, may be given")
    outlier: float = flag(
        default=3.5, low=0, help="robust deviations of log length from the median answer that are too many"
    )
    tokenizer: str | None = flag(
        default=None,
        help="tokenizer.model, or a folder that holds one: lengths are in tokens, else in characters",
        complete="checkpoint",
    )


def run(settings: Settings) -> None:
    """Look at each dialogue, then at all lengths; show, and write metrics or the dialogues with their flaws."""
    from llama2cli.measure import dialogues, flow
    from llama2cli.text.formats import read_dialogues
    from llama2cli.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(settings.tokenizer) if settings.tokenizer else None
    count = (lambda text: len(tokenizer.encode(text))) if tokenizer else len
    survey = dialogues.Survey(count, "tokens" if tokenizer else "characters", settings.same, settings.outlier)
    read = read_dialogues(settings.files, format=settings.format, keep_empty=True, max_line=settings.max_line)
    inputs = [*settings.files, *([settings.tokenizer] if settings.tokenizer else [])]
    with TemporaryFile() as kept:  # what is an outlier is known at the end, and stdin cannot be read twice
        watched = flow.watched(read, settings.files, "dialogues")
        for place, record in keep(watched, kept) if settings.annotate else watched:
            survey.add(place, record)
        survey.finish()
        out = annotated(kept, survey.names()) if settings.annotate else dialogues.records(survey)
        flow.deliver(settings, dialogues.tables(survey), out, inputs)


def keep(items: Iterable[tuple[Place, Record]], file: IO[bytes]) -> Iterator[tuple[Place, Record]]:
    """The same items, each record written to a file."""
    from llama2cli.text.streams import encode

    for place, record in items:
        file.write(encode(record))
        yield place, record


def annotated(file: IO[bytes], flaws: Iterable[list[str]]) -> Iterator[Record]:
    """The records of a file with their flaws."""
    import msgspec

    file.seek(0)
    for line, names in zip(file, flaws, strict=True):
        yield {**msgspec.json.decode(line), "flaws": names}
