"""Llama 2, section 2: what the paper says of architecture, recipe and cost, held against the defaults of this project.

One test for each rule or number. Asserted is only what the paper's text or tables say, what its reference code does, or
what follows from those by arithmetic; the shapes of the larger models are neither.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama2cli import cli
from llama2cli.nn import budget, ops
from llama2cli.nn.config import PRESETS, ModelConfig, ffn_size, learning_rate
from llama2cli.nn.model import Block, Llama
from llama2cli.stages import plan, pretrain
from llama2cli.training import optim

PAPER = ["7b", "13b", "34b", "70b"]
TINY = ModelConfig(64, 32, 88, 2, 4, 2, 32)


@pytest.fixture(autouse=True)
def plain_operations() -> Iterator[None]:
    """What is asserted here is the method; that faster paths equal the plain one is tested with them."""
    before = ops.choices()
    ops.force("plain")
    yield
    ops.restore(before)


def default(name: str) -> object:
    """The default of a setting of `pretrain`."""
    return {f.name: f.default for f in dataclasses.fields(pretrain.Settings)}[name]


def tiny(config: ModelConfig = TINY) -> Llama:
    """A small model with weights of some size, so that nothing is nearly linear."""
    model = Llama(config)
    model.init_weights(0, std=0.3)
    return model


# --- 2.2: architecture ------------------------------------------------------------------------------------------------


def block(config: ModelConfig = TINY) -> Block:
    """The first layer of a small model."""
    return tiny(config).layers[0]  # type: ignore[return-value]


def branch(layer: Block, x: torch.Tensor) -> torch.Tensor:
    """What a layer adds to the residual stream."""
    return layer(x, ops.rope_table(8, 10000.0, 32), None, None) - x


def test_2_2_normalization_comes_before_each_sublayer() -> None:
    """Pre-normalization: what attention, and what the feed-forward adds, does not depend on the scale of the stream."""
    x = torch.randn(1, 8, 32, dtype=torch.float64)
    for silent in ("down", "out"):
        layer = block().double()
        getattr(layer, silent).data.zero_()
        layer.eps = 0.0
        torch.testing.assert_close(branch(layer, x), branch(layer, 100 * x), rtol=1e-4, atol=1e-5)
        assert branch(layer, x).abs().max() > 1e-2


def test_2_2_the_norm_is_rmsnorm() -> None:
    """RMSNorm: x over its root mean square, times a gain. By hand, and unlike LayerNorm a shift of x is not undone."""
    x, gain = torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(ops.rms_norm(x, gain, 0.0), torch.tensor([[3 / 2.5, 2 * 4 / 2.5, 0.0, 0.0]]))
    y = torch.randn(2, 16)
    torch.testing.assert_close(ops.rms_norm(y, torch.ones(16), 1e-5), torch.nn.functional.rms_norm(y, (16,), eps=1e-5))
    assert not torch.allclose(ops.rms_norm(y, torch.ones(16), 0.0), ops.rms_norm(y + 1, torch.ones(16), 0.0), atol=0.1)


def test_2_2_the_feed_forward_is_swiglu() -> None:
    """SwiGLU: down(swish(gate x) * up x), three matrices and no other non-linearity."""
    layer = block()
    layer.out.data.zero_()
    x = torch.randn(1, 8, 32)
    normed = torch.nn.functional.rms_norm(x, (32,), eps=1e-5)
    gate, up = layer.gate_up.data.split(TINY.intermediate_size)
    by_hand = (normed @ gate.T) * torch.sigmoid(normed @ gate.T) * (normed @ up.T) @ layer.down.data.T
    torch.testing.assert_close(branch(layer, x), by_hand, rtol=1e-4, atol=1e-5)


def test_2_2_positions_are_rotary() -> None:
    """RoPE: the product of a query and a key depends on their distance only, and a rotation keeps lengths."""
    q, k = torch.randn(1, 32, 1, 8), torch.randn(1, 32, 1, 8)
    q[:], k[:] = q[:, :1], k[:, :1]  # the same vector everywhere
    cos, sin = ops.rope_table(8, 10000.0, 32)
    rq, rk = ops.rope(q, k, cos, sin)
    scores = rq[0, :, 0] @ rk[0, :, 0].T
    for distance in range(-31, 32):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
    assert scores[0].std() > 1e-2
    torch.testing.assert_close(rq.norm(dim=-1), q.norm(dim=-1))


def test_2_2_reference_code_rotates_with_base_10000() -> None:
    """Reference code: pair i of a head of size K turns by position / 10000^(2i/K)."""
    cos, sin = ops.rope_table(128, PRESETS["7b"].rope_theta, 4096)
    for position, pair in [(1, 0), (1, 63), (17, 5), (4095, 40)]:
        angle = position / 10000 ** (2 * pair / 128)
        assert cos[position, pair] == pytest.approx(math.cos(angle), abs=5e-4)
        assert sin[position, pair] == pytest.approx(math.sin(angle), abs=5e-4)
    assert all(c.rope_theta == 10000.0 for c in PRESETS.values())


def test_2_2_reference_code_turns_neighbouring_pairs() -> None:
    """Reference code turns neighbours (2i, 2i+1) as complex numbers; our halves are that after a permutation."""
    x = torch.randn(1, 16, 2, 8)
    angle = torch.outer(torch.arange(16), 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8))
    turned = torch.view_as_complex(x.reshape(1, 16, 2, 4, 2)) * torch.polar(torch.ones(16, 4), angle)[None, :, None]
    reference = torch.view_as_real(turned).flatten(-2)
    halves = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    ours, _ = ops.rope(x[..., halves], x[..., halves], *ops.rope_table(8, 10000.0, 16))
    torch.testing.assert_close(ours, reference[..., halves], rtol=1e-4, atol=1e-5)


def test_2_2_grouped_query_attention_is_for_34b_and_70b_only() -> None:
    """Table 1: GQA marks 34B and 70B; the others have a key-value head for each query head."""
    assert [PRESETS[n].num_key_value_heads < PRESETS[n].num_attention_heads for n in PAPER] == [
        False,
        False,
        True,
        True,
    ]


def test_2_2_grouped_query_attention_has_8_key_value_heads() -> None:
    """A.2.1: 8 KV projections, so that 8 GPUs with tensor parallelism hold one each, and the cache shrinks as much."""
    for name in ("34b", "70b"):
        c = PRESETS[name]
        assert c.num_key_value_heads == 8
        everyone = dataclasses.replace(c, num_key_value_heads=c.num_attention_heads)
        ratio = budget.kv_cache_bytes(everyone, 1000) / budget.kv_cache_bytes(c, 1000)
        assert ratio == c.num_attention_heads / 8


def test_2_2_a_group_shares_its_keys_and_values() -> None:
    """A.2.1: GQA equals multi-head attention whose key and value heads are copies within a group."""
    q, k, v = torch.randn(1, 8, 4, 8), torch.randn(1, 8, 2, 8), torch.randn(1, 8, 2, 8)
    copied = ops.attention(q, k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2))
    torch.testing.assert_close(ops.attention(q, k, v), copied)


def test_2_2_reference_code_has_no_biases() -> None:
    """Reference code: every parameter is a matrix, or the gain of a norm."""
    names = {n.split(".")[-1] for n, p in tiny().named_parameters() if p.ndim == 1}
    assert names == {"attn_norm", "mlp_norm", "norm"}


def test_2_2_reference_code_norm_eps() -> None:
    """Reference code: norm_eps 1e-5."""
    assert {c.rms_norm_eps for c in PRESETS.values()} == {1e-5}


def test_2_2_reference_code_7b_shape() -> None:
    """Reference code's defaults: width 4096, 32 layers, 32 heads; the tokenizer gives 32k pieces (2.2.1)."""
    c = PRESETS["7b"]
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.vocab_size) == (4096, 32, 32, 32000)


