"""`llama2 rs-sample`: rejection sampling (Llama 2, section 3.2.3): of K answers the one that reward models like best.

Choices where the paper is silent:
1. K is 16, and nothing is cut off the distribution (top-p 1). The temperature is 1.2: the paper's is 1.2 to 1.3, for 10
   to 100 samples of an RLHF model, to be found anew for each model. Several temperatures give K samples each, with
   random numbers of their own, and the best of all of them is kept.
2. With both reward models the best is that by the piecewise reward, as in PPO; with one of them by its score. `reward`
   is that logit.
3. An answer that was cut is scored at its last token and counts in what is reported, but is not kept unless asked for:
   fine-tuning on it would teach an end where there was none.
4. Samples of earlier rounds compete by the scores of this run's reward models. A prompt that only the pool has is
   answered from there, after the others: the best answers of earlier rounds stay in the training set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llama2cli import console, provenance
from llama2cli.errors import Misuse
from llama2cli.measure.rates import sigmoid
from llama2cli.settings import Asking, Filter, Served, flag
from llama2cli.text.chat import encode_conversation, of_models
from llama2cli.text.folders import resolve_model
from llama2cli.text.output import check_outputs, open_outputs, write_all
from llama2cli.text.pool import FromPool, Pool
from llama2cli.text.prompts import check_endpoint, check_system, read_prompts
from llama2cli.text.records import Record
from llama2cli.text.streams import Place, some, windows

if TYPE_CHECKING:
    from llama2cli.measure.best_of import Temperature
    from llama2cli.sampling.remote import RemoteEngine
    from llama2cli.sampling.samples import Tally, Voice
    from llama2cli.sampling.scoring import Scorer

Window = Sequence[tuple[Place, Record]]
SCORES = ("help", "safe", "reward", "help_logit", "safe_logit")


@dataclass(frozen=True, kw_only=True)
class Settings(Served, Asking, Filter):
    """Sample K answers to each prompt, score them with reward models, and keep the best: a dialogue ready for sft.

    What is kept is a Sample: with "help" and "safe", from 0 to 1, and "reward", the logit that it was chosen by: the
    safety model's where the prompt has "unsafe": true or "safe" is below 0.15, else the helpfulness model's (with one
    reward model, its own). The order is that of the prompts.

    With --pool the Samples of earlier rounds are scored anew and compete: all of them (--pool-mode all, as the paper
    does after RLHF-V3), or those of this round alone (last, as it did before).

    On stderr, and as metric records in --metrics: the reward by temperature, and the largest, the median and the mean
    of N = 1..K samples with intervals over prompts (Figs. 7 and 8).

    Example:
      echo "What is a llama?" | llama2 rs-sample --text --policy run --rm-help rm-help --rm-safe rm-safe -k 4 \\
        --temperature 0.8 --temperature 1.2 --max-new-tokens 32 --keep-truncated --all samples.jsonl -o best.jsonl
    """

    policy: str = flag(help="the model that answers: an HF folder, step folder or run folder", complete="checkpoint")
    rm_help: str | None = flag(default=None, help="the helpfulness reward model", complete="checkpoint")
    rm_safe: str | None = flag(default=None, help="the safety reward model", complete="checkpoint")
    samples: int = flag("-k", default=16, help="samples of each prompt at each temperature", low=1)
    temperature: list[float] = flag(
        default=[1.2],  # Llama 2, section 3.2.3: 1.2 to 1.3
        help="of the samples; may be repeated, and each gives -k samples",
    )
    top_p: float = flag(default=1.0, help="draw from the likeliest tokens that hold this share", low=0, high=1)
    keep_truncated: bool = flag(default=False, help="answers that were cut may be kept too")
    pool: list[str] = flag(
        default=[], help="Samples of earlier rounds, which compete; may be repeated", complete="file"
    )
    pool_mode: Literal["last", "all"] = flag(
        default="all", help="which of them: those of this round alone, or those of all rounds"
    )
    round: int | None = flag(
        default=None, low=0, help="the round of this run's samples (default: one more than the highest of --pool)"
    )
    all_samples: str | None = flag(
        rename="--all",
        default=None,
        help="write every sample of this run to this file, with its scores",
        complete="file",
    )
    metrics: str | None = flag(default=None, help="write the metric records to this file", complete="file")
    text: bool = flag(default=False, help="the input is plain text, a prompt on each line")
    system: str | None = flag(default=None, help="system prompt, where there is no other")
    window: int = flag(default=64, help="prompts that are answered at once; a killed command loses no more", low=1)


@dataclass
class Counts:
    """What is told at the end, over all processes of a run: it goes into the journal."""

    heat: list[Temperature]
    prompts: int = 0
    kept: int = 0
    from_pool: int = 0
    only_in_pool: int = 0
    by_safety: int = 0
    empty: int = 0
    without: int = 0
    cut: int = 0
    scored: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of the scores of all answers
    kept_sums: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, settings: Settings, state: dict[str, Any] | None) -> Counts:
        """Nothing yet, or what an earlier process had counted."""
        from llama2cli.measure.best_of import Temperature

        if state is not None:
            return cls(**{**state, "heat": [Temperature.of_state(t) for t in state["heat"]]})
        return cls([Temperature(t, settings.samples) for t in settings.temperature])

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**vars(self), "heat": [t.state() for t in self.heat]}


class Models(NamedTuple):
    """Who answers, and the reward models by the field that they give; all are held together."""

    policy: Voice
    scorers: dict[str, Scorer]
    server: RemoteEngine | None


@dataclass
class Contest:
    """A prompt, the answers that compete (this run's first, by temperature), and what reward models say of them."""

    place: Place
    prompt: Record
    fresh: list[Record]
    pooled: list[Record]
    logits: dict[str, list[float]] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)

    @property
    def samples(self) -> list[Record]:
        """All that compete."""
        return [*self.fresh, *self.pooled]


