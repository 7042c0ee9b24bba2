"""Recorded steps, tried without a GPU: a tape of operators and their memory stands for a CUDA graph."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama2cli.errors import DataError, Misuse
from llama2cli.nn import ops
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import KVCache, Llama
from llama2cli.sampling import engine as engine_module
from llama2cli.sampling import graphs
from llama2cli.sampling.decode import Decoder
from llama2cli.sampling.engine import Batch, Engine
from llama2cli.sampling.graphs import Steps, choose, key_bucket, row_bucket
from llama2cli.sampling.sampler import SampleParams, at_once, climb

VOCAB, CONTEXT, EOS = 131, 96, 2
HEATS = [(1.0, 1.0), (0.7, 0.9), (1.4, 1.0), (0.0, 1.0), (1.0, 0.5)]
# What waits for a GPU, or has a shape that depends on values: neither can be recorded.
FORBIDDEN = {f"aten::{name}" for name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero")}


class Ends:
    """What the engine needs of a tokenizer."""

    eos_id, vocab_size = EOS, VOCAB


class Tape(TorchDispatchMode):
    """Operators with the memory that they read and wrote. To replay is to call them again, in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.played = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [x for x in tree_leaves(args[1:2]) if torch.is_tensor(x) and x.dtype == torch.bool]
        bad = func._schema.name in FORBIDDEN or (masks and func._schema.name.startswith("aten::index"))
        assert not bad, f"{func} cannot be recorded"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.played += 1
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def taping(made: list[Tape]) -> Callable[[Callable[[], Any]], Callable[[], None]]:
    """A recorder that adds its tapes to a list. As on a GPU, to record gives no result."""

    def record(work: Callable[[], Any]) -> Callable[[], None]:
        with Tape() as tape:
            logits = work()
        logits.fill_(torch.nan)
        made.append(tape)
        return tape.replay

    return record


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are read one step late, as from a GPU."""
    start = Batch.__init__
    monkeypatch.setattr(Batch, "__init__", lambda self, *a: (start(self, *a), setattr(self, "late", 1))[0])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buckets, and a process in which nothing has failed."""
    monkeypatch.setattr(graphs, "KEYS", 16)
    monkeypatch.setattr(graphs, "ROWS", 4)
    monkeypatch.setattr(graphs, "ORDINARY", 1)
    monkeypatch.setattr(graphs, "_failed", set())


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch, small: None) -> list[Tape]:
    """The engine as on a GPU: steps are recorded, tokens read late. What was recorded."""
    made: list[Tape] = []
    monkeypatch.setattr(engine_module, "choose", lambda device, steps, compiles=True: "graphs")
    monkeypatch.setattr(graphs, "cuda_recorder", lambda: taping(made))
    late(monkeypatch)
    return made


