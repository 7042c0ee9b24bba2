"""`llama2 distill`: context distillation (Llama 2, section 4.2.4). A teacher, the model under a template around the
prompt, answers; the student's record has the bare prompt.

Choices where the paper is silent (those of templates, of the gate and of the place of a preprompt are named in
text/templates.py and rlhf/distillation.py):
1. Every answer is scored as an answer to the bare prompt, for that is what the student will give.
2. Without a gate every answer that may be kept is kept; with one the best.
3. An answer that was cut is scored at its last token and counts in what is reported, but is not kept unless asked for.
   An answer in which --extract does not match is scored as a whole, and never kept.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llama2cli import console, provenance
from llama2cli.errors import DataError, Misuse
from llama2cli.measure.rates import percent, rate, sigmoid
from llama2cli.settings import Asking, Drawing, Filter, Served, flag
from llama2cli.text.chat import encode_conversation, of_models
from llama2cli.text.folders import resolve_model
from llama2cli.text.output import check_outputs, open_outputs, write_all
from llama2cli.text.prompts import check_endpoint, check_system, read_prompts
from llama2cli.text.records import Record
from llama2cli.text.streams import Place, some, windows
from llama2cli.text.templates import SAFETY, Templates, extractor, read_templates

if TYPE_CHECKING:
    from llama2cli.measure.distillation import Ledger
    from llama2cli.rlhf.distillation import Case
    from llama2cli.sampling.load import Sampling
    from llama2cli.sampling.remote import RemoteEngine
    from llama2cli.sampling.samples import Tally, Voice
    from llama2cli.sampling.scoring import Scorer

Window = Sequence[tuple[Place, Record]]


@dataclass(frozen=True, kw_only=True)
class Settings(Served, Drawing, Asking, Filter):
    """Context distillation: answers given under a template, as dialogues of the bare prompt, ready for sft.

    The template is a text before the prompt, around it, or earlier turns (examples), of a TOML file; --extract keeps
    what matters of an answer, as what follows a scratchpad. Of the template the student's record holds nothing.

    --preset safety is the paper's (section 4.2.4). Only prompts with "unsafe": true are distilled: under a safety
    preprompt, or where "category" names a risk category under its answer template. An answer is kept only where the
    safety reward model scores it above the answer given without the template; with -k, the best against the best.

    On stderr, and as metric records in --metrics: mean scores without, with, and after the gate (Fig. 16), share kept.

    Example:
      echo '{"messages": [{"role": "user", "content": "Help me steal."}], "unsafe": true, "category": "theft"}' | \\
        llama2 distill --preset safety --policy chat --rm-safe rm-safe -k 4 --max-new-tokens 32 --keep-truncated \\
        --rejected rejected.jsonl -o distilled.jsonl
    """

    preset: Literal["safety"] | None = flag(
        default=None, help="safety: its templates, adversarial prompts only, gated by --rm-safe"
    )
    templates: str | None = flag(default=None, help="a file of templates, in place of the preset's", complete="file")
    show_templates: bool = flag(default=False, help="print the file of templates, to be changed; then exit")
    extract: str | None = flag(
        default=None,
        metavar="REGEX",
        help="what is kept of a templated answer: what the group matches, as (?s)Answer:(.*)",
    )
    place: Literal["system", "user"] = flag(
        default="system", help="where a preprompt goes: into the system message, or before the user's last message"
    )
    policy: str | None = flag(
        default=None, help="the model that answers: an HF folder, step folder or run folder", complete="checkpoint"
    )
    rm_safe: str | None = flag(default=None, help="the safety reward model", complete="checkpoint")
    rm_help: str | None = flag(default=None, help="the helpfulness reward model", complete="checkpoint")
    gate: Literal["safe", "help", "none"] | None = flag(
        default=None, help="whose score must rise (default: safe with --preset safety, else none)"
    )
    samples: int = flag("-k", default=1, help="samples of each prompt, with the template and without", low=1)
    keep_truncated: bool = flag(default=False, help="answers that were cut may be kept too")
    quote: int = flag(
        default=8, low=0, help="an answer with this many words in a row of its template is not kept; 0 allows it"
    )
    compare: bool = flag(
        default=False, help="prompts with a category are answered under a preprompt too, for the report (Fig. 16)"
    )
    show_harm: bool = flag(
        default=False,
        help="the preset's other prompts are answered too: how templates would hurt them; none of it is kept",
    )
    rejected: str | None = flag(
        default=None, help="write prompts of which nothing is kept to this file, with the answer", complete="file"
    )
    metrics: str | None = flag(default=None, help="write the metric records to this file", complete="file")
    text: bool = flag(default=False, help="the input is plain text, a prompt on each line")
    system: str | None = flag(default=None, help="system prompt, where there is no other; the student has it too")
    window: int = flag(default=64, help="prompts that are answered at once; a killed command loses no more", low=1)

    @property
    def gated_by(self) -> str | None:
        """The field of the score that must rise."""
        gate = self.gate or ("safe" if self.preset == "safety" else "none")
        return None if gate == "none" else gate

    @property
    def rewarders(self) -> dict[str, str]:
        """The reward models by the field that they give."""
        return {name: path for name, path in (("safe", self.rm_safe), ("help", self.rm_help)) if path is not None}

    @property
    def judge(self) -> str | None:
        """The score whose gain is told: that of the gate, else one that there is."""
        return self.gated_by or next(iter(self.rewarders), None)


@dataclass
class Counts:
    """What is told at the end, over all processes of a run: it goes into the journal."""

    ledger: Ledger
    prompts: int = 0
    others: int = 0  # not adversarial, under the preset
    asked: int = 0  # distilled
    answered: int = 0  # of them, those of which something is kept
    kept: int = 0
    cut: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(cls, state: dict[str, Any] | None) -> Counts:
        """Nothing yet, or what an earlier process had counted."""
        from llama2cli.measure.distillation import Ledger

        if state is None:
            return cls(Ledger())
        return cls(**{**state, "ledger": Ledger.of_state(state["ledger"])})

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**vars(self), "ledger": self.ledger.state()}


class Models(NamedTuple):
    """Who answers, and the reward models by the field that they give; all are held together."""

    policy: Voice
    scorers: dict[str, Scorer]
    server: RemoteEngine | None


def run(settings: Settings) -> None:
    """Read prompts, answer them with and without their templates, keep what the gate lets through."""
    from llama2cli.sampling.samples import Tally

    # 1. what is asked: the first prompt is read, and the outputs opened, before a model is loaded
    if settings.show_templates:
        sys.stdout.write(Path(settings.templates or SAFETY).read_text(encoding="utf-8"))
        return
    check(settings)
    templates = read_templates(settings.templates or SAFETY)
    given = templates.extract if settings.extract is None else settings.extract
    pattern = extractor(given, "--extract" if settings.extract is not None else settings.templates)
    if settings.compare and not (templates.teachers and templates.categories):
        raise Misuse("there is nothing to compare: the templates want [[teachers]] and [[categories]]", "--compare")
    policy = settings.policy if settings.endpoint is None else settings.tokenizer
    folders = [*{resolve_model(path): None for path in settings.rewarders.values()}]
    folders += [resolve_model(policy or "")] if settings.endpoint is None else [Path(policy or "")]
    read = read_prompts(settings.files, text=settings.text, max_line=settings.max_line)
    prompts = some(read, settings.files, "prompts")
    sampling = settle(settings)
    inputs = [str(settings.templates or SAFETY), str(policy), *settings.rewarders.values()]
    if settings.provenance:
        provenance.write(settings.provenance, settings, [*settings.files, *inputs])
    beside = {"--rejected": settings.rejected}
    with open_outputs(settings, beside, sampling, paths=[*folders, inputs[0]]) as outputs:
        out, rejected = outputs.main, outputs.beside.get("--rejected")
        # 2. the models
        models = load(settings, sampling)
        counts, done = Counts.start(out.state), out.skip
        tally = Tally()
        # 3. the answers
        with models.server or nullcontext(), console.Progress("distill", unit="answers") as progress:
            for window in windows(out.rest(prompts), settings.window):
                cases = ask(window, models, templates, settings, counts, tally)
                sample(cases, models, pattern, settings, tally, progress)
                score(cases, models, settings, counts, progress)
                for case in cases:
                    kept = judge(case, settings, counts)
                    for record in kept:
                        out.write(record)
                    if rejected and case.distilled and not kept:
                        rejected.write(refused(case, settings))
                done += len(window)
                outputs.commit(done, counts.state())
            refuse_nothing(counts, settings)
            write_metrics(counts, settings)
    if models.server is not None:
        models.server.forget()  # the outputs are complete: the server's answers need not be kept beside them
    report(counts, tally, sampling, settings)


# --- what is asked ------------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raise Misuse for flags that do not go together."""
    safety = settings.preset == "safety"
    if not safety and settings.templates is None:
        raise Misuse("what shall the teacher see? give --templates FILE, or --preset safety")
    if settings.policy is None:
        raise Misuse("name the model that answers", "--policy")
    if (gate := settings.gated_by) is not None and gate not in settings.rewarders:
        none = ", or --gate none, which keeps every answer" if safety and settings.gate is None else ""
        raise Misuse(f"the gate compares its scores; name the reward model{none}", f"--rm-{gate}")
    if settings.show_harm and not safety:
        raise Misuse("without --preset safety every prompt is distilled, and there are no others", "--show-harm")
    if settings.show_harm and not settings.rewarders:
        raise Misuse("harm is a matter of scores; give --rm-help or --rm-safe", "--show-harm")
    if settings.compare and not settings.rewarders:
        raise Misuse("what is compared are scores; give --rm-safe or --rm-help", "--compare")
    if safety and settings.text:
        raise Misuse('lines of text have no tag "unsafe", and --preset safety distils no others', "--text")
    check_endpoint(settings.endpoint, settings.tokenizer)
    check_system(settings.system, settings.tags)
    outputs = (("--out", settings.out), ("--rejected", settings.rejected), ("--metrics", settings.metrics))
    check_outputs(outputs, [*settings.files, *([settings.templates] if settings.templates else [])])


