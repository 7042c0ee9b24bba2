"""`llama2 gatt-synth`: dialogues for Ghost Attention (Llama 2, section 3.3 and appendix A.3.5).

Choices where the paper is silent, beside those at the top of `rlhf/gatt.py` and `sampling/turns.py`:
1. Every answer of a dialogue is sampled anew, so that those before the last obey as well: they are what it follows.
2. Half of the instructions are combinations. Temperature and top-p are those of a chat with the policy.
3. An answer that was cut at --max-new-tokens is context like any other, but is not trained unless asked for. An empty
   one never is.
4. A checker admits a record where all of its answers obey; a reward model where the trained one scores well. It reads
   the dialogue as the policy was shown it, with the instruction in every user message.
5. --rm-keep is a share of each window's records, carried over from window to window: all is never held at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from llama2cli import console, provenance
from llama2cli.errors import Misuse
from llama2cli.settings import Asking, Drawing, Filter, Served, flag
from llama2cli.text import constraints as lists
from llama2cli.text.chat import encode_dialogue, of_models
from llama2cli.text.folders import resolve_model
from llama2cli.text.formats import read_dialogues
from llama2cli.text.output import check_outputs, write_all
from llama2cli.text.prompts import check_endpoint
from llama2cli.text.records import Record, prompt_id
from llama2cli.text.streams import Place, open_output, some, windows

if TYPE_CHECKING:
    from llama2cli.measure.synthesis import Counts
    from llama2cli.rlhf.gatt import Drawn
    from llama2cli.sampling.load import Sampling
    from llama2cli.sampling.remote import RemoteEngine
    from llama2cli.sampling.samples import Tally, Voice
    from llama2cli.sampling.scoring import Scorer
    from llama2cli.sampling.turns import Rolled

Window = Sequence[tuple[Place, Record]]


@dataclass(frozen=True, kw_only=True)
class Settings(Served, Drawing, Asking, Filter):
    """Make dialogues for Ghost Attention: an instruction that stands in the first turn alone, and is obeyed in all.

    For each dialogue an instruction is drawn, one constraint or a combination, and put before every user message; the
    policy answers them turn by turn (answers of the input are replaced). Then the instruction is taken out of all turns
    but the first, shortened half of the time, and all answers but the last get weight 0: ready for sft.

    Constraints are records {"kind", "instruction", "short"?, "check"?} in a file, or lists that the policy is asked
    for. What a record has to obey stands in its field "gatt", with the form in which the instruction was kept.

    Example:
      llama2 gatt-synth examples/data/chat.jsonl --join 3 --constraints examples/data/constraints.jsonl --policy chat \\
        --max-new-tokens 16 --keep-truncated | llama2 sft --init chat --epochs 1 --batch-size 16 --lr 1e-3 -o gatt -
    """

    constraints: list[str] = flag(default=[], help="constraint records; may be repeated", complete="file")
    ask: list[str] = flag(
        default=[], metavar="KIND", help="ask the policy for a list: hobby, language or figure; may be repeated"
    )
    ask_lists: int = flag(default=4, help="lists that it is asked for, of each kind", low=1)
    asked: str | None = flag(default=None, help="write the constraints that it named to this file", complete="file")
    policy: str = flag(help="the model that answers: an HF folder, step folder or run folder", complete="checkpoint")
    samples: int = flag("-k", default=1, help="instructions for each dialogue, each with answers of its own", low=1)
    combine: float = flag(default=0.5, help="probability that an instruction is a combination", low=0, high=1)
    most: int = flag(default=3, help="constraints in a combination at most, each of another kind", low=2)
    shorten: float = flag(  # Llama 2, section 3.3: "half of the time"
        default=0.5, help="probability that the short forms are kept (Figure: Napoleon.)", low=0, high=1
    )
    place: Literal["first", "system"] = flag(
        default="first", help="where the instruction stays: in the first user message, or in the system message"
    )
    expand: bool = flag(default=False, help="of N turns make N records, each of which trains its own last answer")
    join: int | None = flag(
        default=None, low=2, metavar="N", help="join the user turns of dialogues that follow each other up to N turns"
    )
    turns: int | None = flag(default=None, low=1, help="turns of a dialogue at most (default: all)")
    min_turns: int = flag(default=1, low=1, help="leave out, and count, dialogues with fewer turns")
    turn_window: int | None = flag(
        default=None, low=1, help="show the policy the first and the last so many turns (default: all that fit)"
    )
    check: bool = flag(default=False, help="leave out records with an answer that breaks a constraint's check")
    rm: str | None = flag(default=None, help="a reward model, which leaves out answers", complete="checkpoint")
    rm_threshold: float | None = flag(
        default=None, low=0, high=1, help="with --rm: leave out what scores less, from 0 to 1"
    )
    rm_keep: float | None = flag(default=None, low=0, high=1, help="with --rm: the share of the best that is kept")
    keep_truncated: bool = flag(default=False, help="answers that were cut may be trained too, without an end")
    format: str = flag(default="auto", help="form of the records (auto: by their fields), as alpaca, sharegpt, oasst")
    skip_long: bool = flag(
        default=False, help="leave out, and count, dialogues whose first turn fills the context; else an error"
    )
    window: int = flag(default=64, help="dialogues that are answered at once; a killed command loses no more", low=1)


class Models(NamedTuple):
    """Who answers, and who judges."""

    policy: Voice
    scorer: Scorer | None
    server: RemoteEngine | None


class Plan(NamedTuple):
    """A dialogue to be answered: where it is from, what it is, and what it has to obey. sample: of its instructions."""

    place: Place
    record: Record
    drawn: Drawn
    sample: int


@dataclass
class Candidate:
    """A record that may be written: the dialogue up to turn `turn`, of `rolled`.

    obeyed: whether each of its answers holds against the checks of its constraints; None where those have none.
    """

    plan: Plan
    rolled: Rolled
    turn: int
    messages: list[Record]
    obeyed: list[bool] | None = None
    reward: float | None = None

    @property
    def truncated(self) -> bool:
        """Whether the trained answer was cut."""
        return self.rolled.truncated[self.turn - 1]


def run(settings: Settings) -> None:
    """Read dialogues, answer them window by window, write what is to be trained in their order."""
    from llama2cli.measure.synthesis import Counts, Kind
    from llama2cli.sampling.samples import Tally
    from llama2cli.sampling.voices import drawn_as

    # 1. what is asked: the first dialogue is read, and the output opened, before a model is loaded
    check(settings)
    answers = settings.policy if settings.endpoint is None else settings.tokenizer or ""
    folders = [resolve_model(answers) if settings.endpoint is None else Path(answers)]
    folders += [resolve_model(settings.rm)] if settings.rm is not None else []
    given = read_constraints(settings)
    sampling = drawn_as(settings.policy, settings.endpoint, settings.temperature, settings.top_p)
    dialogues = some(read(settings), settings.files, "dialogues")
    if settings.provenance:
        inputs = [*settings.files, *settings.constraints, answers, *([settings.rm] if settings.rm else [])]
        provenance.write(settings.provenance, settings, inputs)
    with open_output(settings, sampling, paths=[*folders, *settings.constraints]) as out:
        # 2. the models, and what they name when they are asked
        models = load(settings, sampling)
        state = out.state or {}
        counts, done, tally = Counts.start(state.get("counts")), out.skip, Tally()
        with models.server or nullcontext(), console.Progress("gatt-synth", unit="answers") as progress:
            named = state["named"] if "named" in state else ask(models.policy, settings)
            drawn_from = settle_constraints([*given, *named], settings)
            for kind in lists.kinds(drawn_from):
                counts.kinds.setdefault(kind, Kind())
            # 3. the dialogues
            for window in windows(out.rest(dialogues), settings.window):
                plans = plan(window, drawn_from, settings, counts)
                rolled = answer(plans, models.policy, settings, tally, progress)
                candidates = make(plans, rolled, models.policy, settings, counts)
                candidates = chosen(candidates, models.scorer, settings, counts)
                for record in records(candidates, models.policy, settings):
                    out.write(record)
                count(candidates, models.policy, settings, counts)
                done += len(window)
                out.commit(done, {"counts": counts.state(), "named": named})
            write_asked(named, settings)
    if models.server is not None:
        models.server.forget()  # the output is complete: the server's answers need not be kept beside it
    report(counts, tally, sampling, settings)


# --- what is asked ------------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raise Misuse for flags that do not go together."""
    if not settings.constraints and not settings.ask:
        raise Misuse("nothing to obey: give --constraints FILE, or --ask KIND to have the policy name some")
    if "-" in settings.constraints:
        raise Misuse("stdin is for the dialogues; give a file", "--constraints")
    for kind in settings.ask:
        if kind not in lists.ASKED:
            known = ", ".join(lists.ASKED)
            raise Misuse(f'expected one of {known}, got "{kind}"; others come from --constraints', "--ask")
    if settings.asked is not None and not settings.ask:
        raise Misuse("nothing is asked: give --ask KIND", "--asked")
    if settings.rm is None and (settings.rm_threshold is not None or settings.rm_keep is not None):
        raise Misuse("there is no reward model: give --rm", "--rm-threshold/--rm-keep")
    if settings.rm is not None and (settings.rm_threshold is None) == (settings.rm_keep is None):
        raise Misuse("what does it keep? give --rm-threshold or --rm-keep", "--rm")
    check_endpoint(settings.endpoint, settings.tokenizer)
    if settings.turns is not None and settings.turns < max(settings.min_turns, settings.join or 0):
        raise Misuse(f"{settings.turns} turns at most are fewer than --min-turns or --join ask for", "--turns")
    check_outputs((("--out", settings.out), ("--asked", settings.asked)), [*settings.files, *settings.constraints])


