"""The model against transformers' LlamaForCausalLM with the same weights: logits and gradients in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama2cli.nn import cpu, ops
from llama2cli.nn.checkpoint import parts, state_from_hf, state_to_hf
from llama2cli.nn.config import ModelConfig, preset
from llama2cli.nn.model import KVCache, Llama, initial_value

SHAPES = {
    "one head": ModelConfig(50, 16, 24, 1, 1, 1, 64),
    "MHA": ModelConfig(101, 32, 88, 3, 4, 4, 64),
    "GQA": ModelConfig(101, 48, 96, 2, 6, 2, 64, rms_norm_eps=1e-6),
    "MQA, another base": ModelConfig(64, 32, 48, 2, 4, 1, 64, rope_theta=500.0),
    "tied": ModelConfig(80, 32, 64, 2, 4, 2, 64, tie_word_embeddings=True),
    "1m": preset("1m"),
}


@pytest.fixture(params=["plain", "fast"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test with torch's own operators, and with all of the faster forms, whatever this machine would choose."""
    before = ops.choices()
    names = ["rms_norm", "rope", "attention", *(["matmul"] if cpu.exact() else [])]
    picks = {f"{name}.fp32": "fast" for name in names} if request.param == "fast" else {}
    ops.restore({"mode": "auto", "picks": picks})
    yield request.param
    ops.restore(before)


def pair(config: ModelConfig, seed: int = 0) -> tuple[LlamaForCausalLM, Llama]:
    """Transformers' model and ours with the same weights, larger than initial ones so that attention is not flat."""
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
            tie_word_embeddings=config.tie_word_embeddings,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.15 + (1.0 if p.dim() == 1 else 0.0))
    ours = Llama(config)
    ours.load_state_dict(state_from_hf(theirs.state_dict(), config))
    return theirs, ours


def close(ours: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    """Within `bound` of the largest value."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < bound, f"relative error {error:.2e}"


def close_gradients(ours: Llama, theirs: LlamaForCausalLM) -> None:
    grads = state_to_hf({n: p.grad for n, p in ours.named_parameters()}, ours.config)
    want = {n: p.grad for n, p in theirs.named_parameters()}
    assert set(grads) == set(want)
    for name, grad in grads.items():
        close(grad, want[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients(shape: str, path: str) -> None:
    config = SHAPES[shape]
    theirs, ours = pair(config)
    ids = torch.randint(0, config.vocab_size, (3, 150 if shape == "1m" else 17))
    want = theirs(ids).logits
    got = ours.logits(ours(ids))
    close(got, want)
    for logits in (want, got):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    close_gradients(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", ["MHA", "GQA", "tied"])
def test_padding(shape: str, side: str, path: str) -> None:
    config = SHAPES[shape]
    theirs, ours = pair(config)
    T, lengths = 12, [12, 7, 1]
    real = torch.stack([(torch.arange(T) < n) if side == "right" else (torch.arange(T) >= T - n) for n in lengths])
    ids = torch.randint(1, config.vocab_size, (3, T)) * real
    want = theirs(ids, attention_mask=real.long()).logits
    got = ours.logits(ours(ids, segments_BT=real.long()))
    close(got[real], want[real])
    weights = torch.randn(T, config.vocab_size)
    for logits in (want, got):
        (logits * weights)[real].sum().backward()
    close_gradients(ours, theirs)


def test_packed_segments_are_separate_texts(path: str) -> None:
    config = SHAPES["GQA"]
    theirs, ours = pair(config)
    texts = [torch.randint(0, config.vocab_size, (n,)) for n in (5, 1, 9)]
    ids = torch.cat(texts)[None]
    segments = torch.cat([torch.full((len(t),), i) for i, t in enumerate(texts)])[None]
    positions = torch.cat([torch.arange(len(t)) for t in texts])[None]
    want = torch.cat([theirs(t[None]).logits[0] for t in texts])
    close(ours.logits(ours(ids, positions, segments))[0], want)
    close(ours.logits(ours(ids, None, segments))[0], want)  # rotary positions are relative


def tree_rows(config: ModelConfig, seed: int = 0) -> tuple[list[list[Tensor]], dict[str, Tensor], list[Tensor]]:
    """Trees of a trunk and answers, packed in two padded rows: (whole texts of each tree, arguments, place of each)."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> Tensor:
        return torch.randint(0, config.vocab_size, (n,), generator=generator)

    rows = [[(7, [5, 1, 9]), (3, [2, 4])], [(4, [6, 6]), (9, []), (1, [1, 2, 3, 1])]]  # a text without answers too
    width, texts, places = 40, [], []
    names = ("ids_BT", "positions_BT", "segments_BT", "branches_BT")
    laid = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in names}
    laid["segments_BT"] -= 1  # what is left of a row is a segment of its own
    for b, trees in enumerate(rows):
        at = 0
        for segment, (trunk, answers) in enumerate(trees):
            pieces = [words(n) for n in (trunk, *answers)]
            texts.append([torch.cat([pieces[0], p]) for p in pieces[1:]] or [pieces[0]])
            trunk_places, starts = torch.arange(at, at + trunk) + b * width, []
            for branch, piece in enumerate(pieces):
                end, first = at + len(piece), trunk if branch else 0
                laid["ids_BT"][b, at:end] = piece
                laid["positions_BT"][b, at:end] = torch.arange(first, first + len(piece))
                laid["segments_BT"][b, at:end] = segment
                laid["branches_BT"][b, at:end] = branch
                starts.append(torch.arange(at, end) + b * width)
                at = end
            places += [torch.cat([trunk_places, s]) for s in starts[1:]] or [trunk_places]
    return texts, laid, places


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("shape", ["MHA", "GQA", "MQA, another base"])
def test_a_tree_is_its_texts(shape: str, recompute: bool, path: str) -> None:
    """A trunk once and several answers: hidden states and gradients of transformers on each whole text alone."""
    theirs, ours = pair(SHAPES[shape])
    ours.checkpoint_layers = recompute
    trees, laid, places = tree_rows(SHAPES[shape])
    texts = [text for tree in trees for text in tree]
    logits = ours.logits(ours(**laid)).flatten(0, 1)
    total = torch.zeros(())
    for i, (text, place) in enumerate(zip(texts, places, strict=True)):
        want = theirs(text[None]).logits[0]
        close(logits[place], want)
        weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(i))
        (want * weights).sum().backward()
        total = total + (logits[place] * weights).sum()
    total.backward()
    close_gradients(ours, theirs)


