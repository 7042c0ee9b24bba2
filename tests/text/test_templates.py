"""Templates of `distill`: what is drawn and filled in, by hand; what is wrong with a file, by line and field."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2cli.errors import DataError, Misuse
from llama2cli.text.templates import PREPROMPT, SAFETY, TEMPLATE, Templates, read_templates

MINE = """
answer = "{category}, {adverb}:\\n{steps}\\n{{steps}}"

[words]
noun = ["fox", "dog", "cat"]
adverb = ["slowly"]

[[teachers]]
preprompt = "A {noun}, a {noun} and a {noun}. {{noun}} stays."
prompt = "Q: {prompt} {adverb} {{prompt}}"
examples = [{user = "one {noun}", assistant = "two"}]

[[categories]]
name = "Theft"
also = ["stealing", "Robbery ", "armed robbery"]
steps = ["Say no.", " Say why. "]
"""


@pytest.fixture
def mine(tmp_path: Path) -> Templates:
    return read_templates(written(tmp_path, MINE))


def written(folder: Path, text: str) -> Path:
    path = folder / "t.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- what is filled in --------------------------------------------------------------------------------------------


def test_a_teacher_is_filled_with_different_words(mine: Templates) -> None:
    orders = Counter()
    for i in range(300):
        lesson = mine.general(f"prompt {i}", 0)
        assert lesson is not None and lesson.kind == PREPROMPT
        found = re.fullmatch(r"A (\w+), a (\w+) and a (\w+)\. \{noun\} stays\.", lesson.preprompt)
        assert found and sorted(found.groups()) == ["cat", "dog", "fox"]
        orders[found.groups()] += 1
        assert lesson.examples == (("one {noun}", "two"),)  # as they are
        assert lesson.around("why?") == "Q: why? slowly {prompt}"
    assert len(orders) == 6 and min(orders.values()) > 25  # each of the six orders, about 50 times


@given(message=st.text())
def test_the_prompt_is_put_in_as_it_is(message: str) -> None:
    """Whatever braces it holds: it is never read as a template."""
    lesson = read_templates(SAFETY).general("x", 0)._replace(prompt="<{prompt}>")
    assert lesson.around(message) == f"<{message}>"
    assert lesson.around("{prompt}{{prompt}}{adjective}") == "<{prompt}{{prompt}}{adjective}>"


def test_a_category_is_found_by_any_name(mine: Templates) -> None:
    for name in ("Theft", "theft", " THEFT:", "stealing", "robbery", "Armed_Robbery", "armed  robbery"):
        lesson = mine.lesson({"category": name}, "x", 0)
        assert lesson == (TEMPLATE, "Theft, slowly:\n1. Say no.\n2. Say why.\n{steps}", "", ())
    assert mine.lesson({"category": "arson"}, "x", 0).kind == PREPROMPT
    assert mine.lesson({}, "x", 0).kind == PREPROMPT


def test_what_is_drawn_depends_on_the_seed_and_the_prompt_alone(mine: Templates) -> None:
    texts = [mine.general(f"p{i}", seed).preprompt for seed in (0, 1) for i in range(20)]
    assert texts == [mine.general(f"p{i}", seed).preprompt for seed in (0, 1) for i in range(20)]
    assert texts[:20] != texts[20:]


def test_several_teachers_are_drawn_evenly(tmp_path: Path) -> None:
    path = written(tmp_path, "".join(f'[[teachers]]\npreprompt = "{name}"\n' for name in "abc"))
    drawn = Counter(read_templates(path).general(str(i), 3).preprompt for i in range(600))
    assert set(drawn) == set("abc") and all(150 < n < 250 for n in drawn.values())


def test_without_teachers_only_categories_have_a_template(tmp_path: Path) -> None:
    text = 'answer = "{steps}"\n[[categories]]\nname = "x"\nsteps = ["y"]\n'
    templates = read_templates(written(tmp_path, text))
    assert templates.lesson({}, "p", 0) is None and templates.lesson({"category": "X"}, "p", 0).preprompt == "1. y"


# --- the file that comes with the program -------------------------------------------------------------------------


def test_the_safety_templates() -> None:
    """Each preprompt is filled; each category's template names it and has its steps in a numbered list."""
    templates = read_templates(SAFETY)
    for i in range(100):
        assert "{" not in templates.general(str(i), 0).preprompt
    for category in set(map(id, templates.categories.values())):
        one = next(c for c in templates.categories.values() if id(c) == category)
        text = templates.of_category(one, "p", 0).preprompt
        assert one.name in text and "{" not in text
        assert re.findall(r"^(\d)\. (.*)$", text, re.MULTILINE) == [(str(i), s) for i, s in enumerate(one.steps, 1)]
    assert {"responsible", "respectful", "wise"} <= set(templates.words["adjective"])


