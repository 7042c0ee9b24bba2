"""The engine against transformers, against one row at a time, and against one forward pass over what it sampled."""

from __future__ import annotations

import pytest
import torch

from llama2cli.errors import DataError
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import KVCache, Llama
from llama2cli.sampling import decode
from llama2cli.sampling import engine as engine_module
from llama2cli.sampling.decode import Decoder
from llama2cli.sampling.engine import Batch, Engine
from llama2cli.sampling.sampler import SampleParams

NEAR_TIE = 1e-4
VOCAB, CONTEXT, EOS = 131, 96, 2


class Ends:
    """What the engine needs of a tokenizer."""

    eos_id, vocab_size = EOS, VOCAB


def make(kv_heads: int = 2, *, tied: bool = False, seed: int = 0, eos_bias: float = 0.0, dtype=torch.float32) -> Llama:
    """A small model with logits far enough apart for greedy decoding to mean something."""
    model = Llama(ModelConfig(VOCAB, 48, 80, 3, 6, kv_heads, CONTEXT, tie_word_embeddings=tied))
    model.init_weights(seed=seed, std=0.3)
    if eos_bias:  # a direction of the hidden state that is always there and that only EOS reads
        with torch.no_grad():
            assert model.head is not None
            model.norm[0] = 5.0
            model.head[:, 0] = 0.0
            model.head[EOS, 0] = eos_bias
    return model.to(dtype).eval()


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [[1, *torch.randint(3, VOCAB, (n - 1,), generator=generator).tolist()] for n in lengths]


def greedy_by_hand(model: Llama, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
    """Greedy tokens by a whole forward pass each, without cache or engine; and the gap between the two best logits."""
    ids, gaps = list(prompt), []
    while len(ids) < min(len(prompt) + new, CONTEXT) and (len(ids) == len(prompt) or ids[-1] != EOS):
        with torch.no_grad():
            best = model.logits(model(torch.tensor([ids])))[0, -1].topk(2)
        ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
    return ids[len(prompt) :], gaps


def same_until_near_tie(got: list[int], want: list[int], gaps: list[float]) -> bool:
    """Whether two greedy answers agree up to the first near-tie."""
    for i, gap in enumerate(gaps):
        if gap < NEAR_TIE:
            return got[:i] == want[:i]
    return got == want


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_greedy_equals_whole_forward_passes_in_any_batch(kv_heads):
    model = make(kv_heads, tied=kv_heads == 6)
    asked = prompts(23)
    params = [SampleParams(5 + 3 * i % 17, temperature=0) for i in range(23)]
    want = [greedy_by_hand(model, p, s.max_new_tokens) for p, s in zip(asked, params)]
    assert sum(g < NEAR_TIE for _, gaps in want for g in gaps) < 5, "the model has too many near-ties to test with"
    for rows in (1, 3, 8, 64):
        results = Engine(model, Ends(), rows=rows).generate(asked, params)
        for result, (ids, gaps) in zip(results, want):
            assert same_until_near_tie(result.ids, ids, gaps)


def test_greedy_equals_transformers():
    import transformers

    model = make(2)
    c = model.config
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=c.rms_norm_eps,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    from llama2cli.nn.checkpoint import state_to_hf

    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(state_to_hf(model.state_dict(), c))
    asked = prompts(6, seed=4)
    results = Engine(model, Ends()).generate(asked, [SampleParams(30, temperature=0)] * 6)
    for prompt, result in zip(asked, results):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0)
        want = out[0, len(prompt) :].tolist()
        _, gaps = greedy_by_hand(model, prompt, 30)
        assert same_until_near_tie(result.ids, want, gaps)


