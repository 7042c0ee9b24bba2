"""A model made ready for training: shaped, sharded, filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from llama2cli.nn import checkpoint
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import Llama
from llama2cli.training import dist
from llama2cli.training.dist import World


def build(
    config: ModelConfig,
    world: World,
    *,
    objective: Callable[[Llama], nn.Module],
    scorer: bool = False,
    value_head: bool = False,
    weights: Path | None,
    seed: int,
    dtype: torch.dtype,
    checkpointing: bool = False,
    compile: bool = False,
) -> tuple[Llama, nn.Module]:
    """The model with fp32 weights on this rank's device, and the loss around it, whose forward is to be called.

    objective: makes the loss of a model. scorer: a scalar head in place of the language model's; where the checkpoint
    has none it is drawn from `seed`. value_head: a scalar head beside it, which starts as 0. weights: a checkpoint's
    folder, None to draw them from `seed`. dtype: of the arithmetic. A sharded model is sharded before it has values, so
    no rank holds all of it. Raises DataError for a checkpoint of another shape.
    """
    with torch.device("meta"):
        model = Llama(config, scorer=scorer, value_head=value_head)
    model.checkpoint_layers = checkpointing
    loss = objective(model)
    if compile:
        for layer in model.layers:
            layer.compile()
    dist.shard(loss, model.layers, world, dtype=dtype)
    model.to_empty(device=world.device)
    if weights is None:
        model.init_weights(seed)
    elif not checkpoint.load_into(model, weights) and scorer:
        model.init_score(seed)
    if value_head:
        model.init_score(std=0.0)
    return model, loss
