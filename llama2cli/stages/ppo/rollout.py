"""Answers to prompts, and what the reward models and the reference say of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from llama2cli import console
from llama2cli.measure.rates import sigmoid
from llama2cli.nn import checkpoint
from llama2cli.rlhf import ppo
from llama2cli.rlhf.rewards import combined
from llama2cli.sampling.engine import Engine, Result
from llama2cli.sampling.judging import score_answers
from llama2cli.sampling.sampler import SampleParams
from llama2cli.sampling.samples import answer_text
from llama2cli.stages.ppo.job import Job
from llama2cli.stages.ppo.roles import Roles, at_work
from llama2cli.text.chat import of_models
from llama2cli.text.records import Record
from llama2cli.text.streams import Place
from llama2cli.training import dist
from llama2cli.training.answers import Answers, Read, exact_kl
from llama2cli.training.dist import World
from llama2cli.training.roles import consolidated
from llama2cli.training.signals import Stop

COLUMNS = ("reward", "help", "safe", "by_safety", "judge", "length", "cut", "kl")  # what is known of each answer


class Abandoned(Exception):
    """A signal came while answers were sampled or scored: no weight has moved, the iteration is given up."""


@dataclass(eq=False)
class Rollout:
    """The answers of this rank: which of the iteration's they are, as text, and of their tokens log-probability under
    the policy, KL to the reference, and value.

    table: what is known of the answers of all ranks, by COLUMNS, fp64 [answers].
    """

    mine: list[int]
    answers: Answers
    texts: list[str]
    logprobs_M: Tensor
    kl_M: Tensor
    values_M: Tensor
    table: dict[str, Tensor]


def roll_out(
    job: Job,
    roles: Roles,
    chosen: Sequence[int],
    indices: Sequence[int],
    seconds: dict[str, float],
    stop: Stop,
    *,
    heldout: bool = False,
) -> Rollout:
    """Sample an answer to each chosen prompt and score it; each rank has every n-th of them.

    indices: which samples they are, so that no random number is used twice. heldout: the judge is asked too, and no
    values are wanted. Raises Abandoned.
    """
    settings, world = job.settings, job.world
    mine = list(range(world.rank, len(chosen), world.size))
    records = [job.prompts.records[chosen[j]] for j in mine]
    places = [job.prompts.places[chosen[j]] for j in mine]

    def tick(_: object) -> None:
        if stop.asked and world.size == 1:
            raise Abandoned

    with clock(seconds, "rollout", world):
        prompts = [job.prompts.ids[chosen[j]].tolist() for j in mine]
        answers, results, exact_M = sample(job, roles, prompts, [indices[j] for j in mine], tick)
    with clock(seconds, "scoring", world):
        sampled_M = torch.tensor([x for r in results for x in r.sampled_logprobs])
        logprobs_M, values_M = read_learners(job, roles, answers, sampled_M, values=not heldout)
        kl_M = exact_M
        if kl_M is None:
            with at_work(job, [roles.reference]):
                ref_M = job.rows.read(roles.reference, answers, torch.float32, k=2)[0]
            kl_M = ppo.kl_estimate(logprobs_M, ref_M, job.terms.estimator)
        tags = of_models(settings.tags)
        read = [answer_text(r, job.start.tokenizer, tags) for r in results]
        for place, (_, escaped) in zip(places, read):
            if escaped:
                told = f"{place.file}:{place.line}: its answer holds tags of the chat format; they are escaped"
                console.warn(told, "answers with tags of the chat format")
        texts = [text for text, _ in read]
        cut = [r.truncated for r in results]
        asked = answered(records, places, texts, cut)
        logits: dict[str, list[float]] = {}
        with at_work(job, roles.judges):
            for name, scorer in roles.scorers.items():
                if name != "judge" or heldout:
                    found = score_answers(scorer, asked, tags=tags, tick=tick).logits
                    logits[name] = [logit for [logit] in found]
        lengths = [len(r.ids) for r in results]
        columns = rewards(logits, [bool(r.get("unsafe")) for r in records])
        columns |= {"length": list(map(float, lengths)), "cut": list(map(float, cut))}
        columns["kl"] = [float(part.sum()) for part in kl_M.split(lengths)]
        if not (job.sampled_logprobs or heldout):
            gap_M = ((logprobs_M - sampled_M).exp() - 1).abs()
            columns["gap"] = [float(part.sum()) for part in gap_M.split(lengths)]
        table = everyones(world, columns, mine, len(chosen))
    return Rollout(mine, answers, texts, logprobs_M, kl_M, values_M, table)


def sample(
    job: Job, roles: Roles, prompts: list[list[int]], indices: Sequence[int], tick: Callable[[object], None]
) -> tuple[Answers, list[Result], Tensor | None]:
    """Answers to prompts of this rank, and where it is asked for the exact KL of each token.

    The policy's weights are brought together for the time of it, and given free.
    """
    settings, context = job.settings, job.start.context
    whole = consolidated(roles.policy.model, checkpoint.DTYPES[job.resolved["dtype"]], job.world)
    # the form of steps is the same in every process, which compiled ones need not be: a resumed run draws the same
    engine = Engine(whole, job.start.tokenizer, rows=settings.rollout_rows, compiles=False)
    params = [
        SampleParams(min(settings.max_new_tokens, context - len(p)), settings.temperature, 1.0, settings.seed, i)
        for p, i in zip(prompts, indices)
    ]
    results = engine.generate(prompts, params, logprobs=True, tick=tick)
    answers = Answers(prompts, [r.ids for r in results])
    if settings.kl != "exact":
        return answers, results, None
    with at_work(job, [roles.reference]):
        pieces = job.start.tokenizer.vocab_size
        read = exact_kl(Read(whole, temperature=settings.temperature, pieces=pieces), roles.reference)
        return answers, results, job.rows.read(read, answers, torch.float32)[0]


def read_learners(
    job: Job, roles: Roles, answers: Answers, sampled_M: Tensor, *, values: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens, those of sampling where they serve, and their values (0 where not wanted)."""
    dtype = checkpoint.DTYPES[job.resolved["dtype"]]
    logprobs_M, values_M, trunk = sampled_M, torch.zeros_like(sampled_M), roles.value is None
    if (values and trunk) or not job.sampled_logprobs:
        found = job.rows.read(roles.policy.loss, answers, dtype, k=3 if trunk else 2)
        logprobs_M = sampled_M if job.sampled_logprobs else found[0]
        values_M = found[-1] if trunk else values_M
    if values and roles.value is not None:
        values_M = job.rows.read(roles.value.loss, answers, dtype)[0]
    return logprobs_M, values_M