def read_constraints(settings: Settings) -> list[Record]:
    """The constraints of --constraints."""
    from llama2cli.measure.checkers import compile_check

    if not settings.constraints:
        return []
    return lists.read_constraints(settings.constraints, compile=compile_check, max_line=settings.max_line)


def read(settings: Settings) -> Iterator[tuple[Place, Record]]:
    """The dialogues without their answers, joined where that is asked for."""
    from llama2cli.sampling.turns import asked_turns, user_turns

    read = read_dialogues(settings.files, format=settings.format, keep_empty=True, max_line=settings.max_line)
    asked = asked_turns(read, settings.join)
    return ((place, {**r, "messages": user_turns(r["messages"], settings.turns)}) for place, r in asked)


def load(settings: Settings, sampling: Sampling) -> Models:
    """The policy and the reward model."""
    from llama2cli.sampling.voices import open_scorers, open_voice

    voice, server = open_voice(settings.policy, sampling, settings)
    compute = {"device": settings.device, "dtype": settings.dtype}
    rewarders = {} if settings.rm is None else {"rm": settings.rm}
    scorers = open_scorers(rewarders, **compute, tokens=settings.batch_tokens)
    return Models(voice, scorers.get("rm"), server)


def ask(policy: Voice, settings: Settings) -> list[Record]:
    """The constraints that the policy names, where it is asked."""
    from llama2cli.sampling.lists import ask

    most = settings.max_new_tokens
    return ask(policy, settings.ask, lists=settings.ask_lists, seed=settings.seed, max_new_tokens=most)


