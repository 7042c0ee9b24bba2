"""Answers from a model that somebody else serves, over any OpenAI-compatible completions endpoint.

`RemoteEngine.generate` is that of `engine.Engine`. Prompts go out as token ids of our own encoder, one request for each
answer, so no template or tokenizer of the server plays a part; it must not add to them, which is checked. What servers
differ in:

    vLLM       ids of the answer by `return_token_ids` (from 0.10.2), before that by `return_tokens_as_token_ids`; its
               log-probabilities are at temperature 1; `seed` is honoured. Defaults of the model's
               generation_config.json apply to what a request leaves out, so nothing is left out.
    SGLang     the same fields, in releases since the summer of 2026; `seed` only with --enable-deterministic-inference.
    llama.cpp  ids of the prompt since August 2025; those of the answer stand in `logprobs`, where a character of
               several byte tokens has only the last; seeds of 32 bits. It cuts by top-p before it applies the
               temperature unless told otherwise, which it is.
    others     text only: its ids are encoded anew, which is told and counted, and no log-probabilities.

What is drawn depends on (prompt, seed, sample index) as far as the server honours seeds: the index is added to a number
made from prompt and seed, so samples of one prompt never share a seed. Greedy answers have no seed and are asked for
once. With a journal (see `answers`) a command that was killed asks only for what is missing.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from llama2cli import console
from llama2cli.errors import DataError, Misuse, did_you_mean
from llama2cli.sampling.answers import Answers
from llama2cli.sampling.endpoint import KEY_NAME, Endpoint, Faulty, Refused, Stopped
from llama2cli.sampling.engine import Result, room
from llama2cli.sampling.load import TEMPERATURE, TOP_P, Sampling
from llama2cli.sampling.sampler import SampleParams
from llama2cli.text.tokenizer import Tokenizer

CONTEXT = 4096  # Llama 2's, where the server does not tell
SEEDS = (1 << 31) - 1  # llama.cpp's seeds have 32 bits, of which all ones mean "draw one"

Source = Literal["token_ids", "logprobs", "text"]  # where a server's answers have their ids


@dataclass(frozen=True)
class Answer:
    """What the journal keeps. exact: the ids are the server's, not made from its text. logprobs at temperature 1."""

    ids: list[int]
    truncated: bool
    exact: bool
    logprobs: list[float]


@dataclass(frozen=True)
class Request:
    """One answer that is wanted. limit: tokens at most, with the context taken into account."""

    prompt: Sequence[int]
    params: SampleParams
    limit: int
    logprobs: bool


def request_seed(prompt: Sequence[int], seed: int, index: int) -> int:
    """The seed that a server gets for a sample: 31 bits; for one prompt and seed it differs from index to index."""
    words = np.array([seed & (1 << 63) - 1, *prompt], dtype="<i8")
    base = int.from_bytes(blake2b(words.tobytes(), digest_size=8).digest(), "little")
    return (base + index) % SEEDS


def answer_key(request: Request, model: str) -> bytes:
    """What tells answers apart: the ids of the prompt, the parameters and the model. Where it is served does not."""
    p = request.params
    told = [model, request.limit, p.temperature, p.top_p, p.seed, p.index, request.logprobs]
    ids = np.array(request.prompt, dtype="<i8").tobytes()
    return blake2b(json.dumps(told).encode() + b"\0" + ids, digest_size=16).digest()


