"""The iterations: rollout, advantages, update, log; held-out prompts, the best step, early stopping, saves."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from llama2cli import console, provenance
from llama2cli.errors import Interrupted
from llama2cli.nn import budget, checkpoint
from llama2cli.nn.roles import Held
from llama2cli.rlhf import alarms
from llama2cli.rlhf.ppo import Moments
from llama2cli.stages.ppo import memory
from llama2cli.stages.ppo.job import Job
from llama2cli.stages.ppo.lesson import credit_answers, update
from llama2cli.stages.ppo.roles import VALUE, Roles, load
from llama2cli.stages.ppo.rollout import COLUMNS, Abandoned, Rollout, clock, roll_out
from llama2cli.stages.ppo.telling import note, show_end, told_heldout, told_kl
from llama2cli.text.chat import TEMPLATE
from llama2cli.training import card, dist, examples, meter, roles, session, state
from llama2cli.training.fit import HELD_OUT, due
from llama2cli.training.run import TIMING, Run
from llama2cli.training.signals import Stop
from llama2cli.training.state import State

HELD_ANSWERS = "heldout.jsonl"  # in a step folder: held-out answers with their scores; of rank 1 heldout-00001.jsonl
HELDOUT_INDEX = -1  # random numbers of held-out answers: the same at every measurement, and none that training draws


def measure(job: Job, roles: Roles, seconds: dict[str, float], stop: Stop) -> tuple[dict[str, Any], Rollout]:
    """Held-out figures: reward, judge, KL, length. The loss is minus what the best step is chosen by."""
    chosen = job.heldout
    rollout = roll_out(job, roles, chosen, [HELDOUT_INDEX] * len(chosen), seconds, stop, heldout=True)
    told = {name: float(column.mean()) for name, column in rollout.table.items()}
    by = rollout.table["judge" if "judge" in rollout.table else "reward"]
    error = float(by.std() / math.sqrt(len(by))) if len(by) > 1 else 0.0
    told |= {"n": len(chosen), "judge_error": error}
    return {HELD_OUT: -float(by.mean()), "heldout": told}, rollout


def samples_file(job: Job, rollout: Rollout) -> bytes:
    """The held-out answers of this rank with their scores, as JSON lines for a person to read."""
    lines = []
    for i, (j, text) in enumerate(zip(rollout.mine, rollout.texts)):
        record = job.prompts.records[job.heldout[j]]
        scores = {name: column[j].item() for name, column in rollout.table.items() if name not in ("length", "cut")}
        told = {"n_tokens": len(rollout.answers.answers[i]), "truncated": bool(rollout.table["cut"][j])}
        messages = [*record["messages"], {"role": "assistant", "content": text}]
        tag = {"unsafe": record["unsafe"]} if "unsafe" in record else {}
        lines.append(json.dumps({"messages": messages, **tag, **told, **scores}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def train(job: Job, held: Held, stop: Stop) -> dict[str, Any]:
    """Open the run folder, go on where it stands, train to the end; the record that the command prints."""
    folder = Run(job.settings.out, resume=job.settings.resume, world=job.world)
    try:
        at, machine = session.resume(folder, job.resolved, free={*session.FREE, "patience", "offload"})
        if at.extra.get("ended"):
            console.say(f"{folder.folder}: ended early at step {at.step:,}; --patience 0 and a new run go further")
        elif at.step < job.resolved["steps"]:
            session.set_up(job.world, job.settings.seed, job.settings.kernels, machine, folder.folder)
            memory.show(job, held)
            Loop(job, folder, at, stop).run()
            show_end(folder)
        return session.record(folder, ("step", "reward", "help", "safe", "kl", "length", "truncated", "heldout_loss"))
    finally:
        folder.close()


class Loop:
    """The iterations of a run, from a state on."""

    def __init__(self, job: Job, folder: Run, at: State, stop: Stop) -> None:
        """Load the models and write settings.json."""
        settings, world = job.settings, job.world
        self.job, self.folder, self.at, self.stop = job, folder, at, stop
        self.roles = load(job, folder.step_folder if at.step else None)
        self.moments = Moments(*at.extra.get("moments", ()))
        self.saved = at.step
        self.metrics: dict[str, Any] = {}  # of the last step
        self.held_answers: Rollout | None = None
        origin = provenance.collect(settings, job.inputs)
        session.write_settings(folder, settings, job.resolved, origin)
        self.stages = card.lineage_of(job.start.folder)
        self.stages.append(card.entry("ppo", dataclasses.asdict(settings), job.resolved, origin))
        dtype = checkpoint.DTYPES[job.resolved["dtype"]]
        peak, origin_of_peak = meter.peak_flops(world.device, dtype, settings.peak)
        console.say(f"peak {peak / 1e12:.3g} TFLOP/s ({origin_of_peak}); the KL is {told_kl(job.terms)}")
        for odd in job.notes:
            console.warn(odd)
        self.meter = meter.Meter(
            flops=flops_per_token(job),
            peak=peak,
            watts=meter.power(world.device, settings.watts),
            devices=world.size,
            earlier=folder.last(TIMING),
        )

    def run(self) -> None:
        """Iterate to the last step, to the end of patience, or to a signal. Raises Interrupted after a signal."""
        job, at = self.job, self.at
        steps, stopped = job.resolved["steps"], False
        self.stop.saving = True
        with console.Progress("ppo", total=steps, unit="iterations") as bar:
            bar.start_at(at.step)
            try:
                if job.heldout and at.step == 0:
                    self.measure_first(bar)
                batches = examples.walk(job.order.count, job.settings.batch_size, None, at.position)
                for items, position in islice(batches, steps - at.step):
                    stopped = self.iterate(items, position, bar)
                    if stopped or at.extra["ended"]:
                        break
            except Abandoned:
                stopped = True
            if at.step > self.saved:  # stopped: a step that an uninterrupted run may not save is never `best`
                self.save(self.metrics, candidate=False)
        if stopped and at.step < steps and not at.extra.get("ended"):
            done = f"saved step {at.step:,}; the same command with --resume goes on" if at.step else "no step was done"
            raise Interrupted(f"stopped by a signal, {done}")

    def measure_first(self, bar: console.Progress) -> None:
        """What the policy is before any update."""
        seconds: dict[str, float] = {}
        found, _ = measure(self.job, self.roles, seconds, self.stop)
        self.at.extra["held"] = found["heldout"]
        self.folder.log({"step": 0, **found}, {"step": 0})
        bar.say(f"before the first step: {told_heldout(found['heldout'])}")

    def iterate(self, items: list[tuple[int, int]], position: dict[str, Any], bar: console.Progress) -> bool:
        """One iteration: rollout, scoring, advantages, update, log, perhaps measure and save. Whether a signal came."""
        job, roles, at, world = self.job, self.roles, self.at, self.job.world
        began = time.perf_counter()
        seconds: dict[str, float] = {}
        # rollout and scoring: nothing has changed until they are done
        chosen = [int(job.order.of(epoch)[i]) for epoch, i in items]
        first = position["seen"] - len(items)
        rollout = roll_out(job, roles, chosen, range(first, position["seen"]), seconds, self.stop)
        with clock(seconds, "scoring", world):
            lesson = credit_answers(job, rollout, self.moments)
        # update
        with clock(seconds, "update", world):
            updated = update(job, roles, rollout, lesson, at.step + 1)
        at.step, at.position, self.moments = at.step + 1, position, lesson.whitened
        means = {name: float(column.mean()) for name, column in rollout.table.items()}
        n_tokens = int(rollout.table["length"].sum())
        metrics: dict[str, Any] = {
            "step": at.step,
            **{name: means[name] for name in COLUMNS if name in means and name != "cut"},
            "truncated": means["cut"],
            "reward_deviation": float(rollout.table["reward"].std(correction=0)),
            "kl_per_token": float(rollout.table["kl"].sum()) / n_tokens,
            "kl_estimator": job.terms.estimator,
            **lesson.told,
            **updated,
            "sampling_gap": float(rollout.table["gap"].sum()) / n_tokens
            if "gap" in rollout.table
            else updated["ratio_gap"],
            "lr": roles.policy.schedule.lr(at.step),
            "seen": position["seen"],
        }
        at.extra.setdefault("first_length", means["length"])
        # held-out prompts, and what is odd
        measured = bool(job.heldout) and due(at.step, job.resolved["eval_every"], job.resolved["steps"])
        if measured:
            measuring: dict[str, float] = {}
            found, self.held_answers = measure(job, roles, measuring, Stop())  # the weights have moved: not given up
            metrics |= found
            seconds["heldout"] = sum(measuring.values())
        alarms = self.alarms(metrics, means["length"])
        metrics |= {"alarms": alarms} if alarms else {}
        stopped = dist.sums(world, [float(self.stop.asked)])[0] > 0
        at.extra |= {"moments": list(self.moments), "ended": self.patience_ended(metrics)}
        # log and save
        tokens = n_tokens + sum(len(job.prompts.ids[i]) for i in chosen)
        timing = self.meter.record(at.step, tokens, time.perf_counter() - began, len(chosen))
        timing |= {f"{phase}_seconds": round(s, 4) for phase, s in seconds.items()}
        self.folder.log(metrics, timing)
        self.metrics = metrics
        if (
            due(at.step, job.resolved["save_every"], job.resolved["steps"])
            or at.extra["ended"]
            or self.is_best(metrics)
        ):
            self.save(metrics, candidate=True)
        bar.advance(1, note(metrics, seconds))
        for alarm in alarms:
            console.warn(f"step {at.step:,}: {alarm}", f"alarms: {alarm.partition(':')[0]}")
        if measured:
            bar.say(f"step {at.step:,}: {told_heldout(metrics['heldout'])}")
        if at.extra["ended"]:
            patience = f"{job.settings.patience} held-out measurements no better than the best"
            bar.say(f"step {at.step:,}: ends early, {patience}")
        return stopped

    def alarms(self, metrics: Mapping[str, Any], length: float) -> list[str]:
        """What looks like a policy that games its reward models."""
        settings = self.job.settings
        found = [
            alarms.length_drift(length, self.at.extra["first_length"], settings.alarm_length),
            alarms.far(metrics["kl"], settings.alarm_kl),
            alarms.rounding(metrics["sampling_gap"], 0.01 if self.job.resolved["dtype"] == "fp32" else 0.05),
        ]
        if "heldout" in metrics and settings.judge is not None:
            found.append(alarms.gamed(metrics["heldout"], self.at.extra["held"]))
        return [alarm for alarm in found if alarm]

    def is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Whether this step's held-out answers are the best of all saved ones."""
        return metrics.get(HELD_OUT, math.inf) < (self.at.best[1] if self.at.best else math.inf)

    def patience_ended(self, metrics: Mapping[str, Any]) -> bool:
        """Count measurements that were no better than the best, step 0 among them; whether they are too many now."""
        if "heldout" not in metrics:
            return False
        extra, by = self.at.extra, "judge" if self.job.settings.judge is not None else "reward"
        if metrics["heldout"][by] > extra["held"][by]:
            extra |= {"held": metrics["heldout"], "worse": 0}
        else:
            extra["worse"] = extra.get("worse", 0) + 1
        return 0 < self.job.settings.patience <= extra["worse"]

    def save(self, metrics: Mapping[str, Any], *, candidate: bool) -> None:
        """Save this step; `best` names it where it is the best."""
        best = candidate and self.is_best(metrics)
        if best:
            self.at.best = (self.at.step, metrics[HELD_OUT])
        needed = memory.save_bytes(self.job)
        self.folder.save(
            self.at.step,
            lambda aside: self.write(aside, metrics),
            needed=needed,
            best=best,
            keep=self.job.settings.keep,
        )
        self.saved = self.at.step

    def write(self, aside: Path, metrics: Mapping[str, Any]) -> None:
        """All that a step folder holds."""
        job, settings, world = self.job, self.job.settings, self.job.world
        size = f"{budget.n_params(job.start.config):,} parameters, context {job.start.context:,}"
        told = f"A Llama of {size}, after {self.at.step:,} iterations of PPO ({metrics['seen']:,} answers)."
        files = card.files(self.stages, metrics, told)
        if "heldout" in metrics and self.held_answers is not None:
            name = HELD_ANSWERS if world.first else f"heldout-{world.rank:05d}.jsonl"
            (aside / name).write_bytes(samples_file(job, self.held_answers))
        common: Any = dict(save_dtype=settings.save_dtype, writes=world.first)
        policy, value = self.roles.policy, self.roles.value
        checkpoint.save_model(
            aside, policy.model, job.start.tokenizer, extra_files=files, chat_template=TEMPLATE, **common
        )
        extra: dict[str, Tensor] = {}
        rounded = settings.save_dtype != "fp32"
        if value is not None:
            if world.first:
                (aside / VALUE).mkdir()
            checkpoint.save_model(aside / VALUE, value.model, job.start.tokenizer, chat_template=TEMPLATE, **common)
            extra = state.moments(value.named, value.optimizer, weights=rounded, prefix=f"{VALUE}.")
        state.save(aside, self.at, policy.named, policy.optimizer, world, weights=rounded, extra=extra)
        if value is None:
            roles.save_value_head(aside, policy.model, world)


def flops_per_token(job: Job) -> float:
    """FLOPs of an iteration over its tokens: the update's passes, and one forward pass of each role and the rollout."""
    length = job.start.context // 2
    train, read = budget.train_flops_per_token, budget.forward_flops_per_token
    config, epochs = job.start.config, job.settings.ppo_epochs
    total = float(epochs * train(config, length) + 2 * read(config, length))  # the policy's rollout, the reference
    if job.value_config is not None:
        total += epochs * train(job.value_config, length, scorer=True) + read(job.value_config, length, scorer=True)
    for folder in {f for name, f in job.scorers.items() if name != "judge"}:
        total += read(checkpoint.load_config(folder, None), length, scorer=True)
    return total