def test_a_sample_does_not_depend_on_the_batch():
    model = make(eos_bias=0.5)
    asked = prompts(30, seed=1)
    heat = [(1.0, 1.0), (0.7, 0.9), (1.4, 1.0), (0.0, 1.0), (1.0, 0.5)]
    params = [SampleParams(40, *heat[i % 5], seed=7, index=i % 3) for i in range(30)]
    alone = [Engine(model, Ends(), rows=1).generate([p], [s])[0] for p, s in zip(asked, params)]
    assert {r.truncated for r in alone} == {True, False}
    together = Engine(model, Ends(), rows=7).generate(asked, params)
    turned = Engine(model, Ends(), rows=16).generate(asked[::-1], params[::-1])[::-1]
    assert [r.ids for r in together] == [r.ids for r in alone] == [r.ids for r in turned]
    others = Engine(model, Ends(), rows=7).generate(asked, [SampleParams(40, *heat[i % 5], seed=8) for i in range(30)])
    assert sum(a.ids != b.ids for a, b in zip(alone, others)) > 15


def test_kept_log_probabilities_equal_one_forward_pass():
    model = make(eos_bias=0.5)
    asked = prompts(20, seed=2)
    params = [SampleParams(50, t, seed=1) for t in (1.0, 0.6, 1.5, 0.0) for _ in range(5)]
    for prompt, p, result in zip(asked, params, Engine(model, Ends(), rows=6).generate(asked, params, logprobs=True)):
        assert len(result.logprobs) == len(result.sampled_logprobs) == len(result.ids)
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([prompt + result.ids])))[0].double()
        logits = logits[len(prompt) - 1 : -1]
        ids = torch.tensor(result.ids)[:, None]
        plain = torch.log_softmax(logits, -1).gather(1, ids)[:, 0]
        assert ((torch.tensor(result.logprobs) - plain).exp() - 1).abs().max() < NEAR_TIE
        if p.temperature:
            drawn_from = torch.log_softmax(logits / p.temperature, -1).gather(1, ids)[:, 0]
            assert ((torch.tensor(result.sampled_logprobs) - drawn_from).exp() - 1).abs().max() < NEAR_TIE
        else:
            assert result.sampled_logprobs == [0.0] * len(result.ids)


def test_first_tokens_have_the_frequencies_of_the_softmax():
    model = make(seed=3)
    prompt = prompts(1, seed=5)[0]
    n = 4000
    params = [SampleParams(1, temperature=0.5, seed=1, index=i) for i in range(n)]
    results = Engine(model, Ends(), rows=500).generate([prompt] * n, params)
    with torch.no_grad():
        p = torch.softmax(model.logits(model(torch.tensor([prompt])))[0, -1].double() / 0.5, -1)
    counts = torch.bincount(torch.tensor([r.ids[0] for r in results]), minlength=VOCAB).double()
    # every frequency within 5 standard errors: one in a million each by chance
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all()


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_ids_without_a_piece_are_never_drawn(temperature):
    model, small = make(), Ends()
    small.vocab_size = 40  # the model has 131 rows
    asked, params = prompts(8, longest=8), [SampleParams(20, temperature)] * 8
    results = Engine(model, small).generate(asked, params, logprobs=True)
    assert all(i < 40 for r in results for i in r.ids)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([asked[0]])))[0, -1, :40].double()
    assert results[0].logprobs[0] == pytest.approx(torch.log_softmax(logits, -1)[results[0].ids[0]].item(), abs=1e-4)
    assert all(i < 40 for i in Engine(model, small).stream([1, 5], SampleParams(20, temperature)))


def test_where_answers_end():
    model = make(eos_bias=0.5)
    asked = [*prompts(20, seed=6), [1] * (CONTEXT - 1), [1] * (CONTEXT - 3)]
    results = Engine(model, Ends(), rows=4).generate(asked, [SampleParams(25, seed=2)] * len(asked))
    for prompt, result in zip(asked, results):
        most = min(25, CONTEXT - len(prompt))
        assert 1 <= len(result.ids) <= most
        assert EOS not in result.ids[:-1]
        assert result.truncated == (result.ids[-1] != EOS)
        assert not result.truncated or len(result.ids) == most
    assert {r.truncated for r in results} == {True, False}