def settle(settings: Settings) -> Sampling:
    """How answers are drawn. Raises Misuse for several that would all be the same."""
    from llama2cli.sampling.voices import drawn_as

    sampling = drawn_as(settings.policy or "", settings.endpoint, settings.temperature, settings.top_p)
    if sampling.temperature == 0 and settings.samples > 1:
        raise Misuse(f"greedy answers are all the same: {settings.samples} samples want a --temperature", "--samples")
    return sampling


def load(settings: Settings, sampling: Sampling) -> Models:
    """The policy and the reward models."""
    from llama2cli.sampling.voices import open_scorers, open_voice

    voice, server = open_voice(settings.policy or "", sampling, settings)
    compute = {"device": settings.device, "dtype": settings.dtype}
    return Models(voice, open_scorers(settings.rewarders, **compute, tokens=settings.batch_tokens), server)


def ask(
    window: Window, models: Models, templates: Templates, settings: Settings, counts: Counts, tally: Tally
) -> list[Case]:
    """The prompts of a window that are answered, with what each is put into. What is left out is counted."""
    from llama2cli.rlhf.distillation import Case, adversarial
    from llama2cli.sampling.samples import passed_on, with_system

    cases = []
    for place, record in window:
        counts.prompts += 1
        distilled = settings.preset != "safety" or adversarial(record)
        if not distilled:
            counts.others += 1
            if not settings.show_harm:
                continue
        record = with_system(record, settings.system)
        lessons = templates.lessons(record, settings.seed, compare=settings.compare, place=place)
        if not lessons:
            why = "there is no template for it"
            console.warn(f"{place.file}:{place.line}: left out: {why}", f"prompts left out: {why}")
            count_reason(counts, why, distilled)
            continue
        case = Case(place, passed_on(record, place), lessons, distilled)
        if not has_room(case, models, settings, tally):
            count_reason(counts, "fills a context", distilled)
            continue
        counts.asked += distilled
        cases.append(case)
    return cases


