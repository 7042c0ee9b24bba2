"""The Llama 2 model (section 2.2): pre-norm RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases.

Letters of shapes: B rows, T new positions, S cached positions, D width, H query heads, G key/value heads, K head size,
F feed-forward width, V vocabulary, L layers.

The projections that read the same input are one matrix: `qkv` [(H + 2G) K, D] and `gate_up` [2F, D]. Halves of a head
are the two coordinates that the rotary embedding turns (the layout of Hugging Face folders).

Choices that the paper leaves open:
1. The initial weights are normal(0, 0.02), those of the two projections that write into the residual stream (`out`,
   `down`) divided by sqrt(2 L), as GPT-2's; norms are 1.
2. The head of a reward model is one row without a bias; it starts as normal(0, 1/sqrt(D + 1)).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama2cli.nn import ops
from llama2cli.nn.config import ModelConfig

INIT_STD = 0.02


class Block(nn.Module):
    """One layer: attention and feed-forward, each on the normed residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, width, K = config.hidden_size, config.intermediate_size, config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, K)
        self.eps = config.rms_norm_eps
        self.attn_norm = nn.Parameter(torch.ones(D))
        self.qkv = nn.Parameter(torch.empty((self.heads[0] + 2 * self.heads[1]) * K, D))
        self.out = nn.Parameter(torch.empty(D, self.heads[0] * K))
        self.mlp_norm = nn.Parameter(torch.ones(D))
        self.gate_up = nn.Parameter(torch.empty(2 * width, D))
        self.down = nn.Parameter(torch.empty(D, width))

    def forward(
        self,
        x_BTD: Tensor,
        table: tuple[Tensor, Tensor],
        positions_BT: Tensor | None,
        segments_BT: Tensor | None,
        cache: LayerCache | None = None,
        branches_BT: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after this layer, [B, T, D]."""
        H, G, K = self.heads
        B, T, _ = x_BTD.shape
        qkv = ops.linear(ops.rms_norm(x_BTD, self.attn_norm, self.eps), self.qkv)
        q, k, v = qkv.view(B, T, H + 2 * G, K).split([H, G, G], dim=2)
        q, k = ops.rope(q, k, *table, positions_BT)
        if cache is None:
            o = ops.attention(q, k, v, segments_BT=segments_BT, branches_BT=branches_BT)
        else:
            o = cache.attend(q, k, v)
        x_BTD = x_BTD + ops.linear(o.reshape(B, T, H * K), self.out)
        h = ops.linear(ops.rms_norm(x_BTD, self.mlp_norm, self.eps), self.gate_up)
        return x_BTD + ops.linear(ops.swiglu(h), self.down)


class Llama(nn.Module):
    """The language model, or a reward model. Parameters are not initialised: call `init_weights`, or load a checkpoint.

    scorer: instead of the output table there is one row, `score` [1, D], without a bias (Llama 2, section 3.2.2).
    value_head: that row stands beside the table, for the value of a state in PPO on the policy's own trunk.
    checkpoint_layers: keep only the residual stream between layers and recompute the rest in the backward pass.
    """

    def __init__(self, config: ModelConfig, *, scorer: bool = False, value_head: bool = False) -> None:
        super().__init__()
        self.config, self.scorer = config, scorer
        self.checkpoint_layers = False
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        own_head = not config.tie_word_embeddings and not scorer
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size)) if own_head else None
        self.score = nn.Parameter(torch.empty(1, config.hidden_size)) if scorer or value_head else None
        self.tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        cache: KVCache | None = None,
        branches_BT: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm.

        ids_BT: token ids. positions_BT: default 0..T-1 (with a cache: from the row's length on). segments_BT: a query
        sees the keys of its own segment at or before it; packed texts are segments, padding is one of its own.
        branches_BT: of these keys it sees those of branch 0, the trunk, and of its own branch: several answers to one
        prompt, whose positions go on from the prompt's end, so `positions_BT` must be given.
        cache: the T tokens are appended to each row of it; a query sees the row's earlier tokens and its own. Raises
        ValueError for more positions than `max_position_embeddings` (a packed row whose positions are given may be
        longer), for a cache together with segments, and for branches without segments or positions.
        """
        T = ids_BT.shape[1]
        end = T + (cache.longest if cache is not None else 0)
        if end > self.config.max_position_embeddings and (positions_BT is None or cache is not None):
            raise ValueError(f"{end} positions, the context of the model is {self.config.max_position_embeddings}")
        if branches_BT is not None and (segments_BT is None or positions_BT is None):
            raise ValueError("branches want segments and positions")
        layers: Sequence[LayerCache | None] = [None] * len(self.layers)
        if cache is not None:
            if segments_BT is not None:
                raise ValueError("a cache holds one segment a row")
            layers = cache.extend(T)
            if positions_BT is None:
                positions_BT = cache.slots_BT
        table = self.rope_table(ids_BT.device)
        x = F.embedding(ids_BT, self.embed)
        for layer, layer_cache in zip(self.layers, layers):
            if self.checkpoint_layers and cache is None and torch.is_grad_enabled():
                x = checkpoint(layer, x, table, positions_BT, segments_BT, None, branches_BT, use_reentrant=False)
            else:
                x = layer(x, table, positions_BT, segments_BT, layer_cache, branches_BT)
        if cache is not None:
            cache.advance(T)
        return ops.rms_norm(x, self.norm, self.config.rms_norm_eps)

    def head_weight(self) -> Tensor:
        """The output table [V, D]; the embedding where the two are tied. Raises ValueError for a reward model."""
        if self.scorer:
            raise ValueError("a reward model has no output table")
        return self.embed if self.head is None else self.head

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return ops.linear(hidden, self.head_weight())

    def scores(self, hidden: Tensor) -> Tensor:
        """The scalar of hidden states [..., D]: [...] in fp32, under autocast too. Raises ValueError without one."""
        if self.score is None:
            raise ValueError("a language model has no score")
        return (hidden.float() * self.score[0].float()).sum(-1)

    def rope_table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [max_position_embeddings, K/2] in fp32 on a device; not part of the state."""
        if device not in self.tables:
            c = self.config
            with torch.inference_mode(False):  # a table made while sampling must serve training too
                cos, sin = ops.rope_table(c.head_dim, c.rope_theta, c.max_position_embeddings)
                self.tables[device] = (cos.to(device), sin.to(device))
        return self.tables[device]

    @torch.no_grad()
    def init_weights(self, seed: int = 0, std: float = INIT_STD) -> None:
        """Fill all parameters from a seed: the same values on every device and number of ranks, in fp32 and rounded."""
        for name, param in self.named_parameters():
            fill(param, initial_value(name, tuple(param.shape), self.config, seed, std))

    @torch.no_grad()
    def init_score(self, seed: int = 0, std: float | None = None) -> None:
        """Fill `score` alone, normal(0, std), from a seed; std: by default 1/sqrt(D + 1).

        The default is that of Stiennon et al. 2020, "Learning to summarize from human feedback". The values are those
        that `init_weights` gives. Raises ValueError without a scorer.
        """
        if self.score is None:
            raise ValueError("a language model has no score")
        shape = tuple(self.score.shape)
        value = initial_value("score", shape, self.config, seed) if std is None else drawn("score", shape, seed, std)
        fill(self.score, value)


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int, std: float = INIT_STD) -> Tensor:
    """Initial value of a parameter, fp32 on the CPU; it depends on seed and name, not on the order of drawing."""
    if len(shape) == 1:
        return torch.ones(shape)
    if name.endswith((".out", ".down")):
        std = std / math.sqrt(2 * config.num_hidden_layers)
    if name == "score":
        std = 1 / math.sqrt(config.hidden_size + 1)
    return drawn(name, shape, seed, std)


def drawn(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """Normal(0, std), fp32 on the CPU, from a generator of the parameter's own."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def fill(param: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter; where it is sharded (DTensor) each rank takes its part, nothing is sent."""
    if hasattr(param, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(param, DTensor)
        value = value.to(param.device, param.dtype)
        value = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    param.copy_(value)


# --- key-value cache ----------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of B rows that grow by the tokens of each forward pass; rows may have different lengths.

    keys, values: [L, B, G, S, K], preallocated. lengths: tokens in each row. Prompts of different length are padded on
    the right, run in one pass, and the padding is dropped by `truncate`.
    """

    def __init__(
        self, config: ModelConfig, rows: int, size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, size, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._set([0] * rows)

    def _set(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.longest = max(lengths, default=0)
        self.lengths_B = torch.tensor(lengths, device=self.keys.device)

    @property
    def size(self) -> int:
        """Tokens that a row can hold."""
        return self.keys.shape[3]

    def extend(self, count: int) -> list[LayerCache]:
        """Views of each layer for `count` more tokens a row. Raises ValueError where they do not fit."""
        if self.longest + count > self.size:
            raise ValueError(f"{self.longest + count} tokens in a cache of {self.size}")
        self.slots_BT = self.lengths_B[:, None] + torch.arange(count, device=self.keys.device)
        even = min(self.lengths, default=0) == self.longest
        seen = None
        if self.longest and (count > 1 or not even):
            end = torch.arange(self.longest + count, device=self.keys.device)
            seen = (end <= self.slots_BT[:, :, None])[:, None]
        start = self.longest if even else None
        return [LayerCache(k, v, self.slots_BT, start, self.longest, seen) for k, v in zip(self.keys, self.values)]

    def advance(self, count: int) -> None:
        """Count tokens that a forward pass has appended to every row."""
        self.lengths = [n + count for n in self.lengths]
        self.longest += count
        self.lengths_B = self.lengths_B + count

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget the tail of each row: it keeps its first `lengths[b]` tokens."""
        if len(lengths) != len(self.lengths) or any(not 0 <= n <= old for n, old in zip(lengths, self.lengths)):
            raise ValueError(f"rows of {self.lengths} tokens cannot be cut to {list(lengths)}")
        self._set(list(lengths))

    def select(self, rows: Sequence[int]) -> KVCache:
        """A new cache of these rows, in this order; a row may be taken several times."""
        new = object.__new__(KVCache)
        index = torch.tensor(list(rows), device=self.keys.device)
        new.keys, new.values = self.keys.index_select(1, index), self.values.index_select(1, index)
        new._set([self.lengths[r] for r in rows])
        return new


class LayerCache:
    """One layer's part of a KVCache during one forward pass.

    keys, values: [B, G, S, K], views. slots_BT: where the new tokens go. start: the same as one number where the rows
    are equally long. longest: tokens in the longest row before. seen: mask [B, 1, T, S], None where nothing is hidden.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, slots_BT: Tensor, start: int | None, longest: int, seen: Tensor | None
    ) -> None:
        self.keys, self.values, self.slots_BT = keys, values, slots_BT
        self.start, self.longest, self.seen = start, longest, seen

    def attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """Append keys and values, and attend to the row's tokens up to each query: [B, T, H, K]."""
        T = q_BTHK.shape[1]
        for kept, new in ((self.keys, k_BTGK), (self.values, v_BTGK)):
            if self.start is not None:
                kept[:, :, self.start : self.start + T] = new.transpose(1, 2).to(kept.dtype)
            else:
                rows = torch.arange(len(kept), device=kept.device)[:, None]
                kept[rows, :, self.slots_BT] = new.to(kept.dtype)
        if self.longest == 0:
            return ops.attention(q_BTHK, k_BTGK, v_BTGK)
        end = self.longest + T
        k, v = (x[:, :, :end].to(q_BTHK.dtype) for x in (self.keys, self.values))
        q = q_BTHK.transpose(1, 2)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen, enable_gqa=gqa).transpose(1, 2)
