"""The same model, data and token budget through `llama2 pretrain` and through transformers' own `Trainer`.

    python tests/bench/quality.py --tokens examples/sources/out/tokens --tokenizer examples/sources/out/tokenizer.model

Both begin with the same weights and read the same rows in the same order; Trainer uses its own loop, its Llama and
torch's AdamW with the paper's numbers. Runs alternate, one process each; both models are then measured by one function.
Prints JSON lines and a table: held-out bits per byte by source (mean over seeds, and the spread between seeds as the
noise) and tokens per second. Needs `pip install accelerate`, which Trainer wants.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokens", required=True, help="a folder of token folders, one per source")
parser.add_argument("--tokenizer", required=True)
parser.add_argument("--weights", default="", help="NAME:WEIGHT,... (default: by size)")
parser.add_argument("--preset", default="1m")
parser.add_argument("--context", type=int, default=256)
parser.add_argument("--batch-size", type=int, default=4096)
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--warmup", type=int, default=50)
parser.add_argument("--heldout", default="0.05")
parser.add_argument("--seeds", default="0,1")
parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--side", choices=["ours", "trainer"], help=argparse.SUPPRESS)
parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
parser.add_argument("--work", help=argparse.SUPPRESS)


def settings(args: argparse.Namespace, out: str) -> Any:
    """The settings of `llama2 pretrain` for one seed."""
    from llama2cli.stages import pretrain

    weights = dict(pair.split(":") for pair in args.weights.split(",") if pair)
    names = sorted(p.name for p in Path(args.tokens).iterdir() if p.is_dir())
    data = [f"{n}={args.tokens}/{n}" + (f":{weights[n]}" if weights else "") for n in names]
    return pretrain.Settings(
        data=data, out=out, preset=args.preset, tokenizer=args.tokenizer, heldout=[args.heldout], context=args.context,
        batch_size=args.batch_size, steps=args.steps, lr=args.lr, warmup=args.warmup, dtype=args.dtype,
        seed=args.seed, save_every=args.steps, eval_every=args.steps, quiet=True,
    )  # fmt: skip


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Train with `llama2 pretrain`; the seconds are those of the steps alone."""
    from llama2cli.stages import pretrain

    record = pretrain.run(settings(args, f"{args.work}/ours"))
    assert record is not None
    rates = [
        json.loads(line)["tokens_per_second"] for line in Path(args.work, "ours/timing.jsonl").read_text().splitlines()
    ]
    seconds = sum(args.batch_size / r for r in rates[1:])
    return {"checkpoint": record["checkpoint"], "tokens_per_second": args.batch_size * (len(rates) - 1) / seconds}


def trainer(args: argparse.Namespace) -> dict[str, Any]:
    """Train transformers' Llama with its Trainer, from our first weights, on our rows."""
    import torch
    import transformers
    from torch.utils.data import Dataset

    from llama2cli.nn import checkpoint
    from llama2cli.nn.model import Llama
    from llama2cli.stages import pretrain
    from llama2cli.training.dist import world

    with world("cpu") as one:
        job = pretrain.prepare(settings(args, f"{args.work}/unused"), one)
    start = Path(args.work, "start")
    start.mkdir()
    model = Llama(job.config)
    model.init_weights(args.seed)
    checkpoint.save_model(start, model, job.tokenizer)
    rows = []
    batches = pretrain.batches(job, None)
    while len(rows) < args.steps * job.shape.rows:
        batch, _ = next(batches)
        for micro in batch.micro:
            rows += list(torch.cat([micro["ids_BT"], micro["targets_BT"][:, -1:]], 1))

    class Rows(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"input_ids": rows[i], "labels": rows[i]}  # it shifts the labels itself

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(start)
    told = transformers.TrainingArguments(
        output_dir=f"{args.work}/hf", max_steps=args.steps, per_device_train_batch_size=job.shape.micro,
        gradient_accumulation_steps=job.shape.rows // job.shape.micro, learning_rate=args.lr, warmup_steps=args.warmup,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, adam_beta1=0.9,
        adam_beta2=0.95, adam_epsilon=1e-5, weight_decay=0.1, max_grad_norm=1.0, optim="adamw_torch_fused",
        save_strategy="no", report_to=[], logging_steps=100, disable_tqdm=True, use_cpu=True, bf16=args.dtype == "bf16",
        dataloader_num_workers=0, seed=args.seed,
    )  # fmt: skip
    loop = InOrder(model=theirs, args=told, train_dataset=Rows())
    began = time.perf_counter()
    loop.train()
    seconds = time.perf_counter() - began
    theirs.save_pretrained(f"{args.work}/theirs")
    return {"checkpoint": f"{args.work}/theirs", "tokens_per_second": args.steps * args.batch_size / seconds}


def measured(args: argparse.Namespace, folder: str) -> dict[str, float]:
    """Held-out bits per byte by source of a checkpoint, whoever trained it."""
    import torch

    from llama2cli.nn import checkpoint
    from llama2cli.stages import pretrain
    from llama2cli.training import heldout
    from llama2cli.training.dist import world
    from llama2cli.training.objective import NextToken

    with world("cpu") as one:
        job = pretrain.prepare(settings(args, f"{args.work}/unused"), one)
        model = checkpoint.load_model(Path(folder), dtype=torch.float32, device="cpu")
        parts = [heldout.held_out(s, job.tokenizer, None) for s in job.corpus.heldout]
        told = heldout.measure(NextToken(model), parts, job.context, job.shape.micro, one, torch.float32)
    return {name: source["bits_per_byte"] for name, source in told["heldout"].items()}


def main() -> None:
    """Run both sides for every seed in turn; print what came out."""
    args = parser.parse_args()
    if args.side:
        record = {"ours": ours, "trainer": trainer}[args.side](args)
        print(json.dumps(record | {"bits_per_byte": measured(args, record["checkpoint"])}))
        return
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "trainer": []}
    for seed in args.seeds.split(","):
        for side, records in found.items():
            with tempfile.TemporaryDirectory() as work:
                command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--seed", seed, "--work", work]
                env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
                out = subprocess.run(command, capture_output=True, text=True, env=env)
                if out.returncode:
                    sys.exit(f"{side}: {out.stderr[-2000:]}")
                records.append(json.loads(out.stdout.splitlines()[-1]))
                print(json.dumps({"side": side, "seed": int(seed)} | records[-1]), flush=True)
    sources = list(found["ours"][0]["bits_per_byte"])

    def row(name: str, pick: Any, form: str) -> str:
        a, b = ([pick(r) for r in found[side]] for side in ("ours", "trainer"))
        spread = max(max(x) - min(x) for x in (a, b))
        mean = [statistics.mean(x) for x in (a, b)]
        last = f"{mean[0] / mean[1]:.2f}x" if name == "tokens/s" else f"{mean[0] - mean[1]:+.4f}"
        return f"| {name} | {mean[0]:{form}} | {mean[1]:{form}} | {last} | {spread:{form}} |"

    print("\n| held-out bits per byte | llama2 pretrain | Trainer | difference | spread between seeds |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for source in sources:
        print(row(source, lambda r, s=source: r["bits_per_byte"][s], ".4f"))
    print(row("tokens/s", lambda r: r["tokens_per_second"], ",.0f"))


if __name__ == "__main__":
    main()