def count_reason(counts: Counts, reason: str, distilled: bool = True) -> None:
    """Count why nothing is kept of a prompt."""
    if distilled:
        counts.reasons[reason] = counts.reasons.get(reason, 0) + 1


def has_room(case: Case, models: Models, settings: Settings, tally: Tally) -> bool:
    """Whether the prompt, bare and in each template, leaves room in the contexts; else an error, or counted."""
    from llama2cli.rlhf.distillation import with_teacher
    from llama2cli.sampling.samples import fits

    voice, messages = models.policy, case.prompt["messages"]
    asked = [(messages, s.tokenizer, s.context, "the prompt") for s in models.scorers.values()]
    asked.append((messages, voice.tokenizer, voice.engine.context, "the prompt"))
    for lesson in case.lessons:
        taught = with_teacher(messages, lesson, settings.place)
        asked.append((taught, voice.tokenizer, voice.engine.context, "the prompt with its template"))
    for shown, tokenizer, context, what in asked:
        ids = encode_conversation(tokenizer, shown, tags=settings.tags, place=case.place).ids
        if not fits(ids, context, case.place, skip=settings.skip_long, tally=tally, what=what):
            return False
    return True


def refuse_nothing(counts: Counts, settings: Settings) -> None:
    """Raise DataError where no prompt was distilled."""
    where = ", ".join(settings.files) or "stdin"
    if counts.others == counts.prompts:
        why = 'no prompt has "unsafe": true, and --preset safety distils no others'
        raise DataError(f"{why} (--templates FILE without it distils all)", where)
    if not counts.asked:
        raise DataError("every prompt to distil was left out", where)


