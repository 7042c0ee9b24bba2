"""`llama2 chat`: a conversation in the terminal. Lines from a pipe make a scripted one, a message each.

Choices where the paper is silent:
1. No system prompt unless one is given: Meta took its default one back, because it made the models refuse too much.
2. Where the conversation outgrows the context, its oldest rounds are forgotten, whole; the system prompt stays.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llama2cli import console
from llama2cli.errors import DataError, did_you_mean
from llama2cli.settings import Sampled
from llama2cli.text.chat import Tags, encode_conversation, escape, of_models
from llama2cli.text.prompts import check_system

if TYPE_CHECKING:
    from llama2cli.sampling.engine import Engine
    from llama2cli.sampling.load import Sampling
    from llama2cli.text.tokenizer import Tokenizer

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
COMMANDS = {
    "/reset": "begin a new conversation",
    "/system": "the same, with the system prompt that follows, or with none",
    "/quit": "end, as Ctrl-D does",
    "/help": "this list",
}


@dataclass(frozen=True, kw_only=True)
class Settings(Sampled):
    """Hold a conversation in the terminal; answers appear as they are written.

    Ctrl-C stops an answer, Ctrl-D ends the conversation, /help lists the commands. When stdin is no terminal each of
    its lines is a message: a scripted conversation, with the answers on stdout.

    Example:
      llama2 chat --model run --system "Answer in one sentence."
    """


@dataclass
class Conversation:
    """What has been said, and what it takes to go on. turns counts all answers, forgotten ones too."""

    engine: Engine
    tokenizer: Tokenizer
    sampling: Sampling
    settings: Settings
    system: str | None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    turns: int = 0


def run(settings: Settings) -> None:
    """Load the model, then answer line by line until the input ends."""
    # 1. the model
    check_system(settings.system, settings.tags)
    from llama2cli.sampling.load import load_engine, settle_sampling

    sampling = settle_sampling(settings.model, settings.temperature, settings.top_p)
    engine, tokenizer = load_engine(settings.model, device=settings.device, dtype=settings.dtype, rows=1)
    talk = Conversation(engine, tokenizer, sampling, settings, settings.system)
    # 2. the conversation
    terminal = sys.stdin.isatty()
    if terminal:
        console.say("Ctrl-C stops an answer, Ctrl-D ends the conversation, /help lists the commands.")
    for number, line in typed() if terminal else piped():
        try:
            if line.startswith("/"):
                if not command(talk, line):
                    break
            elif line.strip():
                reply(talk, line)
        except DataError as e:
            if not terminal:
                raise DataError(e.message, "stdin", number) from None
            console.say(f"({e.message})")


def typed() -> Iterator[tuple[int, str]]:
    """Lines from the terminal, with line editing; Ctrl-C at the prompt takes the line back."""
    import readline  # noqa: F401  input() edits lines where it is loaded

    number = 0
    while True:
        number += 1
        try:
            yield number, input("> ")
        except KeyboardInterrupt:
            console.say("\n(Ctrl-D ends the conversation)")
        except UnicodeDecodeError:
            console.say("(that is not UTF-8)")
        except EOFError:
            console.say("")
            return


def piped() -> Iterator[tuple[int, str]]:
    """Lines of stdin, each as soon as it is there. Raises DataError for what is not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield number, line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError("is not UTF-8", "stdin", number) from None


def command(talk: Conversation, line: str) -> bool:
    """Do what a line that begins with "/" says; false where that is to end. Raises DataError for an unknown one."""
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or "; /help lists them"
        raise DataError(f"{name} is no command{hint} (a message may begin with a space and then /)")
    if name == "/help":
        console.say("\n".join(f"  {name:8} {what}" for name, what in COMMANDS.items()))
    elif name in ("/reset", "/system"):
        if name == "/system":
            talk.system = settle(rest.strip(), talk.settings.tags) or None
        talk.rounds.clear()
        console.say("(a new conversation)")
    return name != "/quit"


def say(role: str, text: str) -> list[dict[str, Any]]:
    """A message, as a list of one."""
    return [{"role": role, "content": text}]


def reply(talk: Conversation, line: str) -> None:
    """Answer a message on stdout and remember both; one that is refused, or gets an empty answer, is forgotten.

    Raises DataError for tags under --tags refuse, and for a message that does not fit the context alone.
    """
    from llama2cli.sampling.sampler import SampleParams

    # 1. the prompt
    rounds, ids = fit(talk, [*talk.rounds, *say("user", settle(line, talk.settings.tags))])
    # 2. the answer, shown as it is drawn
    sampling, limit = talk.sampling, talk.settings.max_new_tokens
    params = SampleParams(limit, sampling.temperature, sampling.top_p, talk.settings.seed, talk.turns)
    talk.turns += 1
    shown = Shown(talk.tokenizer)
    drawn: list[int] = []
    stopped = False
    try:
        for token in talk.engine.stream(ids, params):
            drawn.append(token)
            put(shown.add(token))
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        stopped = True
    put(shown.end() + "\n")
    # 3. what came of it
    if stopped:
        console.say("(stopped)")
    elif drawn[-1] != talk.tokenizer.eos_id:
        console.say(f"(cut at {f'--max-new-tokens {limit}' if len(drawn) == limit else 'the end of the context'})")
    elif not shown.text:
        console.say("(an empty answer)")
    if shown.text:
        answer = settle(shown.text, of_models(talk.settings.tags))
        talk.rounds = [*rounds, *say("assistant", answer)]


def settle(text: str, tags: Tags) -> str:
    """A text as it is remembered, under the policy for tags. Raises DataError under "refuse"."""
    if tags == "keep":
        return text
    safe, n = escape(text)
    if n and tags == "refuse":
        raise DataError("it holds a tag of the chat format, as [INST] (--tags escape admits it)")
    if n:
        console.say(f"({n} {'tag' if n == 1 else 'tags'} of the chat format escaped)")
    return safe


def fit(talk: Conversation, rounds: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """The rounds without the oldest, as many as it takes to leave room for an answer, and the ids of the conversation.

    Raises DataError as `reply` does.
    """
    context = talk.engine.context
    room = min(talk.settings.max_new_tokens, context // 4)
    system = say("system", talk.system) if talk.system else []
    forgotten = 0
    while True:
        ids = encode_conversation(talk.tokenizer, [*system, *rounds], tags=talk.settings.tags).ids
        if len(ids) <= context - room or len(rounds) == 1:
            break
        rounds = rounds[2:]
        forgotten += 1
    if len(ids) >= context:
        beside = " with the system prompt" if system else ""
        raise DataError(f"the message has {len(ids):,} tokens{beside}, the context is {context:,}")
    if forgotten:
        what = "round is" if forgotten == 1 else f"{forgotten} rounds are"
        console.say(f"(the context is full: the oldest {what} forgotten)")
    return rounds, ids


def put(text: str) -> None:
    """Write to stdout at once. A terminal gets no control characters from a model: they could take it over."""
    if sys.stdout.isatty():
        text = CONTROLS.sub("\ufffd", text)
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


class Shown:
    """The text of an answer as its ids come in, stripped as the chat format strips it.

    Bytes of an unfinished character are held back, and so are spaces until something follows them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # white space
        self.text = ""

    def add(self, token: int) -> str:
        """What an id makes certain of the text."""
        return self._more(self.utf8.decode(self.tokenizer.id_to_bytes(token)))

    def end(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""
        return self._more(self.utf8.decode(b"", final=True))

    def _more(self, new: str) -> str:
        text = self.held + new if self.text else new.lstrip()
        sure = text.rstrip()
        self.held = text[len(sure) :]
        self.text += sure
        return sure
