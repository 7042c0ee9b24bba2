"""`llama2 ppo`: proximal policy optimization by the recipe of section 3.2.3.

Choices that the paper leaves open, beside those at the top of `rlhf/ppo.py`:
1. The value model is a model of its own that starts as the helpfulness reward model; it learns at three times the
   policy's rate. Its head starts as 0, for the scores of a reward model are of another scale than whitened rewards, and
   what explains nothing misleads. --value head puts a head on the policy's trunk.
2. Answers are drawn at temperature 1, at most 512 tokens, never with top-k or top-p: policy and reference are compared
   under the distribution that was drawn from. Log-probabilities are kept from sampling where the arithmetic is fp32;
   in bf16 one forward pass gives them anew, as rounding differs.
3. Reward models read the canonical dialogue, as `score` does; an answer that was cut is read at its last token.
4. At most 400 iterations (the paper: 200 to 400); the run ends before where --patience held-out measurements one after
   another were no better than the best, as --judge says, or without it the reward.
5. A mini-batch's loss is a mean over its tokens. The policy's update comes before the value model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llama2cli.errors import Misuse
from llama2cli.settings import Training, flag


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
      llama2 ppo --policy run --rm-help rm-help --rm-safe rm-safe --prompts examples/data/prompts.jsonl --steps 2 \\
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
    text: bool = flag(default=False, help="the prompts are plain text, one on each line")
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
    value_score: Literal["zero", "kept"] = flag(
        default="zero", help="the head that it starts with: 0, or the reward model's own, whose scale is another"
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


def run(settings: Settings) -> dict[str, Any] | None:
    """Train; return the record of the last step."""
    from llama2cli.stages.ppo import memory
    from llama2cli.stages.ppo.job import prepare
    from llama2cli.stages.ppo.loop import train
    from llama2cli.training import dist
    from llama2cli.training.signals import stop_requests

    check(settings)
    with stop_requests() as stop, dist.world(settings.device) as world:
        job = prepare(settings, world)
        held = memory.of(job)
        if settings.dry_run:
            return memory.dry_run(job, held)
        return train(job, held, stop)


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
        given = {"--value-init": settings.value_init, "--value-lr": settings.value_lr}
        for name, value in {**given, "--value-score": None if settings.value_score == "zero" else "kept"}.items():
            if value is not None:
                raise Misuse("has no meaning with --value head: it starts as 0 and learns with the trunk", name)
    for name, wanted in (("help", settings.rm_help), ("safe", settings.rm_safe)):
        if settings.value_init == name and wanted is None:
            raise Misuse(f"is {name}, and there is no --rm-{name}", "--value-init")