def run(settings: Settings) -> None:
    """Read prompts, answer and judge them window by window, write the best answers in their order."""
    from llama2cli.sampling.samples import Tally

    # 1. what is asked: the first prompt is read, and the outputs opened, before a model is loaded
    check(settings)
    rewarders = {name: p for name, p in (("help", settings.rm_help), ("safe", settings.rm_safe)) if p is not None}
    answers = settings.policy if settings.endpoint is None else settings.tokenizer or ""
    folders = [*{resolve_model(path): None for path in rewarders.values()}]
    folders += [resolve_model(answers)] if settings.endpoint is None else [Path(answers)]
    read = read_prompts(settings.files, text=settings.text, max_line=settings.max_line)
    prompts = some(read, settings.files, "prompts")
    earlier = read_pool(settings)
    newest = settings.round if settings.round is not None else earlier.newest + 1 if earlier else 1
    if settings.provenance:
        provenance.write(settings.provenance, settings, [*settings.files, *settings.pool, answers, *rewarders.values()])
    with open_outputs(settings, {"--all": settings.all_samples}, paths=[*folders, *settings.pool]) as outputs:
        out, every = outputs.main, outputs.beside.get("--all")
        # 2. the models
        models = load(settings, rewarders)
        counts, done = Counts.start(settings, out.state), out.skip
        tally = Tally()
        # 3. the answers
        with models.server or nullcontext(), console.Progress("rs-sample", unit="answers") as progress:
            for window in windows(out.rest(asked(prompts, earlier, settings.system)), settings.window):
                contests = sample(window, models, earlier, newest, settings, tally, progress)
                score(contests, models, settings, counts, progress)
                for contest in contests:
                    judged = [scored(contest, i) for i in range(len(contest.samples))]
                    if (kept := choose(contest, settings, counts)) is not None:
                        out.write(judged[kept])
                    if every:
                        for record in judged[: len(contest.fresh)]:
                            every.write(record)
                count(contests, counts, keep_truncated=settings.keep_truncated)
                done += len(window)
                outputs.commit(done, counts.state())
            write_metrics(counts, settings, newest)
    if models.server is not None:
        models.server.forget()  # the outputs are complete: the server's answers need not be kept beside them
    report(counts, tally, settings, continued=out.skip > 0)


# --- what is asked ------------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raise Misuse for flags that do not go together."""
    if settings.rm_help is None and settings.rm_safe is None:
        raise Misuse("nothing to choose by: give --rm-help, --rm-safe or both")
    heat = settings.temperature
    for t in heat:
        if not (math.isfinite(t) and t >= 0):
            raise Misuse(f"expected at least 0, got {t}", "--temperature")
        if heat.count(t) > 1:
            raise Misuse(f"{t:g} is given twice", "--temperature")
    if 0 in heat and settings.samples > 1:
        raise Misuse(f"greedy answers are all the same: {settings.samples} samples want another one", "--temperature")
    check_endpoint(settings.endpoint, settings.tokenizer)
    check_system(settings.system, settings.tags)
    if settings.pool_mode == "last" and settings.pool and settings.round is None:
        raise Misuse("which round is the last? name this run's, and the pool's Samples of it compete", "--round")
    outputs = (("--out", settings.out), ("--all", settings.all_samples), ("--metrics", settings.metrics))
    check_outputs(outputs, [*settings.files, *settings.pool])


