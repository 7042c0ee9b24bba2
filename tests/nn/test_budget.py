"""What a model costs, against other people's counts: transformers, torch's FLOP counter and torch's memory tracker."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from llama2cli.nn import budget, ops
from llama2cli.nn.config import PRESETS, ModelConfig, n_params
from llama2cli.nn.model import Llama
from llama2cli.training import dist
from llama2cli.training.objective import NextToken

SHAPES = {
    "small": ModelConfig(500, 256, 688, 4, 4, 4, 512),
    "grouped": ModelConfig(500, 256, 512, 6, 4, 2, 512),
    "tied": ModelConfig(500, 256, 512, 6, 4, 2, 512, tie_word_embeddings=True),
    "wordy": ModelConfig(8000, 128, 352, 3, 4, 4, 512),
    **PRESETS,
}
TOLERANCE = 0.10  # of memory: the sum that is predicted against the peak that is tracked


@pytest.fixture(autouse=True)
def plain_operations() -> Iterator[None]:
    """The plain forms are what a GPU runs, and what the formulas count."""
    before = ops.choices()
    ops.force("plain")
    yield
    ops.restore(before)


@pytest.mark.parametrize("name", ["small", "grouped", "tied", "7b", "70b"])
def test_parameters_are_transformers(name: str) -> None:
    """Every weight of a LlamaForCausalLM of this shape, part by part (on the meta device: nothing is allocated)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = SHAPES[name]
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**dataclasses.asdict(config)))
    sizes = {key: p.numel() for key, p in theirs.named_parameters()}

    def count(*words: str) -> int:
        return sum(n for key, n in sizes.items() if any(w in key for w in words))

    part = budget.parameters(config)
    assert part.embedding == count("embed_tokens")
    assert part.attention == count("self_attn")
    assert part.feed_forward == count("mlp")
    assert part.norms == count("norm")
    assert part.head == count("lm_head")
    assert sum(part) == n_params(config) == budget.n_params(config) == sum(sizes.values())


@pytest.mark.parametrize("name", ["grouped", "tied", "7b"])
def test_parameters_of_a_reward_model_are_transformers(name: str) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = SHAPES[name]
    with torch.device("meta"):
        theirs = LlamaForSequenceClassification(LlamaConfig(**dataclasses.asdict(config), num_labels=1))
    total = sum(p.numel() for p in theirs.parameters())
    assert n_params(config, scorer=True) == sum(budget.parameters(config, scorer=True)) == total


@pytest.mark.parametrize("name", ["small", "grouped", "tied"])
def test_flops_are_torchs_count(name: str) -> None:
    """torch's FLOP counter over our own forward and backward pass; it counts the whole square of attention.

    The kernel is the one in plain products, whose backward pass has two products for each of the forward's; flash
    kernels make the scores again, which is not the model's own work.
    """
    config = SHAPES[name]
    model = Llama(config)
    model.init_weights(0)
    T = 128
    ids = torch.randint(0, config.vocab_size, (2, T))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.logits(model(ids)).float().square().mean().backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = counted.pop("aten.bmm")
    weights = 6 * budget.n_matmul_params(config)
    assert sum(counted.values()) / (2 * T) == weights
    assert attention / (2 * T) == budget.train_flops_per_token(config, T, causal=False) - weights
    assert budget.train_flops_per_token(config, T) - weights == attention / (2 * T) / 2


def test_flops_by_hand() -> None:
    """7B at 4096: 6 times the weights that multiply, and 6 L H K T: 42.86 GFLOPs a token; PaLM's count is 7.5% more."""
    c = PRESETS["7b"]
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    weights = 32 * layer + 32000 * 4096
    assert budget.train_flops_per_token(c, 4096) == 6 * weights + 6 * 32 * 4096 * 4096
    assert budget.train_flops_per_token(c, 4096, causal=False) == 6 * weights + 12 * 32 * 32 * 128 * 4096
    assert budget.forward_flops_per_token(c, 4096) * 3 == budget.train_flops_per_token(c, 4096)
    # to decode n tokens one by one is, in the mean over the places, a forward pass over them
    places = sum(budget.decode_flops_per_token(c, t) for t in range(4096)) / 4096
    assert places == pytest.approx(budget.forward_flops_per_token(c, 4096), rel=1e-4)


def test_hours_utilization_and_back() -> None:
    """GPU-hours at a utilization imply that utilization; a rate of tokens has it too."""
    flops = budget.train_flops_per_token(PRESETS["13b"], 4096)
    hours = budget.gpu_hours(2e12, flops, 312e12, 0.4)
    assert budget.implied_mfu(hours, 2e12, flops, 312e12) == pytest.approx(0.4)
    assert budget.mfu(2e12 / (hours * 3600) * 64, flops, 312e12, gpus=64) == pytest.approx(0.4)


