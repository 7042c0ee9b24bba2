"""`llama2 ppo`: proximal policy optimization by the recipe of section 3.2.3.

Choices that the paper leaves open, beside those at the top of `rlhf/ppo.py`:
1. The value model is a model of its own that starts as the helpfulness reward model, head and all; it learns at three
   times the policy's rate. --value head puts a head on the policy's trunk, which starts as 0.
2. Answers are drawn at temperature 1, at most 512 tokens, never with top-k or top-p: policy and reference are compared
   under the distribution that was drawn from. Log-probabilities are kept from sampling where the arithmetic is fp32;
   in bf16 one forward pass gives them anew, as rounding differs.
3. Reward models read the canonical dialogue, as `score` does; an answer that was cut is read at its last token.
4. At most 400 iterations (the paper: 200 to 400); the run ends before where --patience held-out measurements one after
   another were no better than the best, as --judge says, or without it the reward.
5. A mini-batch's loss is a mean over its tokens. The policy's update comes before the value model's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llama2cli import console
from llama2cli.errors import DataError, Interrupted, Misuse
from llama2cli.measure.rates import sigmoid
from llama2cli.settings import Training, flag
from llama2cli.text.chat import TEMPLATE, encode_conversation
from llama2cli.text.folders import resolve_model
from llama2cli.text.records import Record
from llama2cli.text.streams import Place, read_records

if TYPE_CHECKING:
    from torch import Tensor

    from llama2cli.nn.config import ModelConfig
    from llama2cli.nn.model import Llama
    from llama2cli.nn.roles import Held
    from llama2cli.rlhf.credit import Terms
    from llama2cli.rlhf.ppo import Moments
    from llama2cli.sampling.engine import Result
    from llama2cli.sampling.scoring import Scorer
    from llama2cli.training.answers import Answers, Read, Rows
    from llama2cli.training.corpus import Named
    from llama2cli.training.dist import World
    from llama2cli.training.examples import Order, Part, Ragged
    from llama2cli.training.roles import Learner
    from llama2cli.training.run import Run
    from llama2cli.training.signals import Stop
    from llama2cli.training.state import State
    from llama2cli.training.tuning import Start


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """Train a chat model against reward models with PPO: the paper's last stage, on top of rejection sampling.

    Each iteration samples an answer to every prompt of a batch, scores it with both reward models (the safety model's
    score where the prompt has "unsafe": true or "safe" is below 0.15, else the helpfulness model's), whitens that,
    subtracts the KL to the initial policy, and updates policy and value model. The defaults are the paper's (section
    3.2.3). With --heldout the reward on other prompts is measured, the best step kept, and the run ended early.

    metrics.jsonl has the reward, raw and by model, the KL that is trained, entropy, clip fraction, explained variance,
    length and truncated share of every iteration; timing.jsonl the seconds of rollout, scoring and update. Alarms tell
    of length drift, a policy far from where it began, and a reward that rises while --judge falls.

    Prints one JSON record: {"checkpoint", "step", "reward", ...}.

    Example:
      llama2 ppo --policy run --rm-help rm-help --rm-safe rm-safe --prompts examples/data/chat.jsonl --steps 2 \\
        --batch-size 8 --mini-batch 4 --max-new-tokens 16 --lr 1e-5 -o ppo --resume
    """

    files: list[str] = flag(positional=True, default=[], help="prompts; '-' is stdin", complete="file")
    prompts: list[str] = flag(
        default=[],
        metavar="[NAME=]FILE[:WEIGHT]",
        help="prompts, and how often an epoch reads them (1 when not given)",
        complete="file",
    )
    policy: str = flag(help="the chat model to start from, which is also the one to stay near", complete="checkpoint")
    rm_help: str | None = flag(default=None, help="the helpfulness reward model", complete="checkpoint")
    rm_safe: str | None = flag(default=None, help="the safety reward model", complete="checkpoint")
    judge: str | None = flag(
        default=None, help="a reward model that only judges held-out answers, against gaming", complete="checkpoint"
    )
    heldout: list[str] = flag(
        default=[],
        metavar="FRACTION|[NAME=]FILE",
        help="share of each source's prompts, or prompts, that are not trained on but measured",
        complete="file",
    )
    system: str | None = flag(default=None, help="system prompt, where there is no other")
    tags: Literal["refuse", "escape", "keep"] = flag(
        default="refuse", help="what to do with tags of the chat format, as [INST], in prompts"
    )
    skip_long: bool = flag(default=False, help="leave out, and count, prompts that fill a context; else an error")
    context: int | None = flag(default=None, low=2, help="longest dialogue in tokens (default: the model's context)")
    max_new_tokens: int = flag(default=512, low=1, help="tokens of an answer at most")
    temperature: float = flag(default=1.0, low=0.01, help="of the answers, and of all log-probabilities")
    rollout_rows: int = flag(default=64, low=1, help="answers that a process writes at the same time")

    steps: int | None = flag(default=None, low=1, help="iterations (default: 400)")
    batch_size: int = flag(default=512, low=1, help="prompts of an iteration")  # Llama 2, section 3.2.3, as the next
    mini_batch: int = flag(default=64, low=1, help="answers of an optimizer step")
    ppo_epochs: int = flag(default=1, low=1, help="passes over the answers of an iteration")
    clip_ratio: float = flag(default=0.2, low=0, help="PPO's clip of the ratio of new to old probability")
    beta: float | None = flag(default=None, low=0, help="weight of the KL (default: 0.01; above 20B parameters 0.005)")
    lr: float = flag(default=1e-6, low=0, help="the policy's learning rate, constant")
    warmup: int | None = flag(default=0, low=0, help="iterations of warm-up")
    final_lr: float = flag(default=1.0, low=0, high=1, help="where a cosine ends, as a share of the rate (1: constant)")

    kl: Literal["k1", "k2", "k3", "exact"] = flag(
        default="k1", help="the KL that is paid: an estimator from the sampled token, or of whole distributions"
    )
    kl_per: Literal["token", "answer"] = flag(default="token", help="where it is paid: at each token, or at the last")
    whiten: Literal["batch", "running", "none"] = flag(
        default="batch", help="rewards have mean 0 and variance 1 over this batch, over all so far, or are left alone"
    )
    whiten_mean: bool = flag(
        rename="--whiten-mean/--no-whiten-mean", default=True, help="whitening shifts the mean to 0 too"
    )
    whiten_advantages: bool = flag(
        rename="--whiten-advantages/--no-whiten-advantages", default=False, help="over all tokens of a batch"
    )
    reward_clip: float = flag(default=0.0, low=0, help="bound of a whitened reward; 0 for none")
    cut_penalty: float = flag(default=0.0, low=0, help="taken from the whitened reward of an answer that was cut")
    gamma: float = flag(default=1.0, low=0, high=1, help="discount of later rewards")
    lam: float = flag(default=0.95, low=0, high=1, help="GAE's lambda")

    value: Literal["separate", "head"] = flag(
        default="separate", help="a value model of its own, or a head on the policy's trunk"
    )
    value_init: str | None = flag(
        default=None,
        metavar="help|safe|policy|MODEL",
        help="where a value model starts (default: help; without it safe)",
        complete="checkpoint",
    )
    value_lr: float | None = flag(default=None, low=0, help="its learning rate (default: 3 times --lr)")
    value_weight: float = flag(default=0.1, low=0, help="weight of its loss on a shared trunk")
    value_clip: float | None = flag(default=None, low=0, help="how far a value counts as moved (default: no clip)")
    old_logprobs: Literal["auto", "sampled", "recomputed"] = flag(
        default="auto", help="kept from sampling, or from a forward pass; auto: kept in fp32"
    )

    frozen_dtype: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        default="auto", help="type of the reference and the reward models (auto: bf16 on CUDA, fp32 on CPU)"
    )
    offload: bool = flag(default=False, help="they rest in host memory between their turns")
    patience: int = flag(
        default=5, low=0, help="held-out measurements without a better one that end the run; 0 never does"
    )
    alarm_kl: float = flag(default=10.0, low=0, help="KL of an answer, in nats, that raises an alarm")
    alarm_length: float = flag(default=2.0, low=1, help="how many times longer or shorter answers may become")


STEPS = 400  # Llama 2, section 3.2.3: between 200 and 400 iterations
COLUMNS = ("reward", "help", "safe", "by_safety", "judge", "length", "cut", "kl")  # what is known of each answer
UPDATE = 0x50504F  # tells the shuffle of mini-batches from others
VALUE, HELD_ANSWERS = "value", "heldout.jsonl"  # in a step folder: the value model; held-out answers with their scores
HELDOUT_INDEX = -1  # random numbers of held-out answers: the same at every measurement, and none that training draws


def run(settings: Settings) -> dict[str, Any] | None:
    """Train; return the record of the last step."""
    from llama2cli.training import dist
    from llama2cli.training.signals import stop_requests

    check(settings)
    with stop_requests() as stop, dist.world(settings.device) as world:
        job = prepare(settings, world)
        held = memory(job)
        if settings.dry_run:
            return dry_run(job, held)
        return train(job, held, stop)


# --- 1. what is asked for ------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raise Misuse for settings that contradict each other, or that would do nothing."""
    from llama2cli.training import session

    session.check(settings, heldout=bool(settings.heldout), epochs=None)
    if settings.rm_help is None and settings.rm_safe is None:
        raise Misuse("nothing to learn from: give --rm-help, --rm-safe or both")
    if settings.judge is not None and not settings.heldout:
        raise Misuse("judges held-out answers; give --heldout", "--judge")
    if settings.mini_batch > settings.batch_size:
        n, batch = settings.mini_batch, settings.batch_size
        raise Misuse(f"is {n}, and an iteration has {batch} answers; give both", "--mini-batch")
    if settings.value == "head":
        for name, given in (("--value-init", settings.value_init), ("--value-lr", settings.value_lr)):
            if given is not None:
                raise Misuse("has no meaning with --value head: it starts as 0 and learns with the trunk", name)
    for name, wanted in (("help", settings.rm_help), ("safe", settings.rm_safe)):
        if settings.value_init == name and wanted is None:
            raise Misuse(f"is {name}, and there is no --rm-{name}", "--value-init")


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts as ids, and as records. groups: of each, for the split."""

    ids: Ragged
    records: list[Record] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """A run before any weight exists.

    scorers: folders of the reward models by what they give (help, safe, judge). value: the folder that a value model
    starts from, None for a head on the trunk. heldout: prompts that are measured.
    """

    settings: Settings
    world: World
    start: Start
    scorers: dict[str, Path]
    value: Path | None
    value_config: ModelConfig | None
    prompts: Prompts
    order: Order
    heldout: list[int]
    terms: Terms
    resolved: dict[str, Any]
    inputs: list[str]
    notes: list[str]
    rows: Rows

    @property
    def frozen_dtype(self) -> str:
        """Of the reference and the reward models."""
        chosen = self.settings.frozen_dtype
        return ("bf16" if self.world.device.type == "cuda" else "fp32") if chosen == "auto" else chosen

    @property
    def sampled_logprobs(self) -> bool:
        """Whether the log-probabilities of sampling are those that the ratio starts from."""
        chosen = self.settings.old_logprobs
        return self.resolved["dtype"] == "fp32" if chosen == "auto" else chosen == "sampled"


def prepare(settings: Settings, world: World) -> Job:
    """Read and encode the prompts, set some apart, settle what the settings come to. Reads no weights."""
    from llama2cli import provenance
    from llama2cli.nn import budget
    from llama2cli.rlhf import ppo
    from llama2cli.rlhf.credit import Terms
    from llama2cli.training import answers, examples, tuning

    # the models
    start = tuning.start_from(settings.policy, settings.context)
    given = {"help": settings.rm_help, "safe": settings.rm_safe, "judge": settings.judge}
    scorers = {name: resolve_model(path) for name, path in given.items() if path is not None}
    value, value_config = value_model(settings, scorers, start)

    # the prompts
    named = examples.parse_sources([*settings.files, *settings.prompts], world.size)
    prompts = Prompts(examples.Ragged())

    def read_more(sources: Sequence[Named]) -> list[Part]:
        return read(settings, sources, prompts, start, scorers)

    split = tuning.set_apart(settings.heldout, read_more(named), prompts.groups, read_more, "prompts")
    examples.check_some(split.parts, "prompt")
    order = examples.Order(split.parts, settings.seed)

    # the length of the run, and what trains
    steps = settings.steps or STEPS
    seen = steps * settings.batch_size
    length = tuning.Length(None, steps, seen / order.count(0), max(1, steps // 20), [])
    beta = ppo.beta(budget.n_params(start.config)) if settings.beta is None else settings.beta
    terms = Terms(
        beta=beta,
        estimator=settings.kl,
        per=settings.kl_per,
        whiten=settings.whiten,
        shift_mean=settings.whiten_mean,
        reward_clip=settings.reward_clip,
        cut_penalty=settings.cut_penalty,
        gamma=settings.gamma,
        lam=settings.lam,
        whiten_advantages=settings.whiten_advantages,
    )
    plain = ["system", "tags", "max_new_tokens", "temperature", "rollout_rows", "mini_batch", "ppo_epochs"]
    plain += ["clip_ratio", "value", "value_weight", "value_clip", "old_logprobs", "frozen_dtype", "patience"]
    resolved = {
        **{name: getattr(settings, name) for name in plain},
        **dataclasses.asdict(terms),
        "value_lr": 3 * settings.lr if settings.value_lr is None else settings.value_lr,
        "value_init": None if value is None else provenance.fingerprint(value),
        "reward_models": {name: provenance.fingerprint(folder) for name, folder in scorers.items()},
        **tuning.resolve(
            settings,
            world,
            start,
            split,
            length,
            lr=settings.lr,
            batch_size=settings.batch_size,
            digest=lambda part: digest(prompts, part),
            eval_every=length.eval_every,
        ),
    }
    if settings.save_every is None:
        resolved["save_every"] = resolved["eval_every"]
    paths = [*(n.path for n in named), *split.paths, str(start.folder), *map(str, scorers.values())]
    return Job(
        settings=settings,
        world=world,
        start=start,
        scorers=scorers,
        value=value,
        value_config=value_config,
        prompts=prompts,
        order=order,
        heldout=[int(i) for p in split.heldout for i in p.index],
        terms=terms,
        resolved=resolved,
        inputs=list(dict.fromkeys(paths + ([] if value is None else [str(value)]))),
        notes=[*split.notes, *start.notes],
        rows=answers.Rows(2 * start.context, resolved["micro_tokens"], world),
    )


def value_model(
    settings: Settings, scorers: Mapping[str, Path], start: Start
) -> tuple[Path | None, ModelConfig | None]:
    """The folder that the value model starts from, and its shape. It reads the policy's ids: one tokenizer for both."""
    from llama2cli.nn import checkpoint
    from llama2cli.text.tokenizer import Tokenizer

    if settings.value == "head":
        return None, None
    wanted = settings.value_init or ("help" if "help" in scorers else "safe")
    known = {"help": scorers.get("help"), "safe": scorers.get("safe"), "policy": start.folder}
    folder = known.get(wanted) or resolve_model(wanted)
    config = checkpoint.load_config(folder, None)
    if Tokenizer.load(folder).sha256 != start.tokenizer.sha256:
        fix = "start it from the policy or from another model"
        raise Misuse(f"{folder} has another tokenizer than the policy, whose ids it is to read; {fix}", "--value-init")
    longest = max(config.max_position_embeddings, start.config.max_position_embeddings)
    return folder, dataclasses.replace(config, max_position_embeddings=longest)


