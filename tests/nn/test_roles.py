"""What PPO holds by role: sums worked by hand, and what each setting takes away.

Against what a run really holds: tests/stages/test_ppo.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llama2cli.nn import budget
from llama2cli.nn.config import PRESETS
from llama2cli.nn.roles import Frozen, Held, ppo_memory

SEVEN, SMALL = PRESETS["7b"], PRESETS["15m"]
N = 6_738_415_616  # parameters of Llama 2 7B
SCORER = N - 32_000 * 4096 + 4096  # one row in place of the output table


def of(policy: Any = SEVEN, value: Any = SEVEN, **changes: Any) -> Held:
    frozen = {
        "reference": Frozen(policy, False, 2),
        "help": Frozen(policy, True, 2),
        "safe": Frozen(policy, True, 2),
    }
    given = {"frozen": frozen, "tokens": 4096, "cache_bytes": 10**9, "compute_bytes": 2}
    return ppo_memory(policy, value, **given | changes)


def test_the_roles_of_7b_by_hand() -> None:
    """Frozen ones take 2 bytes a weight in bf16; the copy to sample from too; training takes 16 and its activations."""
    held = of()
    assert held.roles["reference"] == 2 * N == held.roles["copy of the policy, to sample"]
    assert held.roles["help"] == held.roles["safe"] == 2 * SCORER
    assert held.roles["keys and values"] == 1e9
    policy = budget.memory_per_gpu(SEVEN, tokens=4096, compute_bytes=2)
    value = budget.memory_per_gpu(SEVEN, tokens=4096, compute_bytes=2, scorer=True)
    assert held.roles["policy"] == policy.total and held.roles["value model"] == value.total
    assert policy.total > 16 * N and value.total > 16 * SCORER
    # all the time: weights and two moments in fp32 of both, and what is frozen
    always = 12 * N + 12 * SCORER + 2 * N + 4 * SCORER
    assert held.phases["rollout"] == always + 2 * N + 1e9
    work = max(policy.total - 12 * N, value.total - 12 * SCORER)
    assert held.phases["update"] == pytest.approx(always + work)
    assert held.peak == max(held.phases.values()) == held.phases["update"]


def test_prompts_that_are_run_at_once_take_the_activations_of_a_layer() -> None:
    more = of(prompt_tokens=1000).phases["rollout"] - of().phases["rollout"]
    assert more == 1000 * budget.activation_bytes_per_token(SEVEN, 2)


def test_weights_in_the_type_of_sampling_need_no_copy() -> None:
    """One process in fp32 samples with the weights that it trains; several bring them together."""
    assert of(compute_bytes=4).roles["copy of the policy, to sample"] == 0
    assert of(compute_bytes=4, gpus=2).roles["copy of the policy, to sample"] == 4 * N
    assert of(gpus=8).roles["copy of the policy, to sample"] == 2 * N


def test_a_shared_trunk_has_no_second_model() -> None:
    one, two = of(value=None), of()
    assert "value model" not in one.roles and one.roles["policy"] == two.roles["policy"]
    assert two.phases["rollout"] - one.phases["rollout"] == 12 * SCORER
    assert one.peak < two.peak - 12 * SCORER + 1e9


def test_what_is_offloaded_is_there_in_its_own_phase_only() -> None:
    """One at a time while answers are scored, none while policy and value model are at work."""
    here, away = of(), of(offload=True)
    frozen = 2 * N + 4 * SCORER
    assert here.phases["rollout"] - away.phases["rollout"] == frozen
    assert here.phases["update"] - away.phases["update"] == pytest.approx(frozen)
    assert 0 < here.phases["scoring"] - away.phases["scoring"] < frozen
    assert away.roles == here.roles  # what they are does not change


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_what_trains_is_sharded_and_what_is_frozen_is_not(gpus: int) -> None:
    one, many = of(), of(gpus=gpus)
    assert many.roles["reference"] == one.roles["reference"] and many.roles["help"] == one.roles["help"]
    own = one.phases["rollout"] - 2 * N - 4 * SCORER - 2 * N - 1e9  # less what is whole on every device
    assert many.phases["rollout"] == pytest.approx(own / gpus + 4 * N + 4 * SCORER + 1e9)


def test_checkpointing_and_fewer_tokens_take_less_in_the_update() -> None:
    assert of(checkpointing=True).phases["update"] < of().phases["update"]
    assert of(tokens=1024).phases["update"] < of().phases["update"]
    assert of(tokens=1024).phases["rollout"] == of().phases["rollout"]


def test_roles_may_differ_in_size() -> None:
    """A small value model and a small reward model beside a large policy."""
    large = dataclasses.replace(SEVEN)
    frozen = {"reference": Frozen(large, False, 2), "help": Frozen(SMALL, True, 4)}
    held = ppo_memory(large, SMALL, frozen, tokens=1024, cache_bytes=0, compute_bytes=2)
    assert held.roles["help"] == 4 * budget.n_params(SMALL, scorer=True)
    assert held.roles["value model"] < held.roles["policy"] / 50


def test_what_is_scored_at_once_counts_for_reward_models_alone() -> None:
    one, two = of(offload=True, scored_tokens=2**18), of(offload=True, scored_tokens=2**19)
    more = two.phases["scoring"] - one.phases["scoring"]
    states = 4096 * (8 + 2 * 2)  # of a token: the norm's input and output in fp32, the state and its gradient
    assert more == 2**18 * (budget.activation_bytes_per_token(SEVEN, 2) + states)
    assert one.phases["rollout"] == two.phases["rollout"] and one.phases["update"] == two.phases["update"]
    assert of(scored_tokens=4096).phases == of().phases