def test_a_tree_in_bf16(path: str) -> None:
    _, ours = pair(SHAPES["GQA"])
    _, laid, places = tree_rows(SHAPES["GQA"])
    real = torch.cat(places)
    want = ours(**laid).flatten(0, 1)[real]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(**laid).flatten(0, 1)[real]
    assert (got - want).norm() < 0.03 * want.norm()


def test_branches_want_segments_and_positions() -> None:
    _, ours = pair(SHAPES["MHA"])
    zeros = torch.zeros(1, 3, dtype=torch.long)
    for given in ({}, {"segments_BT": zeros}, {"positions_BT": zeros}):
        with pytest.raises(ValueError, match="branches want segments and positions"):
            ours(zeros, branches_BT=zeros, **given)


def test_a_packed_row_may_be_longer_than_the_context() -> None:
    _, ours = pair(SHAPES["MHA"])
    ids = torch.randint(0, 101, (1, 120))
    positions, segments = torch.arange(60).repeat(2)[None], torch.arange(120)[None] // 60
    close(ours(ids, positions, segments)[0, 60:], ours(ids[:, 60:])[0])
    with pytest.raises(IndexError):
        ours(ids, positions + 5, segments)


def test_a_token_sees_only_the_past() -> None:
    config = SHAPES["MHA"]
    _, ours = pair(config)
    ids = torch.randint(0, config.vocab_size, (1, 10))
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % config.vocab_size
    a, b = ours(ids), ours(changed)
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.allclose(a[:, 6:], b[:, 6:])


def test_names_and_shapes_are_those_of_transformers() -> None:
    for config in SHAPES.values():
        theirs, ours = pair(config)
        assert {p.name: p.shape for p in parts(config)} == {n: tuple(p.shape) for n, p in theirs.named_parameters()}
        back = state_from_hf(state_to_hf(ours.state_dict(), config), config)
        assert all(torch.equal(back[n], t) for n, t in ours.state_dict().items())