def read(
    settings: Settings, named: Sequence[Named], prompts: Prompts, start: Start, scorers: Mapping[str, Path]
) -> list[Part]:
    """Read files into the store: a part for each. A prompt that leaves no room for an answer in a context is an error."""
    from llama2cli.nn import checkpoint
    from llama2cli.sampling.samples import Tally, fits, with_system
    from llama2cli.text.tokenizer import Tokenizer
    from llama2cli.training import examples

    readers = {start.tokenizer.sha256: (start.tokenizer, start.context)}  # by tokenizer, the shortest context
    for folder in scorers.values():
        tokenizer, context = Tokenizer.load(folder), checkpoint.load_config(folder, None).max_position_embeddings
        other, shortest = readers.get(tokenizer.sha256, (tokenizer, context))
        readers[tokenizer.sha256] = other, min(shortest, context)
    tally, parts = Tally(), []
    for source in named:
        before = len(prompts.ids)
        for place, plain in read_records([source.path], "prompt"):
            record = with_system(plain, settings.system)
            found = [
                (encode_conversation(tokenizer, record["messages"], tags=settings.tags, place=place).ids, context)
                for tokenizer, context in readers.values()
            ]
            if all(fits(ids, context, place, skip=settings.skip_long, tally=tally) for ids, context in found):
                prompts.ids.add(found[0][0])
                prompts.records.append(record)
                prompts.places.append(place)
                prompts.groups.append(examples.group_of(record["messages"]))
        if len(prompts.ids) == before:
            raise DataError("holds no prompt to answer", source.path)
        parts.append(examples.part(source, before, len(prompts.ids)))
    return parts