def test_co2_by_hand() -> None:
    """1000 hours at 400 W are 400 kWh; with PUE 1.1 and 0.385 kg/kWh 169.4 kg."""
    assert budget.co2_tonnes(1000, 400) == pytest.approx(0.1694)
    assert budget.co2_tonnes(1000, 400, pue=1.0, kg_per_kwh=1.0) == pytest.approx(0.4)


def test_gpus_are_as_sold() -> None:
    """The A100's data sheet: 312 TFLOP/s in bf16, 400 W; every kind has sane numbers."""
    a100 = budget.GPUS["a100-80gb"]
    assert (a100.peak, a100.watts, a100.memory) == (312e12, 400, 80e9)
    assert all(
        1e14 < g.peak < 1e16 and 200 < (g.watts or 0) < 1500 and 20e9 < g.memory < 300e9 for g in budget.GPUS.values()
    )


# --- memory against torch's tracker -----------------------------------------------------------------------------------


def tracked_peak(config: ModelConfig, rows: int, length: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """Peak bytes of training steps of two micro-batches on the CPU, as torch's memory tracker sees the tensors."""
    model = Llama(config)
    model.init_weights(0)
    model.checkpoint_layers = checkpointing
    model.rope_table(torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, config.vocab_size, (rows, length + 1))
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with warnings.catch_warnings(), tracker:
        warnings.simplefilter("ignore")
        for _ in range(2):
            for _ in range(2):
                tracker.reset_mod_stats()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    hidden = model(ids[:, :-1]).reshape(-1, config.hidden_size)
                    loss = ops.linear_cross_entropy(hidden, model.head_weight(), ids[:, 1:].reshape(-1))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["grouped", "wordy"])
def test_memory_of_one_gpu_is_what_torch_tracks(name: str, dtype: torch.dtype, checkpointing: bool) -> None:
    """Weights, gradients, moments, activations, head: the predicted sum is within 10% of the tracked peak."""
    config = SHAPES[name]
    tracked = tracked_peak(config, 2, 256, dtype, checkpointing)
    predicted = budget.memory_per_gpu(config, tokens=2 * 256, checkpointing=checkpointing, compute_bytes=dtype.itemsize)
    assert predicted.total == pytest.approx(tracked, rel=TOLERANCE)


def sharded_peak(config: ModelConfig, gpus: int, length: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """Peak bytes of one of several processes, sharded as in training; the others are made up by torch's fake group."""
    torch.distributed.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        loss = NextToken(Llama(config))
        loss.model.init_weights(0)
        loss.model.checkpoint_layers = checkpointing
        loss.model.rope_table(torch.device("cpu"))
        dist.shard(loss, loss.model.layers, dist.World(0, gpus, torch.device("cpu")), dtype=dtype)
        optimizer = torch.optim.AdamW(loss.parameters(), fused=True)
        ids = torch.randint(0, config.vocab_size, (1, length + 1))
        tracker = FSDPMemTracker(loss, optimizer)
        tracker.track_inputs((ids,))
        with warnings.catch_warnings(), tracker:
            warnings.simplefilter("ignore")
            for _ in range(2):
                for _ in range(2):
                    tracker.reset_mod_stats()
                    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                        total = loss(ids[:, :-1], ids[:, 1:])
                    total.backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.distributed.destroy_process_group()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize(
    ("gpus", "dtype", "checkpointing"),
    [(8, torch.bfloat16, False), (8, torch.float32, True), (32, torch.bfloat16, True)],
)
@pytest.mark.parametrize("name", ["grouped", "wordy"])
def test_memory_under_fsdp_is_not_less_than_torch_tracks(
    name: str, gpus: int, dtype: torch.dtype, checkpointing: bool
) -> None:
    """The predicted sum is 0% to 20% above the tracked peak: who plans by it does not run out of memory."""
    config = SHAPES[name]
    tracked = sharded_peak(config, gpus, 256, dtype, checkpointing)
    predicted = budget.memory_per_gpu(
        config, tokens=256, gpus=gpus, checkpointing=checkpointing, compute_bytes=dtype.itemsize
    )
    assert tracked <= predicted.total <= 1.2 * tracked


def test_chunks_are_those_of_the_loss() -> None:
    """The budget knows no torch, so it has the numbers of the loss a second time."""
    from llama2cli.nn import loss

    assert (budget.CHUNK_LOGITS, budget.MIN_CHUNK) == (loss.CHUNK_LOGITS, loss.MIN_CHUNK)
