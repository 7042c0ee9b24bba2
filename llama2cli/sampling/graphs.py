"""Steps over the rows of one cache: one by one as operators, or, on a GPU, recorded once and replayed (CUDA graphs).

A step launches some twenty kernels a layer, and for few rows the processor needs longer to launch them than the GPU to
run them. A recorded step is launched as one. It has static shapes and reads and writes at the addresses it was recorded
with, so:

1. Shapes are rounded up to buckets. Rows to 1, 2, 4, 8, 16, 32, 64, 96, ...; the others are rows of the cache that
   nobody uses, of length 0. Keys to multiples of 256, up to the cache's size; those behind a row's last are masked.
   The first ORDINARY steps of a bucket are not recorded: as many as a recording costs, at the end of the work a bucket
   comes and goes; and libraries and compilers must have run once before they can be recorded.
2. What was recorded lives and dies with its cache, and is forgotten when the weights were prepared anew. Weights that
   moved in place or are in new memory are seen at the next call of the engine; no answer of one call is computed with
   the weights of another.
3. Nothing in a step reads from the device.

LLAMA2_DECODE in the environment names the form: "plain" (one operator after the other), "graphs", "compiled" (recorded
too, each layer compiled by torch.compile before, which costs some seconds in a process). "auto", the default, is plain
on a CPU or with LLAMA2_OPS=plain; on a GPU compiled for work of COMPILE_STEPS steps and more, else graphs. What cannot
be had is told in one line, and the next simpler form is taken until the process ends.

Letters of shapes: R rows of the cache, N rows in use, V vocabulary.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from llama2cli import console
from llama2cli.errors import Misuse
from llama2cli.nn import ops
from llama2cli.nn.model import KVCache
from llama2cli.sampling.decode import Decoder, layer_of

FORMS = ("plain", "graphs", "compiled")
VARIABLE = "LLAMA2_DECODE"
COMPILE_STEPS = 1000
ROWS, KEYS = 32, 256  # rows above the powers of two up to this, and keys, come in multiples of these
ORDINARY = 3

Replay = Callable[[], object]
Recorder = Callable[[Callable[[], object]], Replay]  # runs the work, and gives what runs it again

_failed: set[str] = set()  # forms that this process has found not to work


def choose(device: torch.device, steps: int, compiles: bool = True) -> str:
    """The form for so many steps on a device. compiles: where it is free to choose. Raises Misuse for a LLAMA2_DECODE
    that is none."""
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in (*FORMS, "auto"):
        raise Misuse(f"expected one of auto, {', '.join(FORMS)}, got {asked!r}", VARIABLE)
    if device.type != "cuda":
        if asked in ("graphs", "compiled"):
            console.warn(f"{VARIABLE}={asked} is for a GPU: decoding is plain on a {device.type}", VARIABLE)
        return "plain"
    if asked == "auto":
        asked = (
            "plain"
            if ops.choices()["mode"] == "plain"
            else "compiled"
            if compiles and steps >= COMPILE_STEPS
            else "graphs"
        )
    if asked == "compiled" and "compiled" in _failed:
        asked = "graphs"
    return "plain" if asked == "graphs" and "graphs" in _failed else asked


def row_bucket(n: int, rows: int) -> int:
    """How many of a cache's rows a step over n of them takes."""
    return min(rows, 1 << (n - 1).bit_length() if n <= ROWS else -(-n // ROWS) * ROWS)


def key_bucket(n: int, size: int) -> int:
    """How many of a row's slots a step that wants n of them takes."""
    return min(size, -(-n // KEYS) * KEYS)


class Steps:
    """Steps over the first rows of one cache; the caller writes what they start from.

    ids_R: the token that each row gets next; lengths_R: tokens in each row, 0 in those that are not in use. size of a
    cache that is to be recorded: a multiple of 16 is best (`whole`), kernels want masks of whole vectors.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, form: str = "plain", recorder: Recorder | None = None) -> None:
        rows, device = cache.keys.shape[1], cache.keys.device
        self.decoder, self.cache, self.form = decoder, cache, form
        self.prepared = decoder.prepared
        self.ids_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.lengths_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.logits_RV: Tensor | None = None
        self.recorded: dict[tuple[int, int], Replay] = {}
        self.ordinary: Counter[tuple[int, int]] = Counter()  # steps of a bucket that were not recorded
        self.recorder = recorder

    def run(self, n: int, longest: int) -> Tensor:
        """A step of the first n rows, the longest of which has `longest` tokens: the logits [n, V], fp32.

        They are good until the next step.
        """
        if self.form == "plain":
            return self.decoder.step(self.ids_R[:n], self.cache, self.lengths_R[:n], longest)
        if self.prepared is not self.decoder.prepared:  # what was recorded reads memory that may be gone
            self.forget()
            self.prepared = self.decoder.prepared
        key = row_bucket(n, len(self.ids_R)), key_bucket(longest + 1, self.cache.size)
        try:
            if self.ordinary[key] < ORDINARY:
                logits = self.static(*key)
                self.ordinary[key] += 1
                return logits[:n]
            replay = self.recorded.get(key) or self.record(*key)
        except Exception as error:  # a step can be done again: it writes the same into the same places
            self.fall_back(error)
            return self.run(n, longest)
        replay()
        assert self.logits_RV is not None
        return self.logits_RV[:n]

    def static(self, rows: int, keys: int) -> Tensor:
        """A step whose shapes follow from the bucket: logits [rows, V]."""
        compiled = compiled_layer(self.decoder) if self.form == "compiled" else None
        return self.decoder.step(self.ids_R[:rows], self.cache, self.lengths_R[:rows], keys - 1, compiled)

    def record(self, rows: int, keys: int) -> Replay:
        """Record a bucket's step. Its logits go to memory of ours, so that recordings can share theirs."""
        if self.recorder is None:
            self.recorder = cuda_recorder()
        if self.logits_RV is None:
            width = len(self.decoder.model.head_weight())
            self.logits_RV = torch.empty(len(self.ids_R), width, device=self.ids_R.device)
        logits = self.logits_RV[:rows]
        replay = self.recorder(lambda: logits.copy_(self.static(rows, keys)))
        self.recorded[rows, keys] = replay
        return replay

    def fall_back(self, error: Exception) -> None:
        """Take the next simpler form, and say why."""
        _failed.add(self.form)
        simpler = FORMS[FORMS.index(self.form) - 1]
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        console.warn(f"decoding takes the form {simpler!r}, {self.form!r} failed ({why})")
        self.form = simpler
        self.forget()

    def forget(self) -> None:
        """Let go what was recorded; it is done anew when it comes again."""
        self.recorded.clear()
        self.ordinary.clear()


def whole(size: int, form: str) -> int:
    """The size of a cache for so many tokens a row."""
    return size if form == "plain" else -(-size // 16) * 16


def compiled_layer(decoder: Decoder) -> Callable[..., Tensor]:
    """`layer_of` compiled for the model's heads; one for all layers, batches and lengths."""
    assert decoder.prepared is not None
    return _compiled(decoder.prepared.heads, decoder.prepared.eps, "inductor")


@functools.cache
def _compiled(heads: tuple[int, int, int], eps: float, backend: str) -> Callable[..., Tensor]:
    def one(*args: object) -> Tensor:
        return layer_of(*args, heads=heads, eps=eps)  # type: ignore[arg-type]

    return torch.compile(one, fullgraph=True, dynamic=True, backend=backend)


def cuda_recorder() -> Recorder:
    """Records as CUDA graphs that share one pool of memory: they are never run at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], object]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return record