def test_poisoned_memory_of_other_rows_changes_nothing(monkeypatch):
    """A row that enters the place of a finished one sees nothing of it: all memory is poisoned before each entry."""
    model = make(eos_bias=0.5)
    asked, params = prompts(40, seed=8), [SampleParams(1 + 7 * i % 30, seed=3) for i in range(40)]
    want = Engine(model, Ends(), rows=5).generate(asked, params)
    admit = Batch.admit
    poisoned = []

    def poison(self: Batch, free: int):
        for kept in (self.cache.keys, self.cache.values):
            kept[:, self.n :] = 1e4
            for row, length in enumerate(self.lengths[: self.n].tolist()):
                kept[:, row, :, length:] = -1e4
        poisoned.append(self.n)
        return admit(self, free)

    monkeypatch.setattr(Batch, "admit", poison)
    got = Engine(model, Ends(), rows=5).generate(asked, params)
    assert [r.ids for r in got] == [r.ids for r in want]
    assert len(poisoned) > 5 and max(poisoned) > 0


def test_a_long_answer_holds_no_other(monkeypatch):
    """One answer of 80 tokens among 60 of 4 in 4 rows: the steps are those of the work."""
    steps = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, ids, *a: (steps.append(len(ids)), step(self, ids, *a))[1])
    asked = [[1, 5], *[[1, 5 + i % 50] for i in range(60)]]
    params = [SampleParams(80, 0), *[SampleParams(4, 0)] * 60]
    model = make()
    with torch.no_grad():
        model.head[EOS] = 0  # no answer ends by itself
    results = Engine(model, Ends(), rows=4).generate(asked, params)
    assert [len(r.ids) for r in results] == [80] + [4] * 60
    assert len(steps) <= 80 and sum(steps) == 79 + 60 * 3


def test_cache_bound_lowers_the_rows(monkeypatch):
    model = make()
    monkeypatch.setattr(engine_module, "CACHE_BYTES", 3 * engine_module.row_bytes(model, 30))
    batch = Batch(Engine(model, Ends(), rows=64), prompts(10, longest=20), [SampleParams(10)] * 10, False)
    assert 3 <= batch.rows <= 5
    monkeypatch.setattr(engine_module, "CACHE_BYTES", 1)
    assert Batch(Engine(model, Ends(), rows=64), prompts(10), [SampleParams(10)] * 10, False).rows == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 6])
def test_a_step_equals_the_model(kv_heads, dtype):
    """The decoder's logits are those of `Llama.forward` with its cache, for rows of different length."""
    model = make(kv_heads, dtype=dtype)
    lengths = [1, 17, 5, 30]
    ids = torch.randint(3, VOCAB, (4, 30), generator=torch.Generator().manual_seed(1))
    new = torch.tensor([7, 8, 9, 10])
    with torch.inference_mode():
        caches = [KVCache(model.config, 4, 40, dtype=dtype, device="cpu") for _ in range(2)]
        for cache in caches:
            model(ids, cache=cache)
            cache.truncate(lengths)
        want = model.logits(model(new[:, None], cache=caches[0])[:, 0]).float()
        got = Decoder(model, 4).step(new, caches[1], torch.tensor(lengths), 30)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got - want).norm() <= tolerance * want.norm()
    for ours, theirs in ((caches[1].keys, caches[0].keys), (caches[1].values, caches[0].values)):
        for row, n in enumerate(lengths):
            difference = (ours[:, row, :, : n + 1] - theirs[:, row, :, : n + 1]).float()
            assert difference.norm() <= tolerance * theirs[:, row].float().norm()
            assert torch.equal(ours[:, row, :, :n], theirs[:, row, :, :n])


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a torch without oneDNN's operator")
def test_weights_in_onednn_layout_give_the_same(monkeypatch):
    model, plain = make(2), Decoder(make(2), 8)
    monkeypatch.setattr(decode.ops, "choices", lambda: {"mode": "auto", "picks": {"matmul.fp32": "fast"}})
    monkeypatch.setattr(decode, "WORTH", 0)
    packed = Decoder(model, 8)
    assert packed.head.func is not plain.head.func
    ids, lengths = torch.arange(10, 15), torch.zeros(5, dtype=torch.long)
    with torch.inference_mode():
        want, got = (
            d.step(ids, KVCache(model.config, 8, 4, dtype=torch.float32, device="cpu"), lengths, 0)
            for d in (plain, packed)
        )
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    monkeypatch.setattr(decode, "PACKED_BYTES", 10)
    assert Decoder(model, 8).head.func is plain.head.func