def digest(prompts: Prompts, part: Part) -> str:
    """A hash of the ids and tags of a part."""
    from hashlib import sha256

    told = sha256()
    for i in part.index:
        unsafe = bool(prompts.records[i].get("unsafe"))
        told.update(bytes([unsafe]) + len(prompts.ids[i]).to_bytes(8) + prompts.ids[i].tobytes())
    return told.hexdigest()


# --- 2. before it trains ------------------------------------------------------------------------------------------


def memory(job: Job) -> Held:
    """What the roles hold. Raises Misuse where the device has not as much, with the arithmetic."""
    from llama2cli.nn import budget, checkpoint
    from llama2cli.nn.roles import Frozen, ppo_memory
    from llama2cli.sampling.engine import CACHE_BYTES

    settings, config, world = job.settings, job.start.config, job.world
    number = 4 if job.frozen_dtype == "fp32" else 2
    frozen = {"reference": Frozen(config, False, number)}
    for folder in dict.fromkeys(job.scorers.values()):
        role = " and ".join(name for name, other in job.scorers.items() if other == folder)
        frozen[f"reward model ({role})"] = Frozen(checkpoint.load_config(folder, None), True, number)
    longest = max((len(job.prompts.ids[i]) for i in range(len(job.prompts.ids))), default=0)
    size = min(job.start.context, longest + settings.max_new_tokens)
    compute = 4 if job.resolved["dtype"] == "fp32" else 2
    rows = min(settings.rollout_rows, settings.batch_size)
    held = ppo_memory(
        config,
        job.value_config,
        frozen,
        tokens=job.resolved["micro_tokens"],
        cache_bytes=min(CACHE_BYTES, budget.kv_cache_bytes(config, rows * size, compute_bytes=compute)),
        gpus=world.size,
        compute_bytes=compute,
        offload=settings.offload,
        checkpointing=settings.activation_checkpointing,
    )
    there = available(world)
    if held.peak > there and not settings.dry_run:
        roles = ", ".join(f"{name} {v / 1e9:.3g}" for name, v in held.roles.items())
        phase = max(held.phases, key=held.phases.__getitem__)
        fix = "try --offload, --value head, --activation-checkpointing, fewer --micro-tokens, more processes"
        need = f"{phase} would hold {held.peak / 1e9:.3g} GB of {there / 1e9:.3g}"
        raise Misuse(f"does not fit a device: {need} (GB: {roles}); {fix}", job.settings.policy)
    return held