def answered(
    records: Sequence[Record], places: Sequence[Place], texts: Sequence[str], cut: Sequence[bool]
) -> list[tuple[Place, list[Record]]]:
    """The dialogue of each prompt with its answer, as `score_answers` takes them."""
    told = [{"role": "assistant", "content": text} for text in texts]
    return [
        (place, [{"messages": [*record["messages"], answer], "truncated": truncated}])
        for record, place, answer, truncated in zip(records, places, told, cut, strict=True)
    ]


def rewards(logits: Mapping[str, list[float]], unsafe: list[bool]) -> dict[str, list[float]]:
    """Columns of answers from the logits of reward models: the piecewise reward, or the score of the one model."""
    columns = {name: list(map(sigmoid, logits[name])) for name in ("help", "safe") if name in logits}
    if len(columns) == 2:
        columns["reward"], safety = combined(logits["help"], logits["safe"], unsafe)
        columns["by_safety"] = list(map(float, safety))
    else:
        columns["reward"] = logits[next(iter(columns))]
    return columns | ({"judge": logits["judge"]} if "judge" in logits else {})


def everyones(world: World, columns: Mapping[str, list[float]], mine: Sequence[int], n: int) -> dict[str, Tensor]:
    """The columns of all ranks' answers, the same on every rank. mine: which of the n are this rank's."""
    out = {}
    for name, values in columns.items():
        whole = torch.zeros(n, dtype=torch.float64)
        whole[torch.tensor(mine, dtype=torch.long)] = torch.tensor(values, dtype=torch.float64)
        out[name] = torch.tensor(dist.sums(world, whole.tolist()), dtype=torch.float64)
    return out


@contextmanager
def clock(seconds: dict[str, float], phase: str, world: World) -> Iterator[None]:
    """Add the time of the block to a phase."""
    began = time.perf_counter()
    yield
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began
