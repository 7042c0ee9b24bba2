"""The chat format: golden ids worked by hand, transformers' chat template and SentencePiece as judges, properties."""

from __future__ import annotations

import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2cli.errors import DataError
from llama2cli.text.chat import TAGS, encode_dialogue, encode_prompt, escape
from llama2cli.text.tokenizer import Tokenizer

TEXTS = [
    "please tell me a good or bad thing about 1234 foxes",
    "[INST] <<SYS>> Always answer well. <</SYS>> the quick [/INST] a brown fox </s> <s> jumps",
    'ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz []<>/\\.,:;!?-_()"',
] * 3

# The chat template of Meta's Llama 2 chat folders on the Hugging Face hub (tokenizer_config.json).
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def trained(vocab_size: int, texts: list[str] = TEXTS, **changes) -> bytes:
    options = dict(
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=out, **(options | changes))
    return out.getvalue()


PROTO = trained(420)
TOKENIZER = Tokenizer(PROTO)
SP = sentencepiece.SentencePieceProcessor(model_proto=PROTO)
WHOLE = Tokenizer(trained(420, user_defined_symbols=["fo"]))  # not a vocabulary whose texts may be cut at spaces
assert TOKENIZER.exact and not WHOLE.exact
SP_OF = {id(t): sentencepiece.SentencePieceProcessor(model_proto=t.proto) for t in (TOKENIZER, WHOLE)}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **extra) -> dict:
    return {"role": "assistant", "content": text, **extra}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def reference(messages: list[dict], sp=SP) -> list[int]:
    """Ids as Meta's code makes them: each round one string, encoded by SentencePiece, BOS and EOS by number."""
    messages = [dict(m) for m in messages]
    if messages[0]["role"] == "system":
        first = messages.pop(0)["content"]
        messages[0]["content"] = "<<SYS>>\n" + first + "\n<</SYS>>\n\n" + messages[0]["content"]
    ids = []
    for i in range(0, len(messages) - 1, 2):
        prompt, answer = messages[i]["content"], messages[i + 1]["content"]
        ids += [1, *sp.encode(f"[INST] {prompt.strip()} [/INST] {answer.strip()} "), 2]
    if len(messages) % 2:
        ids += [1, *sp.encode(f"[INST] {messages[-1]['content'].strip()} [/INST]")]
    return ids


def spans(encoded) -> list[list[int]]:
    """The trained runs of ids; two answers never touch, a BOS stands between."""
    out: list[list[int]] = [[]]
    for i, on in zip(encoded.ids, encoded.mask):
        if on:
            out[-1].append(i)
        elif out[-1]:
            out.append([])
    return [s for s in out if s]


# --- goldens ------------------------------------------------------------------------------------------------------

ALPHABET = "INST/[]<>Yhokbe"
LETTERS = Tokenizer(trained(259 + len(ALPHABET) + 1, [" ".join(ALPHABET)] * 2, character_coverage=1.0))  # no merges


def ids(line: str) -> list[int]:
    """Ids of pieces separated by spaces, in the vocabulary of letters."""
    special = {"<s>": 1, "</s>": 2, "\\n": LETTERS.piece_to_id("<0x0A>")}
    return [special.get(piece) or LETTERS.piece_to_id(piece) for piece in line.split()]


def test_golden_one_round():
    got = encode_dialogue(LETTERS, [user(" h \n"), assistant("ok\n")])
    assert got.ids == ids("<s> ▁ [ I N S T ] ▁ h ▁ [ / I N S T ]  ▁ o k ▁ </s>")
    assert [int(on) for on in got.mask] == [0] * 18 + [1] * 5


def test_golden_system_two_rounds_and_a_weight():
    got = encode_dialogue(LETTERS, [system("be"), user("h"), assistant("k", weight=0), user("o"), assistant("h o")])
    first = "<s> ▁ [ I N S T ] ▁ < < S Y S > > \\n b e \\n < < / S Y S > > \\n \\n h ▁ [ / I N S T ] ▁ k ▁ </s>"
    second = "<s> ▁ [ I N S T ] ▁ o ▁ [ / I N S T ]  ▁ h ▁ o ▁ </s>"
    assert got.ids == ids(first) + ids(second)
    assert [int(on) for on in got.mask] == [0] * len(ids(first)) + [0] * 18 + [1] * 6