def read_pool(settings: Settings) -> Pool | None:
    """The Samples of earlier rounds, if there are any."""
    from llama2cli.rlhf.best_of import competes

    if not settings.pool:
        return None
    mode, newest = settings.pool_mode, settings.round or 0

    def wanted(sample: Record) -> bool:
        return competes(sample, mode, newest)

    with console.Progress("pool", unit="samples") as progress:
        pool = Pool(settings.pool, wanted=wanted, max_line=settings.max_line, tick=progress.advance)
    same = f"; {pool.identical:,} more are the same" if pool.identical else ""
    others = f"; {pool.others:,} of other rounds than {settings.round} left out" if pool.others else ""
    console.say(f"pool: {pool.n:,} samples of {len(pool.lines):,} prompts{same}{others}")
    return pool


def asked(
    prompts: Iterator[tuple[Place, Record]], earlier: Pool | None, system: str | None
) -> Iterator[tuple[Place, Record]]:
    """The prompts, with a system prompt where one is given, and then those that only the pool has."""
    from llama2cli.sampling.samples import with_system

    for place, record in prompts:
        record = with_system(record, system)
        if earlier:
            earlier.ask(record["messages"])
        yield place, record
    if earlier:
        yield from earlier.unasked()


# --- answers and scores -------------------------------------------------------------------------------------------


def load(settings: Settings, rewarders: dict[str, str]) -> Models:
    """The policy and the reward models; a folder that is named twice is loaded once."""
    from llama2cli.sampling.load import Sampling
    from llama2cli.sampling.voices import open_scorers, open_voice

    voice, server = open_voice(settings.policy, Sampling(settings.temperature[0], settings.top_p), settings)
    compute = {"device": settings.device, "dtype": settings.dtype}
    return Models(voice, open_scorers(rewarders, **compute, tokens=settings.batch_tokens), server)


def sample(
    window: Window,
    models: Models,
    earlier: Pool | None,
    newest: int,
    settings: Settings,
    tally: Tally,
    progress: console.Progress,
) -> list[Contest]:
    """The answers that compete for each prompt of a window; one too long for a context is left out, or an error."""
    from llama2cli.sampling.samples import fits, sample_records
    from llama2cli.sampling.voices import ticker

    context = min(scorer.context for scorer in models.scorers.values())
    tokenizer = next(iter(models.scorers.values())).tokenizer
    contests = []
    for place, record in window:
        in_pool = isinstance(place, FromPool)
        tags = settings.tags if not in_pool or settings.tags == "keep" else "escape"
        ids = encode_conversation(tokenizer, record["messages"], tags=tags, place=place).ids
        if fits(ids, context, place, skip=settings.skip_long or in_pool, tally=tally):
            pooled = earlier.of(record["messages"]) if earlier else []
            contests.append(Contest(place, record, [], [tagged(s, record) for s in pooled]))
    answered = [contest for contest in contests if not isinstance(contest.place, FromPool)]
    for number, temperature in enumerate(settings.temperature):
        found = sample_records(
            [(contest.place, contest.prompt) for contest in answered],
            models.policy.engine,
            models.policy.tokenizer,
            k=settings.samples,
            temperature=temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            max_new_tokens=settings.max_new_tokens,
            policy=models.policy.policy,
            tags=settings.tags,
            first=number * settings.samples,
            skip_long=settings.skip_long,
            tally=tally,
            tick=ticker(tally, progress),
        )
        for contest, samples in zip(answered, found, strict=True):
            contest.fresh += [{**s, "round": newest} for s in samples]
    return contests


def tagged(sample: Record, prompt: Record) -> Record:
    """A Sample of the pool without the scores that it had, and with the prompt's tag, which is this run's to say."""
    kept = {k: v for k, v in sample.items() if k not in (*SCORES, "unsafe")}
    return kept | ({"unsafe": prompt["unsafe"]} if "unsafe" in prompt else {})


def score(
    contests: Sequence[Contest], models: Models, settings: Settings, counts: Counts, progress: console.Progress
) -> None:
    """Give every answer its logits and its reward. Answers to one prompt that are the same are computed once."""
    from llama2cli.sampling.judging import judge_answers

    groups = [(contest.place, contest.samples) for contest in contests]
    found, cut = judge_answers(models.scorers, groups, tags=of_models(settings.tags), progress=progress)
    counts.cut += cut
    for contest, logits in zip(contests, found, strict=True):
        contest.logits = logits
        contest.rewards = rewards_of(contest)


