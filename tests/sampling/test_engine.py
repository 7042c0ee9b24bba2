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


def family(count: int, seed: int, stem: int = 45) -> list[list[int]]:
    """Prompts that begin with the same tokens, as with one system prompt."""
    return [[1, *range(3, 2 + stem), *p[1:]] for p in some(count, seed)]


def some(count: int, seed: int) -> list[list[int]]:
    """Different prompts of 2 to 12 tokens."""
    found = {tuple(p): p for p in prompts(3 * count, seed=seed, longest=12) if len(p) > 1}
    assert len(found) >= count
    return list(found.values())[:count]


def fed(monkeypatch, model: Llama) -> list[tuple[int, ...]]:
    """The shapes of the ids that whole forward passes get from now on."""
    shapes: list[tuple[int, ...]] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **kw: (shapes.append(tuple(ids.shape)), forward(ids, **kw))[1])
    return shapes


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


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_greedy_equals_transformers_in_any_batch(kv_heads):
    """Multi-query, grouped-query and multi-head attention; prompts that are equal or begin alike among the others."""
    import transformers

    from llama2cli.nn.checkpoint import state_to_hf

    model = make(kv_heads)
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
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(state_to_hf(model.state_dict(), c))
    asked = [*prompts(5, seed=4), *family(20, seed=kv_heads)]
    want = []
    for prompt in asked:
        out = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=25,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(out.logits).topk(2).values
        want.append((out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()))
    assert sum(g < NEAR_TIE for _, gaps in want for g in gaps) < 5, "the model has too many near-ties to test with"
    twice, params = [*asked, *asked[::3], *asked[::3]], [SampleParams(25, temperature=0)] * 43
    for rows in (1, 4, 64):
        results = Engine(model, Ends(), rows=rows).generate(twice, params)
        for result, (ids, gaps) in zip(results, [*want, *want[::3], *want[::3]], strict=True):
            assert same_until_near_tie(result.ids, ids, gaps)


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


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_samples_have_the_frequencies_of_the_softmax(kv_heads):
    """Chi-squared over pairs of tokens, 6000 samples of one prompt: of the shared prefill, and of a step."""
    model = make(kv_heads, seed=3)
    prompt, n, heat = prompts(1, seed=5)[0], 6000, 0.8
    params = [SampleParams(2, heat, seed=1, index=i) for i in range(n)]
    results = Engine(model, Ends(), rows=700).generate([prompt] * n, params)
    with torch.no_grad():
        first = torch.softmax(model.logits(model(torch.tensor([prompt])))[0, -1].double() / heat, -1)
        each = torch.tensor([[*prompt, i] for i in range(VOCAB)])
        second = torch.softmax(model.logits(model(each))[:, -1].double() / heat, -1)
    second[EOS] = torch.nn.functional.one_hot(torch.tensor(EOS), VOCAB)  # an answer that has ended stays so
    pairs = torch.tensor([[*r.ids, EOS][:2] for r in results])
    counts = torch.bincount(pairs[:, 0] * VOCAB + pairs[:, 1], minlength=VOCAB * VOCAB).double()
    want = n * (first[:, None] * second).flatten()
    assert counts[want == 0].sum() == 0
    many = want >= 10
    observed, expected = (torch.cat([x[many], x[~many].sum()[None]]) for x in (counts, want))
    k = len(expected) - 1
    assert k > 30
    statistic = ((observed - expected) ** 2 / expected).sum()
    # Wilson-Hilferty: the bound that chance passes once in a thousand (the numbers are the same in every run)
    assert statistic < k * (1 - 2 / (9 * k) + 3.09 * (2 / (9 * k)) ** 0.5) ** 3