# --- answers and scores -------------------------------------------------------------------------------------------


def sample(
    cases: Sequence[Case],
    models: Models,
    pattern: re.Pattern[str] | None,
    settings: Settings,
    tally: Tally,
    progress: console.Progress,
) -> None:
    """Give each case its answers: without a template where there is a score to compare, and under each lesson."""
    from llama2cli.rlhf.distillation import with_teacher

    if models.scorers:
        plain = drawn([(c.place, c.prompt) for c in cases], models, settings, tally, progress)
        for case, samples in zip(cases, plain, strict=True):
            case.plain = samples
    asked = []
    for case in cases:
        for lesson in case.lessons:
            messages = with_teacher(case.prompt["messages"], lesson, settings.place)
            asked.append((case.place, {"messages": messages}))
    found = iter(drawn(asked, models, settings, tally, progress))
    for case in cases:
        for lesson in case.lessons:
            case.learn(lesson, next(found), pattern, keep_truncated=settings.keep_truncated, n=settings.quote)


def drawn(
    prompts: Window, models: Models, settings: Settings, tally: Tally, progress: console.Progress
) -> list[list[Record]]:
    """K Samples of each prompt."""
    from llama2cli.sampling.samples import sample_records
    from llama2cli.sampling.voices import ticker

    voice = models.policy
    found = sample_records(
        prompts,
        voice.engine,
        voice.tokenizer,
        k=settings.samples,
        temperature=voice.temperature,
        top_p=voice.top_p,
        seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
        policy=voice.policy,
        tags=settings.tags,
        tally=tally,
        tick=ticker(tally, progress),
    )
    return list(found)


def score(
    cases: Sequence[Case], models: Models, settings: Settings, counts: Counts, progress: console.Progress
) -> None:
    """Give every answer its logits, each as an answer to the bare prompt."""
    from llama2cli.sampling.judging import judge_answers

    groups = [(case.place, [*case.plain, *(s for taught in case.taught for s in taught)]) for case in cases]
    found, cut = judge_answers(models.scorers, groups, tags=of_models(settings.tags), progress=progress)
    counts.cut += cut
    k = settings.samples
    for case, by_model in zip(cases, found, strict=True):
        for name, logits in by_model.items():
            case.logits[name] = [logits[i : i + k] for i in range(0, len(logits), k)]


