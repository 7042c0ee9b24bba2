"""One-token steps of a model over many rows: the same arithmetic as `Llama.forward` with a cache, with its weights laid
out once for it and as few operator calls as possible. The tests hold the two against each other.

Letters of shapes: N rows, D width, H query heads, G key/value heads, K head size, S slots of the cache, L layers, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2cli.nn import cpu, ops
from llama2cli.nn.model import Block, KVCache, Llama

Project = Callable[[Tensor], Tensor]


# --- products of few rows -----------------------------------------------------------------------------------------
# Where `ops` found oneDNN to be the faster library for fp32 products, it is so for steps too, if the weight has its
# layout beforehand; small products are faster with torch's usual one, ten times so the thin ones of attention.

PACKED_BYTES = 6 << 30  # of weights; the layout is a copy
WORTH = 1 << 20  # multiplications in one call, below which oneDNN's fixed cost of some 8 microseconds eats the gain


def prepare(weights: Sequence[Tensor], rows: int) -> list[Project]:
    """x [N, D] -> x weight^T [N, E] for each weight [E, D], where N is at most `rows`."""
    choices = ops.choices()
    onednn = choices["mode"] == "auto" and choices["picks"].get("matmul.fp32") == "fast"
    if any(w.is_cuda or w.dtype != torch.float32 for w in weights) or sum(w.nbytes for w in weights) > PACKED_BYTES:
        onednn = False
    return [
        partial(_packed, _pack(w, rows)) if onednn and rows * w.numel() >= WORTH else partial(_plain, w)
        for w in weights
    ]


def _plain(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def _pack(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def _packed(weight: Tensor, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


# --- steps --------------------------------------------------------------------------------------------------------


class SlotView(KVCache):
    """A KVCache over part of another's memory: keys and values [L, N, G, S, K]."""

    def __init__(self, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> None:
        self.keys, self.values = keys, values
        self._set(list(lengths))


class Decoder:
    """The weights of a model prepared for steps of up to `rows` rows. `refresh` follows a model that was trained on."""

    def __init__(self, model: Llama, rows: int) -> None:
        self.model, self.rows = model, rows
        self.prepared: object = None
        self.refresh()

    def refresh(self) -> None:
        """Prepare the weights, unless they are those that were prepared before."""
        state = [
            ops.choices(),
            *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.model.parameters()),
        ]
        if state == self.prepared:
            return
        model, self.prepared = self.model, state
        c = model.config
        blocks = [cast(Block, layer) for layer in model.layers]
        matrices = [w for b in blocks for w in (b.qkv, b.out, b.gate_up, b.down)]
        *made, self.head = prepare([*matrices, model.head_weight()], self.rows)
        self.norms = [(b.attn_norm, b.mlp_norm) for b in blocks]
        self.projections = [made[i : i + 4] for i in range(0, len(made), 4)]
        cos, sin = model.rope_table(model.embed.device)
        # x * (cos, cos) + (second half, first half) * (-sin, sin) is the rotation of the pairs (first, second half)
        self.cos_S1K = torch.cat((cos, cos), -1)[:, None]
        self.sin_S1K = torch.cat((-sin, sin), -1)[:, None]
        self.heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)

    @cpu.blas()
    def step(self, ids_N: Tensor, cache: KVCache, lengths_N: Tensor, longest: int) -> Tensor:
        """Append one token to each row of the cache's memory and return the logits after it, fp32 [N, V].

        The rows are the first N of the cache; lengths_N: tokens in each of them, longest: the largest of these. Neither
        is written: the caller counts.
        """
        H, G, K = self.heads
        N, T = len(ids_N), longest + 1
        eps = self.model.config.rms_norm_eps
        x = F.embedding(ids_N, self.model.embed)
        D = x.shape[1]
        rows = torch.arange(N, device=x.device)
        cos, sin = self.cos_S1K[lengths_N], self.sin_S1K[lengths_N]
        unseen = torch.arange(T, device=x.device) > lengths_N[:, None]
        mask = torch.zeros(unseen.shape, dtype=x.dtype, device=x.device).masked_fill_(unseen, float("-inf"))
        mask_NG1T = mask[:, None, None].expand(N, G, 1, T)
        for norms, (qkv, out, gate_up, down), keys, values in zip(
            self.norms, self.projections, cache.keys, cache.values
        ):
            y = qkv(F.rms_norm(x, (D,), norms[0], eps)).view(N, H + 2 * G, K)
            qk = y[:, : H + G].float()
            first, second = qk.chunk(2, -1)
            qk = (qk * cos).addcmul_(torch.cat((second, first), -1), sin).to(x.dtype)
            keys[rows, :, lengths_N] = qk[:, H:].to(keys.dtype)
            values[rows, :, lengths_N] = y[:, H + G :].to(values.dtype)
            q = qk[:, :H].reshape(N, G, H // G, K)
            o = attend(q, keys[:N, :, :T].to(x.dtype), values[:N, :, :T].to(x.dtype), mask_NG1T)
            x = x + out(o.reshape(N, H * K))
            x = x + down(ops.swiglu(gate_up(F.rms_norm(x, (D,), norms[1], eps))))
        return self.head(F.rms_norm(x, (D,), self.model.norm, eps)).float()


def attend(q_NGRK: Tensor, k_NGTK: Tensor, v_NGTK: Tensor, mask_NG1T: Tensor) -> Tensor:
    """Attention of one query a row: the R = H/G query heads of a key head are its queries. [N, G, R, K]"""
    if q_NGRK.dtype != torch.float32 or q_NGRK.is_cuda:  # the kernel sums in fp32
        return F.scaled_dot_product_attention(q_NGRK, k_NGTK, v_NGTK, attn_mask=mask_NG1T)
    N, G, R, K = q_NGRK.shape
    k, v = k_NGTK.flatten(0, 1), v_NGTK.flatten(0, 1)  # views; 10 to 20% faster than the kernel on a CPU
    weights = torch.baddbmm(mask_NG1T.flatten(0, 1), q_NGRK.flatten(0, 1), k.transpose(1, 2), alpha=K**-0.5)
    return torch.bmm(torch.softmax(weights, -1), v).view(N, G, R, K)