def settle_constraints(constraints: list[Record], settings: Settings) -> list[Record]:
    """The constraints to draw from, and a line about them. Raises Misuse for --check where none has a check."""
    of_kind = lists.kinds(constraints)
    notes = [f"{sum(of_kind.values()):,} ({', '.join(f'{kind} {n:,}' for kind, n in of_kind.items())})"]
    if settings.combine and len(of_kind) == 1:
        notes.append("all are of one kind: none are combined")
    without = sum("short" not in c for c in constraints)
    if settings.shorten and without:
        notes.append(f"{without:,} have no short form")
    unchecked = sum("check" not in c for c in constraints)
    if settings.check and unchecked == len(constraints):
        raise Misuse("no constraint has a check", "--check")
    if settings.check and unchecked:
        notes.append(f"{unchecked:,} have no check: --check leaves out nothing for them")
    console.say("; ".join([f"constraints: {notes[0]}", *notes[1:]]))
    return constraints


# --- answers ------------------------------------------------------------------------------------------------------


def plan(window: Window, constraints: list[Record], settings: Settings, counts: Counts) -> list[Plan]:
    """What each dialogue of a window has to obey; those with too few turns are left out."""
    from llama2cli.rlhf.gatt import draw

    plans = []
    for place, record in window:
        turns = sum(m["role"] == "user" for m in record["messages"])
        if turns < settings.min_turns:
            leave_out(place, f"it has {turns} of the {settings.min_turns} turns of --min-turns", "too few turns")
            counts.few += 1
            continue
        for sample in range(settings.samples):
            drawn = draw(
                constraints,
                seed=settings.seed,
                dialogue=prompt_id(record["messages"]),
                sample=sample,
                combined=settings.combine,
                most=settings.most,
                shortened=settings.shorten,
            )
            plans.append(Plan(place, record, drawn, sample))
    return plans