def test_a_step_leaves_the_process_as_it_was():
    matmul = torch.backends.mkldnn.matmul
    before, model = matmul.fp32_precision, make()
    matmul.fp32_precision = "bf16"
    try:
        Engine(model, Ends()).generate(prompts(2), [SampleParams(3)] * 2)
        assert matmul.fp32_precision == "bf16"
        assert not torch.is_inference_mode_enabled()
    finally:
        matmul.fp32_precision = before


def test_weights_that_were_trained_on_are_noticed():
    model = make()
    engine = Engine(model, Ends())
    asked, params = prompts(3), [SampleParams(10, 0)] * 3
    before = engine.generate(asked, params)
    assert list(engine.stream(asked[0], params[0])) == before[0].ids
    other = make(seed=9)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters()):
            ours.copy_(theirs)
    after = engine.generate(asked, params)
    assert [r.ids for r in after] == [r.ids for r in Engine(other, Ends()).generate(asked, params)]
    assert [r.ids for r in after] != [r.ids for r in before]
    assert list(engine.stream(asked[0], params[0])) == after[0].ids


def test_stream_equals_generate_and_keeps_its_cache(monkeypatch):
    model = make(eos_bias=0.5)
    engine = Engine(model, Ends())
    history: list[int] = []
    fed = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **kw: (fed.append(ids.shape[1]), forward(ids, **kw))[1])
    for turn in range(4):
        history = [*history, 1, *prompts(1, seed=turn, longest=8)[0]]
        params = SampleParams(12, 0.8, seed=turn)
        fed.clear()
        answer = list(engine.stream(history, params))
        assert turn == 0 or fed[0] < 12, "a later turn runs only what is new through the model"
        assert [answer] == [r.ids for r in Engine(model, Ends()).generate([history], [params])]
        history += answer


def test_a_stream_that_was_closed_can_go_on():
    model = make()
    engine = Engine(model, Ends())
    prompt = prompts(1, seed=3)[0]
    stream = engine.stream(prompt, SampleParams(20, 0))
    first = [next(stream) for _ in range(3)]
    stream.close()
    again = list(engine.stream(prompt, SampleParams(20, 0)))
    assert again[:3] == first
    shorter = [*prompt[:-2], 50]
    assert list(engine.stream(shorter, SampleParams(20, 0))) == list(
        Engine(model, Ends()).stream(shorter, SampleParams(20, 0))
    )


def test_results_are_told_as_they_come():
    told = []
    asked, params = prompts(9), [SampleParams(4, 0)] * 9
    results = Engine(make(), Ends(), rows=2).generate(asked, params, tick=told.append)
    assert sorted(map(id, told)) == sorted(map(id, results))


@pytest.mark.parametrize("prompt", [[], [1] * CONTEXT, [1] * (CONTEXT + 5)])
def test_prompts_that_cannot_be_answered(prompt):
    engine = Engine(make(), Ends())
    with pytest.raises(ValueError, match="tokens, the context is 96"):
        engine.generate([[1, 5], prompt], [SampleParams(4)] * 2)
    with pytest.raises(ValueError, match="tokens, the context is 96"):
        engine.stream(prompt, SampleParams(4))
    assert engine.generate([], []) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(temperature):
    model = make()
    with torch.no_grad():
        model.head[5, 3] = torch.nan
    engine = Engine(model, Ends())
    with pytest.raises(DataError, match="not finite"):
        engine.generate([[1, 5]], [SampleParams(4, temperature)])
    with pytest.raises(DataError, match="not finite"):
        list(engine.stream([1, 5], SampleParams(4, temperature)))
