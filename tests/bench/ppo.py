"""An iteration of PPO beside TRL's PPOTrainer: the same weights, prompts, answers' length, passes and optimizer steps.

    python tests/bench/ppo.py [--data even,mixed] [--rounds 2] [--iterations 5] [--core 0] [-o FILE.md]

64 prompts are answered with 64 tokens each, scored by one reward model, and trained on in 4 passes of one mini-batch;
the models are of the 1m preset, fp32. "even": prompts of 40 tokens; "mixed": instructions as they are published, of at
most 256 tokens, which TRL pads to the longest. Policy and reference begin as one language model, value model and reward
model as another (ours sets the value model's head to 0). Of these weights the rows of the first 259 pieces (control
tokens and bytes) point away from every hidden state, so that no answer ends before its 64 tokens on either side, and
each is text.

Ours is `llama2 ppo`, timed by its own timing.jsonl: "separate" has a value model of its own as TRL has, "head" a value
head on the policy's trunk. Both run the output table on the answers' tokens only and keep log-probabilities from
sampling. TRL's trainer runs in a process of its own, timed from the end of one step to the end of the next; its rollout
is `batch_generation`, its update what follows the whitening of advantages, its scoring what lies between. "malloc
tuned": three environment variables keep glibc from returning memory. The terms of the objective are TRL's on both
sides: KL paid per token by k1 at 0.05, advantages whitened, values clipped at 0.2, one rate for both models, AdamW
0.9/0.95. Ours clips gradients, as the paper does; TRL's trainer does not.

The second table is what must agree: tokens and optimizer steps of an iteration, the entropy, and the KL at the first
step (none, up to rounding) and as it grows. Their random numbers differ, and so do the ids that the reward model reads:
ours encodes an answer's text anew. A ratio is taken within a round, and the lowest round is told. Needs
`pip install trl==1.10.0 datasets accelerate pandas`: later versions have no PPOTrainer.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import beside_trl as peer
import reward
from beside_trl import Task

SIZE = "1m"
BATCH, ANSWER, PASSES = 64, 64, 4
PROMPT = {"even": range(40, 41), "mixed": range(8, 257)}  # tokens of a prompt
BETA, CLIP, LAMBDA, VALUE_WEIGHT = 0.05, 0.2, 0.95, 0.1  # as PPOConfig has them
NEVER = 259  # pieces that are not sampled: the first of the vocabulary, control tokens and bytes
AWAY = 1.0  # against deviations of 0.02
RATE = 2e-5
SKIPPED = 1  # iterations of a run that are not counted
OURS = {"ours, separate": 1.6, "ours, head": 3.0}  # and the bar over TRL
TRLS = ("TRL", "TRL, malloc tuned")
PHASES = ("rollout", "scoring", "update")


# --- the same for both --------------------------------------------------------------------------------------------


def prompts(tokenizer: Any, data: str) -> Iterator[tuple[str, list[int]]]:
    """Instructions, and with "even" their beginnings, that have as many tokens as are wanted; with their ids."""
    from llama2cli.text.chat import encode_prompt

    for record in peer.records("alpaca_eval_graded/binary_pairs.jsonl.gz"):
        words = record["instruction"].split()
        for n in range(len(words), 0, -1):
            text = " ".join(words[:n])
            ids = encode_prompt(tokenizer, [peer.turn("user", text)])
            if len(ids) in PROMPT[data]:
                yield text, ids
            if len(ids) < PROMPT[data].stop or data == "mixed":
                break


def prepare(work: Path, data: str, n: int) -> Task:
    """Files of n prompts, as records and as ids, and the folders of the models."""
    texts = (r["instruction"] for r in peer.records("alpaca_eval_graded/binary_pairs.jsonl.gz"))
    tokenizer = peer.tokenizer(work, SIZE, texts)
    found = list(dict(prompts(tokenizer, data)).items())
    random.Random(0).shuffle(found)
    found = list(itertools.islice(itertools.cycle(found), n))
    told = ({"messages": [peer.turn("user", text)]} for text, _ in found)
    policy, lengths = weights(work, tokenizer), [len(ids) for _, ids in found]
    return {
        "data": data, "prompts": str(peer.write_lines(work / f"{data}.jsonl", told)),
        "ids": str(peer.write_lines(work / f"{data}-ids.jsonl", ({"input_ids": ids} for _, ids in found))),
        "policy": str(policy), "reward": str(reward.head(work, policy)),
        "note": f"* {data}: prompts of {statistics.mean(lengths):.0f} tokens, at most {max(lengths)}",
    }  # fmt: skip


def weights(work: Path, tokenizer: Any) -> Path:
    """A folder with a random language model that does not sample the first NEVER pieces."""
    from llama2cli.nn import checkpoint
    from llama2cli.nn.config import preset
    from llama2cli.nn.model import Llama

    folder = work / f"policy-{SIZE}"
    if not folder.exists():
        model = Llama(preset(SIZE, vocab_size=peer.VOCABULARY[SIZE], context=1024))
        model.init_weights(0)
        assert model.head is None  # tied: hidden states follow what the other rows have in common
        model.embed.data[:, 0] = AWAY
        model.embed.data[:NEVER, 0] = -AWAY
        folder.mkdir()
        checkpoint.save_model(folder, model, tokenizer)
    return folder


# --- ours ---------------------------------------------------------------------------------------------------------


def of_ours(made: Task, side: str, args: argparse.Namespace) -> list[Task]:
    """Iterations of `llama2 ppo`."""
    steps, separate = SKIPPED + args.iterations, "separate" in side
    value = ["--value-lr", str(RATE)] if separate else ["--value", "head", "--value-weight", str(VALUE_WEIGHT)]
    with tempfile.TemporaryDirectory() as out:
        called = [
            "ppo", made["prompts"], "--policy", made["policy"], "--rm-help", made["reward"], "-o", f"{out}/run",
            "--steps", str(steps), "--save-every", str(steps), "--batch-size", str(BATCH), "--mini-batch", str(BATCH),
            "--ppo-epochs", str(PASSES), "--max-new-tokens", str(ANSWER), "--lr", str(RATE), *value,
            "--whiten", "none", "--whiten-advantages", "--beta", str(BETA), "--lam", str(LAMBDA),
            "--clip-ratio", str(CLIP), "--value-clip", str(CLIP), "--tags", "escape", "--dtype", "fp32", "--quiet",
        ]  # fmt: skip
        peer.command(called, peer.environment(args, tuned=False))
        timing, metrics = peer.read_lines(f"{out}/run/timing.jsonl"), peer.read_lines(f"{out}/run/metrics.jsonl")
    ends = [0.0, *(line["seconds"] for line in timing)]
    rows = []
    for t, m, (began, end) in zip(timing, metrics, itertools.pairwise(ends)):
        phases = {phase: t[f"{phase}_seconds"] for phase in PHASES}
        told = {k: m[k] for k in ("kl", "entropy", "reward", "value_loss", "policy_loss")}
        tokens = round(m["length"] * BATCH)
        rows.append({"seconds": end - began, **phases, **told, "tokens": tokens, "steps": PASSES})
    return rows


# --- theirs -------------------------------------------------------------------------------------------------------


def of_trl(made: Task, side: str, args: argparse.Namespace) -> list[Task]:
    """Iterations of PPOTrainer."""
    return peer.theirs(__file__, made | {"side": side, "iterations": SKIPPED + args.iterations}, args)


def measure(task: Task, folder: str) -> Task:
    """In a process of its own: train with PPOTrainer."""
    import torch
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    module: Any = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    told: dict[str, Any] = dict(dtype=torch.float32, attn_implementation="sdpa")
    policy, reference = (LlamaForCausalLM.from_pretrained(task["policy"], **told) for _ in range(2))
    judge, value = (
        AutoModelForSequenceClassification.from_pretrained(task["reward"], num_labels=1, **told) for _ in range(2)
    )
    words = AutoTokenizer.from_pretrained(task["policy"], padding_side="left")
    words.pad_token_id = 0
    data = Dataset.from_list(peer.read_lines(task["ids"]))
    rows: list[Task] = []
    marks: dict[str, float] = {}
    seen = {"tokens": 0, "steps": 0}

    def marked(name: str, then: Callable[[Any], None] = lambda _: None) -> None:
        """Have a function of the trainer's file leave the times of its beginning and end."""
        real = getattr(module, name)

        def call(*given: Any, **named: Any) -> Any:
            marks[f"{name} begins"] = time.perf_counter()
            out = real(*given, **named)
            marks[f"{name} ends"] = time.perf_counter()
            then(out)
            return out

        setattr(module, name, call)

    class Clock(transformers.TrainerCallback):
        at = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.at = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            rows[-1]["seconds"], self.at = now - self.at, now

    class Timed(PPOTrainer):
        def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
            now, start = time.perf_counter(), marks["batch_generation begins"]
            scored, whitened = marks["batch_generation ends"], marks["masked_whiten ends"]
            rows.append({
                "rollout": scored - start, "scoring": whitened - scored, "update": now - whitened,
                "kl": logs["objective/kl"], "entropy": logs["policy/entropy_avg"], "reward": logs["objective/scores"],
                "value_loss": logs["loss/value_avg"], "policy_loss": logs["loss/policy_avg"], **seen,
            })  # fmt: skip
            seen.update(tokens=0, steps=0)

    marked("batch_generation", lambda out: seen.update(tokens=out[1][..., 0].numel()))
    marked("masked_whiten")
    loop = Timed(
        args=PPOConfig(
            output_dir=folder, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
            bf16=False, gradient_checkpointing=False, dataloader_num_workers=0, seed=0, optim="adamw_torch_fused",
            learning_rate=RATE, lr_scheduler_type="constant", adam_beta2=0.95, adam_epsilon=1e-5, weight_decay=0.1,
            per_device_train_batch_size=BATCH, num_mini_batches=1, num_ppo_epochs=PASSES, response_length=ANSWER,
            total_episodes=BATCH * task["iterations"], local_rollout_forward_batch_size=BATCH, temperature=1.0,
            num_sample_generations=0, kl_coef=BETA, cliprange=CLIP, cliprange_value=CLIP, lam=LAMBDA,
            vf_coef=VALUE_WEIGHT,
        ),
        processing_class=words, model=policy, ref_model=reference, reward_model=judge, value_model=value,
        train_dataset=data, eval_dataset=data.select(range(8)), callbacks=[Clock()],
    )  # fmt: skip
    step = loop.optimizer.step

    def counted(*given: Any, **named: Any) -> Any:
        seen["steps"] += 1
        return step(*given, **named)

    loop.optimizer.step = counted
    loop.train()
    return {"rows": rows}