def test_samples_of_one_prompt_are_prefilled_once(monkeypatch):
    """Also where they do not fit into the rows together, and other prompts stand before and behind them."""
    model = make(eos_bias=0.5)
    many, *others = sorted(prompts(9, seed=11), key=len)[::-1]
    asked = [many] * 30 + [p for p in others for _ in range(3)] + [many] * 5
    params = [SampleParams(30, 0.9, seed=2, index=i) for i in range(len(asked))]
    alone = [Engine(model, Ends(), rows=1).generate([p], [s])[0] for p, s in zip(asked, params)]
    assert len({tuple(r.ids) for r in alone}) > 40
    for rows in (1, 2, 7, 16, 64):
        shapes = fed(monkeypatch, model)
        engine = Engine(model, Ends(), rows=rows)
        results = engine.generate(asked, params, logprobs=True)
        assert [r.ids for r in results] == [r.ids for r in alone]
        assert sum(n for n, _ in shapes) == 9, "one row for each different prompt"
        monkeypatch.undo()


def test_what_is_kept_for_samples_to_come_is_one_prompt(monkeypatch):
    """And nothing is kept when all have come."""
    model, held = make(eos_bias=0.5), []
    keep = Batch.keep
    monkeypatch.setattr(Batch, "keep", lambda self, *a: (keep(self, *a), held.append(list(self.kept)))[0])
    asked = [p for p in prompts(6, seed=3) for _ in range(10)]
    Engine(model, Ends(), rows=4).generate(asked, [SampleParams(9, seed=1, index=i) for i in range(60)])
    assert {len(kept) for kept in held} == {0, 1} and held[-1] == []


def test_a_common_beginning_is_computed_once(monkeypatch):
    model = make(2, eos_bias=0.5)
    asked = [*family(25, 1), *prompts(6, seed=2), *[[1, 7, *p[1:]] for p in family(25, 3)]]
    params = [SampleParams(20, 0.8 * (i % 3 > 0), seed=5, index=i) for i in range(len(asked))]
    alone = [Engine(model, Ends(), rows=1).generate([p], [s])[0] for p, s in zip(asked, params)]
    trunks: list[int] = []
    admit = Batch.admit
    for rows, scores in ((3, 1 << 30), (64, 1 << 30), (64, 1)):
        monkeypatch.setattr(engine_module, "SCORES_BYTES", scores)
        shapes = fed(monkeypatch, model)
        trunks.clear()
        monkeypatch.setattr(Batch, "admit", lambda self, free: (admit(self, free), trunks.append(len(self.trunks)))[0])
        results = Engine(model, Ends(), rows=rows).generate(asked, params, logprobs=True)
        assert [r.ids for r in results] == [r.ids for r in alone]
        assert [shapes.count((1, n)) for n in (45, 46)] == [1, 1], "each of the two beginnings once"
        assert max(t for shape in shapes if (t := shape[1]) not in (45, 46)) <= 40, "and nothing else is that long"
        assert max(n for n, t in shapes if t < 13) == (1 if scores == 1 else min(rows, 25))
        assert max(trunks) <= 2 and trunks[-1] == 0, "what nobody waits for any more is let go"
        for prompt, result in zip(asked, results):
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([prompt + result.ids])))[0, len(prompt) - 1 : -1].double()
            plain = torch.log_softmax(logits, -1).gather(1, torch.tensor(result.ids)[:, None])[:, 0]
            assert ((torch.tensor(result.logprobs) - plain).exp() - 1).abs().max() < NEAR_TIE
        monkeypatch.undo()


