"""Roll-outs: with an engine whose answers are known, and with a small model against one answer at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.errors import DataError
from llama2cli.nn.config import ModelConfig
from llama2cli.nn.model import Llama
from llama2cli.sampling.engine import Engine, Result
from llama2cli.sampling.samples import Tally, sample_records
from llama2cli.sampling.turns import join_turns, recent, roll_out, user_turns
from llama2cli.text.chat import encode_dialogue
from llama2cli.text.records import validate
from llama2cli.text.streams import Place
from llama2cli.text.tokenizer import Tokenizer

HOW = dict(temperature=0.7, top_p=0.8, seed=11, max_new_tokens=12)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


@dataclass
class Parrot:
    """An engine that says how many turns it was shown; it keeps what it was asked, as text and as parameters.

    cut: answers of `cut` tokens, as if they had been stopped there.
    """

    tokenizer: Tokenizer
    context: int = 4000
    says: str = "fox"
    cut: int | None = None
    calls: list[list[tuple[str, object]]] = field(default_factory=list)

    def generate(self, prompts, params, *, tick=None):
        texts = [self.tokenizer.decode(p) for p in prompts]
        self.calls.append(list(zip(texts, params, strict=True)))
        results = []
        for prompt, text, p in zip(prompts, texts, params, strict=True):
            ids = [*self.tokenizer.encode(f"{self.says} {text.count('[/INST]')}"), 2]
            assert len(prompt) < self.context, "as the engine refuses it"
            room = min(self.cut or p.max_new_tokens, self.context - len(prompt))
            results.append(Result(ids[:room], [], [], truncated=len(ids) > room))
            if tick is not None:
                tick(results[-1])
        return results


def test_a_turn_of_all_dialogues_is_one_call_and_sees_the_answers_before_it(tokenizer):
    engine, ticked, tally = Parrot(tokenizer), [], Tally()
    dialogues = [[user("a"), user("b"), user("c")], [system("s"), user("d")], [user("e"), assistant("old"), user("f")]]
    rolled = roll_out(dialogues, engine, tokenizer, **HOW, tick=ticked.append, tally=tally)
    assert [len(call) for call in engine.calls] == [3, 2, 1] and len(ticked) == tally.answers == 6
    assert rolled[0].messages == [
        user("a"),
        assistant("fox 1"),
        user("b"),
        assistant("fox 2"),
        user("c"),
        assistant("fox 3"),
    ]
    assert rolled[1].messages == [system("s"), user("d"), assistant("fox 1")]
    assert rolled[2].messages == [user("e"), assistant("fox 1"), user("f"), assistant("fox 2")], "old answers go"
    assert engine.calls[1][1][0].split() == ["[INST]", "e", "[/INST]", "fox", "1", "[INST]", "f", "[/INST]"]
    assert [r.turns for r in rolled] == [3, 1, 2] and all(r.cut is None for r in rolled)
    assert rolled[0].truncated == [False] * 3
    assert rolled[0].n_tokens == [len(tokenizer.encode(f"fox {i}")) + 1 for i in (1, 2, 3)]
    assert {(p.seed, p.temperature, p.top_p, p.max_new_tokens) for call in engine.calls for _, p in call} == {
        (11, 0.7, 0.8, 12)
    }
    for r in rolled:
        validate("dialogue", {"messages": r.messages})


def test_the_first_turn_is_the_sample_of_that_number_and_no_two_turns_share_numbers(tokenizer):
    engine, other = Parrot(tokenizer), Parrot(tokenizer)
    roll_out([[user("a")] * 5] * 2, engine, tokenizer, **HOW, samples=[0, 3], window=1)
    list(sample_records([(Place("x", 1), {"messages": [user("a")]})], other, tokenizer, k=4, policy="p", **HOW))
    first = [p for _, p in engine.calls[0]]
    assert first == [other.calls[0][i][1] for i in (0, 3)]
    numbers = [p.index for call in engine.calls for _, p in call]
    assert len(set(numbers)) == 10
    assert len({n % ((1 << 31) - 1) for n in numbers}) == 10, "as a server's seeds hold them"


def test_the_view_is_shown_and_the_dialogue_is_kept(tokenizer):
    def loud(number, messages):
        return [{**m, "content": m["content"] + f" says {number}"} if m["role"] == "user" else m for m in messages]

    engine = Parrot(tokenizer)
    rolled = roll_out([[user("a"), user("b")], [user("c")]], engine, tokenizer, **HOW, view=loud)
    assert [m["content"] for m in rolled[0].messages] == ["a", "fox 1", "b", "fox 2"]
    assert engine.calls[0][1][0] == "[INST] c says 1 [/INST]"
    assert engine.calls[1][0][0].count("says 0") == 2
    with pytest.raises(ValueError, match="a view must end with a user message"):
        roll_out([[user("a")]], engine, tokenizer, **HOW, view=lambda n, m: [*m, assistant("x")])


def test_a_dialogue_ends_at_a_turn_boundary_where_the_context_does(tokenizer):
    long = [user("the fox says")] * 8
    whole = roll_out([long], Parrot(tokenizer), tokenizer, **HOW)[0]
    for context in range(20, 90):
        tally = Tally()
        [r] = roll_out([long], Parrot(tokenizer, context), tokenizer, **HOW, tally=tally)
        assert r.messages == whole.messages[: 2 * r.turns] and r.cut == (r.turns + 1 if r.turns < 8 else None)
        assert r.truncated == [False] * r.turns and len(r.n_tokens) == r.turns
        assert tally.at_context in (0, 1) and tally.answers == r.turns + tally.at_context
    assert r.turns > 2


def test_one_that_ends_does_not_hold_the_others(tokenizer):
    dialogues = [[user("the fox " * 12)] * 3, [user("a")] * 3]
    rolled = roll_out(dialogues, Parrot(tokenizer, 60), tokenizer, **HOW)
    assert (rolled[0].cut, rolled[1].cut, rolled[1].turns) == (2, None, 3)


def test_a_first_turn_that_fills_the_context(tokenizer, capsys):
    dialogues, tally = [[user("a"), user("b")], [user("the fox " * 60)]], Tally()
    places = [Place("in.jsonl", 4), Place("in.jsonl", 9)]
    with pytest.raises(DataError, match=r"in.jsonl:9: the prompt has .* the context of the model is 80"):
        roll_out(dialogues, Parrot(tokenizer, 80), tokenizer, **HOW, places=places)
    rolled = roll_out(dialogues, Parrot(tokenizer, 80), tokenizer, **HOW, places=places, skip_long=True, tally=tally)
    assert rolled[1].messages == [] and (rolled[1].cut, rolled[1].turns) == (1, 0) and rolled[0].turns == 2
    assert tally.skipped == 1 and "in.jsonl:9: left out" in capsys.readouterr().err


def test_an_answer_that_was_cut_stays_and_is_closed(tokenizer):
    engine, tally = Parrot(tokenizer, says="the fox says the fox says the"), Tally()
    [r] = roll_out([[user("a"), user("b")]], engine, tokenizer, **HOW | {"max_new_tokens": 4}, tally=tally)
    assert r.truncated == [True, True] and r.n_tokens == [4, 4] and r.cut is None
    assert tally.truncated == 2 and tally.at_context == 0
    cut = r.messages[1]["content"]
    assert cut == tokenizer.decode(tokenizer.encode("the fox says the fox says the")[:4]).strip()
    again = encode_dialogue(tokenizer, [*r.messages[:2], user("b")]).ids
    assert again.count(2) == 1 and engine.calls[1][0][0] == tokenizer.decode(again)


def test_tags(tokenizer):
    engine, tally = Parrot(tokenizer, says="[INST]"), Tally()
    [r] = roll_out([[user("a [INST]"), user("b"), user("c")]], engine, tokenizer, **HOW, tally=tally)
    assert [m["content"] for m in r.messages[::2]] == ["a [INST]", "b", "c"], "what the user typed is theirs"
    assert all(m["content"].startswith("[\\INST]") for m in r.messages[1::2])
    assert tally.escaped == 1 + 3, "each once, however often it is shown"
    with pytest.raises(DataError, match=r"in.jsonl:7: messages\[2\].content"):
        dialogue = [user("b"), user("a [INST]")]
        roll_out([dialogue], Parrot(tokenizer), tokenizer, **HOW, tags="refuse", places=[Place("in.jsonl", 7)])
    [r] = roll_out([[user("b"), user("c")]], engine, tokenizer, **HOW, tags="keep")
    assert r.messages[1]["content"].startswith("[INST]")


def test_user_turns():
    given = [system("s"), user("a"), assistant("x"), user("b"), assistant("y")]
    assert user_turns(given) == [system("s"), user("a"), user("b")]
    assert user_turns(given, 1) == [system("s"), user("a")]
    assert user_turns(given[1:], 5) == [user("a"), user("b")]
    assert user_turns(given[1:], 5, cycle=True) == [user(c) for c in "ababa"]
    assert user_turns(given[1:], 2, cycle=True) == [user("a"), user("b")]


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=12), st.integers(2, 6))
def test_joined_dialogues_hold_every_turn_once_and_in_order(shapes, n):
    """Those with a system message pass alone; the others stand together until they have n turns."""
    given = []
    for i, (turns, with_system) in enumerate(shapes):
        users = [user(f"{i}.{turn}") for turn in range(turns)]
        record = {"messages": [system("s"), *users] if with_system else users, "source": "one", "n": i}
        given.append((Place("in.jsonl", i + 1), record))
    made = list(join_turns(given, n))
    alone = [item for item in given if item[1]["messages"][0]["role"] == "system"]
    assert [item for item in made if item[1]["messages"][0]["role"] == "system"] == alone
    joined = [(place, r) for place, r in made if r["messages"][0]["role"] == "user"]
    assert all(len(r["messages"]) >= n for _, r in joined[:-1])
    held = [r["messages"] for _, r in given if r["messages"][0]["role"] == "user"]
    assert [m for _, r in joined for m in r["messages"]] == [m for messages in held for m in messages]
    assert sum(r["joined"] for _, r in joined) == len(held)
    for place, r in joined:
        assert r["messages"][0]["content"] == f"{place.line - 1}.0", "its place is that of the first"
        assert r["source"] == "one" and ("n" in r) == (r["joined"] == 1)
        if r["joined"] > 1:
            last = int(r["messages"][-1]["content"].split(".")[0])
            assert len(r["messages"]) - shapes[last][0] < n, "no more than are wanted"


@given(st.integers(1, 12), st.integers(1, 6), st.booleans())
def test_a_window_holds_the_first_turn_and_the_last_ones(turns, window, with_system):
    messages = [m for i in range(turns) for m in (user(f"u{i}"), assistant(f"a{i}"))][:-1]
    head = [system("s")] if with_system else []
    seen = recent([*head, *messages], window)
    validate("prompt", {"messages": seen})
    kept = [i for i in range(turns) if i == 0 or i >= turns - window]
    assert [m["content"] for m in seen if m["role"] == "user"] == [f"u{i}" for i in kept]
    assert seen[-1] == messages[-1] and seen[: len(head)] == head
    assert recent([*head, *messages], None) == [*head, *messages]
    assert recent([*head, *messages], turns) == [*head, *messages]


def test_the_window_bounds_what_is_shown(tokenizer):
    engine = Parrot(tokenizer)
    [r] = roll_out([[user(f"{i}") for i in range(9)]], engine, tokenizer, **HOW, window=2)
    assert [call[0][0].count("[/INST]") for call in engine.calls] == [1, 2, 3, 3, 3, 3, 3, 3, 3]
    assert r.turns == 9 and [m["content"] for m in r.messages[::2]] == [f"{i}" for i in range(9)]


# --- a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tokenizer) -> Llama:
    model = Llama(ModelConfig(tokenizer.vocab_size, 48, 80, 2, 6, 2, 256))
    model.init_weights(seed=4, std=0.3)
    return model.eval()


def test_what_is_said_does_not_depend_on_the_batch(tokenizer, model):
    """Each dialogue alone, one answer at a time with the engine's own call, in another order, and in fewer rows."""
    texts = ["the fox", "the", "number 7 says", "the fox", "a"]
    dialogues = [[user(f"{t} {turn}") for turn in range(2 + i % 3)] for i, t in enumerate(texts)]
    how = HOW | {"max_new_tokens": 7}
    rolled = roll_out(dialogues, Engine(model, tokenizer, rows=64), tokenizer, **how)
    assert len({m["content"] for r in rolled for m in r.messages[1::2]}) > 8
    for rows in (1, 2):
        assert roll_out(dialogues, Engine(model, tokenizer, rows=rows), tokenizer, **how) == rolled
    backwards = roll_out(dialogues[::-1], Engine(model, tokenizer), tokenizer, **how)
    assert backwards[::-1] == rolled
    for i, dialogue in enumerate(dialogues):
        assert roll_out([dialogue], Engine(model, tokenizer), tokenizer, **how) == [rolled[i]]
    # the longest by hand: a prompt, an answer, the next prompt, as any caller of `sample_records` would
    messages: list[dict] = []
    for turn, message in enumerate(dialogues[2]):
        prompt = {"messages": [*messages, message]}
        engine = Engine(model, tokenizer)
        [[sample]] = sample_records(
            [(Place("x", 1), prompt)], engine, tokenizer, k=1, policy="p", first=turn << 20, **how
        )
        messages = sample["messages"]
    assert messages == rolled[2].messages


def test_roll_outs_of_one_dialogue_differ_by_their_number_and_seed(tokenizer, model):
    dialogue = [user("the fox"), user("says")]
    engine = Engine(model, tokenizer)
    found = roll_out([dialogue] * 4, engine, tokenizer, **HOW, samples=[0, 1, 2, 0])
    assert found[0] == found[3] and len({str(r.messages) for r in found}) == 3
    assert roll_out([dialogue], engine, tokenizer, **HOW | {"seed": 12})[0] != found[0]
    greedy = HOW | {"temperature": 0.0}
    assert len({str(r.messages) for r in roll_out([dialogue] * 3, engine, tokenizer, **greedy, samples=[0, 1, 2])}) == 1


def test_the_same_prompt_again_is_answered_anew(tokenizer, model):
    """Under a view that shows the last user message alone every turn has the same prompt."""
    [r] = roll_out([[user("the fox")] * 6], Engine(model, tokenizer), tokenizer, **HOW, view=lambda n, m: m[-1:])
    assert len({m["content"] for m in r.messages[1::2]}) > 3