# --- key-value cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["MHA", "GQA", "MQA, another base"])
@torch.no_grad()
def test_cache_rows_of_different_length(shape: str) -> None:
    """Prompts padded on the right in one pass, then tokens one by one, then several at once: as without a cache."""
    config = SHAPES[shape]
    theirs, ours = pair(config)
    texts = [torch.randint(0, config.vocab_size, (n,)) for n in (20, 13, 30)]
    prompts = [9, 3, 1]
    want = [theirs(t[None]).logits[0] for t in texts]
    cache = KVCache(config, 3, 40, dtype=torch.float32, device="cpu")
    padded = torch.stack([F.pad(t[:n], (0, 9 - n), value=7) for t, n in zip(texts, prompts)])
    hidden = ours(padded, cache=cache)
    cache.truncate(prompts)
    for row, n in enumerate(prompts):
        close(ours.logits(hidden[row, :n]), want[row][:n])
    for step in range(6):
        ids = torch.stack([t[n + step] for t, n in zip(texts, prompts)])[:, None]
        logits = ours.logits(ours(ids, cache=cache))[:, 0]
        for row, n in enumerate(prompts):
            close(logits[row], want[row][n + step])
    assert cache.lengths == [n + 6 for n in prompts] == cache.lengths_B.tolist()
    ids = torch.stack([t[n + 6 : n + 10] for t, n in zip(texts, prompts)])
    logits = ours.logits(ours(ids, cache=cache))
    for row, n in enumerate(prompts):
        close(logits[row], want[row][n + 6 : n + 10])


@torch.no_grad()
def test_cache_takes_several_tokens_at_once() -> None:
    config = SHAPES["GQA"]
    theirs, ours = pair(config)
    text = torch.randint(0, config.vocab_size, (2, 16))
    cache = KVCache(config, 2, 16, dtype=torch.float32, device="cpu")
    pieces = [ours.logits(ours(text[:, a:b], cache=cache)) for a, b in ((0, 5), (5, 9), (9, 10), (10, 16))]
    close(torch.cat(pieces, dim=1), theirs(text).logits)


@torch.no_grad()
def test_cache_rows_are_taken_truncated_and_repeated() -> None:
    config = SHAPES["GQA"]
    theirs, ours = pair(config)
    text = torch.randint(0, config.vocab_size, (1, 12))
    want = theirs(text).logits
    cache = KVCache(config, 1, 16, dtype=torch.float32, device="cpu")
    ours(text[:, :8], cache=cache)
    many = cache.select([0, 0, 0])
    close(ours.logits(ours(text[:, 8:9].expand(3, 1), cache=many)), want[:, 8:9].expand(3, 1, -1))
    many.truncate([9, 8, 4])
    few = many.select([2, 0])
    assert few.lengths == [4, 9] and cache.lengths == [8]
    close(ours.logits(ours(torch.stack([text[0, 4:5], text[0, 9:10]]), cache=few))[:, 0], want[0, [4, 9]])


