"""The chat format: golden ids worked by hand, transformers' chat template and SentencePiece as judges, properties."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2cli.errors import DataError
from llama2cli.text.chat import TAGS, encode_dialogue, encode_prompt, encode_scored, escape
from llama2cli.text.tokenizer import Tokenizer
from llama2cli.text.tokenizer_json import write_tokenizer_files

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


def reference_mask(messages: list[dict], sp=SP) -> list[int]:
    """What is trained of `reference`: in each round what stands behind "[/INST]", where the answer has a weight."""
    messages = [dict(m) for m in messages]
    if messages[0]["role"] == "system":
        messages[1]["content"] = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n{messages[1]['content']}"
        del messages[0]
    mask = []
    for i in range(0, len(messages), 2):
        asked, answered = messages[i]["content"].strip(), messages[i + 1 : i + 2]
        prompt = sp.encode(f"[INST] {asked} [/INST]")
        mask += [0] * (1 + len(prompt))
        for answer in answered:
            whole = sp.encode(f"[INST] {asked} [/INST] {answer['content'].strip()} ")
            assert whole[: len(prompt)] == prompt
            mask += [answer.get("weight", 1)] * (len(whole) - len(prompt) + 1)  # and EOS
    return mask


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


def test_golden_scored():
    whole = "<s> ▁ [ I N S T ] ▁ h ▁ [ / I N S T ] ▁ o k ▁ </s>"
    messages = [user("h"), assistant("ok\n")]
    assert encode_scored(LETTERS, messages) == ids(whole)
    assert encode_scored(LETTERS, messages, truncated=True) == ids(whole)[:-2]
    assert encode_scored(LETTERS, [user("h"), assistant("")], truncated=True) == ids(whole)[:18]
    two = [system("be"), user("h"), assistant("k", weight=0), user("o"), assistant("h")]
    first = "<s> ▁ [ I N S T ] ▁ < < S Y S > > \\n b e \\n < < / S Y S > > \\n \\n h ▁ [ / I N S T ] ▁ k ▁ </s>"
    second = "<s> ▁ [ I N S T ] ▁ o ▁ [ / I N S T ] ▁ h"  # only the last answer was cut
    assert encode_scored(LETTERS, two, truncated=True) == ids(first) + ids(second)
    assert encode_scored(LETTERS, two)[-3:] == ids("h ▁ </s>")


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


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' own tokenizer of a checkpoint folder with this vocabulary, and Meta's chat template."""
    import transformers

    folder = tmp_path_factory.mktemp("hf")
    write_tokenizer_files(folder, TOKENIZER, context=512, chat_template=TEMPLATE)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def templated(theirs, messages: list[dict]) -> list[int]:
    """The ids that transformers' apply_chat_template gives, from text to ids in one go.

    The template writes BOS and EOS into the text and transformers reads them back. Its normaliser puts the dummy space
    before each stretch between them, as the reference code does by encoding each round alone.
    """
    return theirs.apply_chat_template(messages, tokenize=True, return_dict=False)


def test_ids_equal_those_of_transformers_own_tokenizer(theirs):
    for messages in (
        [user("tell me 12"), assistant("a good thing")],
        [system("Always answer well."), user("the fox"), assistant("jumps"), user("and?"), assistant("it\n\ndoes")],
        [system("Always\n answer"), user("the fox"), assistant("1. a\n2. b\t\u00e9 \u4f60 \U0001f600"), user("z")],
    ):
        assert encode_dialogue(TOKENIZER, messages).ids == templated(theirs, messages) == reference(messages)


def test_control_texts_are_ids_to_transformers_and_text_to_us(theirs):
    """transformers' tokenizer reads "</s>" in a content as id 2: an answer could be ended from inside. SentencePiece
    reads characters, and so do we."""
    for text, control in (("</s>", 2), ("<s>", 1), ("<unk>", 0)):
        assert control in theirs(f"a {text} b", add_special_tokens=False).input_ids
        assert control not in SP.encode(f"a {text} b") and control not in TOKENIZER.encode(f"a {text} b")
        messages = [user(f"say {text}"), assistant(f"{text} ok")]
        ours = encode_dialogue(TOKENIZER, messages)
        assert [ours.ids.count(c) for c in (0, 1, 2)] == [0, 1, 1]
        assert templated(theirs, messages).count(control) == 2 + (control != 0)
        assert SP.decode(spans(ours)[0]) == f"{text} ok "


# --- properties ---------------------------------------------------------------------------------------------------

