"""The language of OpenAI-compatible completions: requests with a prompt of token ids, and what answers look like.

One request is for one answer. What the servers that matter differ in:

    vLLM       ids of the answer by `return_token_ids` (from 0.10.2), before that by `return_tokens_as_token_ids`; its
               log-probabilities are at temperature 1; `seed` is honoured. Defaults of the model's
               generation_config.json apply to what a request leaves out, so nothing is left out.
    SGLang     the same fields, in releases since the summer of 2026; `seed` only with --enable-deterministic-inference.
    llama.cpp  ids of the prompt since August 2025; those of the answer stand in `logprobs`, where a character of
               several byte tokens has only the last; seeds of 32 bits. It cuts by top-p before it applies the
               temperature unless told otherwise, which it is.
    others     text only: its ids are encoded anew; no log-probabilities.

Each answer is checked: the server read as many ids as were sent, and its text is that of its ids in our tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from llama2cli.errors import DataError
from llama2cli.sampling.endpoint import Faulty
from llama2cli.sampling.sampler import SampleParams
from llama2cli.text.tokenizer import Tokenizer

SEEDS = (1 << 31) - 1  # llama.cpp's seeds have 32 bits, of which all ones mean "draw one"

Source = Literal["token_ids", "logprobs", "text"]  # where a server's answers have their ids
Json = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """Who is spoken to. url is for messages."""

    url: str
    model: str
    tokenizer: Tokenizer
    is_llama_cpp: bool = False
    source: Source = "token_ids"


@dataclass(frozen=True)
class Request:
    """One answer that is wanted. limit: tokens at most, with the context taken into account."""

    prompt: Sequence[int]
    params: SampleParams
    limit: int
    logprobs: bool = False


@dataclass(frozen=True)
class Answer:
    """One answer. logprobs at temperature 1. exact: the ids are the server's; if not, they are those of `text`."""

    ids: list[int]
    truncated: bool
    logprobs: list[float]
    exact: bool = True
    text: str = ""


# --- requests -----------------------------------------------------------------------------------------------------


def request_seed(prompt: Sequence[int], seed: int, index: int) -> int:
    """The seed that a server gets for a sample: 31 bits; for one prompt and seed it differs from index to index."""
    words = np.array([seed & (1 << 63) - 1, *prompt], dtype="<i8")
    base = int.from_bytes(blake2b(words.tobytes(), digest_size=8).digest(), "little")
    return (base + index) % SEEDS


def answer_key(request: Request, model: str) -> bytes:
    """What tells answers apart: the ids of the prompt, the parameters and the model. Where it is served does not."""
    p = request.params
    told = [model, request.limit, float(p.temperature), float(p.top_p), p.seed, p.index, request.logprobs]
    ids = np.array(request.prompt, dtype="<i8").tobytes()
    return blake2b(json.dumps(told).encode() + b"\0" + ids, digest_size=16).digest()


def body(server: Server, request: Request) -> Json:
    """The request as JSON. What would fall back to a default of the server is spelled out."""
    p = request.params
    fields: Json = {
        "model": server.model,
        "prompt": [int(i) for i in request.prompt],
        "max_tokens": request.limit,
        "temperature": p.temperature,
        "top_p": p.top_p,
        "n": 1,
        "stream": False,
        "seed": request_seed(request.prompt, p.seed, p.index),
        "top_k": -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "skip_special_tokens": True,
    }
    if server.is_llama_cpp:
        fields |= {"repeat_penalty": 1.0, "samplers": ["temperature", "top_p"]}
    else:
        fields |= {"repetition_penalty": 1.0, "return_token_ids": True}
    if request.logprobs or server.source == "logprobs":
        fields |= {"logprobs": 1, "return_tokens_as_token_ids": True}
    return fields


# --- answers ------------------------------------------------------------------------------------------------------


def models(reply: Any) -> list[Json]:
    """The models of GET /v1/models; none where it has another form."""
    data = reply.get("data") if isinstance(reply, dict) else None
    return [e for e in data or [] if isinstance(e, dict) and isinstance(e.get("id"), str)]


def the_choice(server: Server, request: Request, reply: Any) -> tuple[Json, Json]:
    """(choice, usage) of a reply. Raises Faulty for another form, DataError where another prompt was read."""
    if not isinstance(reply, dict) or not isinstance(reply.get("choices"), list):
        said = reply.get("error") if isinstance(reply, dict) else None
        raise Faulty(f"the answer has no choices{f' ({said})' if said else ''}")
    choices, usage = reply["choices"], reply.get("usage") or {}
    if len(choices) != 1 or not isinstance(choices[0], dict) or not isinstance(usage, dict):
        raise Faulty(f"the answer has {len(choices)} choices, one was asked for")
    count, sent = usage.get("prompt_tokens"), len(request.prompt)
    if isinstance(count, int) and count != sent:
        raise DataError(f"read a prompt of {sent:,} token ids as {count:,}: it does not take ids", server.url)
    seen = choices[0].get("prompt_token_ids")
    if isinstance(seen, list) and seen != list(request.prompt):
        raise DataError("put other ids in the place of the prompt's", server.url)
    return choices[0], usage


