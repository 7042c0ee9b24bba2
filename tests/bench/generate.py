"""New tokens per second: our engine beside transformers' generate, on the same weights, prompts and lengths.

    python tests/bench/generate.py [--sizes 1m,15m] [--batches 1,16,k16,64] [--rounds 3] [--threads 1] [--core 0]
    python tests/bench/generate.py --heads 6,2,1 --sizes 15m --batches 1,k16,k64,k128 --prompt 512 --sides ours

Random weights, prompts of 64 tokens, 128 new ones, drawn at temperature 1 (no top-k, no top-p), no stop token. A batch
of k16 is 16 samples of one prompt, which transformers calls num_return_sequences. Each side runs in a process of its
own, and they take turns, so that a machine that others use disturbs all; the figure is the best of the rounds.
transformers is run as it is shipped, and once more with glibc told to keep freed memory, as our commands do.

--heads: the same model with so many key-value heads (multi-head, grouped-query and multi-query attention; Llama 2,
appendix A.2.1), its feed-forward widened until it has as many parameters, as in the paper; with bytes of the cache for
one token, and how many rows of this length the engine's cache holds. Many samples of one long prompt (k64) show what
the steps cost, the prompt is computed once. `--batches ""` runs nothing: the bytes alone, for models of any size.

One JSON line for each size, heads and batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

SIDES = ("ours", "transformers", "transformers_keeping_memory")
KEEP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1m,15m")
    parser.add_argument("--batches", default="1,16,k16,64")
    parser.add_argument("--heads", default="", help="key-value heads (default: those of the size)")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--core", default="", help="core to pin to; not pinned when not given")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sides", default=",".join(SIDES), help="which of %(default)s")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    a = arguments()
    if a.side:
        print(json.dumps(measure(a)))
        return
    sides = a.sides.split(",")
    best: dict[str, dict[str, float]] = {side: {} for side in sides}
    for _ in range(a.rounds if a.batches else 0):
        for side in sides:
            for case, rate in child(side).items():
                best[side][case] = max(best[side].get(case, 0), rate)
    for case in best[sides[0]] or [f"{size}:{heads}:" for size in a.sizes.split(",") for heads in a.heads.split(",")]:
        size, heads, batch = case.split(":")
        rates = {side: best[side][case] for side in sides} if batch else {}
        line: dict[str, Any] = dict(what="generate", size=size, dtype=a.dtype, device=a.device, batch=batch)
        line |= dict(prompt=a.prompt, new=a.new) | (cache(size, int(heads), a) if heads else {}) | rates
        for name, side in (("ratio", SIDES[1]), ("ratio_keeping_memory", SIDES[2])):
            if {SIDES[0], side} <= rates.keys():
                line[name] = round(rates[SIDES[0]] / rates[side], 2)
        print(json.dumps(line))


def child(side: str) -> dict[str, float]:
    """Tokens per second by "size:heads:batch", measured in a fresh process."""
    env = os.environ | (KEEP if side == SIDES[2] else {})
    done = subprocess.run([sys.executable, *sys.argv, "--side", side], stdout=subprocess.PIPE, env=env, check=True)
    return json.loads(done.stdout)


def shape(size: str, heads: int | None, length: int) -> Any:
    """The config of a size, with other key-value heads and the feed-forward that makes up for their parameters."""
    from llama2cli.nn.config import PRESETS

    config = PRESETS[size]
    config = replace(config, max_position_embeddings=max(length, config.max_position_embeddings))
    if heads is None:
        return config
    fewer = 2 * (config.num_key_value_heads - heads) * config.head_dim  # rows of keys and values, D parameters each
    return replace(config, num_key_value_heads=heads, intermediate_size=config.intermediate_size + round(fewer / 3))


def cache(size: str, heads: int, a: argparse.Namespace) -> dict[str, int]:
    """What a model with so many key-value heads keeps for a token, and the rows that the engine's cache holds."""
    import torch

    from llama2cli.nn.checkpoint import DTYPES
    from llama2cli.nn.model import Llama
    from llama2cli.sampling.engine import CACHE_BYTES, row_bytes

    with torch.device("meta"):
        model = Llama(shape(size, heads, a.prompt + a.new)).to(DTYPES[a.dtype])
    return dict(
        kv_heads=heads,
        feed_forward=model.config.intermediate_size,
        parameters=sum(p.numel() for p in model.parameters()),
        cache_bytes_per_token=row_bytes(model, 1),
        largest_batch=CACHE_BYTES // row_bytes(model, a.prompt + a.new),
    )


def measure(a: argparse.Namespace) -> dict[str, float]:
    """One side's tokens per second: the better of two runs after a warm-up."""
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    if a.core:
        os.sched_setaffinity(0, {int(c) for c in a.core.split(",")})
    import torch

    from llama2cli.nn.checkpoint import DTYPES
    from llama2cli.nn.model import Llama

    torch.set_num_threads(a.threads)
    rates = {}
    for size in a.sizes.split(","):
        for heads in a.heads.split(","):
            model = Llama(shape(size, int(heads) if heads else None, a.prompt + a.new))
            model.init_weights(seed=0)
            model.to(a.device, DTYPES[a.dtype])
            for batch in a.batches.split(","):
                rows = int(batch.removeprefix("k"))
                distinct = 1 if batch.startswith("k") else rows
                generator = torch.Generator().manual_seed(rows)
                ids = torch.randint(3, model.config.vocab_size, (distinct, a.prompt), generator=generator)
                run = (ours if a.side == "ours" else theirs)(model, ids, rows // distinct, a.new)
                rates[f"{size}:{heads}:{batch}"] = max(rate(run) for _ in range(3))
    return rates


def rate(run: Any) -> float:
    """Tokens per second of one call."""
    began = time.perf_counter()
    return round(run() / (time.perf_counter() - began), 1)


def ours(model: Any, ids: Any, samples: int, new: int) -> Any:
    """A call that generates with our engine, so many samples of each prompt, and says how many tokens."""
    from llama2cli.nn import ops
    from llama2cli.sampling.engine import Engine
    from llama2cli.sampling.sampler import SampleParams

    class NeverEnds:
        eos_id, vocab_size = -1, model.config.vocab_size

    ops.setup_process()
    prompts = [prompt for prompt in ids.tolist() for _ in range(samples)]
    engine = Engine(model, NeverEnds(), rows=len(prompts))  # type: ignore[arg-type]
    params = [SampleParams(new, 1.0, seed=0, index=i) for i in range(len(prompts))]
    return lambda: sum(len(r.ids) for r in engine.generate(prompts, params))


def theirs(model: Any, ids: Any, samples: int, new: int) -> Any:
    """The same with transformers' generate, its dynamic cache."""
    import torch
    import transformers

    from llama2cli.nn.checkpoint import state_to_hf
    from llama2cli.nn.config import config_to_json

    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_to_json(model.config))).eval()
    hf.to(model.embed.device, model.embed.dtype)
    hf.load_state_dict(state_to_hf(model.state_dict(), model.config), strict=False)
    hf.generation_config.eos_token_id = None
    ids = ids.to(model.embed.device)
    options = dict(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, attention_mask=torch.ones_like(ids)
    )
    options |= dict(max_new_tokens=new, min_new_tokens=new, num_return_sequences=samples)

    def run() -> int:
        with torch.no_grad():
            return hf.generate(ids, **options)[:, ids.shape[1] :].numel()

    return run


if __name__ == "__main__":
    main()