# --- what is kept -------------------------------------------------------------------------------------------------


def judge(case: Case, settings: Settings, counts: Counts) -> list[Record]:
    """The student's records of a case; none for one that is looked at only. All is counted."""
    chosen = case.let_through(settings.gated_by)
    count(case, chosen, settings, counts.ledger)
    if not case.distilled:
        return []
    if chosen:
        counts.answered += 1
        counts.kept += len(chosen)
    else:
        count_reason(counts, case.why(settings.judge))
    return [scored(case, i, settings) for i in chosen]


def scored(case: Case, i: int, settings: Settings) -> Record:
    """One of the first lesson's answers with its scores."""
    scores = {name: sigmoid(logits[1][i]) for name, logits in case.logits.items()}
    if (gate := settings.gated_by) is not None:
        plain, taught = case.logits[gate][:2]
        scores |= {"reward": taught[i], "plain_reward": max(plain)}
    return {**case.taught[0][i], **scores}


def refused(case: Case, settings: Settings) -> Record:
    """The record for --rejected: the answer that came closest, why it is not kept, and the best one without."""
    record = {**scored(case, case.shown(settings.judge), settings), "rejected": case.why(settings.judge)}
    if settings.judge is not None:
        plain = case.logits[settings.judge][0]
        record["plain"] = case.plain[plain.index(max(plain))]["messages"][-1]["content"]
    return record


# --- counting and telling -----------------------------------------------------------------------------------------


def count(case: Case, chosen: Sequence[int], settings: Settings, ledger: Ledger) -> None:
    """Add a case to the ledger: to Fig. 16, or to what would be done to prompts that are not adversarial."""
    from llama2cli.measure.distillation import Outcome, add_harm, add_outcome

    by, kinds = settings.judge, [lesson.kind for lesson in case.lessons]
    scores = {name: [[*map(sigmoid, of)] for of in logits] for name, logits in case.logits.items()}
    best = case.logits[by][0].index(max(case.logits[by][0])) if by else 0
    groups: dict[str, str] = {name: case.prompt[name] for name in ("category", "attack") if name in case.prompt}
    outcome = Outcome(scores, kinds, [*chosen], best, by, settings.gated_by is not None, groups)
    (add_outcome if case.distilled else add_harm)(ledger, outcome)


def write_metrics(counts: Counts, settings: Settings) -> None:
    """The metric records, where they are asked for."""
    from llama2cli.measure import distillation

    write_all(settings.metrics, distillation.records(counts.ledger), settings.files)


def report(counts: Counts, tally: Tally, sampling: Sampling, settings: Settings) -> None:
    """Tables and the closing lines on stderr."""
    from llama2cli.measure import distillation

    console.tables(distillation.tables(counts.ledger, [*settings.rewarders], settings.judge))
    console.say(tally.told(sampling.told(), settings.max_new_tokens))
    share = rate(counts.answered, counts.asked)
    answers = f", {counts.kept:,} answers" if settings.gated_by is None and settings.samples > 1 else ""
    parts = [f"{counts.asked:,} prompts distilled, {counts.answered:,} kept ({percent(share)}%){answers}"]
    left = " (looked at for --show-harm)" if settings.show_harm else ", left out"
    told = {
        "not above": f"rejected: not above the {'best ' if settings.samples > 1 else ''}answer without the template",
        "truncated": "truncated, which are not kept",
        "unmatched": "rejected: --extract does not match",
        "empty": "rejected: empty",
        "quotes the teacher": "rejected: they quote the template (--quote)",
    }
    parts += [f"{n:,} {told.get(reason, f'left out: {reason}')}" for reason, n in counts.reasons.items()]
    if counts.others:
        parts.append(f"{counts.others:,} are not adversarial{left}")
    if counts.cut:
        parts.append(f"{counts.cut:,} read up to the end of a reward model's context")
    if settings.show_harm and counts.others:
        passed, n = counts.ledger.share("harm.kept")
        parts.append(f"the gate would have let {passed:,} of {n:,} others through")
    console.say("; ".join(parts))
