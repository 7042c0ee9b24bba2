"""From prompts to records: K Samples of each prompt, or Pairs of two policies' answers. Any engine will do.

Choices where the paper is silent:
1. Sample `i` of a prompt is a function of policy, prompt, seed, temperature and `i`: a run with more samples begins
   with the same ones. The two answers of a pair are samples 0 and 1, so that two policies that are nearly the same do
   not draw the same numbers.
2. Which answer of a pair stands first is drawn from (seed, prompt), for a judge prefers what stands first.
3. Two answers of a pair that are the same are kept, marked `"identical": true` and counted: to draw until they differ
   would change what is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from llama2cli import console
from llama2cli.errors import DataError
from llama2cli.sampling.engine import Result
from llama2cli.sampling.sampler import SampleParams
from llama2cli.text.chat import Tags, encode_conversation, escape
from llama2cli.text.records import Record, prompt_id
from llama2cli.text.streams import Place
from llama2cli.text.tokenizer import Tokenizer

Tick = Callable[[Result], None]
# What is said of one answer: it would be wrong of the next one to the same prompt.
OF_AN_ANSWER = ("help", "safe", "reward", "help_logit", "safe_logit")


class AnyEngine(Protocol):
    """What is wanted of an engine: the local one and the remote one have it."""

    context: int

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SampleParams], *, tick: Tick | None = None
    ) -> list[Result]:
        """One result per prompt, in order."""


@dataclass
class Tally:
    """What a closing line tells of the answers."""

    answers: int = 0
    tokens: int = 0
    truncated: int = 0
    at_context: int = 0
    empty: int = 0
    escaped: int = 0
    skipped: int = 0
    identical: int = 0
    began: float = field(default_factory=time.monotonic)

    def count(self, result: Result, most: int) -> None:
        """Count an answer of which `most` tokens were asked for."""
        self.answers += 1
        self.tokens += len(result.ids)
        self.truncated += result.truncated
        self.at_context += result.truncated and len(result.ids) < most
        self.empty += not result.truncated and len(result.ids) == 1

    def told(self, how: str, most: int) -> str:
        """ "64 answers, 5,120 tokens, 910 tokens/s, {how}; ...": what is 0 is not told. most: --max-new-tokens."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        more = [
            (self.truncated - self.at_context, f"truncated at --max-new-tokens {most}"),
            (self.at_context, "truncated at the end of the context"),
            (self.empty, "empty"),
            (self.identical, f"{'pair' if self.identical == 1 else 'pairs'} of identical answers"),
            (self.escaped, "tags of the chat format escaped"),
            (self.skipped, "prompts left out: they fill the context"),
        ]
        answers = f"{self.answers:,} {'answer' if self.answers == 1 else 'answers'}"
        rate = f"{self.tokens:,} tokens, {self.tokens / seconds:,.0f} tokens/s"
        return "; ".join([f"{answers}, {rate}, {how}", *(f"{n:,} {what}" for n, what in more if n)])


@dataclass(frozen=True)
class Voice:
    """Who answers, and how its answers are drawn. policy: the name that records give it."""

    engine: AnyEngine
    tokenizer: Tokenizer
    policy: str
    temperature: float
    top_p: float = 1.0


def policy_name(path: str, parts: int = 1) -> str:
    """The model's name for records: as given; of an absolute path the last part, of a step folder the last two.

    parts: 2 and more add folders above it.
    """
    given = Path(path)
    if not given.is_absolute():
        return given.as_posix()
    return "/".join(given.parts[1:][-(parts + given.name.startswith("step-")) :])


def policy_names(*paths: str) -> tuple[str, ...]:
    """The names of several models: of absolute paths as many last parts as tell them apart."""
    parts = 1
    while True:
        names = tuple(policy_name(path, parts) for path in paths)
        if len(set(names)) == len(paths) or parts > max(len(Path(path).parts) for path in paths):
            return names
        parts += 1


def with_system(record: Record, system: str | None) -> Record:
    """The record of a prompt with a system prompt, where it has none and one is given."""
    if system is None or record["messages"][0]["role"] == "system":
        return record
    return {**record, "messages": [{"role": "system", "content": system}, *record["messages"]]}


def fits(ids: Sequence[int], context: int, place: Place, *, skip: bool, tally: Tally, what: str = "the prompt") -> bool:
    """Whether a prompt leaves room in the context for an answer; one that does not is counted.

    what: it is called so. Raises DataError for it unless `skip`.
    """
    if len(ids) < context:
        return True
    complaint = f"{what} has {len(ids):,} tokens, the context of the model is {context:,}"
    if not skip:
        raise DataError(f"{complaint}; shorten it, or leave such prompts out with --skip-long", *place)
    console.warn(f"{place.file}:{place.line}: left out: {complaint}", "prompts left out that fill the context")
    tally.skipped += 1
    return False


def answer_text(result: Result, tokenizer: Tokenizer, tags: Tags) -> tuple[str, int]:
    """An answer as text, stripped, and the tags that were escaped in it (none under "keep")."""
    text = tokenizer.decode(result.ids if result.truncated else result.ids[:-1]).strip()
    return (text, 0) if tags == "keep" else escape(text)


