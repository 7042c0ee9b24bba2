"""What a model costs: parameters, FLOPs, memory, GPU-hours, tCO2. Plain arithmetic over a `ModelConfig`; no torch.

Letters: L layers, D width, H query heads, G key-value heads, K head size, F width of the feed-forward, V vocabulary.

Two conventions that others choose differently:

1. A FLOP is a multiply or an add of a matrix product. A weight costs 6 a token in training (2 forward, 4 backward); the
   output head counts, the input table (a lookup) and the norms do not. What activation checkpointing computes again is
   not counted, so the same work has the same FLOPs with and without it (PaLM, appendix B: "model FLOPs").
2. Attention is counted at its causal half: a query at place t needs t keys, T/2 in the mean. PaLM counts the whole
   square, 12 L H K T a token; `causal=False` gives that. For Llama 2 at its own context the two differ by 4% to 8%.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

from llama2cli.nn.config import ModelConfig
from llama2cli.nn.config import n_params as n_params

# --- parameters -----------------------------------------------------------------------------------------------------


class Parameters(NamedTuple):
    """Weights by part. `head` is 0 when it is tied to the embedding."""

    embedding: int
    attention: int
    feed_forward: int
    norms: int
    head: int


def attention_width(config: ModelConfig) -> int:
    """H K: the width of the queries of one layer, which is the model's own in every Llama 2."""
    return config.num_attention_heads * config.head_dim


def key_value_width(config: ModelConfig) -> int:
    """G K: the width of the keys (and of the values) of one layer."""
    return config.num_key_value_heads * config.head_dim


def parameters(config: ModelConfig, *, scorer: bool = False) -> Parameters:
    """Weights by part: there are no biases, two norms a layer and one at the end (Llama 2, section 2.2).

    scorer: of a reward model, whose head is one row (section 3.2.2).
    """
    depth, width = config.num_hidden_layers, config.hidden_size
    return Parameters(
        embedding=config.vocab_size * width,
        attention=depth * width * 2 * (attention_width(config) + key_value_width(config)),
        feed_forward=depth * 3 * width * config.intermediate_size,
        norms=(2 * depth + 1) * width,
        head=width if scorer else 0 if config.tie_word_embeddings else config.vocab_size * width,
    )


def n_matmul_params(config: ModelConfig, *, scorer: bool = False) -> int:
    """How many weights a token is multiplied with: attention, feed-forward and the head, tied or not.

    scorer: of a reward model, whose head is read at the last token only and counts as nothing.
    """
    part = parameters(config)
    return part.attention + part.feed_forward + (0 if scorer else config.vocab_size * config.hidden_size)


# --- FLOPs ----------------------------------------------------------------------------------------------------------