class RemoteEngine:
    """Answers prompts with the model that an endpoint serves under a name; several requests at a time.

    model: None is the only one there is. concurrency: requests that are under way together. context: tokens of prompt
    and answer, where the server does not tell. journal: a file of answers, kept until `forget`. A context manager.

    Raises Misuse for an address or model that is not there, DataError for a server that does not do what is needed.
    """

    def __init__(
        self,
        endpoint: str | Endpoint,
        model: str | None,
        tokenizer: Tokenizer,
        *,
        api_key: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 5,
        patience: float = 300.0,
        context: int | None = None,
        journal: str | Path | None = None,
    ) -> None:
        self.tokenizer, self.concurrency = tokenizer, concurrency
        self.eos_id, self.vocab_size = tokenizer.eos_id, tokenizer.vocab_size
        self.reencoded = self.replayed = self.asked = 0  # answers whose ids are of our making; from the journal; drawn
        self.source: Source = "token_ids"
        self.answers = Answers(journal) if journal is not None else None
        try:
            if isinstance(endpoint, str):
                endpoint = Endpoint(
                    endpoint,
                    api_key=api_key or os.environ.get(KEY_NAME),
                    timeout=timeout,
                    retries=retries,
                    patience=patience,
                )
            self.endpoint = endpoint
            self.url = endpoint.url
            self.is_llama_cpp = False
            self.model, self.context = self._meet(model, context)
            self.source = self._probe()
        except BaseException:
            self.close()
            raise
        if self.answers:
            console.say(f"{self.answers.path}: {len(self.answers):,} answers are there already")

    # --- the server -----------------------------------------------------------------------------------------------

    def _meet(self, model: str | None, context: int | None) -> tuple[str, int]:
        """The name of the model and the context, from what the server says of itself."""
        try:
            entries = self.endpoint.ask("GET", "models", listed)
        except Refused as e:
            if e.status not in (404, 405, 501):
                raise
            entries = []
        names = [e["id"] for e in entries]
        if model is None:
            if len(names) != 1:
                have = f"serves {', '.join(names)}" if names else "does not tell what it serves"
                raise Misuse(f"{have}; name the model", self.url)
            model = names[0]
        entry = next((e for e in entries if e["id"] == model), None)
        self.is_llama_cpp = any(e.get("owned_by") == "llamacpp" for e in entries)
        if names and entry is None:
            raise Misuse(f'serves {", ".join(names)}, not "{model}"{did_you_mean(model, names)}', self.url)
        meta = entry.get("meta") if entry else None
        pieces = meta.get("n_vocab") if isinstance(meta, dict) else None
        if isinstance(pieces, int) and pieces < self.vocab_size:
            what = f"{model} has {pieces:,} tokens, the tokenizer {self.tokenizer.name} has {self.vocab_size:,}"
            raise DataError(f"{what}; name the tokenizer of that model", self.url)
        told = entry.get("max_model_len") if entry else None
        if not isinstance(told, int) and self.is_llama_cpp:
            told = self._slot_context()
        if isinstance(told, int) and told > 0:
            return model, min(told, context or told)
        if context is None:
            console.say(f"{self.url}: does not tell its context; {CONTEXT:,} tokens, Llama 2's, are assumed")
        return model, context or CONTEXT

    def _slot_context(self) -> int | None:
        """The context of one answer at llama.cpp's server, which divides its own among those under way."""
        try:
            props = self.endpoint.ask("GET", "/props", lambda value: value)
            size = props["default_generation_settings"]["n_ctx"]
        except (DataError, KeyError, TypeError):
            return None
        return size if isinstance(size, int) else None

    def _probe(self) -> Source:
        """Find out, with one greedy token, that ids are taken as they are, and where those of answers stand."""
        prompt = [self.tokenizer.bos_id, *self.tokenizer.encode("A llama")]
        request = Request(prompt, SampleParams(1, temperature=0), 1, logprobs=False)
        source: Source
        for source in ("token_ids", "logprobs"):
            self.source = source
            try:
                choice, _ = self.endpoint.ask("POST", "completions", self._checked(request), self._body(request))
            except Refused as e:
                if e.status == 404:
                    what = f"no completions are there ({e.said}); an address ends in /v1 as a rule"
                    raise DataError(what, *e.place) from None
                if e.status not in (400, 415, 422, 501):
                    raise
                needs = "vLLM, SGLang and llama.cpp's server (from August 2025) take ids"
                raise DataError(f'does not take a prompt of token ids ("{e.said}"); {needs}', *e.place) from None
            if self._ids(choice) is not None:
                return source
        what = "gives no token ids, only text; the ids of its answers are encoded from it, which may differ"
        console.warn(f"{self.url}: {what} from those that were drawn")
        return "text"

    def _body(self, request: Request) -> dict[str, Any]:
        """The request as JSON. What would fall back to a default of the server is spelled out."""
        p = request.params
        body: dict[str, Any] = {
            "model": self.model,
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
        if self.is_llama_cpp:
            body |= {"repeat_penalty": 1.0, "samplers": ["temperature", "top_p"]}
        else:
            body |= {"repetition_penalty": 1.0, "return_token_ids": True}
        if request.logprobs or self.source == "logprobs":
            body |= {"logprobs": 1, "return_tokens_as_token_ids": True}
        return body

    # --- what it answers ------------------------------------------------------------------------------------------

    def _checked(self, request: Request) -> Callable[[Any], tuple[dict[str, Any], dict[str, Any]]]:
        """A reader of replies: (choice, usage). It raises Faulty for another form, DataError for another prompt."""

        def read(reply: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            if not isinstance(reply, dict) or not isinstance(reply.get("choices"), list):
                said = reply.get("error") if isinstance(reply, dict) else None
                raise Faulty(f"the answer has no choices{f' ({said})' if said else ''}")
            choices, usage = reply["choices"], reply.get("usage") or {}
            if len(choices) != 1 or not isinstance(choices[0], dict) or not isinstance(usage, dict):
                raise Faulty(f"the answer has {len(choices)} choices, one was asked for")
            count, sent = usage.get("prompt_tokens"), len(request.prompt)
            if isinstance(count, int) and count != sent:
                raise DataError(f"read a prompt of {sent:,} token ids as {count:,}: it does not take ids", self.url)
            seen = choices[0].get("prompt_token_ids")
            if isinstance(seen, list) and seen != list(request.prompt):
                raise DataError("put other ids in the place of the prompt's", self.url)
            return choices[0], usage

        return read

    def _ids(self, choice: dict[str, Any]) -> list[int] | None:
        """The ids of an answer as the server gives them; None where there are none."""
        ids: Any = choice.get("token_ids")
        held = choice.get("logprobs")
        if not isinstance(ids, list) and isinstance(held, dict):
            if isinstance(held.get("content"), list):  # llama.cpp
                ids = [t.get("id") if isinstance(t, dict) else None for t in held["content"]]
            elif isinstance(held.get("tokens"), list):  # vLLM, "token_id:13"
                names = [str(t).removeprefix("token_id:") for t in held["tokens"]]
                marked = all(str(t).startswith("token_id:") for t in held["tokens"])
                ids = [int(n) if n.isdigit() else None for n in names] if marked else None
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            return None
        return ids

    def _logprobs(self, choice: dict[str, Any]) -> list[float]:
        held = choice.get("logprobs") or {}
        if isinstance(held.get("content"), list):
            values = [t.get("logprob") if isinstance(t, dict) else None for t in held["content"]]
        else:
            values = held.get("token_logprobs") or []
        found = [float(v) for v in values if isinstance(v, (int, float))]
        if len(found) != len(values):
            raise Faulty("the answer has tokens without a log-probability")
        return found

    def _read(self, request: Request) -> Callable[[Any], Answer]:
        """A reader of replies. It raises Faulty for a reply that another attempt may mend, else DataError."""
        checked = self._checked(request)

        def read(reply: Any) -> Answer:
            choice, usage = checked(reply)
            finish, text = choice.get("finish_reason"), choice.get("text")
            if finish not in ("stop", "length") or not isinstance(text, str):
                raise Faulty(f"the answer ended with {json.dumps(finish)}, not with stop or length")
            stop = choice.get("stop_reason", choice.get("matched_stop"))
            if finish == "stop" and stop not in (None, self.eos_id):
                what = f"ends answers at {json.dumps(stop)}, which is not the end of a sequence ({self.eos_id})"
                raise DataError(f"{what}; take its own stop words and stop ids out", self.url)
            ids = self._ids(choice)
            open_ended = not ids or ids[-1] != self.eos_id
            count = usage.get("completion_tokens")
            if self.source == "logprobs" and ids is not None and isinstance(count, int):
                # llama.cpp leaves out tokens that end inside a character; EOS may be counted and not be there
                if count - len(ids) not in (0, open_ended and finish == "stop"):
                    ids = None
            exact = ids is not None
            if ids is None:
                ids, open_ended = reencode(self.tokenizer, text), True
            else:
                self._refuse_foreign(ids, text)
            if len(ids) > request.limit and exact:
                raise Faulty(f"the answer has {len(ids)} tokens, {request.limit} were asked for at most")
            if finish == "stop" and open_ended:
                ids = [*ids, self.eos_id]
            logprobs = self._logprobs(choice) if request.logprobs else []
            if request.logprobs and len(logprobs) != len(ids):
                what = f"gives {len(logprobs)} log-probabilities for an answer of {len(ids)} tokens"
                raise DataError(f"{what}; vLLM gives one for each", self.url)
            return Answer(ids, truncated=finish == "length" and open_ended, exact=exact, logprobs=logprobs)

        return read

    def _refuse_foreign(self, ids: list[int], text: str) -> None:
        """Raise DataError where the ids of an answer are not those of its text: the server has another tokenizer."""
        high = max(ids, default=0)
        if high < self.vocab_size and agrees(self.tokenizer, ids, text):
            return
        what = f"holds token {high:,}" if high >= self.vocab_size else "has another text than its token ids"
        named = f"in the tokenizer {self.tokenizer.name} ({self.vocab_size:,} tokens)"
        raise DataError(f"an answer {what} {named}; name the tokenizer of the served model", self.url)

    # --- many prompts ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SampleParams],
        *,
        logprobs: bool = False,
        tick: Callable[[Result], None] | None = None,
    ) -> list[Result]:
        """One result per prompt, in order; see `Engine.generate`. What the journal holds is not asked for.

        sampled_logprobs is empty where it is not logprobs itself (temperature 1, no top-p) or 0 (greedy): servers
        tell one of the two. Raises ValueError as `Engine.generate` does, DataError when an answer cannot be had;
        those that came are in the journal then.
        """
        asked: dict[bytes, list[int]] = {}  # the prompts that one answer is for
        requests: dict[bytes, Request] = {}
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            if not prompt or room(prompt, p, self.context) < 1:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens, the context is {self.context}")
            if p.temperature == 0:
                p = replace(p, top_p=1.0, seed=0, index=0)
            request = Request(prompt, p, room(prompt, p, self.context), logprobs)
            key = answer_key(request, self.model)
            requests[key] = request
            asked.setdefault(key, []).append(i)
        results: list[Result | None] = [None] * len(prompts)

        def give(key: bytes, answer: Answer) -> None:
            self.reencoded += not answer.exact
            if not answer.exact and self.source != "text":
                what = "an answer's token ids are encoded from its text: the server leaves some out"
                console.warn(f"{self.url}: {what}", "answers whose token ids are encoded from their text")
            for i in asked[key]:
                results[i] = result = as_result(answer, requests[key].params)
                if tick is not None:
                    tick(result)

        missing = {key: request for key, request in requests.items() if not self._replay(key, give)}
        self._draw(missing, give)
        return [r for r in results if r is not None]

    def _replay(self, key: bytes, give: Callable[[bytes, Answer], None]) -> bool:
        """Give the answer that the journal holds; whether there is one."""
        kept = self.answers.get(key) if self.answers is not None else None
        if kept is None:
            return False
        self.replayed += 1
        give(key, Answer(kept["ids"], kept["truncated"], kept["exact"], kept.get("logprobs", [])))
        return True

    def _draw(self, requests: dict[bytes, Request], give: Callable[[bytes, Answer], None]) -> None:
        """Ask for answers, several at a time, and give them as they come; each is in the journal before that."""
        todo: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[bytes, Answer | BaseException]] = queue.SimpleQueue()
        stop = threading.Event()
        for key in requests:
            todo.put(key)

        def work() -> None:
            while not stop.is_set():
                try:
                    key = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((key, self._one(requests[key], stop)))
                except BaseException as e:
                    done.put((key, e))
                    return

        left = todo.qsize()
        for _ in range(min(self.concurrency, left)):
            threading.Thread(target=work, daemon=True).start()
        try:
            while left:
                answers, error = self._keep(done, wait=True)
                left -= len(answers)
                for key, answer in answers:
                    give(key, answer)
                if error is not None:
                    raise error
        finally:
            stop.set()
            self._keep(done, wait=False)

    def _one(self, request: Request, stop: threading.Event) -> Answer:
        """Ask for one answer."""
        try:
            return self.endpoint.ask("POST", "completions", self._read(request), self._body(request), stop=stop)
        except Refused as e:
            asked = f"a prompt of {len(request.prompt):,} tokens, {request.limit:,} more at most"
            raise DataError(f"{e.message} ({asked})", *e.place) from None

    def _keep(
        self, done: queue.SimpleQueue[tuple[bytes, Answer | BaseException]], *, wait: bool
    ) -> tuple[list[tuple[bytes, Answer]], BaseException | None]:
        """The answers that have come, now in the journal, with one fsync for all; and an error, where there is one."""
        answers: list[tuple[bytes, Answer]] = []
        error: BaseException | None = None
        while True:
            try:
                key, got = done.get() if wait and not answers and error is None else done.get_nowait()
            except queue.Empty:
                break
            if isinstance(got, Answer):
                answers.append((key, got))
            elif error is None or isinstance(error, Stopped):
                error = got
        self.asked += len(answers)
        if answers and self.answers is not None:
            self.answers.add((key, as_kept(answer)) for key, answer in answers)
        return answers, error

    # --- the end --------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Delete the journal: what it was kept for is complete."""
        if self.answers is not None:
            self.answers.remove()
            self.answers = None

    def close(self) -> None:
        """Break the connections and let go of the journal, which stays."""
        endpoint = getattr(self, "endpoint", None)
        if endpoint is not None:
            endpoint.close()
        if self.answers is not None:
            self.answers.close()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def listed(reply: Any) -> list[dict[str, Any]]:
    """The models of GET /v1/models; none where it has another form."""
    data = reply.get("data") if isinstance(reply, dict) else None
    return [e for e in data or [] if isinstance(e, dict) and isinstance(e.get("id"), str)]


