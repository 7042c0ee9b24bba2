"""The records that commands exchange, one JSON object a line: what each kind holds, and errors that name the field.

A record is a plain dict; fields that a kind does not know pass through. msgspec Structs say which fields there are and
of which types; what types cannot say (roles in turn, a prompt's end) follows in one function per kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from llama2cli.errors import DataError, did_you_mean

Natural = Annotated[int, Meta(ge=0)]
Bit = Literal[0, 1]
Unit = Annotated[float, Meta(ge=0, le=1)]
Five = Literal[1, 2, 3, 4, 5]
GROUPS = (
    "model",
    "round",
    "batch",
    "turn",
    "category",
    "attack",
    "rating",
    "temperature",
    "k",
    "source",
    "task",
    "weights",
)


class Message(Struct):
    role: Literal["system", "user", "assistant"]
    content: str
    weight: Bit | UnsetType = UNSET


class Document(Struct):
    text: str
    source: str | UnsetType = UNSET


class Dialogue(Struct):
    messages: list[Message]
    id: str | UnsetType = UNSET


class Prompt(Dialogue):
    unsafe: bool | UnsetType = UNSET
    category: str | UnsetType = UNSET
    attack: str | UnsetType = UNSET


class Ids(Struct):
    ids: list[Natural]


class Sample(Struct):
    messages: list[Message]
    id: str
    sample: Natural
    policy: str
    temperature: Annotated[float, Meta(ge=0)]
    seed: int
    n_tokens: Natural
    truncated: bool
    help: Unit | UnsetType = UNSET
    safe: Unit | UnsetType = UNSET
    reward: float | UnsetType = UNSET
    round: int | UnsetType = UNSET


class Response(Struct):
    message: Message
    policy: str
    temperature: Annotated[float, Meta(ge=0)]


class Pair(Struct):
    id: str
    prompt: list[Message]
    responses: Annotated[list[Response], Meta(min_length=2, max_length=2)]


class Comparison(Struct):
    chosen: list[Message]
    rejected: list[Message]
    prompt: list[Message] | UnsetType = UNSET
    rating: Literal["significantly", "better", "slightly", "negligibly"] | UnsetType = UNSET
    safety: Literal["chosen_safe", "both_safe", "both_unsafe"] | UnsetType = UNSET
    batch: int | UnsetType = UNSET
    source: str | UnsetType = UNSET


class Labelled(Struct):
    messages: list[Message]
    label: Bit
    id: str | UnsetType = UNSET


class Choice(Struct):
    query: str
    choices: Annotated[list[str], Meta(min_length=1)]
    gold: Natural


class Question(Struct):
    question: str
    answers: Annotated[list[str], Meta(min_length=1)]


class Program(Struct):
    prompt: str
    entry_point: str
    test: str


class Judgement(Struct):
    item: str
    rater: str
    score: float | str


class Session(Struct):
    messages: list[Message]
    person: str
    minutes: Annotated[float, Meta(ge=0)]
    categories: list[str] | UnsetType = UNSET
    attack: str | UnsetType = UNSET
    topic: str | UnsetType = UNSET
    expertise: str | UnsetType = UNSET
    round: int | UnsetType = UNSET
    risk: Five | UnsetType = UNSET
    safety: Five | UnsetType = UNSET
    violation: bool | UnsetType = UNSET


class Metric(Struct):
    measure: Annotated[str, Meta(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)+$")]
    value: float
    n: Natural
    low: float | UnsetType = UNSET
    high: float | UnsetType = UNSET


Record = dict[str, Any]


class Wrong(Exception):
    """A record that is wrong at a field: Wrong(field, message)."""


# --- what types cannot say ----------------------------------------------------------------------------------------


def _in_turn(messages: list[Record], field: str, after: str = "") -> None:
    """System first, then user and assistant in turn; `after`: the role before the first of them."""
    if not messages:
        raise Wrong(field, "expected at least one message, got none")
    previous = after
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "system":
            if previous:
                raise Wrong(f"{field}[{i}].role", "a system message comes first, and only there")
        elif role != ("assistant" if previous == "user" else "user"):
            turn = "an assistant message" if previous == "user" else "a user message"
            raise Wrong(f"{field}[{i}].role", f'expected {turn} here (they take turns), got "{role}"')
        elif role == "user" and message.get("weight"):
            raise Wrong(f"{field}[{i}].weight", "weight 1 is for assistant messages: no other is trained")
        previous = role
    if previous == "system":
        raise Wrong(field, "expected a user message after the system message, got none")


def _ends_with(messages: list[Record], role: str, field: str) -> None:
    if messages[-1]["role"] != role:
        article = "an" if role == "assistant" else "a"
        raise Wrong(
            f"{field}[{len(messages) - 1}].role",
            f'expected {article} {role} message at the end, got "{messages[-1]["role"]}"',
        )


def _dialogue(record: Record) -> Record:
    _in_turn(record["messages"], "messages")
    return record


def _prompt(record: Record) -> Record:
    _in_turn(record["messages"], "messages")
    _ends_with(record["messages"], "user", "messages")
    return record


def _answered(record: Record) -> Record:
    _in_turn(record["messages"], "messages")
    _ends_with(record["messages"], "assistant", "messages")
    return record


def _pair(record: Record) -> Record:
    _in_turn(record["prompt"], "prompt")
    _ends_with(record["prompt"], "user", "prompt")
    for i, response in enumerate(record["responses"]):
        _in_turn([response["message"]], f"responses[{i}].message", after="user")
    return record


def _comparison(record: Record) -> Record:
    """TRL's form without a prompt, whose answers are whole dialogues, becomes the form with one."""
    if "prompt" not in record:
        record = _split_prompt(record)
    _in_turn(record["prompt"], "prompt")
    _ends_with(record["prompt"], "user", "prompt")
    for side in ("chosen", "rejected"):
        _in_turn(record[side], side, after="user")
        _ends_with(record[side], "assistant", side)
    return record


