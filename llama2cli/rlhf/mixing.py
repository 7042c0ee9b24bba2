"""Which preference data go into a reward model, and how much of each (Llama 2, section 3.2.2, "Data Composition").

The data have three roles: `helpfulness` and `safety` are what a model's own annotators collected for either aim (Meta
Helpfulness, Meta Safety and, for the safety model, Anthropic Harmless), `open` is everything else. A source's role is
its name, or what stands before the first dot of it: `helpfulness`, `safety.harmless`, `open.webgpt`.

    helpfulness   all helpfulness data, and as much again of the rest, drawn uniformly from safety and open data
    safety        all safety data, and a ninth of that from helpfulness and open data: 90/10

Choices that the paper leaves open:
1. Where the rest is smaller than wanted, all of it is taken, nothing twice, and that is told.
"""

from __future__ import annotations

from collections.abc import Mapping

from llama2cli.errors import Misuse, did_you_mean

ROLES = ("helpfulness", "safety", "open")
OWN_SHARE = {"helpfulness": 0.5, "safety": 0.9}  # section 3.2.2


def role_of(name: str) -> str:
    """The role of a source by its name. Raises Misuse for a name without a role."""
    role = name.split(".")[0]
    if role not in ROLES:
        hint = did_you_mean(role, ROLES)
        raise Misuse(f'a source of a mix is named by its role, as safety=FILE or open.webgpt=FILE, got "{name}"{hint}')
    return role


def weights(mix: str, sizes: Mapping[str, int], own_share: float | None = None) -> tuple[dict[str, float], list[str]]:
    """The share of each source that an epoch reads, and what a person should know.

    mix: "helpfulness" or "safety". sizes: pairs of each source. own_share: of the mixture, the share of the role that
    the mix is named by; the paper's when not given. Raises Misuse where that role has no source.
    """
    roles = {name: role_of(name) for name in sizes}
    own = sum(n for name, n in sizes.items() if roles[name] == mix)
    rest = sum(sizes.values()) - own
    if not own:
        raise Misuse(f"there are no data named {mix}: give {mix}=FILE", "--mix")
    share = OWN_SHARE[mix] if own_share is None else own_share
    wanted = own * (1 - share) / share
    taken = min(1.0, wanted / rest) if rest else 0.0
    notes = []
    if round(wanted) > rest:
        got = own / (own + rest)
        notes.append(
            f"the mix wants {wanted:,.0f} pairs of other data and there are {rest:,}: {got:.0%} are {mix} data"
        )
    return {name: 1.0 if roles[name] == mix else taken for name in sizes}, notes