def as_kept(answer: Answer) -> dict[str, Any]:
    """An answer as the journal holds it."""
    kept = {"ids": answer.ids, "truncated": answer.truncated, "exact": answer.exact}
    return kept | ({"logprobs": answer.logprobs} if answer.logprobs else {})


def as_result(answer: Answer, params: SampleParams) -> Result:
    """An answer as the engine gives it."""
    logprobs = answer.logprobs
    if params.temperature == 0:
        sampled = [0.0] * len(logprobs)
    else:
        sampled = list(logprobs) if params.temperature == 1 and params.top_p == 1 else []
    return Result(list(answer.ids), list(logprobs), sampled, answer.truncated)


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


# --- for the commands ---------------------------------------------------------------------------------------------


def connect(
    endpoint: str,
    tokenizer: str,
    *,
    model: str | None = None,
    journal: str | Path | None = None,
    concurrency: int = 64,
    timeout: float = 600.0,
    retries: int = 5,
    patience: float = 300.0,
    context: int | None = None,
) -> tuple[RemoteEngine, Tokenizer]:
    """The engine of an endpoint and the tokenizer in a folder or `.model` file, as `load.load_engine` gives them.

    The key is in the environment variable LLAMA2_API_KEY. Raises Misuse and DataError.
    """
    loaded = Tokenizer.load(tokenizer)
    engine = RemoteEngine(
        endpoint,
        model,
        loaded,
        concurrency=concurrency,
        timeout=timeout,
        retries=retries,
        patience=patience,
        context=context,
        journal=journal,
    )
    return engine, loaded


def journal_beside(out: str) -> Path | None:
    """Where a command keeps the answers for its output: FILE.answers; None for stdout and devices, with a warning."""
    path = Path(out)
    if out == "-" or (path.exists() and not path.is_file()):
        console.warn("no journal of the answers is kept for stdout; with -o FILE a killed command goes on from it")
        return None
    return path.with_name(path.name + ".answers")


def settle_remote_sampling(temperature: float | None, top_p: float | None) -> Sampling:
    """Temperature and top-p as given, else Meta's reference values: there is no folder whose wishes could be read."""
    temperature = TEMPERATURE if temperature is None else temperature
    if top_p is not None and temperature == 0:
        console.warn("--top-p does nothing at temperature 0")
    return Sampling(temperature, TOP_P if top_p is None else top_p)