def test_categories_of_public_prompts(shared_data: Path) -> None:
    """HarmBench, SimpleSafetyTests and CatQA: the names that they give find a template, but for these two."""
    with gzip.open(shared_data / "harmbench" / "harmbench_behaviors_text_all.csv.gz", "rt") as file:
        names = {row["SemanticCategory"] for row in csv.DictReader(file)}
    with (shared_data / "simple_safety_tests" / "simple_safety_tests.csv").open(newline="") as file:
        names |= {row["harm_area"] for row in csv.DictReader(file)}
    names |= set(json.loads((shared_data / "red_instruct" / "catqa_english.json").read_text()))
    templates = read_templates(SAFETY)
    assert len(names) == 22
    assert {n for n in names if templates.category_of({"category": n}) is None} == {
        "copyright",
        "Political Campaigning",
    }


# --- what is wrong ------------------------------------------------------------------------------------------------

T = '[[teachers]]\npreprompt = "x"\n'
C = '[[categories]]\nname = "a"\nsteps = ["s"]\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no template: expected [[teachers]] or [[categories]]"),
        ("x = = 1\n", ":1: is not TOML: "),
        (T + 'prepromt = "y"\n', ':3: teachers[0].prepromt: is not known; did you mean "preprompt"?'),
        ("teacher = 1\n" + T, ':1: teacher: is not known; did you mean "teachers"?'),
        (T + "[[teachers]]\n", ":3: teachers[1]: expected preprompt, prompt or examples"),
        (T + '\n[[teachers]]\npreprompt = "a"\nprompt = "no"\n', ":6: teachers[1].prompt: expected {prompt} once, got"),
        ('[[teachers]]\nprompt = "{prompt} {prompt}"\n', ":2: teachers[0].prompt: expected {prompt} once, got it 2"),
        ("[[teachers]]\npreprompt = 3\n", ":2: teachers[0].preprompt: expected a string, got an integer"),
        ('[[teachers]]\nexamples = [{user = "a"}]\n', ':2: teachers[0].examples[0]: the field "assistant" is missing'),
        ("teachers = 3\n", ":1: teachers: expected a list, got an integer"),
        ('[[teachers]]\npreprompt = "a {nun}"\n[words]\nnoun = ["x"]\n',
         ':2: teachers[0].preprompt: there are no words for {nun}; did you mean "noun"?'),
        ('[words]\nnoun = ["x"]\n[[teachers]]\npreprompt = "{noun} {noun}"\n',
         ":4: teachers[0].preprompt: calls {noun} 2 times, and there are 1 of them"),
        ('[[teachers]]\npreprompt = """\n[words]\n[INST] x"""\n', ':2: teachers[0].preprompt: holds "[INST]"'),
        (T + '[words]\nnoun = "x"\n', ":4: words.noun: expected a list of words"),
        (T + "[words]\nnoun = []\n", ":4: words.noun: expected a list of words"),
        (T + '[words]\nnoun = ["{x}"]\n', ':4: words.noun: "{x}" holds a brace'),
        (T + '[words]\nsteps = ["x"]\n', ":4: words.steps: is no name that words may have"),
        (T + C, ": answer: goes together with [[categories]]"),
        ('answer = "x"\n' + T, ":1: answer: goes together with [[categories]]"),
        ('answer = "x"\n' + C, ":1: answer: expected {steps} once, got it 0 times"),
        ('answer = "{steps}"\n' + C + C, ':6: categories[1].name: "a" is a name of "a" too'),
        ('answer = "{steps}"\n' + C.replace('"s"', ""), ":4: categories[0].steps: expected at least 1 elements, got 0"),
        ('answer = "{steps}"\n' + C.replace('"s"', '" "'), ":4: categories[0].steps[0]: is empty"),
        ('answer = "{steps}"\n' + C.replace('"s"', '"<<SYS>>"'), ':4: categories[0].steps[0]: holds "<<SYS>>"'),
        ('answer = "{steps}"\n' + C.replace('"a"', '""'), ":3: categories[0].name: is empty"),
    ],
)  # fmt: skip
def test_a_wrong_file_names_line_and_field(tmp_path: Path, text: str, complaint: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DataError) as error:
        read_templates(path)
    assert str(error.value).startswith(f"{path}{complaint}" if complaint[0] == ":" else f"{path}: {complaint}")
    assert not any(word in str(error.value) for word in ("Struct", "$", "`"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match=r"--templates:.*none\.toml: cannot be read"):
        read_templates(tmp_path / "none.toml")
    (tmp_path / "t.toml").write_bytes(b"\xff")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_templates(tmp_path / "t.toml")


def test_the_file_is_named_for_packages() -> None:
    """What an installation copies beside the modules."""
    manifest = Path(__file__).parents[2] / "MANIFEST.in"
    assert "llama2cli/text/*.toml" in manifest.read_text() and SAFETY.suffix == ".toml"