def leave_out(place: Place, why: str, kind: str) -> None:
    """Tell of a dialogue that gives nothing."""
    console.warn(f"{place.file}:{place.line}: left out: {why}", f"dialogues left out: {kind}")


def answer(
    plans: Sequence[Plan], policy: Voice, settings: Settings, tally: Tally, progress: console.Progress
) -> list[Rolled]:
    """The dialogues with the policy's answers, given with the instruction before every user message."""
    from llama2cli.rlhf.gatt import augment
    from llama2cli.sampling.turns import roll_out
    from llama2cli.sampling.voices import ticker

    return roll_out(
        [p.record["messages"] for p in plans],
        policy.engine,
        policy.tokenizer,
        temperature=policy.temperature,
        top_p=policy.top_p,
        seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
        view=lambda i, messages: augment(messages, plans[i].drawn.instruction),
        window=settings.turn_window,
        samples=[p.sample for p in plans],
        tags=settings.tags,
        places=[p.place for p in plans],
        skip_long=settings.skip_long,
        tally=tally,
        tick=ticker(tally, progress),
    )


def make(
    plans: Sequence[Plan], rolled: Sequence[Rolled], policy: Voice, settings: Settings, counts: Counts
) -> list[Candidate]:
    """What may be trained of the answered dialogues, each cut at a turn boundary to the context."""
    from llama2cli.rlhf.gatt import rewrite

    made = []
    for p, r in zip(plans, rolled, strict=True):
        counts.dialogues += 1
        counts.turns += r.turns
        counts.combined += len(p.drawn.constraints) > 1
        for c in p.drawn.constraints:
            counts.kinds[c["kind"]].drawn += 1
        dialogues = rewrite(r.messages, p.drawn.kept, place=settings.place, expand=True) if r.turns else []
        fitting = [Candidate(p, r, turn, messages) for turn, messages in enumerate(dialogues, 1)]
        while fitting and length(fitting[-1], policy, settings) > policy.engine.context:
            fitting.pop()
        if not fitting:
            counts.unanswered += 1
        elif len(fitting) < settings.min_turns:
            leave_out(p.place, f"{len(fitting)} of the {settings.min_turns} turns of --min-turns fit", "too few turns")
            counts.few += 1
        else:
            counts.cut += r.cut is not None or len(fitting) < r.turns
            made += fitting if settings.expand else fitting[-1:]
    return made


def length(candidate: Candidate, policy: Voice, settings: Settings) -> int:
    """The tokens of a record as sft will have them."""
    encoded = encode_dialogue(
        policy.tokenizer,
        candidate.messages,
        truncated=candidate.truncated,
        tags=of_models(settings.tags),
        place=candidate.plan.place,
    )
    return len(encoded.ids)


# --- which are kept -----------------------------------------------------------------------------------------------


def chosen(
    candidates: Sequence[Candidate], scorer: Scorer | None, settings: Settings, counts: Counts
) -> list[Candidate]:
    """The candidates that are written. Counted: those whose answer was cut, is empty, disobeys or scores badly."""
    observe(candidates, counts)
    kept = []
    for c in candidates:
        if c.truncated and not settings.keep_truncated:
            counts.truncated += 1
        elif not c.messages[-1]["content"].strip():
            counts.empty += 1
        elif settings.check and not all(c.obeyed or ()):
            counts.broken += 1
        else:
            kept.append(c)
    if scorer is None:
        return kept
    score(kept, scorer, settings, counts)
    good = rewarded(kept, settings, counts)
    counts.poor += len(kept) - len(good)
    return good


def observe(candidates: Sequence[Candidate], counts: Counts) -> None:
    """See which answers obey, and count those of each dialogue once."""
    from llama2cli.measure.checkers import compile_check

    for _, group in groupby(candidates, key=lambda c: id(c.rolled)):
        mine = list(group)
        answers = [m["content"] for m in mine[0].rolled.messages if m["role"] == "assistant"]
        held: list[list[bool]] = []  # of each constraint with a check
        for constraint in mine[0].plan.drawn.constraints:
            if "check" in constraint:
                obeys, kind = compile_check(constraint["check"]), counts.kinds[constraint["kind"]]
                held.append([obeys(text) for text in answers])
                kind.checked += len(answers)
                kind.obeyed += sum(held[-1])
        for c in mine:
            c.obeyed = [all(each) for each in zip(*held)][: c.turn] if held else None


