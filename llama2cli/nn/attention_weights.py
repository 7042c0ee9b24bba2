"""What a model attends to: the largest attention weight from each token to each token before it (Fig. 10 of Llama 2).

The model's own kernels never hold the weights. Here each layer is run once more for its queries and keys alone, and
their softmax is written out, a few heads at a time. For looking, not for training or sampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2cli.nn import ops
from llama2cli.nn.model import Block, Llama

SCORES_BYTES = 256 << 20  # of fp32 weights that are held at once


@torch.inference_mode()
def largest_weights(model: Llama, ids: Sequence[int]) -> Tensor:
    """The largest weight over all layers and heads, fp32 [T, T] on the model's device: row query, column key.

    0 above the diagonal. Raises ValueError for no ids, or more than the context.
    """
    T = len(ids)
    if not 0 < T <= model.config.max_position_embeddings:
        raise ValueError(f"{T} tokens, the context of the model is {model.config.max_position_embeddings}")
    ids_BT = torch.tensor([list(ids)], device=model.embed.device)
    table = model.rope_table(ids_BT.device)
    hidden = torch.ones(T, T, dtype=torch.bool, device=ids_BT.device).triu(1)
    largest = torch.zeros(T, T, device=ids_BT.device)
    together = max(1, SCORES_BYTES // (4 * T * T))
    x = F.embedding(ids_BT, model.embed)
    for layer in model.layers:
        assert isinstance(layer, Block)
        H, G, K = layer.heads
        qkv = ops.linear(ops.rms_norm(x, layer.attn_norm, layer.eps), layer.qkv)
        q, k, _ = qkv.view(1, T, H + 2 * G, K).split([H, G, G], dim=2)
        q, k = ops.rope(q, k, *table)
        q_HTK = q[0].transpose(0, 1).float() / math.sqrt(K)
        k_GKT = k[0].permute(1, 2, 0).float()
        for begin in range(0, H, together):
            heads = torch.arange(begin, min(begin + together, H), device=ids_BT.device)
            scores = q_HTK[heads] @ k_GKT[heads * G // H]
            weights = scores.masked_fill_(hidden, -math.inf).softmax(-1)
            largest = torch.maximum(largest, weights.amax(0))
        x = layer(x, table, None, None)
    return largest