def rewards_of(contest: Contest) -> list[float]:
    """The reward of each answer: by the piecewise rule, or the score of the one model."""
    from llama2cli.rlhf.rewards import combined

    if len(contest.logits) == 1:
        return next(iter(contest.logits.values()))
    unsafe = [bool(contest.prompt.get("unsafe"))] * len(contest.samples)
    return combined(contest.logits["help"], contest.logits["safe"], unsafe)[0]


def scored(contest: Contest, i: int) -> Record:
    """The Sample of an answer with its scores."""
    scores = {name: sigmoid(logits[i]) for name, logits in contest.logits.items()}
    return {**contest.samples[i], **scores, "reward": contest.rewards[i]}


def choose(contest: Contest, settings: Settings, counts: Counts) -> int | None:
    """Which answer is kept; None where there is none that may be. Counted."""
    from llama2cli.rlhf.best_of import best

    samples = contest.samples
    chosen = best(contest.rewards, None if settings.keep_truncated else [s["truncated"] for s in samples])
    if chosen is None:
        place = contest.place
        why = "every answer was cut (--keep-truncated keeps such)" if samples else "there is no answer to it"
        console.warn(f"{place.file}:{place.line}: left out: {why}", f"prompts left out: {why}")
        counts.without += 1
        return None
    counts.kept += 1
    counts.empty += not samples[chosen]["messages"][-1]["content"]
    if chosen < len(contest.fresh):
        counts.heat[chosen // settings.samples].chosen += 1
    else:
        counts.from_pool += 1
    if len(contest.logits) > 1:
        counts.by_safety += contest.rewards[chosen] == contest.logits["safe"][chosen]
    for name, logits in contest.logits.items():
        counts.kept_sums[name] = counts.kept_sums.get(name, 0.0) + sigmoid(logits[chosen])
    return chosen


# --- counting and telling -----------------------------------------------------------------------------------------


def count(contests: Sequence[Contest], counts: Counts, *, keep_truncated: bool) -> None:
    """Count the answers of a window, and the curves of their rewards at each temperature."""
    import numpy as np

    from llama2cli.rlhf.best_of import expected_max, expected_median

    counts.prompts += len(contests)
    counts.only_in_pool += sum(isinstance(contest.place, FromPool) for contest in contests)
    for contest in contests:
        counts.scored += len(contest.samples)
        for name, logits in contest.logits.items():
            counts.sums[name] = counts.sums.get(name, 0.0) + sum(map(sigmoid, logits))
    answered = [contest for contest in contests if contest.fresh]
    for i, t in enumerate(counts.heat) if answered else ():
        mine = slice(i * t.k, (i + 1) * t.k)
        rewards_PK = np.array([contest.rewards[mine] for contest in answered])
        t.add(expected_max(rewards_PK), expected_median(rewards_PK), rewards_PK.mean(1))
        for contest in answered:
            t.see(contest.fresh[mine], contest.rewards[mine], whole=not keep_truncated)


def write_metrics(counts: Counts, settings: Settings, newest: int) -> None:
    """The metric records, where they are asked for."""
    from llama2cli.measure import best_of

    metrics = best_of.records(counts.heat, counts.kept, round=newest)
    write_all(settings.metrics, metrics, [*settings.files, *settings.pool])


def report(counts: Counts, tally: Tally, settings: Settings, *, continued: bool) -> None:
    """Tables and the closing lines on stderr."""
    from llama2cli.measure import best_of

    console.tables(best_of.tables(counts.heat, counts.kept))
    heat = ", ".join(f"{t:g}" for t in settings.temperature)
    told = tally.told(f"temperature {heat}, top-p {settings.top_p:g}", settings.max_new_tokens)
    console.say(f"since it continued: {told}" if continued else told)
    parts = [f"{counts.prompts:,} prompts, {counts.kept:,} best answers kept"]
    for name, total in counts.kept_sums.items():
        parts.append(f"{name} {total / counts.kept:.3f} (of all answers {counts.sums[name] / counts.scored:.3f})")
    more = [
        (counts.by_safety, "chosen by the safety model's score"),
        (counts.empty, "of them empty"),
        (counts.from_pool, "from the pool"),
        (counts.only_in_pool, "prompts that only the pool has"),
        (0 if settings.keep_truncated else sum(t.truncated for t in counts.heat), "truncated, which are not kept"),
        (counts.cut, "read up to the end of a reward model's context"),
        (counts.without, "prompts left out: no answer to keep"),
    ]
    console.say("; ".join(parts + [f"{n:,} {what}" for n, what in more if n]))