@pytest.mark.parametrize(
    ("name", "width", "multiplier", "multiple"),
    [("7b", 11008, None, 256), ("13b", 13824, None, 256), ("70b", 28672, 1.3, 4096)],
)
def test_2_2_feed_forward_widths(name: str, width: int, multiplier: float | None, multiple: int) -> None:
    """Two thirds of four times the width, times the multiplier, rounded up: 11008, 13824, 28672."""
    c = PRESETS[name]
    by_hand = math.ceil(int((multiplier or 1) * int(8 * c.hidden_size / 3)) / multiple) * multiple
    assert c.intermediate_size == width == by_hand == ffn_size(c.hidden_size, multiplier, multiple)


@pytest.mark.parametrize(("name", "billions"), zip(PAPER, (7, 13, 34, 70)))
def test_table_1_parameters(name: str, billions: int) -> None:
    """Table 1: 7B, 13B, 34B, 70B parameters, to the nearest billion but for 70B, which has 69.0."""
    assert budget.n_params(PRESETS[name]) / 1e9 == pytest.approx(billions, abs=1.05)


def test_2_2_context_is_4096() -> None:
    """Table 1: context length 4k for all sizes, twice Llama 1's."""
    assert [PRESETS[n].max_position_embeddings for n in PAPER] == [4096] * 4
    assert default("context") is None  # the model's own