def sample_records(
    prompts: Sequence[tuple[Place, Record]],
    engine: AnyEngine,
    tokenizer: Tokenizer,
    *,
    k: int,
    temperature: float,
    top_p: float,
    seed: int,
    max_new_tokens: int,
    policy: str,
    tags: Tags = "escape",
    first: int = 0,
    skip_long: bool = False,
    tally: Tally | None = None,
    tick: Tick | None = None,
) -> Iterator[list[Record]]:
    """The K Samples of each prompt, in the order of the prompts.

    prompts: a window of them, valid records with a system prompt where they shall have one. Sample i has the number
    `first` + i, from which its random numbers come. An id of the prompt's own is kept as `own_id`; `n_tokens` counts
    what was sampled, EOS too. A prompt that fills the context is an error, or with `skip_long` an empty list.
    tally counts, tick is called with each result. Raises DataError as `encode_conversation` and the engine do.
    """
    tally = Tally() if tally is None else tally
    asked: list[list[int] | None] = []
    for place, record in prompts:
        encoded = encode_conversation(tokenizer, record["messages"], tags=tags, place=place)
        tally.escaped += encoded.n_escaped
        fit = fits(encoded.ids, engine.context, place, skip=skip_long, tally=tally)
        asked.append(encoded.ids if fit else None)
    params = [SampleParams(max_new_tokens, temperature, top_p, seed, first + i) for i in range(k)]
    answerable = [ids for ids in asked if ids is not None]
    results = iter(engine.generate([ids for ids in answerable for _ in params], params * len(answerable), tick=tick))
    for (place, record), ids in zip(prompts, asked, strict=True):
        samples = []
        for p in params if ids is not None else ():
            result = next(results)
            tally.count(result, max_new_tokens)
            text, n_escaped = answer_text(result, tokenizer, tags)
            tally.escaped += n_escaped
            messages = [*record["messages"], {"role": "assistant", "content": text}]
            samples.append(
                as_sample(
                    record,
                    place,
                    messages,
                    sample=p.index,
                    policy=policy,
                    temperature=temperature,
                    seed=seed,
                    n_tokens=len(result.ids),
                    truncated=result.truncated,
                )
            )
        yield samples


def as_sample(
    record: Record,
    place: Place,
    messages: list[Record],
    *,
    sample: int,
    policy: str,
    temperature: float,
    seed: int,
    n_tokens: int,
    truncated: bool,
) -> Record:
    """A Sample: messages that end with a policy's answer, what goes on of its prompt's record, and how it was drawn."""
    prompt = messages[:-1]
    return {
        **passed_on({**record, "messages": prompt}, place),
        "messages": messages,
        "id": prompt_id(prompt),
        "sample": sample,
        "policy": policy,
        "temperature": temperature,
        "seed": seed,
        "n_tokens": n_tokens,
        "truncated": truncated,
    }


def passed_on(record: Record, place: Place) -> Record:
    """What of a prompt's record goes with its answers: not the scores of an earlier answer; its own id as `own_id`."""
    kept = {key: value for key, value in record.items() if key not in OF_AN_ANSWER}
    if len(kept) < len(record):
        stale = ", ".join(key for key in record if key in OF_AN_ANSWER)
        console.warn(f"{place.file}:{place.line}: not passed on: {stale}", "scores of earlier answers not passed on")
    if kept.get("id") not in (None, prompt_id(record["messages"])):
        kept["own_id"] = kept["id"]
    return kept


def pair_records(
    prompts: Sequence[tuple[Place, Record]],
    voices: tuple[Voice, Voice],
    *,
    seed: int,
    max_new_tokens: int,
    tags: Tags = "escape",
    skip_long: bool = False,
    tally: Tally | None = None,
    tick: Tick | None = None,
) -> Iterator[Record]:
    """One Pair of each prompt, in the order of the prompts: an answer of each voice (Llama 2, section 3.2.1).

    A prompt that fills a context is an error, or with `skip_long` left out. Raises as `sample_records` does.
    """
    tally = Tally() if tally is None else tally
    answered: list[list[Record]] = [[] for _ in prompts]  # by the voices so far
    for number, voice in enumerate(voices):
        left = [i for i, earlier in enumerate(answered) if len(earlier) == number]  # that fitted in every context
        found = sample_records(
            [prompts[i] for i in left],
            voice.engine,
            voice.tokenizer,
            k=1,
            temperature=voice.temperature,
            top_p=voice.top_p,
            seed=seed,
            max_new_tokens=max_new_tokens,
            policy=voice.policy,
            tags=tags,
            first=number,
            skip_long=skip_long,
            tally=tally,
            tick=tick,
        )
        for i, samples in zip(left, found, strict=True):
            answered[i] += samples
    of_sample = ("messages", "sample", "policy", "temperature", "seed", "n_tokens", "truncated")
    for (_, prompt), samples in zip(prompts, answered, strict=True):
        if len(samples) < len(voices):
            continue
        rest = {key: value for key, value in samples[0].items() if key not in of_sample}
        pair = {"id": rest.pop("id"), "prompt": prompt["messages"]}
        if second_first(seed, pair["id"]):
            samples.reverse()
        pair |= {"responses": [response(sample) for sample in samples], **rest}
        if samples[0]["messages"] == samples[1]["messages"]:
            pair["identical"] = True
            tally.identical += 1
        yield pair


def second_first(seed: int, prompt: str) -> bool:
    """Whether the second voice's answer stands first: one bit of a hash of the seed and the prompt's id."""
    return bool(blake2b(f"{seed}:{prompt}".encode(), digest_size=1).digest()[0] & 1)


def response(sample: Record) -> Record:
    """A Sample as one answer of a Pair; `truncated` where it was cut."""
    made = {"message": sample["messages"][-1], "policy": sample["policy"], "temperature": sample["temperature"]}
    return made | ({"truncated": True} if sample["truncated"] else {})