def test_beginnings_that_memory_does_not_hold_are_not_shared(monkeypatch):
    model = make()
    monkeypatch.setattr(engine_module, "CACHE_BYTES", 100 * engine_module.row_bytes(model, 1))
    batch = Batch(Engine(model, Ends()), family(25, 1), [SampleParams(10)] * 25, False)
    assert (batch.stems, batch.stem_of) == ([], {})
    monkeypatch.undo()
    assert len(Batch(Engine(model, Ends()), family(25, 1), [SampleParams(10)] * 25, False).stems) == 1


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


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_poisoned_memory_changes_nothing(monkeypatch, kv_heads):
    """Before each prefill and step all memory that is no row's is poisoned: NaN where nothing should look at all, huge
    numbers where a mask hides it. With prompts that are computed once for many, and rows that move."""
    model = make(kv_heads, eos_bias=0.5)
    asked = [*prompts(30, seed=8), *[p for p in prompts(4, seed=9) for _ in range(9)], *family(24, seed=3)]
    params = [SampleParams(1 + 7 * i % 30, seed=3, index=i) for i in range(len(asked))]
    want = Engine(model, Ends(), rows=5).generate(asked, params, logprobs=True)
    admit, step, batches, poisoned, moved = Batch.admit, Decoder.step, [], [], []

    def poison(batch: Batch):
        lengths = batch.lengths[: batch.n].tolist()
        for memory in (batch.cache.keys, batch.cache.values):
            memory[:, batch.n :] = torch.nan
            memory[:, :, :, max(lengths, default=0) + 1 :] = torch.nan
            for row, length in enumerate(lengths):
                memory[:, row, :, length : max(lengths) + 1] = -1e4
        poisoned.append(batch.n)

    def before_admit(self: Batch, free: int):
        batches[:] = [self]
        poison(self)
        return admit(self, free)

    def before_step(self: Decoder, *args):
        poison(batches[0])
        return step(self, *args)

    retire = Batch.retire
    monkeypatch.setattr(Batch, "admit", before_admit)
    monkeypatch.setattr(Decoder, "step", before_step)
    monkeypatch.setattr(
        Batch, "retire", lambda self, done: (moved.append(min(done) < self.n - 1), retire(self, done))[1]
    )
    got = Engine(model, Ends(), rows=5).generate(asked, params, logprobs=True)
    assert [r.ids for r in got] == [r.ids for r in want]
    for a, b in zip(got, want):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-6)
    assert len(poisoned) > 100 and max(poisoned) == 5 and any(moved)


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


def test_the_cache_takes_a_quarter_of_a_gpu_or_what_is_free(monkeypatch):
    """80 GB, of which others hold some, and torch holds 10 GB, of which it uses 4."""
    gpu, giga = torch.device("cuda"), 10**9
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * giga)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * giga)
    for free, want in ((70, 20), (30, 20), (14, 15), (2, 6)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * giga, 80 * giga))
        assert engine_module.cache_bytes(gpu) == want * giga
    assert engine_module.cache_bytes(torch.device("cpu")) == engine_module.CACHE_BYTES


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


ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.mark.skipif(not ONEDNN, reason="a torch without oneDNN's operator")
def test_weights_in_onednn_layout_give_the_same(monkeypatch):
    model, plain = make(2), Decoder(make(2), 8)
    monkeypatch.setattr(decode.ops, "choices", lambda: {"mode": "auto", "picks": {"matmul.fp32": "fast"}})
    monkeypatch.setattr(decode, "WORTH", 0)
    packed = Decoder(model, 8)
    assert packed.prepared.head.func is not plain.prepared.head.func
    ids, lengths = torch.arange(10, 15), torch.zeros(5, dtype=torch.long)
    with torch.inference_mode():
        want, got = (
            d.step(ids, KVCache(model.config, 8, 4, dtype=torch.float32, device="cpu"), lengths, 0)
            for d in (plain, packed)
        )
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    monkeypatch.setattr(decode, "PACKED_BYTES", 10)
    assert Decoder(model, 8).prepared.head.func is plain.prepared.head.func


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


@pytest.mark.parametrize("copied", [False, True])
def test_weights_that_were_trained_on_are_noticed(monkeypatch, copied):
    """Also where steps read a copy of the weights in another layout."""
    if copied and not ONEDNN:
        pytest.skip("a torch without oneDNN's operator")
    if copied:
        monkeypatch.setattr(decode.ops, "choices", lambda: {"mode": "auto", "picks": {"matmul.fp32": "fast"}})
        monkeypatch.setattr(decode, "WORTH", 0)
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