NASTY = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<<SYS>>\n", "\n<</SYS>>\n\n"]
NASTY += ["[INST", "INST]", "[/", "[", "]", "/", "<<SYS", "SYS>>", "<", ">", "[ INST ]", "[\\INST]", "\\", "[inst]"]
NASTY += ["</s>", "<s>", "<unk>", "<0x0A>", "</s><s>[INST]", "▁", "▁▁", "［INST］", "[\u200bINST]"]
NASTY += [
    "[IN[INST]ST]",
    "[/[/INST]INST]",
    "<<S<<SYS>>YS>>",
    "<<</SYS>>/SYS>>",
    "[[INST]]",
    "[IN",
    "ST]",
    "<</S",
    "YS>>",
]
NASTY += [
    "＜＜SYS＞＞",
    "[\u200dINST]",
    "[IN\u200dST]",
    "[/I\u00adNST]",
    "[ΙNST]",
    "＜/s＞",
    "<\u200b/s>",
    "</S>",
    "<pad>",
]
NASTY += ["<0x5B>INST]", "<0x02>", "<0x3C>/s>", "\x01", "\x02", "\x1b", "\x7f", "\ufeff", "\u202e", "\r\n"]
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
    assert [int(on) for on in got.mask] == reference_mask(safe, sp)
    assert encode_dialogue(tokenizer, safe) == replace(got, n_escaped=0)  # escaping twice is escaping once
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


@settings(max_examples=200, deadline=None)
@given(dialogues(), st.sampled_from([TOKENIZER, WHOLE]))
def test_what_is_scored_ends_with_the_answer(messages, tokenizer):
    whole = encode_dialogue(tokenizer, messages).ids
    assert encode_scored(tokenizer, messages) == whole and whole[-1] == 2
    cut = encode_scored(tokenizer, messages, truncated=True)
    last = escaped(messages[-2:])
    before = encode_dialogue(tokenizer, messages[:-1]).ids
    answer = f" {last[1]['content'].strip()}".rstrip(" ")
    asked = SP_OF[id(tokenizer)].decode(before[len(before) - before[::-1].index(1) :])
    assert SP_OF[id(tokenizer)].decode(cut[len(cut) - cut[::-1].index(1) :]) == asked + answer.replace("▁", " ")
    assert cut.count(2) == whole.count(2) - 1 and cut[: len(before)] == before
    assert encode_dialogue(tokenizer, messages[:-1], truncated=True).ids == before  # nothing to leave out


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


@pytest.mark.parametrize("messages", [[], [user("a")], [user("a"), assistant("b"), user("c")]])
def test_what_is_scored_ends_with_an_assistant_message(messages):
    with pytest.raises(DataError, match="p:4: messages: expected a dialogue that ends with an assistant message"):
        encode_scored(TOKENIZER, messages, place=("p", 4))


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


# --- what a folder says of its chat format ------------------------------------------------------------------------


def test_our_template_renders_as_the_one_that_llama_2_was_published_with():
    import transformers
    from tokenizers import Tokenizer as Plain
    from tokenizers import models

    from llama2cli.text import chat

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    renderer = transformers.PreTrainedTokenizerFast(tokenizer_object=Plain(models.BPE()), **tokens)
    turns = [user(" a "), assistant(" b\n"), user("c"), assistant("d")]
    for messages in (turns, turns[:1], [system("s"), *turns], [system(""), *turns[:3]]):
        theirs, ours = (
            renderer.apply_chat_template(messages, chat_template=template, tokenize=False)
            for template in (TEMPLATE, chat.TEMPLATE)
        )
        assert ours == theirs
    for wrong in ([user("a"), user("b")], [assistant("a")]):
        with pytest.raises(Exception, match="take turns"):
            renderer.apply_chat_template(wrong, chat_template=chat.TEMPLATE, tokenize=False)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "tokenizer_config.json",
            '{"chat_template": "<|im_start|>{{ messages[0].content }}"}',
        ),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": "USER: {{ messages[0] }}"}]}'),
        ("tokenizer_config.json", '{"chat_template": "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"}'),
        ("chat_template.jinja", "<|user|>{{ messages[0].content }}"),
    ],
)
def test_a_foreign_template_is_refused_where_dialogues_are_encoded(tmp_path, name, content):
    (tmp_path / "tokenizer.model").write_bytes(PROTO)
    (tmp_path / name).write_text(content)
    loaded = Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match=f"{name}: is of another chat format"):
        encode_dialogue(loaded, [user("a"), assistant("b")])
    with pytest.raises(DataError, match="another chat format"):
        encode_prompt(loaded, [user("a")])
    assert loaded.encode("a text") == TOKENIZER.encode("a text")  # documents are none of its business


@pytest.mark.parametrize(
    "content", ["{}", '{"chat_template": null}', '{"chat_template": ""}', '{"model_max_length": 5}', "not JSON", "[1]"]
)
def test_a_folder_without_a_template_is_llama_2s(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(PROTO)
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert encode_prompt(Tokenizer.load(tmp_path), [user("a")]) == encode_prompt(TOKENIZER, [user("a")])


def test_the_template_that_we_write_is_ours(tmp_path):
    from llama2cli.text import chat
    from llama2cli.text.tokenizer_json import write_tokenizer_files

    write_tokenizer_files(tmp_path, TOKENIZER, context=64, chat_template=chat.TEMPLATE)
    assert Tokenizer.load(tmp_path).foreign_template is None