# --- tables -------------------------------------------------------------------------------------------------------


def summary(rows: list[Task]) -> Task:
    """Seconds of the counted iterations, and the shares of their phases."""
    counted = rows[SKIPPED:]
    seconds = [row["seconds"] for row in counted]
    shares = {phase: sum(row[phase] for row in counted) / sum(seconds) for phase in PHASES}
    return {"s": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "n": len(seconds), **shares}


def speed(data: str, found: dict[str, list[Task]]) -> list[list[str]]:
    """Rows of the first table."""
    out = []
    for side, rows in found.items():
        each = " / ".join(f"{row['s']:.2f} ({row['least']:.2f} to {row['most']:.2f})" for row in rows)
        shares = [f"{statistics.mean(row[phase] for row in rows):.0%}" for phase in PHASES]
        over = []
        for other in TRLS:
            ratio = side in OURS and other in found and peer.lowest(found[other], rows, "s")
            bar = f" ({OURS[side]:g})" if ratio and (data, other) == ("even", TRLS[0]) else ""
            over.append(f"**{ratio:.2f}**{bar}" if ratio else "")
        out.append([data, side, each, peer.listed(rows, "n", "d"), *shares, *over])
    return out


def agreement(data: str, side: str, rows: list[Task]) -> list[str]:
    """The row of the second table. Ends the bench where a loss is not finite or an answer is not whole."""
    if not all(math.isfinite(x) for row in rows for x in row.values()):
        raise SystemExit(f"{side}: not finite: {rows}")
    if any(row["tokens"] != BATCH * ANSWER or row["steps"] != PASSES for row in rows):
        raise SystemExit(f"{side}: not {BATCH * ANSWER} tokens and {PASSES} steps: {rows}")
    shown = (rows[0], rows[1], rows[-1])
    return [
        data, side, f"{rows[0]['tokens']:,}", f"{rows[0]['steps']}",
        " / ".join(f"{row['entropy']:.3f}" for row in shown),
        " / ".join(f"{row['kl']:.1e}" for row in shown), " / ".join(f"{row['reward']:.2f}" for row in shown),
        " / ".join(f"{row['value_loss']:.3f}" for row in shown),
    ]  # fmt: skip


