"""`llama2 ppo` derived a second time: transformers' models, plain torch, one answer at a time. Only the sampled ids and
the order in which prompts and answers are read are taken from the stage."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import ppo_kit
from ppo_kit import metrics

from llama2cli.stages import ppo


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ppo_kit.write(tmp_path_factory.mktemp("ppo") / "kit")


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """A command takes the fast forms of this machine; other tests find what was there before."""
    from llama2cli.nn import ops

    before = ops.choices()
    yield
    ops.restore(before)


@contextmanager
def fp64() -> Iterator[None]:
    """The second derivation has digits to spare."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# --- the second derivation ----------------------------------------------------------------------------------------


def encoded(kit: Path, messages: list[dict[str, str]], answer: str | None, cut: bool = False) -> list[int]:
    """A dialogue's ids by the rule: BOS, "[INST] question [/INST] answer ", EOS; of the last answer no end if cut."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(kit / "tok.model"))
    turns = [m["content"] for m in messages]
    if messages[0]["role"] == "system":
        turns[:2] = [f"<<SYS>>\n{turns[0]}\n<</SYS>>\n\n{turns[1]}"]
    ids: list[int] = []
    for question, said in zip(turns[:-1:2], turns[1::2]):
        ids += [1, *sp.encode(f"[INST] {question} [/INST] {said} "), 2]
    if answer is None:
        return [*ids, 1, *sp.encode(f"[INST] {turns[-1]} [/INST]")]
    said = f"[INST] {turns[-1]} [/INST] {answer}".rstrip(" " if not answer else "")
    return [*ids, 1, *sp.encode(said)] if cut else [*ids, 1, *sp.encode(f"[INST] {turns[-1]} [/INST] {answer} "), 2]


def text_of(kit: Path, ids: list[int]) -> str:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(kit / "tok.model"))
    return sp.decode(ids[:-1] if ids[-1] == 2 else ids).strip()


def scorer(folder: Path) -> Any:
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    model.model.embed_tokens.padding_idx = None  # an answer may hold id 0, and its row learns as all others
    return model


def score(model: Any, ids: list[int]) -> float:
    """The score at the last token, of one row without padding."""
    with torch.no_grad():
        return float(model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]))


def optimizer(model: Any, extra: list[Tensor], lr: float) -> torch.optim.Optimizer:
    params = [*model.parameters(), *extra]
    groups = [
        {"params": [p for p in params if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-5)


def states(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """[n, D] the states in which the answer's tokens are drawn."""
    hidden = model.model(torch.tensor([[*prompt, *answer]])).last_hidden_state[0]
    return hidden[len(prompt) - 1 : -1]


def log_softmax(model: Any, prompt: list[int], answer: list[int], heat: float) -> Tensor:
    """[n, V]"""
    return torch.log_softmax(model.lm_head(states(model, prompt, answer)) / heat, -1)