def available(world: World) -> float:
    """Bytes that this process may hold: the device's memory, or its share of what the machine has free."""
    import torch

    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / world.size
    return math.inf


def show_memory(job: Job, held: Held) -> None:
    """The roles and the worst moment of each phase, for a person."""
    rows = [(name, f"{v / 1e9:.3g}") for name, v in held.roles.items() if v]
    if job.value is None:
        rows.insert(1, ("value head", "on the policy's trunk"))
    rows += [(f"at once: {name}", f"{v / 1e9:.3g}") for name, v in held.phases.items()]
    console.table(f"memory of a device, of {available(job.world) / 1e9:.3g} GB", ["role", "GB"], rows)


def dry_run(job: Job, held: Held) -> dict[str, Any]:
    """What the run would be and need; shown to a person too."""
    rows = [(k, v) for k, v in job.resolved.items() if not isinstance(v, (list, dict))]
    console.table("settings", ["", ""], rows)
    data = [(p.name, f"{len(p.index):,}", f"{p.weight:g}") for p in job.order.parts]
    data += [("held out", f"{len(job.heldout):,}", "")] if job.heldout else []
    console.table("data", ["source", "prompts", "weight"], data)
    show_memory(job, held)
    told = {"roles": held.roles, "phases": held.phases}
    return {"dry_run": True, "resolved": job.resolved, "memory": {**told, "peak": held.peak}}


# --- 3. the models ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Roles:
    """All models of a run. value: None where the value is a head on the policy's trunk."""

    policy: Learner
    value: Learner | None
    reference: Read
    scorers: dict[str, Scorer]

    @property
    def judges(self) -> list[Llama]:
        """The reward models, each once."""
        return list({id(s.model): s.model for s in self.scorers.values()}.values())


def load(job: Job, step_folder: Path | None) -> Roles:
    """Make the models, and put back what a saved step has of them."""
    from llama2cli.nn import checkpoint
    from llama2cli.rlhf import credit
    from llama2cli.training import optim, roles, state
    from llama2cli.training.answers import Read
    from llama2cli.training.build import build

    settings, resolved, world, start = job.settings, job.resolved, job.world, job.start
    clip, value_clip, heat = settings.clip_ratio, settings.value_clip, settings.temperature

    def learner(config: ModelConfig, weights: Path, lr: float, make: Callable[..., Read], **kind: bool) -> Learner:
        model, loss = build(
            config,
            world,
            objective=make,
            weights=weights,
            seed=settings.seed,
            dtype=checkpoint.DTYPES[resolved["dtype"]],
            checkpointing=settings.activation_checkpointing,
            compile=settings.compile,
            **kind,
        )
        named = model.named_parameters()
        optimizer = optim.adamw(named, lr=lr, weight_decay=settings.weight_decay, decay=settings.decay)
        schedule = optim.Schedule(lr, resolved["warmup"], resolved["steps"], settings.final_lr)
        return roles.Learner(model, loss, optimizer, schedule)

    trunk = job.value is None
    sums = credit.joint_sums(clip, value_clip, settings.value_weight) if trunk else credit.policy_sums(clip)
    policy = learner(
        start.config,
        step_folder or start.folder,
        resolved["lr"],
        lambda model: Read(model, sums, temperature=heat),
        value_head=trunk,
    )
    value = None
    if job.value is not None and job.value_config is not None:
        value = learner(
            job.value_config,
            step_folder / VALUE if step_folder else job.value,
            resolved["value_lr"],
            lambda model: Read(model, credit.value_sums(value_clip)),
            scorer=True,
        )
    if step_folder is not None:
        rest = state.restore(step_folder, policy.named, policy.optimizer, world)
        if value is None:
            roles.load_value_head(step_folder, policy.model)
        else:
            place = state.rank_file(step_folder, world.rank)
            state.put_back(place, rest, value.named, value.optimizer, f"{VALUE}.")
    reference = checkpoint.load_model(
        start.folder, dtype=job.frozen_dtype, device="cpu" if settings.offload else world.device
    )
    reference.config = start.config  # whose context may be longer
    return Roles(policy, value, Read(reference, temperature=heat), load_scorers(job))


def load_scorers(job: Job) -> dict[str, Scorer]:
    """The reward models by what they give; a folder that is named twice is loaded once."""
    from llama2cli.sampling.scoring import Scorer

    held: dict[Path, Scorer] = {}
    for folder in job.scorers.values():
        if folder not in held:
            held[folder] = Scorer.load(str(folder), device=job.world.device.type, dtype=job.frozen_dtype)
            if job.settings.offload:
                held[folder].model.to("cpu")
    return {name: held[folder] for name, folder in job.scorers.items()}


# --- 4. rollout and scoring ---------------------------------------------------------------------------------------


class Abandoned(Exception):
    """A signal came while answers were sampled or scored: no weight has moved, the iteration is given up."""


@dataclass(eq=False)
class Rollout:
    """The answers of this rank: which of the iteration's they are, as text, and of their tokens log-probability and KL.

    table: what is known of the answers of all ranks, by COLUMNS, fp64 [answers].
    """

    mine: list[int]
    answers: Answers
    texts: list[str]
    logprobs_M: Tensor
    kl_M: Tensor
    table: dict[str, Tensor]


