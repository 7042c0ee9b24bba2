"""`llama2 generate`: answers to prompts, continuations of documents.

Choices where the paper is silent:
1. A line of plain text (`--text`) is a user's message; a document is continued as it stands, without the chat format.
2. The same prompt twice gives the same answer twice: what is drawn depends on prompt, seed and sample index alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llama2cli import console, provenance
from llama2cli.errors import DataError, Misuse
from llama2cli.settings import Filter, Sampled, flag
from llama2cli.text.chat import TAGS, encode_conversation, escape
from llama2cli.text.records import Record
from llama2cli.text.streams import Place, open_output, read_records, read_texts, some, windows

if TYPE_CHECKING:
    from llama2cli.sampling.engine import Engine, Result
    from llama2cli.sampling.load import Sampling
    from llama2cli.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Settings(Filter, Sampled):
    """Answer prompts, continue documents or answer lines of plain text.

    A record {"messages": [...]} that ends with a user message gets the answer as one message more; a record
    {"text": ...} is continued and gets "completion"; with --text each line is a user's message and becomes a dialogue.
    Other fields pass through, the order is that of the input. Answers that were cut have "truncated": true.

    Example:
      echo "What is a llama?" | llama2 generate --text --model run --max-new-tokens 100 --seed 1 -o answers.jsonl
    """

    text: bool = flag(default=False, help="the input is plain text, a prompt on each line")
    skip_long: bool = flag(default=False, help="leave out, and count, prompts that fill the context; else an error")
    batch_size: int = flag(default=64, help="answers that are written at the same time", low=1)


@dataclass
class Counts:
    """What the closing line tells."""

    answers: int = 0
    tokens: int = 0
    truncated: int = 0
    at_context: int = 0
    empty: int = 0
    escaped: int = 0
    skipped: int = 0
    began: float = field(default_factory=time.monotonic)


def run(settings: Settings) -> None:
    """Read requests, answer them window by window, write them in their order."""
    # 1. what is asked: the first record is read, and the output opened, before a model is loaded
    if settings.system is not None and settings.tags == "refuse" and (found := TAGS.search(settings.system)):
        raise Misuse(f'holds "{found[0]}", a tag of the chat format (--tags escape admits it)', "--system")
    requests = some(read_requests(settings), settings.files)
    from llama2cli.sampling.load import load_engine, settle_sampling

    sampling = settle_sampling(settings.model, settings.temperature, settings.top_p)
    if settings.provenance:
        provenance.write(settings.provenance, settings, [*settings.files, settings.model])
    with open_output(settings, sampling, paths=[settings.model]) as out:
        # 2. the model
        engine, tokenizer = load_engine(
            settings.model, device=settings.device, dtype=settings.dtype, rows=settings.batch_size
        )
        counts, done = Counts(), out.skip
        # 3. the answers
        with console.Progress("generate", unit="answers") as progress:
            for window in windows(out.rest(requests), settings.window):
                for record in answer(window, engine, tokenizer, sampling, settings, counts, progress):
                    out.write(record)
                done += len(window)
                out.commit(done)
    report(counts, settings, sampling)


def read_requests(settings: Settings) -> Iterator[tuple[Place, Record]]:
    """Prompts and documents; a line of text is a prompt."""
    if not settings.text:
        return read_records(settings.files, "request", max_line=settings.max_line)
    lines = read_texts(settings.files, max_line=settings.max_line)
    return ((place, {"messages": [{"role": "user", "content": line}]}) for place, line in lines)


def answer(
    window: Sequence[tuple[Place, Record]],
    engine: Engine,
    tokenizer: Tokenizer,
    sampling: Sampling,
    settings: Settings,
    counts: Counts,
    progress: console.Progress,
) -> Iterator[Record]:
    """The records of a window with their answers, in order."""
    from llama2cli.sampling.sampler import SampleParams

    asked: list[tuple[Record, list[int]]] = []
    for place, record in window:
        record, ids, n_escaped = encode_request(record, tokenizer, settings, place)
        counts.escaped += n_escaped
        if len(ids) < engine.context:
            asked.append((record, ids))
            continue
        complaint = f"the prompt has {len(ids):,} tokens, the context of the model is {engine.context:,}"
        if not settings.skip_long:
            raise DataError(f"{complaint}; shorten it, or leave such prompts out with --skip-long", *place)
        console.warn(f"{place.file}:{place.line}: left out: {complaint}", "prompts left out that fill the context")
        counts.skipped += 1

    def finished(result: Result) -> None:
        counts.tokens += len(result.ids)
        rate = counts.tokens / (time.monotonic() - counts.began)
        progress.advance(1, note=f"{rate:,.0f} tokens/s")

    params = SampleParams(settings.max_new_tokens, sampling.temperature, sampling.top_p, settings.seed)
    results = engine.generate([ids for _, ids in asked], [params] * len(asked), tick=finished)
    for (record, ids), result in zip(asked, results):
        counts.answers += 1
        counts.truncated += result.truncated
        counts.at_context += result.truncated and len(result.ids) < settings.max_new_tokens
        counts.empty += not result.truncated and len(result.ids) == 1
        record, n_escaped = completed(record, ids, result, tokenizer, settings.tags)
        counts.escaped += n_escaped
        yield record


def encode_request(
    record: Record, tokenizer: Tokenizer, settings: Settings, place: Place
) -> tuple[Record, list[int], int]:
    """The record (with the system prompt that --system gives it), the ids to go on from, and the tags escaped."""
    if "messages" not in record:
        if settings.system is not None:
            console.warn(f"{place.file}:{place.line}: a document has no system prompt", "--system given to documents")
        return record, [tokenizer.bos_id, *tokenizer.encode(record["text"])], 0
    messages: list[dict[str, Any]] = record["messages"]
    if settings.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": settings.system}, *messages]
        record = record | {"messages": messages}
    encoded = encode_conversation(tokenizer, messages, tags=settings.tags, place=place)
    return record, encoded.ids, encoded.n_escaped


def completed(record: Record, ids: list[int], result: Result, tokenizer: Tokenizer, tags: str) -> tuple[Record, int]:
    """The record with its answer or completion, and the tags that were escaped in an answer."""
    new = result.ids if result.truncated else result.ids[:-1]
    cut = {"truncated": result.truncated} if result.truncated or "truncated" in record else {}
    if "messages" not in record:
        before = tokenizer.decode(ids)  # decoded alone, the new ids would lose the space that they may begin with
        return {**record, "completion": tokenizer.decode([*ids, *new])[len(before) :], **cut}, 0
    text = tokenizer.decode(new).strip()
    text, n_escaped = (text, 0) if tags == "keep" else escape(text)
    return {**record, "messages": [*record["messages"], {"role": "assistant", "content": text}], **cut}, n_escaped


def report(counts: Counts, settings: Settings, sampling: Sampling) -> None:
    """The closing line on stderr."""
    seconds = max(time.monotonic() - counts.began, 1e-9)
    how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    rate = f"{counts.tokens:,} tokens, {counts.tokens / seconds:,.0f} tokens/s"
    parts = [f"{counts.answers:,} {'answer' if counts.answers == 1 else 'answers'}, {rate}, {how}"]
    at_limit = counts.truncated - counts.at_context
    if at_limit:
        parts.append(f"{at_limit:,} truncated at --max-new-tokens {settings.max_new_tokens}")
    if counts.at_context:
        parts.append(f"{counts.at_context:,} truncated at the end of the context")
    if counts.empty:
        parts.append(f"{counts.empty:,} empty")
    if counts.escaped:
        parts.append(f"{counts.escaped:,} tags of the chat format escaped")
    if counts.skipped:
        parts.append(f"{counts.skipped:,} prompts left out: they fill the context")
    console.say("; ".join(parts))