def make(kv_heads: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Llama:
    """A small model whose answers often end by themselves."""
    model = Llama(ModelConfig(VOCAB, 48, 80, 3, 6, kv_heads, CONTEXT))
    model.init_weights(seed=seed, std=0.3)
    with torch.no_grad():
        assert model.head is not None
        model.norm[0], model.head[:, 0], model.head[EOS, 0] = 5.0, 0.0, 0.5
    return model.to(dtype).eval()


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [[1, *torch.randint(3, VOCAB, (n - 1,), generator=generator).tolist()] for n in lengths]


def asked_of(count: int, seed: int = 0) -> tuple[list[list[int]], list[SampleParams]]:
    """Prompts, some of them several times, and how they are answered."""
    asked = prompts(count, seed)
    asked += asked[::4] * 2
    return asked, [SampleParams(1 + 7 * i % 50, *HEATS[i % 5], seed=3, index=i) for i in range(len(asked))]


# --- buckets ------------------------------------------------------------------------------------------------------


def test_buckets():
    assert [row_bucket(n, 100) for n in (1, 2, 3, 5, 17, 32, 33, 64, 65, 97, 100)] == [
        *(1, 2, 4, 8, 32, 32, 64, 64, 96, 100, 100)
    ]
    assert [key_bucket(n, 1000) for n in (1, 256, 257, 768, 769, 1000)] == [256, 256, 512, 768, 1000, 1000]
    for rows in range(1, 200):
        buckets = [row_bucket(n, rows) for n in range(1, rows + 1)]
        assert all(n <= b <= min(rows, max(2 * n, n + 31)) for n, b in enumerate(buckets, 1))
        assert buckets == sorted(buckets) and len(set(buckets)) <= 6 + -(-rows // 32)
    assert len({key_bucket(n, 4096) for n in range(1, 4097)}) == 16, "the context of the paper's models"


# --- a step with static shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_a_static_step_equals_the_plain_one(small, kv_heads, dtype):
    """For all numbers of rows and lengths around the edges of buckets, in memory that is poisoned wherever a step of
    this bucket does not look (NaN), and full of large numbers where it looks and must not see."""
    model = make(kv_heads, dtype=dtype)
    decoder, rows, size, buckets = Decoder(model, 7), 7, 48, set()
    generator = torch.Generator().manual_seed(0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for n in range(1, rows + 1):
        for longest in (0, 1, 14, 15, 16, 17, 31, 40, 46, 47):
            lengths = torch.randint(0, longest + 1, (n,), generator=generator)
            lengths[n // 2] = longest
            with torch.inference_mode():
                caches = [KVCache(model.config, rows, size, dtype=dtype, device="cpu") for _ in range(2)]
                made: list[Tape] = []
                plain, static = Steps(decoder, caches[0]), Steps(decoder, caches[1], "graphs", taping(made))
                bucket = row_bucket(n, rows), key_bucket(longest + 1, size)
                buckets.add(bucket)
                content = torch.randn(caches[0].keys.shape, generator=generator).to(dtype)
                for cache, steps in zip(caches, (plain, static)):
                    for memory in (cache.keys, cache.values):
                        memory.copy_(content)
                        memory[:, n:] = 1e4
                        memory[:, bucket[0] :] = torch.nan
                        for row, length in enumerate(lengths.tolist()):
                            memory[:, row, :, length:] = -1e4
                        memory[:, :, :, bucket[1] :] = torch.nan
                    steps.ids_R[:n] = torch.arange(5, 5 + n)
                    steps.ids_R[n:] = VOCAB - 1  # as rows leave it that have ended
                    steps.lengths_R[:n] = lengths
                want = plain.run(n, longest)
                for time in range(3):  # as an ordinary step, recorded and replayed, replayed
                    got = static.run(n, longest)
                    assert got.shape == want.shape and got.isfinite().all()
                    assert (got - want).norm() <= tolerance * want.norm(), (n, longest, time)
                    for ours, theirs in ((caches[1].keys, caches[0].keys), (caches[1].values, caches[0].values)):
                        for row, length in enumerate(lengths.tolist()):
                            difference = (ours[:, row, :, : length + 1] - theirs[:, row, :, : length + 1]).float()
                            assert difference.norm() <= tolerance * theirs[:, row, :, : length + 1].float().norm()
                            same = ours[:, row, :, length + 1 :] == theirs[:, row, :, length + 1 :]
                            assert (same | theirs[:, row, :, length + 1 :].isnan()).all()
                assert len(made) == 1 and made[0].played == 2
    assert len(buckets) == 4 * 3


def test_what_cannot_be_recorded_is_noticed_by_the_tape():
    x = torch.arange(5.0)
    for forbidden in (lambda: int(x[1]), lambda: x[x > 2], lambda: x.nonzero(), lambda: bool(x.any())):
        with pytest.raises(AssertionError, match="cannot be recorded"):
            taping([])(forbidden)


# --- the engine with recorded steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 7, 16])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_answers_are_the_same(tapes, kv_heads, rows):
    model, (asked, params) = make(kv_heads), asked_of(30, seed=1)
    got = Engine(model, Ends(), rows=rows).generate(asked, params, logprobs=True)
    assert len(tapes) > 2 and sum(t.played for t in tapes) > len(tapes)
    for prompt, p, result in zip(asked, params, got):  # each by itself, step by step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "choose", lambda device, steps, compiles=True: "plain")
            patch.setattr(engine_module, "LATE", 0)
            (want,) = Engine(model, Ends(), rows=1).generate([prompt], [p], logprobs=True)
        assert (result.ids, result.truncated) == (want.ids, want.truncated)
        assert result.logprobs == pytest.approx(want.logprobs, abs=1e-4)
        assert result.sampled_logprobs == pytest.approx(want.sampled_logprobs, abs=2e-4)
    assert {r.truncated for r in got} == {True, False}


@pytest.mark.parametrize("ordinary", [1, 3])
def test_a_bucket_is_recorded_when_it_comes_again(tapes, monkeypatch, ordinary):
    steps: list[tuple[int, int]] = []
    step = Decoder.step
    monkeypatch.setattr(graphs, "ORDINARY", ordinary)
    monkeypatch.setattr(
        Decoder,
        "step",
        lambda self, ids, c, l, longest, *a: (steps.append((len(ids), longest)), step(self, ids, c, l, longest, *a))[1],
    )
    model = make()
    with torch.no_grad():
        model.head[EOS] = 0  # no answer ends by itself
    params = [SampleParams(40 if i < 7 else 39, 0) for i in range(8)]
    Engine(model, Ends(), rows=8).generate([[1, 5 + i] for i in range(8)], params)
    each = ordinary + 1  # as it is, and once for the tape
    assert steps == [(8, 15)] * each + [(8, 31)] * each + [(8, 47)] * each, "the last step, of 7 rows, takes 8 too"
    assert [t.played for t in tapes] == [14 - ordinary, 16 - ordinary, 9 - ordinary]


def test_nothing_is_read_before_the_next_step_was_launched(tapes, monkeypatch):
    """But where an answer is full, which the processor knows; and a row that has ended takes one step more."""
    log: list[str] = []
    on_the_way, run = engine_module.on_the_way, Steps.run
    monkeypatch.setattr(Steps, "run", lambda self, n, m: (log.append(f"step {n}"), run(self, n, m))[1])

    def reading(ids: torch.Tensor) -> Callable[[], list[int]]:
        read = on_the_way(ids)
        return lambda: (log.append("read"), read())[1]

    monkeypatch.setattr(engine_module, "on_the_way", reading)
    model = make()
    with torch.no_grad():
        model.head[EOS] = 0
    Engine(model, Ends(), rows=2).generate([[1, 5], [1, 6]], [SampleParams(5, 0), SampleParams(3, 0)])
    assert log == ["step 2", "read", "step 2", "read", "read", "step 1", "step 1", "read", "read"]
    ends = Ends()
    ends.eos_id = Engine(model, Ends()).generate([[1, 5]], [SampleParams(1, 0)])[0].ids[0]
    log.clear()
    (result,) = Engine(model, ends).generate([[1, 5]], [SampleParams(5, 0)])
    assert result.ids == [ends.eos_id] and log == ["step 1", "read"]


def test_late_reading_alone_changes_nothing(monkeypatch):
    model, (asked, params) = make(), asked_of(40, seed=2)
    for rows in (1, 5, 64):
        want = Engine(model, Ends(), rows=rows).generate(asked, params, logprobs=True)
        with monkeypatch.context() as patch:
            late(patch)
            got = Engine(model, Ends(), rows=rows).generate(asked, params, logprobs=True)
        assert [r.ids for r in got] == [r.ids for r in want]
        assert [r.truncated for r in got] == [r.truncated for r in want]
        for a, b in zip(got, want):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("vocab", [VOCAB, 5000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(tapes, temperature, vocab):
    """Also where they are read one step late: the row has taken a step by then, with whatever token was found. Where
    the sampler sums a large vocabulary in blocks that is one behind the last."""
    model = Llama(ModelConfig(vocab, 48, 80, 1, 6, 2, CONTEXT))
    model.init_weights(seed=0, std=0.3)
    ends = Ends()
    ends.vocab_size = vocab
    with torch.no_grad():
        assert model.head is not None
        model.head[5, 3] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        Engine(model, ends).generate([[1, 5], [1, 7]], [SampleParams(9, temperature)] * 2)
    with pytest.raises(DataError, match="not finite"):
        list(Engine(model, ends).stream([1, 5], SampleParams(9, temperature)))


def test_a_conversation(tapes):
    model = make()
    engine, history = Engine(model, Ends()), []
    for turn in range(4):
        history = [*history, 1, *prompts(1, seed=turn, longest=8)[0]]
        params = SampleParams(12, 0.8, seed=turn)
        answer = list(engine.stream(history, params))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "choose", lambda device, steps, compiles=True: "plain")
            assert answer == list(Engine(model, Ends()).stream(history, params))
        history += answer
    assert len(tapes) > 1


# --- weights that move --------------------------------------------------------------------------------------------


def moved(model: Llama, other: Llama, how: str) -> None:
    """Give a model another's weights: in place, as an optimizer does, or in new memory."""
    for ours, theirs in zip(model.parameters(), other.parameters()):
        if how == "in place":
            with torch.no_grad():
                ours.copy_(theirs)
        else:
            ours.data = theirs.detach().clone()


@pytest.mark.parametrize("how", ["in place", "new memory"])
def test_weights_that_moved_are_seen(tapes, how):
    """As in training by rollouts: the same engine answers before and after an update."""
    model, other, (asked, params) = make(), make(seed=9), asked_of(20)
    engine = Engine(model, Ends(), rows=6)
    before = engine.generate(asked, params)
    stream = list(engine.stream(asked[3], params[3]))
    moved(model, other, how)
    after = engine.generate(asked, params)
    assert [r.ids for r in after] == [r.ids for r in Engine(other, Ends(), rows=6).generate(asked, params)]
    assert [r.ids for r in after] != [r.ids for r in before]
    assert list(engine.stream(asked[3], params[3])) == after[3].ids != stream


def test_what_was_recorded_reads_the_weights_where_they_are(small):
    """Weights moved in place are seen by a recorded step, and weights prepared anew make it forget what it has."""
    model, other, made = make(), make(seed=9), []
    decoder = Decoder(model, 2)
    with torch.inference_mode():
        cache = KVCache(model.config, 2, 16, dtype=torch.float32, device="cpu")
        steps = Steps(decoder, cache, "graphs", taping(made))
        for _ in range(2):
            steps.run(2, 3)
        moved(model, other, "in place")
        got = steps.run(2, 3).clone()
        assert len(made) == 1 and made[0].played == 2
        cache = KVCache(model.config, 2, 16, dtype=torch.float32, device="cpu")
        assert torch.allclose(got, Steps(Decoder(other, 2), cache).run(2, 3), rtol=1e-4, atol=1e-4)
        decoder.refresh()
        steps.run(2, 3)
        assert not steps.recorded and made[0].played == 2


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "graphs"])
def test_the_cache_is_freed_when_the_answers_are_there(tapes, monkeypatch, form):
    """By reference counting alone: nothing waits for the collector of cycles while a training step wants the memory."""
    monkeypatch.setattr(engine_module, "choose", lambda device, steps, compiles=True: form)
    held: list[weakref.ref[Any]] = []
    start = Steps.__init__

    def watch(self: Steps, decoder: Decoder, cache: KVCache, *more: Any) -> None:
        start(self, decoder, cache, *more)
        held.extend(weakref.ref(x) for x in (self, cache, cache.keys, cache.values))

    monkeypatch.setattr(Steps, "__init__", watch)
    engine, (asked, params) = Engine(make(), Ends(), rows=6), asked_of(20)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            results = engine.generate(asked, params, logprobs=True)
            tapes.clear()
            assert len(results) == len(asked) and held and not [r for r in held if r() is not None]
    finally:
        gc.enable()


# --- the choice of a form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "steps", "failed", "form"),
    [
        ("auto", 10, "", "graphs"),
        ("auto", 5000, "", "compiled"),
        ("auto", 5000, "compiled", "graphs"),
        ("auto", 5000, "compiled graphs", "plain"),
        ("auto", 10, "graphs", "plain"),
        ("plain", 5000, "", "plain"),
        ("graphs", 5000, "", "graphs"),
        ("compiled", 0, "", "compiled"),
    ],
)
def test_the_form_on_a_gpu(monkeypatch, small, asked, steps, failed, form):
    monkeypatch.setenv("LLAMA2_DECODE", asked)
    monkeypatch.setattr(graphs, "_failed", set(failed.split()))
    assert choose(torch.device("cuda"), steps) == form
    monkeypatch.setattr(ops, "choices", lambda: {"mode": "plain", "picks": {}})
    assert choose(torch.device("cuda"), steps) == ("plain" if asked == "auto" else form)


def test_the_form_on_a_cpu(monkeypatch, capsys):
    cpu = torch.device("cpu")
    monkeypatch.delenv("LLAMA2_DECODE", raising=False)
    assert choose(cpu, 5000) == "plain" and capsys.readouterr().err == ""
    monkeypatch.setenv("LLAMA2_DECODE", "graphs")
    assert choose(cpu, 5000) == "plain"
    assert "LLAMA2_DECODE=graphs is for a GPU" in capsys.readouterr().err
    monkeypatch.setenv("LLAMA2_DECODE", "graph")
    with pytest.raises(Misuse, match="LLAMA2_DECODE: expected one of auto, plain, graphs, compiled, got 'graph'"):
        choose(cpu, 0)


def test_a_recording_that_fails(tapes, monkeypatch, capsys):
    """It is told in one line, the answers are the same, and the process does not try again."""
    model, (asked, params) = make(), asked_of(20)
    want = [r.ids for r in Engine(model, Ends(), rows=6).generate(asked, params)]

    def refuse(work: Callable[[], object]) -> Callable[[], object]:
        work()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphs, "cuda_recorder", lambda: refuse)
    assert [r.ids for r in Engine(model, Ends(), rows=6).generate(asked, params)] == want
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "'plain', 'graphs' failed (RuntimeError: operation not permitted)" in told[0]
    monkeypatch.undo()
    assert choose(torch.device("cuda"), 0) == "graphs"


def test_a_compiler_that_fails(tapes, monkeypatch, capsys):
    def broken(*args: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(engine_module, "choose", lambda device, steps, compiles=True: "compiled")
    monkeypatch.setattr(graphs, "compiled_layer", lambda decoder: broken)
    model, (asked, params) = make(), asked_of(20)
    got = [r.ids for r in Engine(model, Ends(), rows=6).generate(asked, params)]
    assert "'graphs', 'compiled' failed (RuntimeError: no C compiler)" in capsys.readouterr().err
    assert choose(torch.device("cuda"), 5000) == "graphs" and len(tapes) > 1
    monkeypatch.setattr(engine_module, "choose", lambda device, steps, compiles=True: "plain")
    assert got == [r.ids for r in Engine(model, Ends(), rows=6).generate(asked, params)]


# --- compiled layers ----------------------------------------------------------------------------------------------


def compiled_steps(model: Llama, backend: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of plain steps and of compiled ones, over several caches, rows and lengths."""
    decoder, pairs = Decoder(model, 16), []
    assert decoder.prepared is not None
    compiled = graphs._compiled(decoder.prepared.heads, decoder.prepared.eps, backend)
    dtype = model.embed.dtype
    for rows, size in ((8, 64), (16, 80)):
        for n, keys in ((4, 32), (1, 32), (2, 48), (8, size)):
            with torch.inference_mode():
                caches = [KVCache(model.config, rows, size, dtype=dtype, device="cpu") for _ in range(2)]
                for cache in caches:
                    generator = torch.Generator().manual_seed(n)
                    cache.keys.normal_(generator=generator)
                    cache.values.normal_(generator=generator)
                ids, lengths = torch.arange(5, 5 + n), torch.arange(n)
                pairs.append(
                    (
                        decoder.step(ids, caches[0], lengths, keys - 1),
                        decoder.step(ids, caches[1], lengths, keys - 1, compiled),
                    )
                )
                difference = (caches[0].keys - caches[1].keys).float().norm()
                assert difference <= 2e-2 * caches[0].keys.float().norm()
    return pairs


def test_one_compiled_layer_serves_all(monkeypatch):
    """All layers, rows, lengths and caches, with two compilations: for one row, and for several."""
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    for want, got in compiled_steps(make(dtype=torch.bfloat16), backend):
        assert torch.equal(want, got)
    assert len(compilations) <= 3, "a layer is not compiled for each shape"
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_layers_equal_the_plain_ones():
    torch._dynamo.reset()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        for want, got in compiled_steps(make(dtype=dtype), "inductor"):
            assert (want - got).norm() <= tolerance * want.norm()


# --- the sampler on a GPU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_the_nucleus_without_reading(scale):
    """Found from whole rows at once it is the one that is found by trying the best few."""
    generator = torch.Generator().manual_seed(1)
    p = torch.softmax(scale * torch.randn(40, 3000, generator=generator), -1)
    p[0] = 0.0
    p[0, 7] = 1.0
    top_p = torch.rand(40, 1, generator=generator, dtype=torch.float64)
    top_p[::5] = 1.0
    with Tape():
        got = at_once(p, top_p)
    assert torch.equal(got, climb(p, top_p))
