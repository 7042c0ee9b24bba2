"""What a set of comparisons holds: Tables 6 and 26 of Llama 2, and the shares of ratings and safety bins (3.2.1).

What is counted. An example is what a reward model reads: the prompt, with the dialogue before it, and one answer; a
comparison is two examples. Of the examples:

    turns       user messages; a system prompt belongs to the first
    tokens per example     of all its messages
    tokens per prompt      of a user message (and the system prompt before it), over all user messages
    tokens per response    of an assistant's message, over all of them

so that example = turns x (prompt + response). Counted are the tokens of contents, without the tags of a chat format.

Table 6 does not define its columns. In its rows of one turn example = prompt + response, as here. The other rows fit
too, but for the turns themselves: 152.5 / (15.7 + 46.4) = 2.46 for Anthropic Harmless, which is the number of user
messages in those dialogues, where the table says 3.0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama2cli.errors import DataError
from llama2cli.measure.flow import Table
from llama2cli.measure.rates import metric, percent, rate
from llama2cli.text.records import RATINGS, SAFETY_LABELS, Record, prompt_id

Count = Callable[[str], int]


@dataclass
class Tally:
    """Sums over comparisons."""

    comparisons: int = 0
    turns: int = 0  # over both examples of each comparison, as all that follows
    answers: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longer: float = 0.0  # comparisons whose chosen answer is the longer one; equal ones count half
    ratings: Counter[str | None] = field(default_factory=Counter)
    safety: Counter[str | None] = field(default_factory=Counter)
    prompts: set[int] = field(default_factory=set)

    def add(self, comparison: Record, sizes: dict[str, int], prompt: int) -> None:
        """Count one; sizes: what `sizes_of` says of it; prompt: the number of its prompt."""
        self.comparisons += 1
        self.turns += sizes["turns"]
        self.answers += sizes["answers"]
        self.prompt_tokens += sizes["prompt"]
        self.response_tokens += sizes["response"]
        self.longer += (sizes["chosen"] > sizes["rejected"]) + 0.5 * (sizes["chosen"] == sizes["rejected"])
        self.ratings[comparison.get("rating")] += 1
        self.safety[comparison.get("safety")] += 1
        self.prompts.add(prompt)


@dataclass
class Statistics:
    """The tally of all comparisons, and of each source and each batch."""

    unit: str  # "tokens" or "words"
    total: Tally = field(default_factory=Tally)
    sources: dict[str, Tally] = field(default_factory=dict)
    batches: dict[int, Tally] = field(default_factory=dict)


def collect(comparisons: Iterable[Record], count: Count, unit: str = "tokens") -> Statistics:
    """Read comparisons one by one; count gives the tokens (or whatever unit says) of a text.

    Raises DataError when there are none.
    """
    found = Statistics(unit)
    for comparison in comparisons:
        source, batch = comparison.get("source"), comparison.get("batch")
        tallies = [found.total]
        if source is not None:
            tallies.append(found.sources.setdefault(source, Tally()))
        if batch is not None:
            tallies.append(found.batches.setdefault(batch, Tally()))
        sizes, prompt = sizes_of(comparison, count), int(prompt_id(comparison["prompt"]), 16)
        for tally in tallies:
            tally.add(comparison, sizes, prompt)
    if not found.total.comparisons:
        raise DataError("there are no comparisons to count")
    return found


def sizes_of(comparison: Record, count: Count) -> dict[str, int]:
    """Turns, answers and tokens of the two examples of a comparison together; tokens of chosen and rejected alone."""
    sizes = {"turns": 0, "answers": 0, "prompt": 0, "response": 0}
    parts = {name: add_up(comparison[name], count) for name in ("prompt", "chosen", "rejected")}
    for name, times in (("prompt", 2), ("chosen", 1), ("rejected", 1)):
        for key, value in parts[name].items():
            sizes[key] += times * value
    return {**sizes, **{name: parts[name]["response"] for name in ("chosen", "rejected")}}


def add_up(messages: Iterable[Record], count: Count) -> dict[str, int]:
    """Turns, answers, and tokens by whose they are, of some messages."""
    sizes = {"turns": 0, "answers": 0, "prompt": 0, "response": 0}
    for message in messages:
        role = message["role"]
        sizes["turns"] += role == "user"
        sizes["answers"] += role == "assistant"
        sizes["response" if role == "assistant" else "prompt"] += count(message["content"])
    return sizes


def means(tally: Tally) -> dict[str, tuple[float, int]]:
    """{"turns", "per_example", "per_prompt", "per_response"}: a mean, and of how many things."""
    examples, tokens = 2 * tally.comparisons, tally.prompt_tokens + tally.response_tokens
    return {
        "turns": (tally.turns / examples, examples),
        "per_example": (tokens / examples, examples),
        "per_prompt": (tally.prompt_tokens / tally.turns, tally.turns),
        "per_response": (tally.response_tokens / tally.answers, tally.answers),
    }


def records(found: Statistics) -> list[Record]:
    """Metric records: of all, then by source, then by batch (shares of a safety bin are named by the measure)."""
    made = of_group(found.total, found.unit)
    for source, tally in sorted(found.sources.items()):
        made += of_group(tally, found.unit, source=source)
    for batch, tally in sorted(found.batches.items()):
        made += of_group(tally, found.unit, batch=batch)
    return made


def of_group(tally: Tally, unit: str, **groups: Any) -> list[Record]:
    """The records of one group."""

    def mean(name: str, value: float, n: int) -> Record:
        return {"measure": f"preferences.{name}", "value": value, "n": n, **groups}

    n = tally.comparisons
    made = [mean("comparisons", n, n), mean("prompts", len(tally.prompts), n)]
    for name, (value, count) in means(tally).items():
        made.append(mean(name if name == "turns" else f"{unit}_{name}", value, count))
    made.append(metric("preferences.chosen_longer", rate(tally.longer, n), **groups))
    if rated := n - tally.ratings[None]:
        shares = [(name, rate(tally.ratings[name], rated)) for name in RATINGS]
        made += [metric("preferences.rating_share", share, **groups, rating=name) for name, share in shares]
    if binned := n - tally.safety[None]:
        shares = [(name, rate(tally.safety[name], binned)) for name in SAFETY_LABELS]
        made += [metric(f"preferences.safety_share.{name}", share, **groups) for name, share in shares]
    return made


# --- for a person -------------------------------------------------------------------------------------------------


def tables(found: Statistics) -> list[Table]:
    """Sizes by source (Table 6) and by batch (Table 26), and shares of ratings and safety bins where there are any."""
    made: list[Table] = []
    named: list[tuple[str, dict[Any, Tally]]] = [("source", found.sources), ("batch", found.batches)]
    present = [(what, groups) for what, groups in named if groups]
    for what, groups in present or [("", {})]:
        rows = [(str(name), tally) for name, tally in sorted(groups.items())]
        rest = found.total.comparisons - sum(tally.comparisons for _, tally in rows)
        note = f"; {rest:,} without {what}" if rest and what else ""
        rows.append(("total", found.total))
        made.append(
            sizes_table(
                f"comparisons{f' by {what}' if what else ''}{note} (longer: the chosen answer is)",
                what,
                found.unit,
                rows,
            )
        )
        made += [shares for shares in (ratings_table(what, rows), safety_table(what, rows)) if shares[2]]
    return made


def sizes_table(title: str, what: str, unit: str, rows: list[tuple[str, Tally]]) -> Table:
    """The columns of Tables 6 and 26, and two more: distinct prompts, and how often the chosen answer is the longer."""
    columns = [what, "pairs", "prompts", "turns", f"{unit}/example", "/prompt", "/response", "longer %"]
    cells = []
    for name, tally in rows:
        numbers = [f"{value:,.1f}" for value, _ in means(tally).values()]
        longer = percent(rate(tally.longer, tally.comparisons))
        cells.append([name, f"{tally.comparisons:,}", f"{len(tally.prompts):,}", *numbers, longer])
    return title, columns, cells


def ratings_table(what: str, rows: list[tuple[str, Tally]]) -> Table:
    """Shares of the ratings, in percent, of the comparisons that have one."""
    return shares_table("ratings, %", what, RATINGS, [(name, tally.ratings) for name, tally in rows])


def safety_table(what: str, rows: list[tuple[str, Tally]]) -> Table:
    """Shares of the safety bins, in percent, of the comparisons that have one."""
    return shares_table("safety, %", what, list(SAFETY_LABELS), [(name, tally.safety) for name, tally in rows])


def shares_table(title: str, what: str, names: Sequence[str], rows: list[tuple[str, Counter[str | None]]]) -> Table:
    """A column for each name, one for how many have any; groups in which none has are left out."""
    cells = []
    for group, counts in rows:
        if n := sum(counts.values()) - counts[None]:
            shares = [percent(rate(counts[name], n)) for name in names]
            cells.append([group, *shares, f"{n:,}", f"{counts[None]:,}"])
    return title, [what, *names, "of", "without"], cells
