"""One-token steps of a model over many rows: the same arithmetic as `Llama.forward` with a cache, with its weights laid
out once for it and as few operator calls as possible. The tests hold the two against each other.

Letters of shapes: N rows, D width, H query heads, G key/value heads, K head size, S slots of the cache, L layers, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

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


@dataclass(frozen=True, eq=False)
class Prepared:
    """What steps read. Nothing in it is written or replaced: another state of the model has a `Prepared` of its own.

    matrices: (qkv, out, gate_up, down) of each layer; projections: the same as products; norms: (before attention,
    before the feed-forward). cos, sin [S, 1, K]: x * cos + (second half, first half) * sin is the rotation of the pairs
    (first half, second half).
    """

    state: object
    embed: Tensor
    norms: Sequence[tuple[Tensor, Tensor]]
    matrices: Sequence[tuple[Tensor, ...]]
    projections: Sequence[Sequence[Project]]
    norm: Tensor
    head: Project
    cos: Tensor
    sin: Tensor
    heads: tuple[int, int, int]
    eps: float


class Decoder:
    """The weights of a model prepared for steps of up to `rows` rows. `refresh` follows a model that was trained on."""

    def __init__(self, model: Llama, rows: int) -> None:
        self.model, self.rows = model, rows
        self.prepared: Prepared | None = None
        self.refresh()

    def refresh(self) -> Prepared:
        """The weights prepared, anew unless they are those that were prepared before."""
        state = [
            ops.choices(),
            *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.model.parameters()),
        ]
        if self.prepared is not None and state == self.prepared.state:
            return self.prepared
        self.prepared = None  # two layouts of the weights are not held at a time
        model, c = self.model, self.model.config
        blocks = [cast(Block, layer) for layer in model.layers]
        matrices = [(b.qkv, b.out, b.gate_up, b.down) for b in blocks]
        *made, head = prepare([*(w for four in matrices for w in four), model.head_weight()], self.rows)
        cos, sin = model.rope_table(model.embed.device)
        self.prepared = Prepared(
            state=state,
            embed=model.embed,
            norms=[(b.attn_norm, b.mlp_norm) for b in blocks],
            matrices=matrices,
            projections=[made[i : i + 4] for i in range(0, len(made), 4)],
            norm=model.norm,
            head=head,
            cos=torch.cat((cos, cos), -1)[:, None],
            sin=torch.cat((-sin, sin), -1)[:, None],
            heads=(c.num_attention_heads, c.num_key_value_heads, c.head_dim),
            eps=c.rms_norm_eps,
        )
        return self.prepared

    def step(
        self,
        ids_N: Tensor,
        cache: KVCache,
        lengths_N: Tensor,
        longest: int,
        compiled: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Append one token to each row of the cache's memory and return the logits after it, fp32 [N, V].

        The rows are the first N of the cache; lengths_N: tokens in each of them, longest: the largest of these, or any
        larger number (the keys between are looked at, and masked). Neither is written: the caller counts. compiled: a
        form of `layer_of` for all layers.

        All shapes follow from N and longest, and nothing is read from the device: a step can be recorded.
        """
        assert self.prepared is not None
        return step(self.prepared, ids_N, cache, lengths_N, longest + 1, compiled)


@cpu.blas()
def step(
    p: Prepared,
    ids_N: Tensor,
    cache: KVCache,
    lengths_N: Tensor,
    T: int,
    compiled: Callable[..., Tensor] | None,
) -> Tensor:
    """`Decoder.step`, over the first T slots of the rows."""
    N = len(ids_N)
    x = F.embedding(ids_N, p.embed)
    rows = torch.arange(N, device=x.device)
    cos, sin = p.cos[lengths_N], p.sin[lengths_N]
    unseen = torch.arange(T, device=x.device) > lengths_N[:, None]
    mask = torch.zeros(unseen.shape, dtype=x.dtype, device=x.device).masked_fill_(unseen, float("-inf"))
    parts = zip(cache.keys[:, :N, :, :T], cache.values[:, :N, :, :T])
    if compiled is None:
        for norms, projections, memory in zip(p.norms, p.projections, parts):
            x = layer(x, norms, projections, *memory, cos, sin, mask, rows, lengths_N, heads=p.heads, eps=p.eps)
    else:
        for norms, matrices, memory in zip(p.norms, p.matrices, parts):
            x = compiled(x, norms, matrices, *memory, cos, sin, mask, rows, lengths_N)
    return p.head(F.rms_norm(x, x.shape[1:], p.norm, p.eps)).float()


def layer(
    x_ND: Tensor,
    norms: tuple[Tensor, Tensor],
    projections: Sequence[Project],
    keys_NGTK: Tensor,
    values_NGTK: Tensor,
    cos_N1K: Tensor,
    sin_N1K: Tensor,
    mask_NT: Tensor,
    rows_N: Tensor,
    lengths_N: Tensor,
    *,
    heads: tuple[int, int, int],
    eps: float,
) -> Tensor:
    """The residual stream behind one layer; the new keys and values go into its memory.

    mask_NT: -inf where a row has no key; rows_N: 0..N-1; heads: (H, G, K).
    """
    H, G, K = heads
    N, D = x_ND.shape
    T = mask_NT.shape[1]
    qkv, out, gate_up, down = projections
    y = qkv(F.rms_norm(x_ND, (D,), norms[0], eps)).view(N, H + 2 * G, K)
    qk = y[:, : H + G].float()
    first, second = qk.chunk(2, -1)
    qk = (qk * cos_N1K).addcmul_(torch.cat((second, first), -1), sin_N1K).to(x_ND.dtype)
    keys_NGTK[rows_N, :, lengths_N] = qk[:, H:].to(keys_NGTK.dtype)
    values_NGTK[rows_N, :, lengths_N] = y[:, H + G :].to(values_NGTK.dtype)
    q = qk[:, :H].reshape(N, G, H // G, K)
    mask_NG1T = mask_NT[:, None, None].expand(N, G, 1, T)
    o = attend(q, keys_NGTK.to(x_ND.dtype), values_NGTK.to(x_ND.dtype), mask_NG1T)
    x_ND = x_ND + out(o.reshape(N, H * K))
    return x_ND + down(ops.swiglu(gate_up(F.rms_norm(x_ND, (D,), norms[1], eps))))


def layer_of(x_ND: Tensor, norms: tuple[Tensor, Tensor], matrices: Sequence[Tensor], *rest: Any, **more: Any) -> Tensor:
    """`layer` whose projections are given as matrices, the form that torch.compile takes."""
    return layer(x_ND, norms, [partial(_plain, w) for w in matrices], *rest, **more)


def attend(q_NGRK: Tensor, k_NGTK: Tensor, v_NGTK: Tensor, mask_NG1T: Tensor) -> Tensor:
    """Attention of one query a row: the R = H/G query heads of a key head are its queries. [N, G, R, K]"""
    if q_NGRK.dtype != torch.float32 or q_NGRK.is_cuda:  # the kernel sums in fp32
        return F.scaled_dot_product_attention(q_NGRK, k_NGTK, v_NGTK, attn_mask=mask_NG1T)
    N, G, R, K = q_NGRK.shape
    k, v = k_NGTK.flatten(0, 1), v_NGTK.flatten(0, 1)  # views; 10 to 20% faster than the kernel on a CPU
    weights = torch.baddbmm(mask_NG1T.flatten(0, 1), q_NGRK.flatten(0, 1), k.transpose(1, 2), alpha=K**-0.5)
    return torch.bmm(torch.softmax(weights, -1), v).view(N, G, R, K)
