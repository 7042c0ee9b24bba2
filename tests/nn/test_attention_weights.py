"""Attention weights against those that transformers gives out for the same model."""

from __future__ import annotations

import pytest
import torch
import transformers

from llama2cli.nn import attention_weights
from llama2cli.nn.attention_weights import largest_weights
from llama2cli.nn.checkpoint import load_model

IDS = torch.randint(3, 131, (57,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module", params=[1, 2, 6])
def folder(request, tmp_path_factory):
    """Multi-query, grouped-query and multi-head attention, with weights far enough from zero to have peaks."""
    torch.manual_seed(request.param)
    config = transformers.LlamaConfig(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=request.param,
        max_position_embeddings=96,
    )
    made = transformers.LlamaForCausalLM(config)
    for p in made.parameters():
        p.data.mul_(12 if p.dim() > 1 else 1)
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    return folder


def theirs(folder) -> torch.Tensor:
    """The largest over layers and heads, from transformers' output_attentions."""
    made = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        layers = made(torch.tensor([IDS]), output_attentions=True).attentions
    assert len(layers) == 3 and layers[0].shape == (1, 6, 57, 57)
    return torch.stack([layer[0] for layer in layers]).amax((0, 1))


def test_the_largest_weights_are_those_of_transformers(folder, monkeypatch):
    model, want = load_model(folder), theirs(folder)
    got = largest_weights(model, IDS)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert want.max() > 0.9 and ((want > 0.2) & (want < 0.8)).sum() > 100, "a model with something to see"
    assert torch.equal(got.triu(1), torch.zeros(57, 57)) and got[0, 0] == 1
    monkeypatch.setattr(attention_weights, "SCORES_BYTES", 4 * 4 * 57 * 57)  # four heads at a time, then two
    torch.testing.assert_close(largest_weights(model, IDS), got, rtol=1e-6, atol=1e-7)


def test_a_beginning_has_the_weights_that_it_has_in_the_whole(folder):
    model = load_model(folder)
    torch.testing.assert_close(
        largest_weights(model, IDS[:20]), largest_weights(model, IDS)[:20, :20], rtol=1e-4, atol=1e-5
    )


def test_bf16_is_near(folder):
    got = largest_weights(load_model(folder, dtype="bf16"), IDS)
    assert got.dtype == torch.float32 and (got - theirs(folder)).abs().mean() < 0.05


def test_what_does_not_fit(folder):
    model = load_model(folder)
    for ids in ([], [5] * 97):
        with pytest.raises(ValueError, match="the context of the model is 96"):
            largest_weights(model, ids)