# --- 2.2: the recipe --------------------------------------------------------------------------------------------------


def test_2_2_optimizer_is_adamw_with_these_numbers() -> None:
    """AdamW with beta1 0.9, beta2 0.95, eps 1e-5, as built by the function that `pretrain` calls."""
    optimizer = optim.adamw(tiny().named_parameters(), lr=1e-3)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-5 and not group["amsgrad"]


def test_2_2_weight_decay_is_0_1() -> None:
    """Weight decay 0.1, decoupled: a matrix without gradient shrinks by lr x 0.1 a step."""
    assert default("weight_decay") == 0.1
    param = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = optim.adamw([("w", param)], lr=0.5, weight_decay=0.1)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((2, 2), 1 - 0.5 * 0.1))


def test_2_2_gradients_are_clipped_to_1() -> None:
    """Gradient clipping at 1.0: of the norm over all parameters together."""
    assert default("clip") == 1.0
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))]
    sgd = torch.optim.SGD(params, lr=1.0)
    params[0].grad, params[1].grad = torch.full((3,), 3.0), torch.full((4,), -3.0)
    optim.step(sgd, params, lr=1.0, loss=1.0)
    moved = torch.cat([p.detach() for p in params])
    assert moved.norm() == pytest.approx(1.0, rel=1e-4)
    torch.testing.assert_close(moved.abs(), torch.full((7,), 1 / math.sqrt(7)), rtol=1e-4, atol=0)


def test_2_2_warm_up_has_2000_steps() -> None:
    """Warm-up of 2000 steps, linear, in a run of the paper's length: 2.0T tokens in steps of 4M."""
    steps = round(budget.PAPER_TOKENS / 4e6)
    assert default("warmup") is None and optim.warmup_steps(steps, None) == 2000
    schedule = optim.Schedule(3e-4, 2000, steps)
    assert schedule.lr(1000) == pytest.approx(1.5e-4)
    assert schedule.lr(2000) == pytest.approx(3e-4) == max(schedule.lr(s) for s in range(1, 4000))


