"""Constraints that a policy names itself (Llama 2, section 3.3): "we asked Llama 2-Chat to generate it", so that it is
not told to be somebody whom it has never met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llama2cli import console
from llama2cli.errors import DataError
from llama2cli.sampling.samples import Voice, sample_records
from llama2cli.text import constraints
from llama2cli.text.records import Record
from llama2cli.text.streams import Place


def ask(policy: Voice, kinds: Sequence[str], *, lists: int, seed: int, max_new_tokens: int) -> list[Record]:
    """The constraints of some kinds of `constraints.ASKED` that the policy names in so many lists of each.

    Told are how many it named, and what was no name. Raises DataError where it names none of a kind.
    """
    return [c for kind in dict.fromkeys(kinds) for c in _of_kind(policy, kind, lists, seed, max_new_tokens)]


def _of_kind(policy: Voice, kind: str, lists: int, seed: int, max_new_tokens: int) -> Iterator[Record]:
    question = constraints.ASKED[kind].question.replace("{n}", str(constraints.LENGTH))
    place, prompt = Place(f"--ask {kind}", 1), {"messages": [{"role": "user", "content": question}]}
    [samples] = sample_records(
        [(place, prompt)],
        policy.engine,
        policy.tokenizer,
        k=lists,
        temperature=policy.temperature,
        top_p=policy.top_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
        policy=policy.policy,
    )
    read = [constraints.parse_list(s["messages"][-1]["content"], whole=not s["truncated"]) for s in samples]
    made, twice = constraints.of_names(kind, (name for names, _ in read for name in names))
    if not made:
        raise DataError(f"the policy named none in {lists} lists; give --constraints", place.file)
    of = f"{lists} {'list' if lists == 1 else 'lists'}"
    no_name = sum(n for _, n in read)
    console.say(f"{kind}: {len(made):,} named in {of}, {twice:,} more than once, {no_name:,} lines are no name")
    yield from made