@torch.no_grad()
def test_cache_refuses_what_does_not_fit() -> None:
    config = SHAPES["MHA"]
    _, ours = pair(config)
    cache = KVCache(config, 2, 4, dtype=torch.float32, device="cpu")
    ours(torch.zeros(2, 3, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="5 tokens in a cache of 4"):
        ours(torch.zeros(2, 2, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="cannot be cut"):
        cache.truncate([4, 1])
    with pytest.raises(ValueError, match="65 positions, the context of the model is 64"):
        ours(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="one segment a row"):
        ours(torch.zeros(2, 1, dtype=torch.long), segments_BT=torch.zeros(2, 1), cache=cache)


def test_a_table_made_while_sampling_serves_training() -> None:
    _, ours = pair(SHAPES["MHA"])
    ids = torch.zeros(1, 4, dtype=torch.long)
    with torch.inference_mode():
        ours(ids)
    ours(ids).sum().backward()


# --- initial weights ----------------------------------------------------------------------------------------------


def test_initial_weights() -> None:
    config = ModelConfig(3000, 128, 352, 8, 4, 2, 64)
    model = Llama(config)
    model.init_weights(seed=3)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
            continue
        std = 0.02 / 4 if name.endswith(("out", "down")) else 0.02  # sqrt(2 * 8 layers) = 4
        assert p.std().item() == pytest.approx(std, rel=0.02) and abs(p.mean().item()) < std / 50, name
        assert torch.equal(p, initial_value(name, tuple(p.shape), config, 3))
    again, other = Llama(config), Llama(config)
    again.init_weights(seed=3)
    other.init_weights(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.embed, other.embed) and not torch.equal(model.embed, model.head)
    assert not torch.equal(model.layers[0].qkv, model.layers[1].qkv)


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_has_a_score_and_no_head(tied: bool) -> None:
    config = ModelConfig(300, 1024, 32, 1, 4, 4, 64, tie_word_embeddings=tied)
    lm, model = Llama(config), Llama(config, scorer=True)
    model.init_weights(seed=3)
    lm.init_weights(seed=3)
    ours, theirs = dict(model.named_parameters()), dict(lm.named_parameters())
    assert model.scorer and not lm.scorer
    assert ours.keys() == (theirs.keys() | {"score"}) - {"head"}
    assert all(torch.equal(ours[n], theirs[n]) for n in ours.keys() & theirs.keys())
    assert model.score.shape == (1, 1024) and model.score.std().item() == pytest.approx(1025**-0.5, rel=0.06)
    first, embed = model.score.clone(), model.embed.clone()
    model.init_score(seed=4)
    assert not torch.equal(model.score, first) and torch.equal(model.embed, embed)
    model.init_score(seed=3)
    assert torch.equal(model.score, first)
    model.init_score(seed=3, std=0.5)
    assert torch.allclose(model.score, first * 0.5 * 1025**0.5)


def test_each_kind_of_model_refuses_the_other_s_head() -> None:
    lm, model, hidden = Llama(SHAPES["MHA"]), Llama(SHAPES["MHA"], scorer=True), torch.zeros(1, 32)
    with pytest.raises(ValueError, match="no output table"):
        model.logits(hidden)
    with pytest.raises(ValueError, match="has no score"):
        lm.scores(hidden)
    with pytest.raises(ValueError, match="has no score"):
        lm.init_score()


def test_scores_are_fp32_under_autocast() -> None:
    model = Llama(SHAPES["MHA"], scorer=True)
    model.init_weights(seed=1)
    hidden = torch.randn(2, 3, 32)
    want = (hidden.double() @ model.score[0].double()).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model.scores(hidden)
    assert got.shape == (2, 3) and got.dtype == torch.float32 and torch.allclose(got, want, atol=1e-6)
    assert model.scores(hidden.bfloat16()).dtype == torch.float32


def test_initial_weights_do_not_depend_on_the_global_generator_or_change_it() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = Llama(SHAPES["MHA"])
    model.init_weights(seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_can_be_made_on_meta_and_filled() -> None:
    config = SHAPES["tied"]
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu").init_weights(seed=5)
    plain = Llama(config)
    plain.init_weights(seed=5)
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids), plain(ids))


# --- the ways in which training runs it ---------------------------------------------------------------------------


def loss_and_gradients(model: Llama, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    hidden = model(ids[:, :-1])
    loss = ops.linear_cross_entropy(hidden.flatten(0, 1), model.head_weight(), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", ["GQA", "tied"])
def test_activation_checkpointing_changes_nothing(shape: str, path: str) -> None:
    config = SHAPES[shape]
    _, ours = pair(config)
    ids = torch.randint(0, config.vocab_size, (2, 20))
    loss, grads = loss_and_gradients(ours, ids)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ours(ids)
    plain = sum(kept)
    ours.checkpoint_layers = True
    again, grads_again = loss_and_gradients(ours, ids)
    assert torch.equal(loss, again) and all(torch.equal(grads[n], grads_again[n]) for n in grads)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ours(ids)
    assert sum(kept) < plain / 3  # it does save memory


def test_bf16_autocast_is_near_fp32() -> None:
    config = SHAPES["GQA"]
    _, ours = pair(config)
    ids = torch.randint(0, config.vocab_size, (2, 20))
    loss, grads = loss_and_gradients(ours, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, rough_grads = loss_and_gradients(ours, ids)
        assert ours(ids).dtype in (torch.float32, torch.bfloat16)
    assert rough.item() == pytest.approx(loss.item(), rel=2e-2)
    assert all(g.dtype == torch.float32 for g in rough_grads.values())
    flat, rough_flat = (torch.cat([g[n].flatten() for n in grads]) for g in (grads, rough_grads))
    assert F.cosine_similarity(flat, rough_flat, dim=0) > 0.99


@pytest.mark.slow  # 20 s of compilation
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks(recompute: bool) -> None:
    config = SHAPES["GQA"]
    theirs, ours = pair(config)
    ids = torch.randint(0, config.vocab_size, (2, 20))
    loss, grads = loss_and_gradients(ours, ids)
    ours.checkpoint_layers = recompute
    for layer in ours.layers:
        layer.compile()
    compiled, compiled_grads = loss_and_gradients(ours, ids)
    close(compiled, loss)
    for name in grads:
        close(compiled_grads[name], grads[name])
    close(ours.logits(ours(ids)), theirs(ids).logits)
    _, laid, places = tree_rows(config)
    _, plain = pair(config)
    real = torch.cat(places)
    close(ours(**laid).flatten(0, 1)[real], plain(**laid).flatten(0, 1)[real])