def roll_out(
    job: Job,
    roles: Roles,
    chosen: Sequence[int],
    indices: Sequence[int],
    seconds: dict[str, float],
    stop: Stop,
    *,
    judge: bool = False,
) -> Rollout:
    """Sample an answer to each chosen prompt and score it; each rank has every n-th of them.

    indices: which samples they are, so that no random number is used twice. judge: ask it too. Raises Abandoned.
    """
    import torch

    from llama2cli.rlhf import credit
    from llama2cli.sampling.judging import score_answers
    from llama2cli.sampling.samples import answer_text

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
        logprobs_M = torch.tensor([x for r in results for x in r.sampled_logprobs])
        with at_work(job, [roles.reference]):
            ref_M = job.rows.read(roles.reference, answers, torch.float32, k=2)[0]
        kl_M = credit.kl(job.terms, logprobs_M, ref_M, exact_M)
        tags: Literal["keep", "escape"] = "keep" if settings.tags == "keep" else "escape"
        texts = [answer_text(r, job.start.tokenizer, tags)[0] for r in results]
        cut = [r.truncated for r in results]
        logits: dict[str, list[float]] = {}
        with at_work(job, roles.judges):
            for name, scorer in roles.scorers.items():
                if name != "judge" or judge:
                    logits[name] = score_answers(scorer, records, texts, cut, places, tags=tags, tick=tick)
        lengths = [len(r.ids) for r in results]
        columns = rewards(logits, [bool(r.get("unsafe")) for r in records])
        columns |= {"length": list(map(float, lengths)), "cut": list(map(float, cut))}
        columns["kl"] = [float(part.sum()) for part in kl_M.split(lengths)]
        table = everyones(world, columns, mine, len(chosen))
    return Rollout(mine, answers, texts, logprobs_M, kl_M, table)


def sample(
    job: Job, roles: Roles, prompts: list[list[int]], indices: Sequence[int], tick: Callable[[object], None]
) -> tuple[Answers, list[Result], Tensor | None]:
    """Answers to prompts of this rank, and where it is asked for the exact KL of each token.

    The policy's weights are brought together for the time of it, and given free.
    """
    import torch

    from llama2cli.nn import checkpoint
    from llama2cli.sampling.engine import Engine
    from llama2cli.sampling.sampler import SampleParams
    from llama2cli.training.answers import Answers, Read, exact_kl
    from llama2cli.training.roles import consolidated

    settings, context = job.settings, job.start.context
    whole = consolidated(roles.policy.model, checkpoint.DTYPES[job.resolved["dtype"]], job.world)
    engine = Engine(whole, job.start.tokenizer, rows=settings.rollout_rows)
    params = [
        SampleParams(min(settings.max_new_tokens, context - len(p)), settings.temperature, 1.0, settings.seed, i)
        for p, i in zip(prompts, indices)
    ]
    results = engine.generate(prompts, params, logprobs=True, tick=tick)
    answers = Answers(prompts, [r.ids for r in results])
    if settings.kl != "exact":
        return answers, results, None
    with at_work(job, [roles.reference]):
        read = exact_kl(Read(whole, temperature=settings.temperature), roles.reference)
        return answers, results, job.rows.read(read, answers, torch.float32)[0]


def rewards(logits: Mapping[str, list[float]], unsafe: list[bool]) -> dict[str, list[float]]:
    """Columns of answers from the logits of reward models: the piecewise reward, or the score of the one model."""
    import torch

    from llama2cli.rlhf.rewards import by_safety, piecewise

    columns = {name: list(map(sigmoid, logits[name])) for name in ("help", "safe") if name in logits}
    if len(columns) == 2:
        help_N, safe_N = (torch.tensor(logits[name], dtype=torch.float64) for name in columns)
        tags_N = torch.tensor(unsafe, dtype=torch.bool)
        columns["reward"] = piecewise(help_N, safe_N, tags_N).tolist()
        columns["by_safety"] = by_safety(safe_N, tags_N).double().tolist()
    else:
        columns["reward"] = logits[next(iter(columns))]
    return columns | ({"judge": logits["judge"]} if "judge" in logits else {})


def everyones(world: World, columns: Mapping[str, list[float]], mine: Sequence[int], n: int) -> dict[str, Tensor]:
    """The columns of all ranks' answers, the same on every rank. mine: which of the n are this rank's."""
    import torch

    from llama2cli.training import dist

    out = {}
    for name, values in columns.items():
        whole = torch.zeros(n, dtype=torch.float64)
        whole[torch.tensor(mine, dtype=torch.long)] = torch.tensor(values, dtype=torch.float64)
        out[name] = torch.tensor(dist.sums(world, whole.tolist()), dtype=torch.float64)
    return out


@contextmanager
def clock(seconds: dict[str, float], phase: str, world: World) -> Iterator[None]:
    """Add the time of the block to a phase."""
    import torch

    began = time.perf_counter()
    yield
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began


def at_work(job: Job, models: Sequence[Any]) -> Any:
    """Have models that only read on the device for the time of a block."""
    from llama2cli.training.roles import at_work

    return at_work(models, job.world.device, job.settings.offload)


# --- 5. advantages and the update ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Lesson:
    """What the tokens of this rank's answers are trained on, by the numbers of all tokens; and what is told of it."""

    policy: dict[str, Tensor]
    value: dict[str, Tensor]
    whitened: Moments
    told: dict[str, float]


def credit_answers(job: Job, roles: Roles, rollout: Rollout, before: Moments) -> Lesson:
    """Whiten the rewards, pay the KL, estimate the values; from these the advantages. before: of earlier batches."""
    import torch

    from llama2cli.nn import checkpoint
    from llama2cli.rlhf import credit, ppo

    answers, terms, dtype = rollout.answers, job.terms, checkpoint.DTYPES[job.resolved["dtype"]]
    old_M = rollout.logprobs_M
    if roles.value is not None:
        values_M = job.rows.read(roles.value.loss, answers, dtype)[0]
    if roles.value is None or not job.sampled_logprobs:
        found = job.rows.read(roles.policy.loss, answers, dtype, k=3 if roles.value is None else 2)
        old_M = old_M if job.sampled_logprobs else found[0]
        values_M = found[2] if roles.value is None else values_M
    rewards_N, whitened = credit.whitened(rollout.table["reward"], rollout.table["cut"].bool(), terms, before)
    mask_NT = answers.mask()

    def laid(x_M: Tensor) -> Tensor:
        return torch.zeros(mask_NT.shape).masked_scatter(mask_NT, x_M)

    mine_N = rewards_N[torch.tensor(rollout.mine, dtype=torch.long)]
    advantages_NT, returns_NT = credit.advantages(mine_N, laid(rollout.kl_M), laid(values_M), mask_NT, terms)
    advantages_M, returns_M = advantages_NT[mask_NT].float(), returns_NT[mask_NT].float()
    if terms.whiten_advantages:
        advantages_M = ppo.standardize(advantages_M, together(job.world, ppo.moments(advantages_M)))
    returns, left = (together(job.world, m) for m in credit.Explained.of(values_M, returns_M))
    return Lesson(
        {"old_logprobs": old_M, "advantages": advantages_M},
        {"old_values": values_M, "returns": returns_M},
        whitened,
        {"explained_variance": ppo.explained(returns, left), "return": returns.mean},
    )


