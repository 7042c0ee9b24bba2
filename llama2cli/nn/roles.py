"""What PPO holds in memory: several models at once, some of which train. Arithmetic over `budget`; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from llama2cli.nn import budget
from llama2cli.nn.config import ModelConfig


class Frozen(NamedTuple):
    """A model that only reads. scorer: a reward model. number_bytes: of a weight."""

    config: ModelConfig
    scorer: bool
    number_bytes: int


@dataclass(frozen=True)
class Held:
    """Bytes of one device by role, and at the worst moment of each phase of an iteration."""

    roles: dict[str, float]
    phases: dict[str, float]

    @property
    def peak(self) -> float:
        """The most that is held at once."""
        return max(self.phases.values())


def ppo_memory(
    policy: ModelConfig,
    value: ModelConfig | None,
    frozen: Mapping[str, Frozen],
    *,
    tokens: int,
    cache_bytes: int,
    prompt_tokens: int = 0,
    scored_tokens: int | None = None,
    gpus: int = 1,
    compute_bytes: int = 4,
    offload: bool = False,
    checkpointing: bool = False,
) -> Held:
    """Bytes per device of PPO.

    value: the value model's shape, None for a head on the policy's trunk. frozen: by role; each is whole on every
    device. tokens: of a micro-batch; scored_tokens: of what a reward model reads at once, where these are others.
    cache_bytes: of the keys and values while answers are sampled. prompt_tokens: of the prompts that are run at once
    before that. offload: what only reads rests in host memory between its phases.

    What trains has weights and moments all the time, gradients and activations while it is updated, one model after the
    other. Answers are sampled with a whole copy of the policy, unless the weights are whole and in the type already.
    """
    trains = {
        "policy": budget.memory_per_gpu(
            policy, tokens=tokens, gpus=gpus, checkpointing=checkpointing, compute_bytes=compute_bytes
        )
    }
    if value is not None:
        trains["value model"] = budget.memory_per_gpu(
            value, tokens=tokens, gpus=gpus, checkpointing=checkpointing, compute_bytes=compute_bytes, scorer=True
        )
    rest = {name: m.parameters + m.optimizer for name, m in trains.items()}
    work = {name: m.total - rest[name] for name, m in trains.items()}
    still = {name: budget.n_params(f.config, scorer=f.scorer) * f.number_bytes for name, f in frozen.items()}
    scored = tokens if scored_tokens is None else scored_tokens
    reads: list[float] = [
        still[name] * offload + read_bytes(f.config, scored if f.scorer else tokens, f.number_bytes)
        for name, f in frozen.items()
    ]
    shapes = [policy] if value is None else [policy, value]
    reads += [m.gathered + read_bytes(c, tokens, compute_bytes) for m, c in zip(trains.values(), shapes)]
    copy = 0 if gpus == 1 and compute_bytes == 4 else budget.n_params(policy) * compute_bytes
    begin = budget.activation_bytes_per_token(policy, compute_bytes) * prompt_tokens
    always = sum(rest.values()) + (0 if offload else sum(still.values()))
    return Held(
        roles={
            **{name: m.total for name, m in trains.items()},
            **still,
            "copy of the policy, to sample": float(copy),
            "keys and values": float(cache_bytes),
        },
        phases={
            "rollout": always + copy + cache_bytes + begin,
            "scoring": always + max(reads),
            "update": always + max(work.values()),
        },
    )


def read_bytes(config: ModelConfig, tokens: int, number_bytes: int) -> int:
    """Bytes of a forward pass that nothing is kept of: one layer at work, and the states at the end."""
    layer = budget.activation_bytes_per_token(config, number_bytes) * tokens
    return layer + budget.head_bytes(config, tokens, number_bytes, scorer=True)