def test_2_2_cosine_decays_to_a_tenth_of_the_peak() -> None:
    """Cosine schedule, final rate 10% of the peak; halfway it is at the middle of the two."""
    steps = 500_000
    schedule = optim.Schedule(3e-4, 2000, steps)
    assert schedule.lr(steps) == pytest.approx(3e-5)
    assert schedule.lr((steps + 2000) // 2) == pytest.approx(3e-4 * 0.55)
    for step in (50_000, 123_456, 400_000):
        share = (step - 2000) / (steps - 2000)
        assert schedule.lr(step) == pytest.approx(3e-5 + 2.7e-4 * (1 + math.cos(math.pi * share)) / 2)


@pytest.mark.parametrize(("name", "rate"), zip(PAPER, (3.0e-4, 3.0e-4, 1.5e-4, 1.5e-4)))
def test_table_1_learning_rates(name: str, rate: float) -> None:
    """Table 1: 3.0e-4 for 7B and 13B, 1.5e-4 for 34B and 70B."""
    assert default("lr") is None  # by size
    assert learning_rate(PRESETS[name]) == rate


def test_table_1_batch_is_4m_tokens() -> None:
    """Table 1: a global batch of 4M tokens; we take 1024 rows of 4096, which the paper's M allows."""
    assert default("batch_size") == pytest.approx(4e6, rel=0.05)
    assert default("batch_size") % 4096 == 0  # type: ignore[operator]
    assert plan.parse_count(plan.Settings().batch_size, "") == default("batch_size")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer (tok.model) and some tokens (tokens)."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "d.jsonl").write_text("".join(f'{{"text": "line {i} of {i * i}"}}\n' for i in range(2000)))
    train = ["tokenize", "--train", "--vocab-size", "300", "-o", str(folder / "tok.model"), str(folder / "d.jsonl")]
    assert cli.invoke([*train, "--quiet"]) == 0
    write = [
        "tokenize",
        "--tokenizer",
        str(folder / "tok.model"),
        "-o",
        str(folder / "tokens"),
        str(folder / "d.jsonl"),
    ]
    assert cli.invoke([*write, "--quiet"]) == 0
    return folder


@pytest.mark.parametrize(("name", "rate"), zip(PAPER, (3.0e-4, 3.0e-4, 1.5e-4, 1.5e-4)))
def test_2_2_pretrain_of_a_size_resolves_to_the_papers_run(
    name: str, rate: float, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`pretrain --preset SIZE` for 2.0T tokens, and nothing else said, is the paper's recipe as a whole."""
    steps = round(2.0e12 / (4 << 20))
    args = ["--preset", name, "--tokenizer", str(data / "tok.model"), "--steps", str(steps), "-o", str(data / "run")]
    assert cli.invoke(["pretrain", *args, "--dry-run", "--quiet", str(data / "tokens")]) == 0
    record = json.loads(capsys.readouterr().out)
    got = record["resolved"]
    assert (got["lr"], got["warmup"], got["weight_decay"], got["clip"]) == (rate, 2000, 0.1, 1.0)
    assert (got["batch_size"], got["context"]) == (4 << 20, 4096)
    assert record["tokens"] == pytest.approx(2.0e12, rel=1e-5)
    assert not (data / "run").exists()


# --- 2.2.1 (hardware) and Table 2 -------------------------------------------------------------------------------------

TABLE_2 = {"7b": (184_320, 400, 31.22), "13b": (368_640, 400, 62.44)}
TABLE_2 |= {"34b": (1_038_336, 350, 153.90), "70b": (1_720_320, 400, 291.42)}


@pytest.mark.parametrize("name", PAPER)
def test_table_2_carbon_of_each_row(name: str) -> None:
    """Hours x W give each row's tCO2eq to two decimals, cut as the table cuts them."""
    hours, watts, tonnes = TABLE_2[name]
    assert math.floor(budget.co2_tonnes(hours, watts) * 100) / 100 == tonnes


def test_table_2_carbon_in_total() -> None:
    """The printed total, 539.00, is that of the rows before they were cut; the printed rows add to 538.98."""
    assert round(sum(budget.co2_tonnes(h, w) for h, w, _ in TABLE_2.values()), 2) == 539.00
    assert round(sum(t for _, _, t in TABLE_2.values()), 2) == 538.98


def test_table_2_intensity() -> None:
    """Every row has 0.4235 tonnes for a MWh: PUE x grid of our constants, within what the printed digits allow."""
    for hours, watts, tonnes in TABLE_2.values():
        energy = hours * watts / 1e6
        assert tonnes / energy <= budget.co2_tonnes(1e6, 1) < (tonnes + 0.01) / energy


def test_table_2_hours() -> None:
    """The hours and powers that `plan` prints beside its prediction are the table's; they add to 3,311,616."""
    assert {n: tuple(row) for n, row in budget.TABLE_2.items()} == TABLE_2
    assert sum(h for h, _, _ in TABLE_2.values()) == 3_311_616


def test_table_2_hardware() -> None:
    """A100-80GB, 400 W: the kind that `plan` takes when none is named."""
    assert plan.Settings().gpu == "a100-80gb" and budget.GPUS["a100-80gb"].watts == 400


def test_table_2_hours_are_within_reach_of_the_hardware() -> None:
    """The hours imply a plausible utilization for 2.0T tokens of each size; our assumed one lies among the four."""
    implied = []
    for name, (hours, _, _) in TABLE_2.items():
        flops = budget.train_flops_per_token(PRESETS[name], 4096)
        implied.append(budget.implied_mfu(hours, 2.0e12, flops, 312e12))
    assert 0.3 < min(implied) < budget.DEFAULT_MFU < max(implied) < 0.5
