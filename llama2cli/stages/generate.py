"""`llama2 generate`: answers to prompts, K samples of each, pairs of two models' answers, continuations of documents.

Choices where the paper is silent:
1. A line of plain text (`--text`) is a user's message; a document is continued as it stands, without the chat format.
2. The same prompt twice gives the same answer twice: what is drawn depends on prompt, seed and sample index alone.
Those of samples and pairs stand in `sampling.samples`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llama2cli import console, provenance
from llama2cli.errors import Misuse
from llama2cli.settings import Filter, Sampled, Served, flag
from llama2cli.text.chat import Tags, encode_conversation
from llama2cli.text.folders import resolve_model
from llama2cli.text.prompts import check_endpoint, check_system, read_prompts
from llama2cli.text.records import Record
from llama2cli.text.streams import Place, open_output, some, windows

if TYPE_CHECKING:
    from llama2cli.sampling.engine import Result
    from llama2cli.sampling.load import Sampling
    from llama2cli.sampling.remote import RemoteEngine
    from llama2cli.sampling.samples import Tally, Voice
    from llama2cli.text.tokenizer import Tokenizer

Window = Sequence[tuple[Place, Record]]


@dataclass(frozen=True, kw_only=True)
class Settings(Sampled, Served, Filter):
    """Answer prompts, continue documents or answer lines of plain text.

    A record {"messages": [...]} that ends with a user message gets the answer as one message more; a record
    {"text": ...} is continued and gets "completion"; with --text each line is a user's message and becomes a dialogue.
    Other fields pass through, the order is that of the input. Answers that were cut have "truncated": true.

    With -k each prompt gives K Samples, ready for score. With --pair or --pair-temperature, or both, it gives a Pair of
    two answers that wait for a judgement, in random order: one of --model, the other of that second model, or drawn at
    that second temperature (Llama 2, section 3.2.1).

    Example:
      echo "What is a llama?" | llama2 generate --text --model run --max-new-tokens 100 --seed 1 -o answers.jsonl
      echo "What is a llama?" | llama2 generate --text --model run --max-new-tokens 100 -k 4 -o samples.jsonl
      echo "Is it?" | llama2 generate --text --model run --max-new-tokens 100 --pair-temperature 1.2 -o pairs.jsonl
    """

    text: bool = flag(default=False, help="the input is plain text, a prompt on each line")
    samples: int | None = flag("-k", default=None, help="samples of each prompt, as Sample records", low=1)
    pair: str | None = flag(default=None, help="the second model of Pair records", complete="checkpoint")
    pair_temperature: float | None = flag(
        default=None, help="temperature of the second answer of Pair records (default: that of the first)", low=0
    )
    skip_long: bool = flag(default=False, help="leave out, and count, prompts that fill the context; else an error")
    batch_size: int = flag(default=64, help="answers that are written at the same time", low=1)

    @property
    def pairs(self) -> bool:
        """Whether Pairs are asked for."""
        return self.pair is not None or self.pair_temperature is not None


def run(settings: Settings) -> None:
    """Read requests, answer them window by window, write them in their order."""
    # 1. what is asked: the first record is read, and the output opened, before a model is loaded
    check(settings)
    requests = some(read_requests(settings), settings.files)
    from llama2cli.sampling.samples import Tally
    from llama2cli.sampling.voices import drawn_as, ticker

    sampling = drawn_as(settings.model, settings.endpoint, settings.temperature, settings.top_p)
    second = second_sampling(settings, sampling)
    if sampling.temperature == 0 and settings.samples not in (None, 1):
        raise Misuse(f"greedy answers are all the same: {settings.samples} samples want a --temperature", "--samples")
    models = [path for path in (settings.tokenizer if settings.endpoint else settings.model, settings.pair) if path]
    if settings.provenance:
        provenance.write(settings.provenance, settings, [*settings.files, *models])
    with open_output(settings, sampling, second, paths=models) as out:
        # 2. the models
        voices, remote = load_voices(settings, sampling, second)
        tally, done = Tally(), out.skip
        # 3. the answers
        with console.Progress("generate", unit="answers") as progress, remote or nullcontext():
            tick = ticker(tally, progress)
            for window in windows(out.rest(requests), settings.window):
                for record in answer(window, voices, settings, tally, tick):
                    out.write(record)
                done += len(window)
                out.commit(done)
    if remote is not None:
        remote.forget()  # the output is complete: the server's answers need not be kept beside it
    how = sampling.told() + (f" and {second.told()}" if settings.pairs else "")
    console.say(tally.told(how, settings.max_new_tokens))


def check(settings: Settings) -> None:
    """Raise Misuse for flags that do not go together."""
    check_system(settings.system, settings.tags)
    check_endpoint(settings.endpoint, settings.tokenizer)
    if settings.endpoint is not None and settings.pair is not None:
        raise Misuse("the two answers of a pair come from models here, or from one of a server", "--pair")
    if settings.pairs and settings.samples is not None:
        raise Misuse("a prompt gives either samples or a pair: take --samples off, or --pair", "--samples")


def second_sampling(settings: Settings, first: Sampling) -> Sampling:
    """How the second answer of a pair is drawn: as the first one, but for --pair-temperature.

    A second model's own generation_config.json decides what no flag gives. Raises Misuse for a pair of greedy answers
    of one model.
    """
    from llama2cli.sampling.load import settle_sampling

    if not settings.pairs:
        return first
    heat = settings.temperature if settings.pair_temperature is None else settings.pair_temperature
    if settings.pair is not None:
        second = settle_sampling(settings.pair, heat, settings.top_p)
    else:
        second = first._replace(temperature=first.temperature if heat is None else heat)
    if first.temperature == second.temperature == 0 and one_model(settings):
        raise Misuse("two greedy answers of one model are the same", "--pair-temperature")
    return second


def one_model(settings: Settings) -> bool:
    """Whether the second answers come from the first model."""
    return settings.pair is None or resolve_model(settings.pair).resolve() == resolve_model(settings.model).resolve()


def load_voices(settings: Settings, first: Sampling, second: Sampling) -> tuple[list[Voice], RemoteEngine | None]:
    """Who answers: the model, and for pairs the second one, which is loaded once where it is the same; the server."""
    from llama2cli.sampling.samples import policy_names
    from llama2cli.sampling.voices import open_voice

    voice, server = open_voice(settings.model, first, settings)
    if not settings.pairs:
        return [voice], server
    if settings.pair is None or one_model(settings):
        return [voice, replace(voice, temperature=second.temperature, top_p=second.top_p)], server
    other, _ = open_voice(settings.pair, second, settings)
    names = policy_names(settings.model, settings.pair)
    return [replace(v, policy=name) for v, name in zip((voice, other), names)], None


def read_requests(settings: Settings) -> Iterator[tuple[Place, Record]]:
    """Prompts and documents; a line of text is a prompt. Samples and pairs are of prompts only."""
    kind = "prompt" if settings.pairs or settings.samples is not None else "request"
    return read_prompts(settings.files, text=settings.text, kind=kind, max_line=settings.max_line)


def answer(
    window: Window, voices: Sequence[Voice], settings: Settings, tally: Tally, tick: Callable[[Result], None]
) -> Iterator[Record]:
    """The records that a window of requests gives, in order."""
    from llama2cli.sampling.samples import pair_records, sample_records, with_system

    if not settings.pairs and settings.samples is None:
        yield from complete(window, voices[0], settings, tally, tick)
        return
    prompts = [(place, with_system(record, settings.system)) for place, record in window]
    common: dict[str, Any] = dict(
        seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
        tags=settings.tags,
        skip_long=settings.skip_long,
        tally=tally,
        tick=tick,
    )
    if settings.samples is None:
        yield from pair_records(prompts, (voices[0], voices[1]), **common)
        return
    v = voices[0]
    how: dict[str, Any] = dict(k=settings.samples, temperature=v.temperature, top_p=v.top_p, policy=v.policy)
    for samples in sample_records(prompts, v.engine, v.tokenizer, **how, **common):
        yield from samples


def complete(
    window: Window, voice: Voice, settings: Settings, tally: Tally, tick: Callable[[Result], None]
) -> Iterator[Record]:
    """The records of a window, each with its answer or completion."""
    from llama2cli.sampling.sampler import SampleParams
    from llama2cli.sampling.samples import fits

    engine, tokenizer = voice.engine, voice.tokenizer
    asked: list[tuple[Record, list[int]]] = []
    for place, record in window:
        record, ids, n_escaped = encode_request(record, tokenizer, settings, place)
        tally.escaped += n_escaped
        if fits(ids, engine.context, place, skip=settings.skip_long, tally=tally):
            asked.append((record, ids))
    params = SampleParams(settings.max_new_tokens, voice.temperature, voice.top_p, settings.seed)
    results = engine.generate([ids for _, ids in asked], [params] * len(asked), tick=tick)
    for (record, ids), result in zip(asked, results):
        tally.count(result, settings.max_new_tokens)
        record, n_escaped = completed(record, ids, result, tokenizer, settings.tags)
        tally.escaped += n_escaped
        yield record


def encode_request(
    record: Record, tokenizer: Tokenizer, settings: Settings, place: Place
) -> tuple[Record, list[int], int]:
    """The record (with the system prompt that --system gives it), the ids to go on from, and the tags escaped."""
    from llama2cli.sampling.samples import with_system

    if "messages" not in record:
        if settings.system is not None:
            console.warn(f"{place.file}:{place.line}: a document has no system prompt", "--system given to documents")
        return record, [tokenizer.bos_id, *tokenizer.encode(record["text"])], 0
    record = with_system(record, settings.system)
    encoded = encode_conversation(tokenizer, record["messages"], tags=settings.tags, place=place)
    return record, encoded.ids, encoded.n_escaped


def completed(record: Record, ids: list[int], result: Result, tokenizer: Tokenizer, tags: Tags) -> tuple[Record, int]:
    """The record with its answer or completion, and the tags that were escaped in an answer."""
    from llama2cli.sampling.samples import answer_text

    cut = {"truncated": result.truncated} if result.truncated or "truncated" in record else {}
    if "messages" not in record:
        new = result.ids if result.truncated else result.ids[:-1]
        before = tokenizer.decode(ids)  # decoded alone, the new ids would lose the space that they may begin with
        return {**record, "completion": tokenizer.decode([*ids, *new])[len(before) :], **cut}, 0
    text, n_escaped = answer_text(result, tokenizer, tags)
    return {**record, "messages": [*record["messages"], {"role": "assistant", "content": text}], **cut}, n_escaped