def gae_by_sums(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t as the double sum of its definition."""
    n = len(rewards)
    following = torch.cat([values[1:], torch.zeros(1)])
    delta = rewards + gamma * following - values
    return torch.stack([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])  # type: ignore[arg-type]


class Derived:
    """The whole of PPO, as its definition reads."""

    def __init__(self, kit: Path, settings: dict[str, Any], new_head: Tensor) -> None:
        """new_head: of a value model that starts as the policy."""
        from transformers import LlamaForCausalLM

        self.kit, self.s = kit, settings
        self.policy = LlamaForCausalLM.from_pretrained(kit / "lm", dtype=torch.float64).eval()
        self.reference = copy.deepcopy(self.policy)
        self.rms = {n: scorer(kit / f"rm-{n}") for n in ("help", "safe") if f"rm_{n}" in settings}
        self.trunk = settings.get("value") == "head"
        self.head = torch.zeros(1, 32, requires_grad=True)
        self.optimizer = optimizer(self.policy, [self.head] if self.trunk else [], settings["lr"])
        self.value: Any = None
        if not self.trunk:
            start = settings.get("value_init", "help" if "help" in self.rms else "safe")
            if start == "policy":
                self.value = copy.deepcopy(self.rms["help"])
                self.value.model.load_state_dict(self.policy.model.state_dict())
                with torch.no_grad():
                    self.value.score.weight.copy_(new_head)
            else:
                self.value = scorer(kit / f"rm-{start}")
            if settings.get("value_score", "zero") == "zero":
                torch.nn.init.zeros_(self.value.score.weight)
            self.value_optimizer = optimizer(self.value, [], settings.get("value_lr", 3 * settings["lr"]))
        self.seen_rewards: list[float] = []

    def values(self, prompt: list[int], answer: list[int]) -> Tensor:
        if self.trunk:
            return states(self.policy, prompt, answer) @ self.head[0]
        return states(self.value, prompt, answer) @ self.value.score.weight[0]

    def rewards(self, records: list[dict[str, Any]], answers: list[list[int]]) -> tuple[Tensor, dict[str, Any]]:
        """R~c of each answer, and what is logged of it."""
        s, raw, by_safety = self.s, [], []
        told: dict[str, list[float]] = {"help": [], "safe": []}
        for record, answer in zip(records, answers):
            ids = encoded(self.kit, record["messages"], text_of(self.kit, answer), cut=answer[-1] != 2)
            logits = {n: score(m, ids) + (ppo_kit.OFFSET if n == "help" else 0) for n, m in self.rms.items()}
            for name, logit in logits.items():
                told[name].append(1 / (1 + torch.tensor(-logit).exp().item()))
            if len(logits) == 2:
                safe = record.get("unsafe", False) or told["safe"][-1] < 0.15
                by_safety.append(float(safe))
                raw.append(logits["safe" if safe else "help"])
            else:
                raw += logits.values()
        self.seen_rewards += raw
        x = torch.tensor(raw)
        over = torch.tensor(self.seen_rewards) if s.get("whiten") == "running" else x
        if s.get("whiten") != "none":
            mean = over.mean()
            x = (x - mean) / over.std(correction=0) + (0 if s.get("whiten_mean", True) else mean)
        if bound := s.get("reward_clip"):
            x = x.clamp(-bound, bound)
        cut = torch.tensor([float(a[-1] != 2) for a in answers])
        means = {k: sum(v) / len(v) for k, v in told.items() if v}
        means |= {"reward": sum(raw) / len(raw), "truncated": cut.mean().item()}
        means |= {"by_safety": sum(by_safety) / len(by_safety)} if by_safety else {}
        return x - s.get("cut_penalty", 0) * cut, means

    def kl(self, prompt: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
        """(log-probabilities, KL) of each token."""
        heat = self.s.get("temperature", 1.0)
        p, q = (log_softmax(m, prompt, answer, heat) for m in (self.policy, self.reference))
        taken = torch.tensor(answer)[:, None]
        log_p, log_q = p.gather(1, taken)[:, 0], q.gather(1, taken)[:, 0]
        match self.s.get("kl", "k1"):
            case "k1":
                return log_p, log_p - log_q
            case "k2":
                return log_p, (log_p - log_q) ** 2 / 2
            case "k3":
                return log_p, torch.exp(log_q - log_p) - 1 - (log_q - log_p)
            case _:
                return log_p, (p.exp() * (p - q)).sum(-1)

    def iterate(self, step: int, prompts: list[list[int]], records: list[Any], answers: list[list[int]]) -> Any:
        """One iteration; its metrics."""
        from llama2cli.stages.ppo.lesson import UPDATE
        from llama2cli.training.examples import permutation
        from llama2cli.training.order import mix

        s, beta = self.s, self.s.get("beta", 0.01)
        pairs = list(zip(prompts, answers))
        rewards, told = self.rewards(records, answers)
        old, advantages, returns, old_values, kls = [], [], [], [], []
        with torch.no_grad():
            for (prompt, answer), reward in zip(pairs, rewards):
                log_p, kl = self.kl(prompt, answer)
                values = self.values(prompt, answer)
                earned = torch.zeros(len(answer))
                if s.get("kl_per", "token") == "token":
                    earned -= beta * kl
                    earned[-1] += reward
                else:
                    earned[-1] = reward - beta * kl.sum()
                found = gae_by_sums(earned, values, s.get("gamma", 1.0), s.get("lam", 0.95))
                old.append(log_p)
                kls.append(kl.sum())
                advantages.append(found)
                old_values.append(values)
                returns.append(found + values)
        R, V = torch.cat(returns), torch.cat(old_values)
        told |= {
            "kl": torch.stack(kls).mean().item(),
            "length": sum(map(len, answers)) / len(answers),
            "explained_variance": 1 - ((R - V).var() / R.var()).item(),
            "return": R.mean().item(),
        }
        if s.get("whiten_advantages"):
            A = torch.cat(advantages)
            advantages = [(a - A.mean()) / A.std(correction=0) for a in advantages]
        clip, value_clip = s.get("clip_ratio", 0.2), s.get("value_clip")
        sums: dict[str, float] = {}
        norms: dict[str, list[float]] = {"grad_norm": [], "value_grad_norm": []}
        tokens = 0
        for turn in range(s.get("ppo_epochs", 1)):
            order = permutation(len(pairs), mix(s["seed"], UPDATE, step, turn)).tolist()
            for begin in range(0, len(order), s["mini_batch"]):
                chosen = order[begin : begin + s["mini_batch"]]
                count = sum(len(answers[i]) for i in chosen)
                tokens += count
                policy_loss, value_loss = torch.zeros(()), torch.zeros(())
                for i in chosen:
                    p = log_softmax(self.policy, *pairs[i], s.get("temperature", 1.0))
                    log_p = p.gather(1, torch.tensor(answers[i])[:, None])[:, 0]
                    r, a = torch.exp(log_p - old[i]), advantages[i]
                    policy_loss = policy_loss + torch.max(-r * a, -r.clamp(1 - clip, 1 + clip) * a).sum()
                    values = self.values(*pairs[i])
                    error = (values - returns[i]) ** 2
                    if value_clip is not None:
                        near = old_values[i] + (values - old_values[i]).clamp(-value_clip, value_clip)
                        error = torch.max(error, (near - returns[i]) ** 2)
                    value_loss = value_loss + error.sum() / 2
                    beyond = ((r > 1 + clip) & (a > 0)) | ((r < 1 - clip) & (a < 0))
                    for name, x in (
                        ("policy_loss", torch.max(-r * a, -r.clamp(1 - clip, 1 + clip) * a)),
                        ("value_loss", error / 2),
                        ("entropy", -(p.exp() * p).sum(-1)),
                        ("clip_fraction", beyond.float()),
                        ("kl_old", r - 1 - torch.log(r)),
                        ("value_clip_fraction", ((values - old_values[i]).abs() > (value_clip or 1e9)).float()),
                    ):
                        sums[name] = sums.get(name, 0.0) + x.sum().item()
                loss = policy_loss / count
                if self.trunk:
                    loss = loss + s.get("value_weight", 0.1) * value_loss / count
                loss.backward()
                params = [*self.policy.parameters(), *([self.head] if self.trunk else [])]
                norms["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(params, 1.0)))
                self.optimizer.step()
                self.optimizer.zero_grad()
                if not self.trunk:
                    (value_loss / count).backward()
                    norm = torch.nn.utils.clip_grad_norm_(self.value.parameters(), 1.0)
                    norms["value_grad_norm"].append(float(norm))
                    self.value_optimizer.step()
                    self.value_optimizer.zero_grad()
        return told | {k: v / tokens for k, v in sums.items()} | {k: sum(v) / len(v) for k, v in norms.items() if v}


# --- against the command ------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, head": {"value": "head"},
    "warm": {
        "temperature": 1.3,
        "kl": "k3",
        "gamma": 0.9,
        "lam": 0.7,
        "value_init": "policy",
        "value_lr": 2e-3,
        "value_score": "kept",
    },
    "answer": {"value": "head", "kl": "k2", "kl_per": "answer", "beta": 0.5, "whiten": "running", "value_clip": 0.01},
    "exact": {
        "kl": "exact",
        "beta": 0.3,
        "whiten_mean": False,
        "value_init": "safe",
        "value_score": "kept",
        "old_logprobs": "recomputed",
    },
    "passes": {
        "value_score": "kept",
        "ppo_epochs": 2,
        "clip_ratio": 0.05,
        "reward_clip": 0.5,
        "cut_penalty": 0.7,
        "whiten_advantages": True,
    },
    "one": {"rm_safe": None, "whiten": "none", "value": "head", "temperature": 0.7, "value_weight": 0.5},
    "small": {"micro_tokens": 1, "kl": "exact", "temperature": 1.3, "beta": 0.1},
}


def sampled(settings: ppo.Settings, run: Path) -> Iterator[tuple[list[list[int]], list[Any], list[list[int]]]]:
    """Prompts, their records and the sampled answers of each iteration, drawn again from the step before."""
    from llama2cli.stages.ppo.job import prepare
    from llama2cli.stages.ppo.roles import load
    from llama2cli.stages.ppo.rollout import roll_out
    from llama2cli.training.dist import World
    from llama2cli.training.examples import walk
    from llama2cli.training.signals import Stop

    job = prepare(settings, World(0, 1, torch.device("cpu")))
    batches = walk(job.order.count, settings.batch_size, None, None)
    for step in range(1, job.resolved["steps"] + 1):
        items, position = next(batches)
        roles = load(job, run / f"step-{step - 1:06d}" if step > 1 else None)
        chosen = [int(job.order.of(epoch)[i]) for epoch, i in items]
        found = roll_out(job, roles, chosen, range(position["seen"] - len(items), position["seen"]), {}, Stop())
        answers = [list(a) for a in found.answers.answers]
        yield [list(p) for p in found.answers.prompts], [job.prompts.records[i] for i in chosen], answers


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float) -> None:
    assert ours.keys() == theirs.keys()
    far = {k: float((ours[k] - theirs[k]).abs().max()) for k in theirs}
    worst = max(far, key=far.__getitem__)
    assert far[worst] < atol, (worst, far[worst])


@pytest.mark.parametrize("name", FORMS)
def test_iterations_are_those_of_transformers_and_torch(name: str, kit: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    from llama2cli.nn.model import drawn

    given = ppo_kit.given(kit, steps=2, out=str(tmp_path / "run"), **FORMS[name])
    settings, run = ppo.Settings(**given), tmp_path / "run"
    ppo.run(settings)
    new_head = drawn("score", (1, 32), given["seed"], 33**-0.5)
    with fp64():
        derived = Derived(kit, given, new_head)
    ended = []
    for line, (prompts, records, answers) in zip(metrics(run), sampled(settings, run), strict=True):
        assert prompts == [encoded(kit, r["messages"], None) for r in records]
        ended += [a[-1] == 2 for a in answers]
        with fp64():
            want = derived.iterate(line["step"], prompts, records, answers)
        for key, value in want.items():
            if key in line or value:
                assert line[key] == pytest.approx(value, rel=5e-4, abs=5e-6), (line["step"], key)
        assert line["ratio_gap"] < 1e-5 and line["lr"] == 1e-3 and line["kl_estimator"] == given.get("kl", "k1")
        assert line["kl_per_token"] == pytest.approx(want["kl"] * len(answers) / sum(map(len, answers)), abs=1e-6)
    assert any(ended) and not all(ended)  # both kinds of answers
    last = run / "step-000002"
    first = derived.reference.state_dict()
    ours = LlamaForCausalLM.from_pretrained(last, dtype=torch.float64).state_dict()
    assert max(float((ours[k] - first[k]).abs().max()) for k in first) > 1e-3  # it has moved
    close(ours, derived.policy.state_dict(), 2e-6)
    if derived.trunk:
        close(load_file(last / "trainer/value_head.safetensors"), {"score": derived.head.detach()}, 2e-6)
        assert not (last / "value").exists()
    else:
        close(scorer(last / "value").state_dict(), derived.value.state_dict(), 5e-6)
        assert not (last / "trainer/value_head.safetensors").exists()