def train_flops_per_token(config: ModelConfig, context: int, *, causal: bool = True, scorer: bool = False) -> int:
    """FLOPs to train on one token, forward and backward: 6 N + 6 L H K T, where N is `n_matmul_params`.

    context: T, the length of the sequences, in tokens. causal: see the top of this file. scorer: of a reward model.
    """
    square = 12 * config.num_hidden_layers * attention_width(config) * context
    return 6 * n_matmul_params(config, scorer=scorer) + (square // 2 if causal else square)


def forward_flops_per_token(config: ModelConfig, context: int, *, scorer: bool = False) -> int:
    """FLOPs of a forward pass over a sequence of T tokens, per token: a third of training."""
    return train_flops_per_token(config, context, scorer=scorer) // 3


def decode_flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs to generate one token that sees `context` earlier ones in the cache: 2 N + 4 L H K T."""
    return 2 * n_matmul_params(config) + 4 * config.num_hidden_layers * attention_width(config) * context


# --- machines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPU:
    """A kind of accelerator.

    peak: dense bf16 FLOP/s of the data sheet. watts: power limit. memory: bytes as sold (80 GB = 80e9); a device holds
    some 5% more, which is left to the CUDA context, communication buffers and fragmentation.
    """

    peak: float
    watts: float | None
    memory: float


# NVIDIA's data sheets, SXM boards where there is a choice; sparsity not counted.
GPUS = {
    "a100-40gb": GPU(312e12, 400, 40e9),
    "a100-80gb": GPU(312e12, 400, 80e9),  # Llama 2, Table 2
    "h100": GPU(989e12, 700, 80e9),
    "h200": GPU(989e12, 700, 141e9),
    "b200": GPU(2250e12, 1000, 180e9),
    "l40s": GPU(362e12, 350, 48e9),
}


def mfu(tokens_per_second: float, flops_per_token: float, peak: float, gpus: int = 1) -> float:
    """Model FLOPs utilization: the share of the peak (FLOP/s of one GPU) that went into the model's own FLOPs."""
    return tokens_per_second * flops_per_token / (peak * gpus)


def gpu_hours(tokens: float, flops_per_token: float, peak: float, mfu: float) -> float:
    """GPU-hours to train on so many tokens when each GPU does `mfu` of its peak."""
    return tokens * flops_per_token / (peak * mfu) / 3600


def implied_mfu(gpu_hours: float, tokens: float, flops_per_token: float, peak: float) -> float:
    """The utilization that a number of GPU-hours amounts to."""
    return tokens * flops_per_token / (gpu_hours * 3600 * peak)


def co2_tonnes(gpu_hours: float, watts: float, pue: float = 1.1, kg_per_kwh: float = 0.385) -> float:
    """Tonnes of CO2 equivalent of GPU-hours at a power (W per GPU): hours x W x PUE x intensity of the grid.

    Llama 2's text names neither constant. These give all four rows of Table 2 and its total of 539.00 when the rows are
    cut, not rounded, to two decimals (13B is 62.447, printed 62.44); no intensity gives them rounded.
    """
    return gpu_hours * watts * pue * kg_per_kwh * 1e-6


class Run(NamedTuple):
    """A row of Table 2: GPU-hours on A100-80GB, W per GPU, tonnes of CO2 equivalent."""

    gpu_hours: int
    watts: int
    tco2: float


TABLE_2 = {
    "7b": Run(184_320, 400, 31.22),
    "13b": Run(368_640, 400, 62.44),
    "34b": Run(1_038_336, 350, 153.90),
    "70b": Run(1_720_320, 400, 291.42),
}
PAPER_TOKENS = 2_000_000_000_000  # Llama 2, section 2.1
# The hours of Table 2 imply 0.41, 0.40, 0.36 and 0.44 by `implied_mfu` on the A100's peak: 0.40 is their middle.
DEFAULT_MFU = 0.40

# --- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment of a training step, by part."""

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(asdict(self).values())


def activation_bytes_per_token(config: ModelConfig, compute_bytes: int = 2) -> int:
    """Bytes that one layer keeps of one token for its backward pass.

    The count of Korthikanti et al. 2022 (section 4.1), made anew for what this model's plain operations keep. With c
    bytes a number: each of two norms its fp32 input, the same normed, and the product with its gain (8 D + c D);
    attention the rotated q and k, the qkv that v is a part of, its output (c (3 H K + 3 G K)) and a sum per head (4 H);
    SwiGLU gate and up, silu of the gate, the product (4 c F). No dropout, no score matrix (flash attention).
    """
    norms = 2 * ((8 + compute_bytes) * config.hidden_size + 4)
    attention = 3 * compute_bytes * (attention_width(config) + key_value_width(config)) + 4 * config.num_attention_heads
    return norms + attention + 4 * compute_bytes * config.intermediate_size


def activation_bytes(
    config: ModelConfig, tokens: int, *, checkpointing: bool, compute_bytes: int = 2, residual_bytes: int = 4
) -> int:
    """Bytes kept between forward and backward for so many tokens in all layers.

    checkpointing: each layer keeps its input only; one layer at a time has all of its own, made again. residual_bytes:
    of a number in the residual stream.
    """
    layer = tokens * activation_bytes_per_token(config, compute_bytes)
    if not checkpointing:
        return config.num_hidden_layers * layer
    return config.num_hidden_layers * tokens * config.hidden_size * residual_bytes + layer


CHUNK_LOGITS, MIN_CHUNK = 1 << 24, 256  # of `nn.loss`: logits of a chunk, and the fewest tokens of one


def head_bytes(config: ModelConfig, tokens: int, compute_bytes: int = 2, *, scorer: bool = False) -> int:
    """Bytes of the last norm, the head and the loss for so many tokens, gradients included; of a scorer the norm only.

    A chunk of logits, 2^22 of them in fp32 too where the product is in bf16; the fp32 gradient of the head; of each
    token the norm's fp32 input and the same normed, the hidden state and its gradient.
    """
    states = tokens * config.hidden_size * (8 + 2 * compute_bytes)
    if scorer:
        return states
    chunk = max(MIN_CHUNK, CHUNK_LOGITS // config.vocab_size // 64 * 64)
    logits = min(chunk, tokens) * config.vocab_size
    softmax = 0 if compute_bytes == 4 else 4 * min(logits, 1 << 22)
    return logits * compute_bytes + softmax + 4 * config.vocab_size * config.hidden_size + states


def memory_per_gpu(
    config: ModelConfig,
    *,
    tokens: int,
    gpus: int = 1,
    checkpointing: bool = False,
    compute_bytes: int = 2,
    scorer: bool = False,
) -> Memory:
    """Bytes per GPU of a training step under FSDP2 with AdamW, gradients accumulated over micro-batches.

    tokens: of one micro-batch on one GPU. compute_bytes: 2 for bf16, 4 for fp32. scorer: of a reward model.

    * Weights, gradients and both moments are fp32 and sharded: 16 bytes a weight, over the GPUs.
    * With several GPUs two layers are gathered in the compute type (one at work, one on its way), the layer at work has
      its gradient in it and the one before is being reduced in fp32; table and head stay gathered; the residual stream
      is in the compute type. With one GPU nothing is gathered, but autocast keeps a bf16 copy of each matrix, and the
      residual stream is fp32.

    All parts are added as if their worst moments fell together. Against torch's memory tracker the sum is within 10% on
    one device; under FSDP2 it is 0% to 20% above the peak.
    """
    weights, layers = n_params(config, scorer=scorer), config.num_hidden_layers
    part = parameters(config, scorer=scorer)
    layer, ends = (part.attention + part.feed_forward) // layers, part.embedding + part.head
    if gpus == 1:
        gathered = 2 * n_matmul_params(config, scorer=scorer) if compute_bytes == 2 else 0
    else:
        gathered = layer * (3 * compute_bytes + 4) + ends * compute_bytes
    residual = compute_bytes if gpus > 1 else 4
    activations = activation_bytes(
        config, tokens, checkpointing=checkpointing, compute_bytes=compute_bytes, residual_bytes=residual
    )
    return Memory(
        parameters=4 * weights / gpus,
        gradients=4 * weights / gpus,
        optimizer=8 * weights / gpus,
        gathered=gathered,
        activations=activations,
        head=head_bytes(config, tokens, compute_bytes, scorer=scorer),
    )


def smallest_gpus(
    config: ModelConfig, memory: float, *, tokens: int, checkpointing: bool = False, compute_bytes: int = 2
) -> int | None:
    """The fewest GPUs of so many bytes that hold a training step, or None when no number does."""

    def need(gpus: int) -> float:
        return memory_per_gpu(
            config, tokens=tokens, gpus=gpus, checkpointing=checkpointing, compute_bytes=compute_bytes
        ).total

    if need(1) <= memory:
        return 1
    sharded = 16.0 * n_params(config)
    room = memory - (need(2) - sharded / 2)  # what the parts that are not sharded leave
    return max(2, math.ceil(sharded / room)) if room > 0 else None


def kv_cache_bytes(config: ModelConfig, tokens: int, *, compute_bytes: int = 2) -> int:
    """Bytes of the keys and values of so many tokens (batch x length): 2 L G K numbers each."""
    return tokens * 2 * config.num_hidden_layers * key_value_width(config) * compute_bytes