def test_golden_prompt_and_empty_answer():
    assert encode_prompt(LETTERS, [user("h")]) == ids("<s> ▁ [ I N S T ] ▁ h ▁ [ / I N S T ]")
    got = encode_dialogue(LETTERS, [user("h"), assistant("")])  # Meta's string has two spaces here: "[/INST]  "
    assert got.ids == ids("<s> ▁ [ I N S T ] ▁ h ▁ [ / I N S T ]  ▁ ▁ </s>")
    assert [int(on) for on in got.mask] == [0] * 18 + [1] * 3


def test_a_dialogue_that_waits_for_an_answer_trains_the_others():
    got = encode_dialogue(TOKENIZER, [user("a"), assistant("thing"), user("b")])
    assert got.ids[: len(got.ids) - len(encode_prompt(TOKENIZER, [user("b")]))][-1] == 2
    assert [SP.decode(s) for s in spans(got)] == ["thing "]
    assert got.ids == reference([user("a"), assistant("thing"), user("b")])


def test_ids_equal_the_chat_template_of_transformers():
    import transformers
    from tokenizers import Tokenizer as Plain
    from tokenizers import models

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    renderer = transformers.PreTrainedTokenizerFast(tokenizer_object=Plain(models.BPE()), **tokens)
    cases = [
        [user("tell me 12"), assistant("a good thing")],
        [
            system("Always answer well."),
            user("the fox"),
            assistant("jumps"),
            user("  and? \n"),
            assistant(" it\n\ndoes "),
        ],
        [system(""), user("x"), assistant("y"), user("z")],
        [
            system(" two  spaces "),
            user("  kept as Meta keeps them "),
            assistant("1. a\n2. b\t\u00e9 \u4f60 \U0001f600"),
        ],
    ]
    for messages in cases:
        text = renderer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
        want = []
        for part in text.split("<s>")[1:]:
            want += [1, *SP.encode(part.removesuffix("</s>"))] + [2] * part.endswith("</s>")
        assert encode_dialogue(TOKENIZER, messages).ids == want == reference(messages)


# --- properties ---------------------------------------------------------------------------------------------------

NASTY = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<<SYS>>\n", "\n<</SYS>>\n\n"]
NASTY += ["[INST", "INST]", "[/", "[", "]", "/", "<<SYS", "SYS>>", "<", ">", "[ INST ]", "[\\INST]", "\\", "[inst]"]
NASTY += ["</s>", "<s>", "<unk>", "<0x0A>", "</s><s>[INST]", "▁", "▁▁", "［INST］", "[\u200bINST]"]
NASTY += [" ", "  ", "\n", "\t", "\0", "\u2028", "\x85", "fox", "a good thing 12", "é"]
contents = st.lists(st.sampled_from(NASTY) | st.text(max_size=3), max_size=6).map("".join)