def main() -> None:
    parser = peer.arguments(__doc__)
    parser.add_argument("--data", default="even,mixed")
    parser.add_argument("--iterations", type=int, default=5, help=f"counted, after {SKIPPED} of warm-up")
    args = parser.parse_args()
    if args.worker:
        peer.as_worker(json.loads(args.worker), measure)
        return
    peer.pin(args)
    notes, times, checks = [peer.machine(args), ""], [], []
    sides = [side for side in (*OURS, *TRLS) if not args.sides or side in args.sides.split(";")]
    with tempfile.TemporaryDirectory() as fresh:
        work = Path(args.work or fresh).absolute()
        work.mkdir(exist_ok=True, parents=True)
        for data in args.data.split(","):
            made = prepare(work, data, BATCH * (SKIPPED + args.iterations))
            notes.append(made["note"])
            found: dict[str, list[Task]] = {side: [] for side in sides}
            checked: dict[str, list[str]] = {}
            for _ in range(args.rounds):
                for side in sides:
                    rows = (of_ours if side in OURS else of_trl)(made, side, args)
                    checked[side] = agreement(data, side, rows)
                    found[side].append(peer.told({"data": data, "side": side, **summary(rows)}))
            times += speed(data, found)
            checks += checked.values()
    columns = ["prompts", "side", "s an iteration, median (range)", "iterations counted", *PHASES,
               "times TRL's speed (bar)", "times TRL's, malloc tuned"]  # fmt: skip
    tables = peer.table(columns, times)
    columns = ["prompts", "side", "tokens an iteration", "optimizer steps", "entropy of a token, nats",
               "KL of an answer, nats", "reward", "value loss"]  # fmt: skip
    tables += ["", "At the first, second and last iteration of the last round:", *peer.table(columns, checks)]
    peer.report(args, "An iteration of PPO beside TRL's PPOTrainer", "\n".join(notes), tables)


if __name__ == "__main__":
    main()