def _split_prompt(record: Record) -> Record:
    """The same with `prompt`: the longest common prefix of both dialogues, less the last message if they are equal."""
    chosen, rejected = record["chosen"], record["rejected"]
    for side in (chosen, rejected):
        _in_turn(side, "chosen" if side is chosen else "rejected")
    n = 0
    while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
        n += 1
    if n == 0 or chosen[n - 1]["role"] != "user":
        raise Wrong(f"rejected[{n}]", "the two dialogues part here, before an answer; they need the same prompt")
    return {"prompt": chosen[:n], **record, "chosen": chosen[n:], "rejected": rejected[n:]}


def _choice(record: Record) -> Record:
    if record["gold"] >= len(record["choices"]):
        raise Wrong(
            "gold", f"expected an index below {len(record['choices'])}, the number of choices, got {record['gold']}"
        )
    return record


def _metric(record: Record) -> Record:
    for key in record.keys() - {"measure", "value", "n", "low", "high", *GROUPS}:
        raise Wrong(key, f"unknown group{did_you_mean(key, GROUPS)} (there are {', '.join(GROUPS)})")
    return record


def _same(record: Record) -> Record:
    return record


KINDS: dict[str, tuple[type[Struct], Callable[[Record], Record]]] = {
    "document": (Document, _same),
    "dialogue": (Dialogue, _dialogue),
    "prompt": (Prompt, _prompt),
    "ids": (Ids, _same),
    "sample": (Sample, _answered),
    "pair": (Pair, _pair),
    "comparison": (Comparison, _comparison),
    "labelled": (Labelled, _answered),
    "choice": (Choice, _choice),
    "question": (Question, _same),
    "program": (Program, _same),
    "judgement": (Judgement, _same),
    "session": (Session, _dialogue),
    "metric": (Metric, _metric),
}


# --- checking -----------------------------------------------------------------------------------------------------


def validate(kind: str, record: Any, place: Iterable[object] = ()) -> Record:
    """The record, seen to be of a kind (a comparison without `prompt` gets one). Raises DataError at its place and field."""
    return checker(kind)(record, place)


def checker(kind: str) -> Callable[[Any, Iterable[object]], Record]:
    """`validate` for one kind, for use on many records. Raises KeyError for an unknown kind."""
    shape, semantics = KINDS[kind]
    convert = msgspec.convert

    def check(record: Any, place: Iterable[object]) -> Record:
        try:
            convert(record, shape)
            return semantics(record)
        except msgspec.ValidationError as e:
            field, message = _explain(str(e), record, shape)
        except Wrong as e:
            field, message = e.args
        raise DataError(f"{field}: {message}" if field else message, *place)

    return check


_AT = re.compile(r"(.*?)(?: - at `\$?(.*)`)?", re.DOTALL)
_NAMES = {"str": "a string", "int": "an integer", "float": "a number", "bool": "true or false", "array": "a list",
          "object": "an object", "null": "null"}  # fmt: skip


def _explain(error: str, record: Any, shape: type[Struct]) -> tuple[str, str]:
    """(field, message) for a person from a msgspec error."""
    match = _AT.fullmatch(error)
    message, path = (match[1], (match[2] or "").lstrip(".")) if match else (error, "")
    there = _value_at(record, path)
    if missing := re.fullmatch(r"Object missing required field `(.*)`", message):
        return path, _missing(missing[1], there)
    if message.startswith("Invalid enum value"):
        allowed = [str(value) for value in _allowed(shape, path)]
        close = did_you_mean(there, allowed) if isinstance(there, str) else ""
        return path, f"expected one of {', '.join(allowed)}, got {_show(there)}{close}"
    if types := re.fullmatch(r"Expected `(.*)`, got `(.*)`", message):
        return path, f"expected {_types(types[1])}, got {_types(types[2])}"
    return path, message[0].lower() + message[1:].replace("`", "")


def _types(names: str) -> str:
    return " or ".join(_NAMES.get(n, n) for n in names.split(" | "))


def _missing(field: str, there: Any) -> str:
    keys = list(there) if isinstance(there, dict) else []
    close = get_close_matches(field, keys, n=1)
    return (
        f'expected the field "{field}", got "{close[0]}"; is it misspelt?'
        if close
        else f'the field "{field}" is missing'
    )


def _steps(path: str) -> list[str | int]:
    """`messages[1].role` -> ["messages", 1, "role"]."""
    return [int(index) if index else name for name, index in re.findall(r"([A-Za-z_]\w*)|\[(\d+)\]", path)]


def _value_at(record: Any, path: str) -> Any:
    """The value that a field names, or None where there is none."""
    for step in _steps(path):
        try:
            record = record[step]
        except (KeyError, IndexError, TypeError):
            return None
    return record


def _allowed(shape: Any, path: str) -> tuple[Any, ...]:
    """The values of the Literal type of a field."""
    for step in _steps(path):
        shape = get_type_hints(shape)[step] if isinstance(step, str) else get_args(shape)[0]
        if get_origin(shape) in (Union, UnionType):
            shape = next(t for t in get_args(shape) if t is not UnsetType)
    return get_args(shape)


def _show(value: Any) -> str:
    """A value as JSON, cut short."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else text[:56] + "..." + text[-1]