@st.composite
def dialogues(draw) -> list[dict]:
    messages = [system(draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        weight = draw(st.sampled_from([{}, {"weight": 0}, {"weight": 1}]))
        messages += [user(draw(contents)), assistant(draw(contents), **weight)]
    return messages


def escaped(messages: list[dict]) -> list[dict]:
    out = []
    for m in messages:
        text = m["content"]
        for tag, safe in [("[INST]", "[\\INST]"), ("[/INST]", "[\\/INST]")]:
            text = text.replace(tag, safe)
        for tag, safe in [("<<SYS>>", "<\\<SYS>>"), ("<</SYS>>", "<\\</SYS>>")]:
            text = text.replace(tag, safe)
        out.append(m | {"content": text})
    return out


@settings(max_examples=300, deadline=None)
@given(dialogues(), st.sampled_from([TOKENIZER, WHOLE]))
def test_no_content_moves_a_turn_or_a_mask(messages, tokenizer):
    sp = SP_OF[id(tokenizer)]
    got = encode_dialogue(tokenizer, messages)
    safe = escaped(messages)
    assert got.ids == reference(safe, sp)
    n_rounds = sum(m["role"] == "user" for m in messages)
    assert (got.ids.count(1), got.ids.count(2), got.ids.count(0)) == (n_rounds, n_rounds, 0)
    rounds = " ".join(sp.decode(got.ids).split("\u2047"))
    assert rounds.count("[INST]") == rounds.count("[/INST]") == n_rounds
    assert rounds.count("<<SYS>>") == rounds.count("<</SYS>>") == (messages[0]["role"] == "system")
    wanted = [m["content"].strip() for m in safe if m["role"] == "assistant" and m.get("weight", 1)]
    trained_spans = spans(got)
    assert all(s[-1] == 2 for s in trained_spans)
    # U+2581 is SentencePiece's own space: the one character that does not come back
    assert [sp.decode(s[:-1]) for s in trained_spans] == [f"{w} ".replace("▁", " ") for w in wanted]


@settings(max_examples=100, deadline=None)
@given(dialogues())
def test_the_prompt_of_each_round_is_what_generation_is_given(messages):
    whole = encode_dialogue(TOKENIZER, messages).ids
    for i, m in enumerate(messages):
        if m["role"] == "user":
            prompt = encode_prompt(TOKENIZER, messages[: i + 1])
            assert whole[: len(prompt)] == prompt


@given(contents)
def test_escape(text):
    safe, n = escape(text)
    assert not TAGS.search(safe)
    assert n == sum(text.count(tag) for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"))
    assert escape(safe) == (safe, 0)
    assert len(safe) == len(text) + n and (n or safe == text)


# --- policies and errors ------------------------------------------------------------------------------------------


def test_policies_for_tags():
    messages = [user("a [/INST] b <<SYS>>"), assistant("ok [INST]")]
    assert encode_dialogue(TOKENIZER, messages).n_escaped == 3
    kept = encode_dialogue(TOKENIZER, messages, tags="keep")
    assert kept.n_escaped == 0 and kept.ids == reference(messages)
    with pytest.raises(DataError) as e:
        encode_dialogue(TOKENIZER, messages, tags="refuse", place=("p.jsonl", 3))
    assert str(e.value).startswith('p.jsonl:3: messages[0].content: holds "[/INST]"')


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages: expected a user message"),
        ([system("x")], "messages: expected a user message"),
        ([assistant("x")], 'messages[0].role: expected user, got "assistant"'),
        ([user("x"), user("y")], 'messages[1].role: expected assistant, got "user"'),
        ([user("x"), system("y")], 'messages[1].role: expected assistant, got "system"'),
    ],
)
def test_roles_out_of_turn(messages, complaint):
    with pytest.raises(DataError) as e:
        encode_dialogue(TOKENIZER, messages)
    assert str(e.value).startswith(complaint)


def test_a_prompt_ends_with_a_user_message():
    with pytest.raises(DataError, match="ends with a user message"):
        encode_prompt(TOKENIZER, [user("a"), assistant("b")])


def test_a_tokenizer_whose_pieces_reach_over_spaces_is_refused():
    proto = trained(420, [*TEXTS, *["[/INST] a"] * 50], split_by_whitespace=False, split_by_unicode_script=False)
    reaching = Tokenizer(proto)
    assert not reaching.exact
    with pytest.raises(DataError, match="reach over a space"):
        encode_dialogue(reaching, [user("b"), assistant("a b")])


def test_a_tokenizer_that_normalises_makes_no_tag():
    proto = trained(420, normalization_rule_name="nmt_nfkc")
    folding = Tokenizer(proto)
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert "[/INST]" in sp.decode(sp.encode("［/INST］"))
    got = encode_dialogue(folding, [user("x ［/INST］ y"), assistant("z")])
    assert got.n_escaped == 1
    assert sp.decode(got.ids).count("[/INST]") == 1
