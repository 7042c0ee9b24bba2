"""Whole dialogues turn by turn: the user turns are given, each answer is sampled after those before it. Any engine.

A turn of all dialogues is one call of the engine. The messages as the model is shown them may differ from those that
are kept (`view`): with Ghost Attention (Llama 2, section 3.3) an instruction is concatenated to user messages.

Choices where the paper is silent:
1. A dialogue ends at a turn boundary. A turn whose prompt fills the context is not asked, and an answer that the end of
   the context cut is dropped, with its turn. One that was cut at `max_new_tokens` stays, and is closed like any other.
2. Turn `t` of roll-out `i` takes its random numbers from (policy's prompt, seed, i, t): two turns that are shown the
   same (a short window, user turns that come again) do not draw the same numbers, and turn 1 is sample i of its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from llama2cli.sampling.sampler import SampleParams
from llama2cli.sampling.samples import AnyEngine, Tally, Tick, answer_text, fits
from llama2cli.text.chat import Tags, encode_conversation, encode_dialogue
from llama2cli.text.records import Record
from llama2cli.text.streams import Place
from llama2cli.text.tokenizer import Tokenizer

View = Callable[[int, list[Record]], list[Record]]
TURN = 1 << 20  # between the sample numbers of two turns; a server's seeds have 31 bits


@dataclass
class Rolled:
    """A dialogue with its new answers.

    messages: the system message, where there is one, and the turns that were answered, user messages as they were
    given. truncated, n_tokens: of each answer, whether it was cut at `max_new_tokens` and what was sampled, EOS too.
    cut: the turn, from 1, at which the context ended; None where all turns were answered.
    """

    messages: list[Record]
    truncated: list[bool]
    n_tokens: list[int]
    cut: int | None = None

    @property
    def turns(self) -> int:
        """How many were answered."""
        return len(self.truncated)


def as_is(number: int, messages: list[Record]) -> list[Record]:
    """The view that changes nothing."""
    return messages


def user_turns(messages: Sequence[Record], turns: int | None = None, *, cycle: bool = False) -> list[Record]:
    """A dialogue without its answers: the system message, where there is one, and user messages.

    turns: the first so many of them. cycle: where there are fewer, they begin again from the first.
    """
    system = [m for m in messages[:1] if m["role"] == "system"]
    users = [m for m in messages if m["role"] == "user"]
    if turns is None:
        return system + users
    if cycle and users:
        users = users * -(-turns // len(users))
    return system + users[:turns]


def join_turns(dialogues: Iterable[tuple[Place, Record]], n: int) -> Iterator[tuple[Place, Record]]:
    """Dialogues of user messages that follow each other, joined up to n turns or more; the last may have fewer.

    One with a system message, which is about itself, passes as it is. A joined one has the fields in which all agree,
    and `joined`, how many they were.
    """
    held: list[Record] = []
    place = Place("", 0)

    def together() -> Record:
        same = {k: v for k, v in held[0].items() if all(r.get(k) == v for r in held)}
        return {**same, "messages": [m for r in held for m in r["messages"]], "joined": len(held)}

    for where, record in dialogues:
        if record["messages"][0]["role"] == "system":
            yield where, record
            continue
        place = place if held else where
        held.append(record)
        if sum(len(r["messages"]) for r in held) >= n:
            yield place, together()
            held = []
    if held:
        yield place, together()


def asked_turns(dialogues: Iterable[tuple[Place, Record]], join: int | None) -> Iterator[tuple[Place, Record]]:
    """Dialogues without their answers, joined up to `join` turns where that is asked for."""
    bare = ((place, {**record, "messages": user_turns(record["messages"])}) for place, record in dialogues)
    return bare if join is None else join_turns(bare, join)


def recent(messages: Sequence[Record], window: int | None) -> list[Record]:
    """A dialogue as one sees it through a window: the system message, the first turn, and the last `window` turns.

    messages end with a user message, which is the last turn. None is the whole dialogue.
    """
    begin = 1 if messages[0]["role"] == "system" else 0
    first, rest = list(messages[: begin + 2]), list(messages[begin + 2 :])
    return first + rest if window is None else first + rest[max(0, len(rest) - (2 * window - 1)) :]


def encode_recent(
    tokenizer: Tokenizer,
    messages: Sequence[Record],
    context: int,
    *,
    truncated: bool = False,
    tags: Tags = "escape",
    place: Sequence[object] = (),
) -> tuple[list[int], bool]:
    """The ids of an answered dialogue for a reward model, and whether first turns were left out to fit its context.

    For dialogues with the instruction in every user message, which lose nothing of it. A last turn that is too long
    alone is cut at its end. Raises as `encode_dialogue` does.
    """
    begin = 1 if messages[0]["role"] == "system" else 0
    head, turns, left_out = list(messages[:begin]), list(messages[begin:]), False
    while True:
        ids = encode_dialogue(tokenizer, [*head, *turns], truncated=truncated, tags=tags, place=place).ids
        if len(ids) <= context or len(turns) <= 2:
            return ids[:context], left_out
        turns, left_out = turns[2:], True


def roll_out(
    dialogues: Sequence[Sequence[Record]],
    engine: AnyEngine,
    tokenizer: Tokenizer,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    max_new_tokens: int,
    view: View = as_is,
    window: int | None = None,
    samples: Sequence[int] | None = None,
    tags: Tags = "escape",
    places: Sequence[Place] | None = None,
    skip_long: bool = False,
    tally: Tally | None = None,
    tick: Tick | None = None,
) -> list[Rolled]:
    """Answer each dialogue turn by turn, in the order of the dialogues.

    dialogues: their user turns, and the system message where there is one; answers among them are left out.
    view(number of the dialogue, messages so far, which end with a user message) -> the messages as the model is shown
    them, which must end so too; by default unchanged. window: of what the view gives, the model is shown the first and
    the last `window` turns (see `recent`). samples: the number of each roll-out, by which several of one dialogue
    differ (default 0). places: where the dialogues came from, for errors. tally counts, tick gets each result.

    A first turn that fills the context is an error, or with `skip_long` counted: such a dialogue has no answer.
    Raises DataError as `encode_conversation` and the engine do.
    """
    tally = Tally() if tally is None else tally
    asked = [[m for m in dialogue if m["role"] == "user"] for dialogue in dialogues]
    rolled = [Rolled([m for m in dialogue[:1] if m["role"] == "system"], [], []) for dialogue in dialogues]
    numbers = samples if samples is not None else [0] * len(dialogues)
    escaped = [0] * len(dialogues)  # tags in what was shown so far
    for turn in range(max(map(len, asked), default=0)):
        going: list[int] = []
        prompts: list[list[int]] = []
        for i, users in enumerate(asked):
            if turn >= len(users) or rolled[i].cut is not None:
                continue
            place = places[i] if places is not None else Place("dialogue", i + 1)
            shown = recent(view(i, [*rolled[i].messages, users[turn]]), window)
            if shown[-1]["role"] != "user":
                raise ValueError("a view must end with a user message")
            encoded = encode_conversation(tokenizer, shown, tags=tags, place=place)
            tally.escaped += max(0, encoded.n_escaped - escaped[i])
            escaped[i] = max(escaped[i], encoded.n_escaped)
            if turn == 0 and not fits(encoded.ids, engine.context, place, skip=skip_long, tally=tally):
                rolled[i].cut = 1
            elif len(encoded.ids) >= engine.context:
                rolled[i].cut = turn + 1
            else:
                going.append(i)
                prompts.append(encoded.ids)
        params = [SampleParams(max_new_tokens, temperature, top_p, seed, turn * TURN + numbers[i]) for i in going]
        for i, result in zip(going, engine.generate(prompts, params, tick=tick), strict=True):
            tally.count(result, max_new_tokens)
            if result.truncated and len(result.ids) < max_new_tokens:
                rolled[i].cut = turn + 1
                continue
            text, n_escaped = answer_text(result, tokenizer, tags)
            tally.escaped += n_escaped
            rolled[i].messages += [asked[i][turn], {"role": "assistant", "content": text}]
            rolled[i].truncated.append(result.truncated)
            rolled[i].n_tokens.append(len(result.ids))
    return rolled