def token_ids(choice: Json) -> list[int] | None:
    """The ids of an answer as the server gives them; None where there are none."""
    ids: Any = choice.get("token_ids")
    held = choice.get("logprobs")
    if not isinstance(ids, list) and isinstance(held, dict):
        if isinstance(held.get("content"), list):  # llama.cpp
            ids = [t.get("id") if isinstance(t, dict) else None for t in held["content"]]
        elif isinstance(held.get("tokens"), list):  # vLLM, "token_id:13"
            marked = [str(t) for t in held["tokens"]]
            numbers = [t.removeprefix("token_id:") for t in marked if t.startswith("token_id:")]
            ids = [int(n) if n.isdecimal() else None for n in numbers] if len(numbers) == len(marked) else None
    return ids if isinstance(ids, list) and all(type(i) is int for i in ids) else None


def logprobs(choice: Json) -> list[float]:
    """The log-probabilities of the tokens of an answer. Raises Faulty where one lacks."""
    held = choice.get("logprobs")
    held = held if isinstance(held, dict) else {}
    if isinstance(held.get("content"), list):
        values = [t.get("logprob") if isinstance(t, dict) else None for t in held["content"]]
    else:
        values = held.get("token_logprobs") or []
    found = [float(v) for v in values if isinstance(v, (int, float))]
    if len(found) != len(values):
        raise Faulty("the answer has tokens without a log-probability")
    return found


def read(server: Server, request: Request, reply: Any) -> Answer:
    """The answer in a reply; ids that are missing are left to `complete`, so threads may call this.

    Raises Faulty for a reply that another attempt may mend, else DataError.
    """
    tokenizer = server.tokenizer
    choice, usage = the_choice(server, request, reply)
    finish, text = choice.get("finish_reason"), choice.get("text")
    if finish not in ("stop", "length") or not isinstance(text, str):
        raise Faulty(f"the answer ended with {json.dumps(finish)}, not with stop or length")
    stop = choice.get("stop_reason", choice.get("matched_stop"))
    if finish == "stop" and stop not in (None, tokenizer.eos_id):
        what = f"ends answers at {json.dumps(stop)}, which is not the end of a sequence ({tokenizer.eos_id})"
        raise DataError(f"{what}; take its own stop words and stop ids out", server.url)
    ids, count = token_ids(choice), usage.get("completion_tokens")
    open_ended = not ids or ids[-1] != tokenizer.eos_id
    if server.source == "logprobs" and ids is not None and isinstance(count, int):
        # llama.cpp leaves out tokens that end inside a character; EOS may be counted and not be there
        if count - len(ids) not in (0, open_ended and finish == "stop"):
            ids = None
    truncated = finish == "length" and open_ended
    if ids is None:
        if request.logprobs:
            raise DataError("does not give the ids of all tokens, so no log-probabilities can be had", server.url)
        return Answer([], truncated, [], exact=False, text=text)
    refuse_foreign(server, ids, text)
    if len(ids) > request.limit:
        raise Faulty(f"the answer has {len(ids)} tokens, {request.limit} were asked for at most")
    if finish == "stop" and open_ended:
        ids = [*ids, tokenizer.eos_id]
    scores = logprobs(choice) if request.logprobs else []
    if request.logprobs and len(scores) != len(ids):
        what = f"gives {len(scores)} log-probabilities for an answer of {len(ids)} tokens"
        raise DataError(f"{what}; vLLM gives one for each", server.url)
    return Answer(ids, truncated, scores)


def complete(tokenizer: Tokenizer, answer: Answer) -> Answer:
    """An answer with its ids. Not for threads: a tokenizer's encoder has one caller at a time."""
    if answer.exact:
        return answer
    return replace(answer, ids=[*reencode(tokenizer, answer.text), *([] if answer.truncated else [tokenizer.eos_id])])


def refuse_foreign(server: Server, ids: Sequence[int], text: str) -> None:
    """Raise DataError where the ids of an answer are not those of its text: the server has another tokenizer."""
    tokenizer = server.tokenizer
    outside = next((i for i in ids if not 0 <= i < tokenizer.vocab_size), None)
    if outside is None and agrees(tokenizer, ids, text):
        return
    what = "has another text than its token ids" if outside is None else f"holds token {outside:,}, which is not"
    named = f"in the tokenizer {tokenizer.name} ({tokenizer.vocab_size:,} tokens)"
    raise DataError(f"an answer {what} {named}; name the tokenizer of the served model", server.url)


def agrees(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> bool:
    """Whether a text is that of ids. Spaces do not count (servers tidy them), nor do texts with bytes that are none."""
    ours = tokenizer.decode(ids)
    if "\ufffd" in ours or "\ufffd" in text or tokenizer.unk_id in ids:
        return True
    return "".join(ours.split()) == "".join(text.split())


def reencode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that goes on from a prompt: the space before it is there only where the text has it."""
    if text.startswith(" "):
        return tokenizer.encode(text[1:])
    before = tokenizer.encode("\n")
    whole = tokenizer.encode("\n" + text)
    return whole[len(before) :] if whole[: len(before)] == before else tokenizer.encode(text)