def together(world: World, mine: Moments) -> Moments:
    """The moments of all ranks' values."""
    from functools import reduce

    from llama2cli.rlhf.ppo import Moments, merged
    from llama2cli.training import dist

    ranks = dist.side_by_side(world, list(mine))
    return reduce(merged, (Moments(int(n), mean, squares) for n, mean, squares in ranks))


def update(job: Job, roles: Roles, rollout: Rollout, lesson: Lesson, step: int) -> dict[str, float]:
    """One optimizer step for each mini-batch of each pass; means over tokens and steps of what the losses track."""
    from llama2cli.nn import checkpoint
    from llama2cli.rlhf.credit import POLICY
    from llama2cli.rlhf.credit import VALUE as OF_VALUE
    from llama2cli.training.data import Batch
    from llama2cli.training.examples import permutation
    from llama2cli.training.order import mix

    settings, world, n = job.settings, job.world, len(rollout.table["reward"])
    how: Any = dict(clip=settings.clip, dtype=checkpoint.DTYPES[job.resolved["dtype"]], world=world)
    trunk = roles.value is None
    policy_names = ["policy_loss", *POLICY, *(["value_loss", *OF_VALUE] if trunk else [])]
    labels = lesson.policy | (lesson.value if trunk else {})
    totals: dict[str, float] = {}
    tokens, norms, value_norms, gap = 0, [], [], 0.0
    for turn in range(settings.ppo_epochs):
        order = permutation(n, mix(settings.seed, UPDATE, step, turn))
        for begin in range(0, n, settings.mini_batch):
            part = order[begin : begin + settings.mini_batch]
            here = [int(j) // world.size for j in part if j % world.size == world.rank]
            count = int(rollout.table["length"][part].sum())

            def batch(labels: Mapping[str, Tensor], here: list[int] = here, count: int = count) -> Batch:
                return Batch(job.rows.labelled(rollout.answers, here, labels), count, count, len(here))

            sums, norm = roles.policy.update(batch(labels), len(policy_names), step, **how)
            norms.append(norm)
            found = dict(zip(policy_names, sums))
            if roles.value is not None:
                names = ["value_loss", *OF_VALUE]
                sums, norm = roles.value.update(batch(lesson.value), len(names), step, **how)
                value_norms.append(norm)
                found |= zip(names, sums)
            gap = gap if tokens else found["ratio_gap"] / count
            tokens += count
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value
    if trunk:  # the loss that was trained has both in it
        totals["policy_loss"] -= settings.value_weight * totals["value_loss"]
    means = {name: value / tokens for name, value in totals.items()} | {"ratio_gap": gap}
    means["grad_norm"] = sum(norms) / len(norms)
    return means | ({"value_grad_norm": sum(value_norms) / len(value_norms)} if value_norms else {})


# --- 6. held-out prompts ------------------------------------------------------------------------------------------


def measure(job: Job, roles: Roles, seconds: dict[str, float], stop: Stop) -> tuple[dict[str, Any], Rollout]:
    """Held-out figures: reward, judge, KL, length. The loss is minus what the best step is chosen by."""
    from llama2cli.training.fit import HELD_OUT

    chosen = job.heldout
    rollout = roll_out(job, roles, chosen, [HELDOUT_INDEX] * len(chosen), seconds, stop, judge=True)
    told = {name: float(column.mean()) for name, column in rollout.table.items()}
    by = rollout.table["judge" if "judge" in rollout.table else "reward"]
    error = float(by.std() / math.sqrt(len(by))) if len(by) > 1 else 0.0
    told |= {"n": len(chosen), "judge_error": error}
    return {HELD_OUT: -float(by.mean()), "heldout": told}, rollout


def samples_file(job: Job, rollout: Rollout) -> bytes:
    """The held-out answers of this rank with their scores, as JSON lines for a person to read."""
    lines = []
    for i, (j, text) in enumerate(zip(rollout.mine, rollout.texts)):
        record = job.prompts.records[job.heldout[j]]
        scores = {name: column[j].item() for name, column in rollout.table.items() if name not in ("length", "cut")}
        told = {"n_tokens": len(rollout.answers.answers[i]), "truncated": bool(rollout.table["cut"][j])}
        messages = [*record["messages"], {"role": "assistant", "content": text}]
        tag = {"unsafe": record["unsafe"]} if "unsafe" in record else {}
        lines.append(json.dumps({"messages": messages, **tag, **told, **scores}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


# --- 7. the run ---------------------------------------------------------------------------------------------------


def train(job: Job, held: Held, stop: Stop) -> dict[str, Any]:
    """Open the run folder, go on where it stands, train to the end; the record that the command prints."""
    from llama2cli.training import session
    from llama2cli.training.run import Run

    folder = Run(job.settings.out, resume=job.settings.resume, world=job.world)
    try:
        at, machine = session.resume(folder, job.resolved, free={*session.FREE, "patience"})
        if at.extra.get("ended"):
            console.say(f"{folder.folder}: ended early at step {at.step:,}; --patience 0 and a new run go further")
        elif at.step < job.resolved["steps"]:
            session.set_up(job.world, job.settings.seed, job.settings.kernels, machine, folder.folder)
            show_memory(job, held)
            Loop(job, folder, at, stop).run()
            show_end(folder)
        return session.record(folder, ("step", "reward", "help", "safe", "kl", "length", "truncated", "heldout_loss"))
    finally:
        folder.close()


class Loop:
    """The iterations of a run, from a state on."""

    def __init__(self, job: Job, folder: Run, at: State, stop: Stop) -> None:
        """Load the models and write settings.json."""
        from llama2cli import provenance
        from llama2cli.nn import checkpoint
        from llama2cli.rlhf.ppo import Moments
        from llama2cli.training import card, meter, session
        from llama2cli.training.run import TIMING

        settings, world = job.settings, job.world
        self.job, self.folder, self.at, self.stop = job, folder, at, stop
        self.roles = load(job, folder.step_folder if at.step else None)
        self.moments = Moments(*at.extra.get("moments", ()))
        self.saved = at.step
        self.held_answers: Rollout | None = None
        origin = provenance.collect(settings, job.inputs)
        session.write_settings(folder, settings, job.resolved, origin)
        self.stages = card.lineage_of(job.start.folder)
        self.stages.append(card.entry("ppo", dataclasses.asdict(settings), job.resolved, origin))
        dtype = checkpoint.DTYPES[job.resolved["dtype"]]
        peak, origin_of_peak = meter.peak_flops(world.device, dtype, settings.peak)
        console.say(f"peak {peak / 1e12:.3g} TFLOP/s ({origin_of_peak}); the KL is {told_kl(job.terms)}")
        for note in job.notes:
            console.warn(note)
        self.meter = meter.Meter(
            flops=flops_per_token(job),
            peak=peak,
            watts=meter.power(world.device, settings.watts),
            devices=world.size,
            earlier=folder.last(TIMING),
        )

    def run(self) -> None:
        """Iterate to the last step, to the end of patience, or to a signal. Raises Interrupted after a signal."""
        from llama2cli.training import examples

        job, at = self.job, self.at
        steps, stopped = job.resolved["steps"], False
        self.stop.saving = True
        with console.Progress("ppo", total=steps, unit="iterations") as bar:
            bar.start_at(at.step)
            try:
                if job.heldout and at.step == 0:
                    self.measure_first(bar)
                batches = examples.walk(job.order.count, job.settings.batch_size, None, at.position)
                for items, position in islice(batches, steps - at.step):
                    stopped = self.iterate(items, position, bar)
                    if stopped or at.extra["ended"]:
                        break
            except Abandoned:
                stopped = True
            if at.step > self.saved:  # stopped: a step that an uninterrupted run may not save is never `best`
                self.save(self.metrics, candidate=False)
        if stopped and at.step < steps and not at.extra.get("ended"):
            done = f"saved step {at.step:,}; the same command with --resume goes on" if at.step else "no step was done"
            raise Interrupted(f"stopped by a signal, {done}")

    def measure_first(self, bar: console.Progress) -> None:
        """What the policy is before any update."""
        seconds: dict[str, float] = {}
        found, _ = measure(self.job, self.roles, seconds, self.stop)
        self.at.extra["held"] = found["heldout"]
        self.folder.log({"step": 0, **found}, {"step": 0})
        bar.say(f"before the first step: {told_heldout(found['heldout'])}")

    def iterate(self, items: list[tuple[int, int]], position: dict[str, Any], bar: console.Progress) -> bool:
        """One iteration: rollout, scoring, advantages, update, log, perhaps measure and save. Whether a signal came."""
        from llama2cli.training import dist
        from llama2cli.training.fit import due

        job, roles, at, world = self.job, self.roles, self.at, self.job.world
        began = time.perf_counter()
        seconds: dict[str, float] = {}
        # rollout and scoring: nothing has changed until they are done
        chosen = [int(job.order.of(epoch)[i]) for epoch, i in items]
        first = position["seen"] - len(items)
        rollout = roll_out(job, roles, chosen, range(first, position["seen"]), seconds, self.stop)
        with clock(seconds, "scoring", world):
            lesson = credit_answers(job, roles, rollout, self.moments)
        # update
        with clock(seconds, "update", world):
            updated = update(job, roles, rollout, lesson, at.step + 1)
        at.step, at.position, self.moments = at.step + 1, position, lesson.whitened
        means = {name: float(column.mean()) for name, column in rollout.table.items()}
        n_tokens = int(rollout.table["length"].sum())
        metrics: dict[str, Any] = {
            "step": at.step,
            **{name: means[name] for name in COLUMNS if name in means and name != "cut"},
            "truncated": means["cut"],
            "reward_deviation": float(rollout.table["reward"].std(correction=0)),
            "kl_per_token": float(rollout.table["kl"].sum()) / n_tokens,
            "kl_estimator": job.terms.estimator,
            **lesson.told,
            **updated,
            "lr": roles.policy.schedule.lr(at.step),
            "seen": position["seen"],
        }
        at.extra.setdefault("first_length", means["length"])
        # held-out prompts, and what is odd
        measured = bool(job.heldout) and due(at.step, job.resolved["eval_every"], job.resolved["steps"])
        if measured:
            found, self.held_answers = measure(job, roles, {}, self.stop)
            metrics |= found
        alarms = self.alarms(metrics, means["length"])
        metrics |= {"alarms": alarms} if alarms else {}
        stopped = dist.sums(world, [float(self.stop.asked)])[0] > 0
        at.extra |= {"moments": list(self.moments), "ended": self.patience_ended(metrics)}
        # log and save
        tokens = n_tokens + sum(len(job.prompts.ids[i]) for i in chosen)
        timing = self.meter.record(at.step, tokens, time.perf_counter() - began, len(chosen))
        timing |= {f"{phase}_seconds": round(s, 4) for phase, s in seconds.items()}
        self.folder.log(metrics, timing)
        self.metrics = metrics
        if (
            due(at.step, job.resolved["save_every"], job.resolved["steps"])
            or at.extra["ended"]
            or self.is_best(metrics)
        ):
            self.save(metrics, candidate=True)
        bar.advance(1, note(metrics, seconds))
        for alarm in alarms:
            console.warn(f"step {at.step:,}: {alarm}")
        if measured:
            bar.say(f"step {at.step:,}: {told_heldout(metrics['heldout'])}")
        if at.extra["ended"]:
            patience = f"{job.settings.patience} held-out measurements no better than the best"
            bar.say(f"step {at.step:,}: ends early, {patience}")
        return stopped

    def alarms(self, metrics: Mapping[str, Any], length: float) -> list[str]:
        """What looks like a policy that games its reward models."""
        from llama2cli.rlhf import alarms

        settings = self.job.settings
        found = [
            alarms.length_drift(length, self.at.extra["first_length"], settings.alarm_length),
            alarms.far(metrics["kl"], settings.alarm_kl),
        ]
        if "heldout" in metrics and settings.judge is not None:
            found.append(alarms.gamed(metrics["heldout"], self.at.extra["held"]))
        return [alarm for alarm in found if alarm]

    def is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Whether this step's held-out answers are the best of all saved ones."""
        from llama2cli.training.fit import HELD_OUT

        return metrics.get(HELD_OUT, math.inf) < (self.at.best[1] if self.at.best else math.inf)

    def patience_ended(self, metrics: Mapping[str, Any]) -> bool:
        """Count measurements that were no better than the best, step 0 among them; whether they are too many now."""
        if "heldout" not in metrics:
            return False
        extra, by = self.at.extra, "judge" if self.job.settings.judge is not None else "reward"
        if metrics["heldout"][by] > extra["held"][by]:
            extra |= {"held": metrics["heldout"], "worse": 0}
        else:
            extra["worse"] = extra.get("worse", 0) + 1
        return 0 < self.job.settings.patience <= extra["worse"]

    def save(self, metrics: Mapping[str, Any], *, candidate: bool) -> None:
        """Save this step; `best` names it where it is the best."""
        from llama2cli.training.fit import HELD_OUT

        best = candidate and self.is_best(metrics)
        if best:
            self.at.best = (self.at.step, metrics[HELD_OUT])
        needed = save_bytes(self.job)
        self.folder.save(
            self.at.step,
            lambda aside: self.write(aside, metrics),
            needed=needed,
            best=best,
            keep=self.job.settings.keep,
        )
        self.saved = self.at.step

    def write(self, aside: Path, metrics: Mapping[str, Any]) -> None:
        """All that a step folder holds."""
        from llama2cli.nn import budget, checkpoint
        from llama2cli.training import card, roles, state

        job, settings, world = self.job, self.job.settings, self.job.world
        size = f"{budget.n_params(job.start.config):,} parameters, context {job.start.context:,}"
        told = f"A Llama of {size}, after {self.at.step:,} iterations of PPO ({metrics['seen']:,} answers)."
        files = card.files(self.stages, metrics, told)
        if "heldout" in metrics and self.held_answers is not None:
            files[HELD_ANSWERS] = samples_file(job, self.held_answers)
        common: Any = dict(save_dtype=settings.save_dtype, writes=world.first)
        policy, value = self.roles.policy, self.roles.value
        checkpoint.save_model(
            aside, policy.model, job.start.tokenizer, extra_files=files, chat_template=TEMPLATE, **common
        )
        extra: dict[str, Tensor] = {}
        rounded = settings.save_dtype != "fp32"
        if value is not None:
            if world.first:
                (aside / VALUE).mkdir()
            checkpoint.save_model(aside / VALUE, value.model, job.start.tokenizer, chat_template=TEMPLATE, **common)
            extra = state.moments(value.named, value.optimizer, weights=rounded, prefix=f"{VALUE}.")
        state.save(aside, self.at, policy.named, policy.optimizer, world, weights=rounded, extra=extra)
        if value is None:
            roles.save_value_head(aside, policy.model, world)


def save_bytes(job: Job) -> int:
    """Disk that one saved step takes: as of other stages, for each model that trains."""
    from llama2cli.nn import budget

    number = 12 if job.settings.save_dtype == "fp32" else 14
    weights = budget.n_params(job.start.config)
    weights += 0 if job.value_config is None else budget.n_params(job.value_config, scorer=True)
    return round(1.01 * number * weights) + 6 * len(job.start.tokenizer.proto) + (1 << 20)


def flops_per_token(job: Job) -> float:
    """FLOPs of an iteration over its tokens: the update's passes, and one forward pass of each role and the rollout."""
    from llama2cli.nn import budget, checkpoint

    length = job.start.context // 2
    train, read = budget.train_flops_per_token, budget.forward_flops_per_token
    config, epochs = job.start.config, job.settings.ppo_epochs
    total = float(epochs * train(config, length) + 2 * read(config, length))  # the policy's rollout, the reference
    if job.value_config is not None:
        total += epochs * train(job.value_config, length, scorer=True) + read(job.value_config, length, scorer=True)
    for folder in {f for name, f in job.scorers.items() if name != "judge"}:
        total += read(checkpoint.load_config(folder, None), length, scorer=True)
    return total


# --- 8. for a person ----------------------------------------------------------------------------------------------


def told_kl(terms: Terms) -> str:
    """ "k1, paid per token, beta 0.01"."""
    return f"{terms.estimator}, paid per {terms.per}, beta {terms.beta:g}"


def told_heldout(found: Mapping[str, float]) -> str:
    """ "held-out reward 0.412 (help 0.61, safe 0.93), KL 1.2, 83 tokens"."""
    models = ", ".join(f"{name} {found[name]:.3f}" for name in ("help", "safe", "judge") if name in found)
    return f"held-out reward {found['reward']:.3f} ({models}), KL {found['kl']:.2f}, {found['length']:.0f} tokens"


def note(metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    """The log line of an iteration."""
    total = sum(seconds.values())
    phases = ", ".join(f"{phase} {s / total:.0%}" for phase, s in seconds.items())
    told = f"reward {metrics['reward']:.3f}, KL {metrics['kl']:.3g}, {metrics['length']:.0f} tokens"
    return f"{told}, {total:.3g} s ({phases})"


def show_end(run: Run) -> None:
    """The curve of the run, and where its time went."""
    from llama2cli.training.run import METRICS, TIMING

    lines = run.read(METRICS)
    iterations = [m for m in lines if m["step"]]
    every = max(1, len(iterations) // 12)
    shown = [m for m in iterations if "heldout" in m or m["step"] % every == 0 or m is iterations[-1]]

    def cells(m: Mapping[str, Any]) -> tuple[str, ...]:
        held = m.get("heldout", {})
        values = [m.get(k) for k in ("reward", "help", "safe", "kl", "entropy", "clip_fraction", "explained_variance")]
        values += [m.get("length"), m.get("truncated"), held.get("reward"), held.get("judge")]
        return (f"{m['step']:,}", *("" if v is None else f"{v:.3g}" for v in values))

    columns = ["step", "reward", "help", "safe", "KL", "entropy", "clipped", "explained", "tokens", "cut"]
    console.table(
        "", [*columns, "held-out reward", "judge"], map(cells, [*lines[:1], *shown] if lines[0] not in shown else shown)
    )
    timing = run.read(TIMING)
    phases = {p: sum(t.get(f"{p}_seconds", 0.0) for t in timing) for p in ("rollout", "scoring", "update")}
    total = sum(phases.values()) or 1.0
    console.say("time: " + ", ".join(f"{phase} {s:.1f} s ({s / total:.0%})" for phase, s in phases.items()))
    alarms = sum(len(m.get("alarms", ())) for m in iterations)
    if alarms:
        console.warn(f"{alarms} alarms; metrics.jsonl has them by step")