def score(candidates: Sequence[Candidate], scorer: Scorer, settings: Settings, counts: Counts) -> None:
    """Give each candidate its reward: the score of the dialogue as the policy was shown it."""
    from llama2cli.rlhf.gatt import augment, prefixes
    from llama2cli.sampling.judging import score_recent

    shown = []
    for c in candidates:
        whole = list(prefixes(c.rolled.messages))[c.turn - 1]
        shown.append((c.plan.place, augment(whole, c.plan.drawn.instruction), c.truncated))
    found, forgot = score_recent(scorer, shown, tags=of_models(settings.tags))
    counts.forgot += forgot
    for c, reward in zip(candidates, found, strict=True):
        c.reward = reward


def rewarded(candidates: Sequence[Candidate], settings: Settings, counts: Counts) -> list[Candidate]:
    """The candidates whose reward is high enough, in their order."""
    from llama2cli.measure.rates import sigmoid
    from llama2cli.rlhf.gatt import best_share

    rewards = [c.reward or 0.0 for c in candidates]
    before = counts.scored
    counts.scored += len(candidates)
    if settings.rm_threshold is not None:
        return [c for c, reward in zip(candidates, rewards) if sigmoid(reward) >= settings.rm_threshold]
    return [candidates[i] for i in best_share(rewards, settings.rm_keep or 0.0, before)]


# --- records ------------------------------------------------------------------------------------------------------


def records(candidates: Sequence[Candidate], policy: Voice, settings: Settings) -> Iterator[Record]:
    """The records that are written: Samples, ready for sft."""
    from llama2cli.sampling.samples import as_sample

    for c in candidates:
        drawn = c.plan.drawn
        sample = as_sample(
            c.plan.record,
            c.plan.place,
            c.messages,
            sample=c.plan.sample,
            policy=policy.policy,
            temperature=policy.temperature,
            seed=settings.seed,
            n_tokens=c.rolled.n_tokens[c.turn - 1],
            truncated=c.truncated,
        )
        yield {
            **sample,
            **({} if c.reward is None else {"reward": c.reward}),
            "gatt": {
                "constraints": list(drawn.constraints),
                "instruction": drawn.instruction,
                "kept": drawn.kept,
                "shortened": drawn.shortened,
                "place": settings.place,
                "turn": c.turn,
                **({} if c.obeyed is None else {"obeyed": c.obeyed}),
            },
        }


def count(candidates: Sequence[Candidate], policy: Voice, settings: Settings, counts: Counts) -> None:
    """Count what was written, and what of it is trained."""
    from llama2cli.training import dialogues

    for c in candidates:
        drawn = c.plan.drawn
        counts.kept += 1
        counts.shortened += drawn.shortened
        for constraint in drawn.constraints:
            kind = counts.kinds[constraint["kind"]]
            kind.kept += 1
            kind.shortened += drawn.shortened and "short" in constraint
    written = [(c.plan.place, {"messages": c.messages, "truncated": c.truncated}) for c in candidates]
    masks = dialogues.add(
        dialogues.Dialogues(),
        policy.tokenizer,
        written,
        context=policy.engine.context,
        tags=of_models(settings.tags),
        long="cut",
    )
    for name, value in vars(masks).items():
        counts.masks[name] = counts.masks.get(name, 0) + value


def write_asked(named: Sequence[Record], settings: Settings) -> None:
    """The constraints that the policy named, where they are asked for."""
    write_all(settings.asked, named, [*settings.files, *settings.constraints])


# --- telling ------------------------------------------------------------------------------------------------------


def report(counts: Counts, tally: Tally, sampling: Sampling, settings: Settings) -> None:
    """Tables and the closing lines on stderr."""
    from llama2cli.training.dialogues import Report

    console.tables([counts.table()])
    console.say("")
    Report(**counts.masks).show()
    console.say(tally.told(sampling.told(), settings.max_new_tokens))
    console.say(counts.told(settings.min_turns))
    if not counts.kept:
        console.warn("no record was written")
