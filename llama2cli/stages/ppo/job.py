"""What is asked for: the prompts, the models that are named, and what the settings come to. Reads no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from llama2cli import provenance
from llama2cli.errors import DataError, Misuse
from llama2cli.nn import budget, checkpoint
from llama2cli.nn.config import SCORER, ModelConfig
from llama2cli.rlhf import ppo
from llama2cli.rlhf.credit import Terms
from llama2cli.sampling.samples import Tally, fits, with_system
from llama2cli.stages.ppo import Settings
from llama2cli.text.chat import encode_conversation
from llama2cli.text.folders import resolve_model
from llama2cli.text.prompts import read_prompts
from llama2cli.text.records import Record
from llama2cli.text.streams import Place
from llama2cli.text.tokenizer import Tokenizer
from llama2cli.training import answers, examples, tuning
from llama2cli.training.answers import Rows
from llama2cli.training.corpus import Named
from llama2cli.training.dist import World
from llama2cli.training.examples import Order, Part, Ragged
from llama2cli.training.tuning import Start

STEPS = 400  # Llama 2, section 3.2.3: between 200 and 400 iterations


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
    # the models
    start = tuning.start_from(settings.policy, settings.context)
    given = {"help": settings.rm_help, "safe": settings.rm_safe, "judge": settings.judge}
    scorers = {name: resolve_model(path) for name, path in given.items() if path is not None}
    value, value_config = value_model(settings, scorers, start)

    # the prompts
    named = examples.parse_sources([*settings.files, *settings.prompts], world.size, "--prompts")
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
    same = ["system", "tags", "max_new_tokens", "temperature", "rollout_rows", "mini_batch", "ppo_epochs", "clip_ratio"]
    same += ["kl", "kl_per", "whiten", "whiten_mean", "whiten_advantages", "reward_clip", "cut_penalty", "gamma", "lam"]
    same += [
        "value",
        "value_score",
        "value_weight",
        "value_clip",
        "old_logprobs",
        "frozen_dtype",
        "offload",
        "patience",
    ]
    named_scorers = [("rm_help", "help"), ("rm_safe", "safe"), ("judge", "judge")]
    resolved = {
        **{name: getattr(settings, name) for name in same},
        "beta": beta,
        "value_lr": 3 * settings.lr if settings.value_lr is None else settings.value_lr,
        **{name: provenance.fingerprint(scorers[key]) if key in scorers else None for name, key in named_scorers},
        "value_init": None if value is None else provenance.fingerprint(value),
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
    resolved["policy"], resolved["prompts"] = resolved.pop("init"), resolved.pop("data")  # as the flags are called
    if settings.save_every is None:
        resolved["save_every"] = resolved["eval_every"]
    idle = ["--offload does nothing on a CPU"] if settings.offload and world.device.type == "cpu" else []
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
        notes=[*split.notes, *start.notes, *idle],
        rows=answers.Rows(2 * start.context, resolved["micro_tokens"], world),
    )


def value_model(
    settings: Settings, scorers: Mapping[str, Path], start: Start
) -> tuple[Path | None, ModelConfig | None]:
    """The folder that the value model starts from, and its shape. It reads the policy's ids: one tokenizer for both."""
    if settings.value == "head":
        return None, None
    wanted = settings.value_init or ("help" if "help" in scorers else "safe")
    known = {"help": scorers.get("help"), "safe": scorers.get("safe"), "policy": start.folder}
    folder = known.get(wanted) or resolve_model(wanted)
    config = checkpoint.load_config(folder, None)
    if Tokenizer.load(folder).sha256 != start.tokenizer.sha256:
        fix = "start it from the policy or from another model"
        raise Misuse(f"{folder} has another tokenizer than the policy, whose ids it is to read; {fix}", "--value-init")
    checkpoint.check_tokenizer(config, start.tokenizer, folder)
    longest = max(config.max_position_embeddings, start.config.max_position_embeddings)
    return folder, dataclasses.replace(config, max_position_embeddings=longest)


def read(
    settings: Settings, named: Sequence[Named], prompts: Prompts, start: Start, scorers: Mapping[str, Path]
) -> list[Part]:
    """Read files into the store: a part for each. A prompt that leaves no room for an answer is an error."""
    readers = {start.tokenizer.sha256: (start.tokenizer, start.context, "the prompt")}  # by tokenizer
    for name, folder in scorers.items():
        tokenizer, context = Tokenizer.load(folder), checkpoint.load_config(folder, SCORER).max_position_embeddings
        known = readers.get(tokenizer.sha256)
        if known is None or context < known[1]:  # the shortest context decides
            flag = "--judge" if name == "judge" else f"--rm-{name}"
            readers[tokenizer.sha256] = tokenizer, context, f"for {flag} the prompt"
    tally, parts = Tally(), []
    for source in named:
        before = len(prompts.ids)
        for place, plain in read_prompts([source.path], text=settings.text):
            record = with_system(plain, settings.system)
            found = [
                (encode_conversation(tokenizer, record["messages"], tags=settings.tags, place=place).ids, context, what)
                for tokenizer, context, what in readers.values()
            ]
            skip = settings.skip_long
            if all(fits(ids, context, place, skip=skip, tally=tally, what=what) for ids, context, what in found):
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
    told = sha256()
    for i in part.index:
        unsafe = bool(prompts.records[i].get("unsafe"))
        told.update(bytes([unsafe]) + len(prompts.ids[i]).to_bytes(8) + prompts.ids[i].tobytes())
    return told.hexdigest()
