"""What a chat is, in tokens: one encoder from a dialogue to ids and a loss mask, for every stage. No torch here.

A round is `<s>[INST] {user} [/INST] {answer} </s>`: BOS and EOS by number, the text between them encoded as one plain
string, so that nothing in a content is ever read as a control token. The system prompt stands between `<<SYS>>` and
`<</SYS>>` inside the first user turn. Turns are stripped after the system prompt is folded in, as Meta's reference code
does, so the ids are those of that code:

    tokenizer.encode(f"[INST] {user.strip()} [/INST] {answer.strip()} ", bos=True, eos=True)

Trained are the tokens of the answers, the space that closes them, and EOS.

Contents that hold a tag of the format could open or close a turn. What is done about them:

    escape  (default) a backslash goes behind the first character: [\\INST]  [\\/INST]  <\\<SYS>>  <\\</SYS>>. A person
            sees it, the ids are no longer the tag's, and escaping twice changes nothing. Counted.
    refuse  an error that names the message.
    keep    left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from llama2cli.errors import DataError

if TYPE_CHECKING:
    from llama2cli.text.tokenizer import Tokenizer

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
# The same for transformers' `apply_chat_template`. It reads "</s>" in a content as EOS; nothing here does.
TEMPLATE = (
    "{% set start = 1 if messages[0]['role'] == 'system' else 0 %}{% for message in messages[start:] %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "{% set text = message['content'] %}{% if loop.first and start %}"
    "{% set text = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' + text %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TAGS = re.compile(r"\[/?INST\]|<</?SYS>>")

Tags = Literal["escape", "refuse", "keep"]
Written = Literal["escape", "keep"]
Message = Mapping[str, Any]


def of_models(tags: Tags) -> Written:
    """What is done about tags in what a model wrote, where --tags says it of what people typed: never an error."""
    return "keep" if tags == "keep" else "escape"


@dataclass(frozen=True)
class Encoded:
    """A dialogue as ids, with mask[i] true where ids[i] is trained, and the number of tags that were escaped."""

    ids: list[int]
    mask: list[bool]
    n_escaped: int


def encode_dialogue(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    truncated: bool = False,
    tags: Tags = "escape",
    place: Sequence[object] = (),
) -> Encoded:
    """The ids and loss mask of a dialogue (system?, user, assistant, user, assistant, ...).

    An assistant message with `weight: 0` is not trained. A last user message without an answer ends in `[/INST]`, ready
    to be answered; nothing of it is trained. truncated: the last answer was cut, so the space and EOS that would close
    it are left out.

    Raises DataError, at `place`, for roles out of turn and a tag under tags="refuse"; and for a tokenizer whose pieces
    reach over a space (no Llama tokenizer's do), because the first token of an answer would be the prompt's too.
    """
    users, answers, weights, n_escaped = rounds(tokenizer, messages, tags, place)
    ids: list[int] = []
    mask: list[bool] = []
    for i, user in enumerate(users):
        prompt = tokenizer.encode(f"{B_INST} {user} {E_INST}")
        open_ended = truncated and i + 1 == len(users)
        answer = encode_answer(tokenizer, prompt, user, answers[i], open_ended) if i < len(answers) else []
        ids += [tokenizer.bos_id, *prompt, *answer]
        mask += [False] * (1 + len(prompt)) + [bool(answer) and weights[i] != 0] * len(answer)
    return Encoded(ids, mask, n_escaped)


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tags: Tags = "escape", place: Sequence[object] = ()
) -> list[int]:
    """The ids of a dialogue that ends with a user message; they end in `[/INST]`. Raises as `encode_dialogue` does."""
    if not messages or messages[-1]["role"] != "user":
        raise DataError("messages: expected a dialogue that ends with a user message", *place)
    return encode_dialogue(tokenizer, messages, tags=tags, place=place).ids


def encode_scored(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    truncated: bool = False,
    tags: Tags = "escape",
    place: Sequence[object] = (),
) -> list[int]:
    """The ids of a dialogue that ends with an assistant message, for a reward model, which is read at the last of them.

    That is the EOS behind the answer; a truncated answer has none, and is read at its own last token. Raises as
    `encode_dialogue` does, and for a dialogue that ends otherwise.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError("messages: expected a dialogue that ends with an assistant message", *place)
    return encode_dialogue(tokenizer, messages, truncated=truncated, tags=tags, place=place).ids


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tags: Tags = "refuse", place: Sequence[object] = ()
) -> Encoded:
    """As `encode_dialogue`, where `tags` is about what a person typed: tags in a model's answers are always escaped."""
    if tags == "keep":
        return encode_dialogue(tokenizer, messages, tags=tags, place=place)
    safe = [escape(m["content"]) if m["role"] == "assistant" else (m["content"], 0) for m in messages]
    settled = [{**m, "content": text} for m, (text, _) in zip(messages, safe)]
    encoded = encode_dialogue(tokenizer, settled, tags=tags, place=place)
    return replace(encoded, n_escaped=encoded.n_escaped + sum(n for _, n in safe))


def encode_answer(
    tokenizer: Tokenizer, prompt: list[int], user: str, answer: str, open_ended: bool = False
) -> list[int]:
    """The ids of an answer with its closing space and EOS, as they stand in the encoding of the whole round.

    open_ended: without the space and EOS.
    """
    text, end = (answer, []) if open_ended else (f"{answer} ", [tokenizer.eos_id])
    if tokenizer.exact:  # no piece reaches over a space: the parts of a round have the ids that they have in the whole
        return [*tokenizer.encode(text), *end]
    whole = tokenizer.encode(f"{B_INST} {user} {E_INST} {text}" if text else f"{B_INST} {user} {E_INST}")
    if whole[: len(prompt)] != prompt:
        raise DataError("has pieces that reach over a space: no token begins where an answer begins", tokenizer.name)
    return [*whole[len(prompt) :], *end]


def rounds(
    tokenizer: Tokenizer, messages: Sequence[Message], tags: Tags, place: Sequence[object] = ()
) -> tuple[list[str], list[str], list[int], int]:
    """The texts of the user turns (the system prompt folded in) and of the answers, their weights, and escapes done."""
    if tokenizer.foreign_template:
        fix = "take chat_template out to have dialogues encoded as Llama 2's all the same"
        raise DataError(f"is of another chat format than Llama 2's; {fix}", tokenizer.foreign_template)
    users: list[str] = []
    answers: list[str] = []
    weights: list[int] = []
    system, n_escaped = "", 0
    for i, message in enumerate(messages):
        role = message["role"]
        text, n = settle_tags(tokenizer, message["content"], tags, f"messages[{i}].content", *place)
        n_escaped += n
        if role == "system" and i == 0:
            system = f"{B_SYS}{text}{E_SYS}"
        elif role == "user" and len(users) == len(answers):
            users.append((system + text).strip())
            system = ""
        elif role == "assistant" and len(users) == len(answers) + 1:
            answers.append(text.strip())
            weights.append(message.get("weight", 1))
        else:
            wanted = "user" if len(users) == len(answers) else "assistant"
            raise DataError(f'messages[{i}].role: expected {wanted}, got "{role}"', *place)
    if not users:
        raise DataError("messages: expected a user message, got none", *place)
    return users, answers, weights, n_escaped


def settle_tags(tokenizer: Tokenizer, text: str, tags: Tags, field: str, *place: object) -> tuple[str, int]:
    """A text under the policy for tags, and how many were escaped; raises DataError naming `field` under "refuse"."""
    if tags == "keep":
        return text, 0
    safe, n = escape(text)
    if not tokenizer.exact:  # one that normalises (Llama's does not) may make a tag of what was none
        seen, more = escape(tokenizer.decode(tokenizer.encode(safe)))
        safe, n = (seen, n + more) if more else (safe, n)
    if n and tags == "refuse":
        found = TAGS.search(text)
        tag = f'"{found[0]}"' if found else "what the tokenizer makes"
        raise DataError(f"{field}: holds {tag}, a tag of the chat format (--tags escape admits it)", *place)
    return safe, n


def escape(text: str) -> tuple[str, int]:
    """A text without tags, and how many it held. Applied twice it changes nothing."""
    # A backslash is in no tag and nothing is taken away, so no new tag can arise from the neighbours of an old one.
    return TAGS.subn(lambda found: found[0][0] + "\\" + found[0][1:], text)
