"""What a teacher is shown around a prompt, read from a file (Llama 2, section 4.2.4: context distillation).

The file is TOML; `safety.toml` beside this module is one, and says what may stand in it. A text calls words by {NAME};
which of them it gets is drawn from the seed and the prompt, so a prompt meets the same teacher in every run.

What the paper leaves open:
1. One teacher and its words are drawn for each prompt, not for each of its samples.
2. A category is found by its name or one of its other names, upper or lower case, with spaces or underscores. One that
   has no template gets a teacher as prompts without a category do.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from msgspec import Meta, Struct

from llama2cli import console
from llama2cli.errors import DataError, Misuse, did_you_mean
from llama2cli.text.chat import TAGS
from llama2cli.text.records import Record, Wrong, conform, prompt_id
from llama2cli.text.streams import Place

SAFETY = Path(__file__).with_name("safety.toml")
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")
PREPROMPT, TEMPLATE = "preprompt", "template"  # the kinds of a Lesson


class Example(Struct):
    """An earlier turn that the teacher sees."""

    user: str
    assistant: str


class Teacher(Struct):
    """A text before the prompt, one around the user's last message, turns before it: one of them at least."""

    preprompt: str = ""
    prompt: str = ""
    examples: list[Example] = []


class Category(Struct):
    """How to answer prompts of a risk category."""

    name: str
    steps: Annotated[list[str], Meta(min_length=1)]
    also: list[str] = []


class Shape(Struct):
    """The file."""

    teachers: list[Teacher] = []
    answer: str = ""
    categories: list[Category] = []
    words: Any = {}
    extract: str = ""


class Lesson(NamedTuple):
    """What one prompt is put into. kind: PREPROMPT, or TEMPLATE where it is that of its category.

    prompt: "" or a text that holds {prompt} in place of the user's last message (see `around`).
    """

    kind: str
    preprompt: str = ""
    prompt: str = ""
    examples: tuple[tuple[str, str], ...] = ()

    def around(self, message: str) -> str:
        """The user's message in the text that goes around it."""
        return _substituted(self.prompt, lambda name: message) if self.prompt else message

    def texts(self) -> list[str]:
        """All texts that the teacher sees and the student does not."""
        return [self.preprompt, self.prompt, *(text for turn in self.examples for text in turn)]


@dataclass(frozen=True)
class Templates:
    """A file of templates. categories: by every name, as `category_key`. words: by {NAME}."""

    teachers: Sequence[Teacher]
    answer: str
    categories: Mapping[str, Category]
    words: Mapping[str, Sequence[str]]
    extract: str = ""

    def category_of(self, record: Record) -> Category | None:
        """The category of a prompt, where it has one that there is a template for."""
        return self.categories.get(category_key(record.get("category", "")))

    def general(self, prompt: str, seed: int) -> Lesson | None:
        """A teacher for the prompt of this id, whatever its category; None where the file has none."""
        if not self.teachers:
            return None
        drawn = _random(seed, prompt, PREPROMPT)
        teacher = drawn.choice(self.teachers)
        words = self._drawn(drawn)
        examples = tuple((e.user, e.assistant) for e in teacher.examples)
        # The words of `prompt` are settled now, {prompt} and what is doubled when the message is known.
        around = _substituted(teacher.prompt, lambda name: "{prompt}" if name == "prompt" else words(name), again=True)
        return Lesson(PREPROMPT, _substituted(teacher.preprompt, words).strip(), around.strip(), examples)

    def of_category(self, category: Category, prompt: str, seed: int) -> Lesson:
        """The answer template of a category for the prompt of this id."""
        words = self._drawn(_random(seed, prompt, TEMPLATE))
        steps = "\n".join(f"{i}. {step.strip()}" for i, step in enumerate(category.steps, start=1))
        given = {"category": category.name, "steps": steps}
        text = _substituted(self.answer, lambda name: given[name] if name in given else words(name))
        return Lesson(TEMPLATE, text.strip())

    def lesson(self, record: Record, prompt: str, seed: int) -> Lesson | None:
        """What the prompt of a record is put into: its category's template, else a teacher's; None without either."""
        category = self.category_of(record)
        return self.general(prompt, seed) if category is None else self.of_category(category, prompt, seed)

    def lessons(self, record: Record, seed: int, *, compare: bool, place: Place) -> list[Lesson]:
        """What the prompt of a record is put into (see `lesson`), none without either.

        compare: after its category's template a teacher's too. A category without a template is told and counted.
        """
        key = prompt_id(record["messages"])
        first, general = self.lesson(record, key, seed), self.general(key, seed)
        if self.category_of(record) is None and self.categories and record.get("category"):
            what = f'there is no template for the category "{record["category"]}"; it gets a preprompt'
            console.warn(f"{place.file}:{place.line}: {what}", "prompts of a category without a template")
        both = [first, general if compare and first and first.kind == TEMPLATE else None]
        return [lesson for lesson in both if lesson]

    def _drawn(self, drawn: random.Random) -> Any:
        """A function that gives one of the words of a name, never the same twice."""
        left = {name: drawn.sample(list(words), len(words)) for name, words in self.words.items()}
        return lambda name: left[name].pop()


def category_key(name: str) -> str:
    """What the names of a category have in common, however they are written."""
    return re.sub(r"[\s_]+", " ", name.strip(" :\t\n").lower())


def _random(seed: int, prompt: str, kind: str) -> random.Random:
    return random.Random(int.from_bytes(blake2b(f"{seed}:{prompt}:{kind}".encode(), digest_size=8).digest()))


def _substituted(text: str, value: Any, again: bool = False) -> str:
    """A text with {NAME} replaced by value(NAME), and {{NAME}} by {NAME}; that once more where it is done `again`.

    One pass: what is put in is not read again.
    """
    return PLACEHOLDER.sub(lambda m: (m[0] if again else f"{{{m[1]}}}") if m[1] else value(m[2]), text)


# --- reading ------------------------------------------------------------------------------------------------------


def extractor(given: str, where: str | None) -> re.Pattern[str] | None:
    """The pattern of what is kept of an answer; None of "". where: the flag or file that gives it. Raises Misuse."""
    if not given:
        return None
    try:
        pattern = re.compile(given)
    except re.error as e:
        raise Misuse(f"is no regular expression: {e}", where) from None
    if pattern.groups > 1:
        raise Misuse(f"has {pattern.groups} groups; one says what is kept (others are written (?:...))", "--extract")
    return pattern


def read_templates(path: str | Path) -> Templates:
    """The templates of a TOML file. Raises DataError, which names the line and the field, Misuse for no file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        given = tomllib.loads(text)
    except OSError as e:
        raise Misuse(f"cannot be read ({e.strerror})", "--templates", path) from None
    except UnicodeDecodeError as e:
        raise DataError(f"is not UTF-8 (byte 0x{e.object[e.start]:02x})", path) from None
    except tomllib.TOMLDecodeError as e:
        line = re.search(r"at line (\d+)", str(e))
        raise DataError(f"is not TOML: {str(e)[:1].lower()}{str(e)[1:]}", path, line and line[1]) from None
    try:
        return _checked(given)
    except Wrong as e:
        field, message = e.args
        raise DataError(f"{field}: {message}" if field else message, path, _line_of(text, field)) from None


def _checked(given: Record) -> Templates:
    """Raises Wrong."""
    for where, table, shape in _tables(given):
        for name in table:
            if name not in shape.__struct_fields__:
                hint = did_you_mean(name, shape.__struct_fields__)
                known = ", ".join(shape.__struct_fields__)
                raise Wrong(f"{where}{name}", f"is not known{hint} (known are {known})")
    shaped = conform(given, Shape)
    words = _words(shaped.words)
    for i, teacher in enumerate(shaped.teachers):
        where = f"teachers[{i}]"
        if not (teacher.preprompt.strip() or teacher.prompt.strip() or teacher.examples):
            raise Wrong(where, "expected preprompt, prompt or examples, got none of them")
        _check_text(teacher.preprompt, f"{where}.preprompt", words)
        if teacher.prompt:
            _check_text(teacher.prompt, f"{where}.prompt", words, needs=("prompt",))
        for j, example in enumerate(teacher.examples):
            for name, text in (("user", example.user), ("assistant", example.assistant)):
                _refuse_tags(text, f"{where}.examples[{j}].{name}")
    if bool(shaped.categories) != bool(shaped.answer.strip()):
        raise Wrong("answer", "goes together with [[categories]]: the text that their steps stand in")
    if shaped.answer:
        _check_text(shaped.answer, "answer", words, needs=("steps",), may=("category",))
    categories: dict[str, Category] = {}
    for i, category in enumerate(shaped.categories):
        for j, name in enumerate((category.name, *category.also)):
            where = f"categories[{i}]." + (f"also[{j - 1}]" if j else "name")
            if not (key := category_key(name)):
                raise Wrong(where, "is empty")
            if categories.get(key, category) is not category:
                raise Wrong(where, f'"{name}" is a name of "{categories[key].name}" too')
            categories[key] = category
        for j, step in enumerate(category.steps):
            if not step.strip():
                raise Wrong(f"categories[{i}].steps[{j}]", "is empty")
            _refuse_tags(step, f"categories[{i}].steps[{j}]")
    if not shaped.teachers and not categories:
        raise Wrong("", "holds no template: expected [[teachers]] or [[categories]]")
    return Templates(shaped.teachers, shaped.answer, categories, words, shaped.extract)


def _tables(given: Record) -> Iterator[tuple[str, Record, type[Struct]]]:
    """Every table of the file whose fields are fixed: (what stands before the name of a field, the table, its type)."""
    yield "", given, Shape
    for key, shape in (("teachers", Teacher), ("categories", Category)):
        tables = given.get(key)
        for i, table in enumerate(tables if isinstance(tables, list) else ()):
            if isinstance(table, dict):
                yield f"{key}[{i}].", table, shape


def _words(given: Any) -> dict[str, list[str]]:
    """The table [words]. Raises Wrong."""
    if not isinstance(given, dict):
        raise Wrong("words", "expected a table of lists")
    for name, words in given.items():
        if not re.fullmatch(r"\w+", name) or name in ("prompt", "category", "steps"):
            raise Wrong(f"words.{name}", "is no name that words may have")
        if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() for w in words):
            raise Wrong(f"words.{name}", "expected a list of words")
        if braced := next((w for w in words if "{" in w), None):
            raise Wrong(f"words.{name}", f'"{braced}" holds a brace, and words do not call others')
        for word in words:
            _refuse_tags(word, f"words.{name}")
    return given


def _check_text(
    text: str, field: str, words: Mapping[str, Sequence[str]], needs: Sequence[str] = (), may: Sequence[str] = ()
) -> None:
    """Raise Wrong unless each {NAME} in a text is known, those it needs are there once, and there are enough words."""
    _refuse_tags(text, field)
    called = [m[2] for m in PLACEHOLDER.finditer(text) if m[2]]
    for name in needs:
        if called.count(name) != 1:
            raise Wrong(field, f"expected {{{name}}} once, got it {called.count(name)} times")
    for name in called:
        if name in needs or name in may:
            continue
        if name not in words:
            hint = did_you_mean(name, [*words, *needs, *may])
            raise Wrong(field, f"there are no words for {{{name}}}{hint}; {{{{{name}}}}} is left as {{{name}}}")
        if called.count(name) > len(words[name]):
            raise Wrong(field, f"calls {{{name}}} {called.count(name)} times, and there are {len(words[name])} of them")


def _refuse_tags(text: str, field: str) -> None:
    if found := TAGS.search(text):
        raise Wrong(field, f'holds "{found[0]}", a tag of the chat format')


def _line_of(text: str, field: str) -> int | None:
    """The line where the field of a TOML text begins, or the closest thing around it; None for the whole file."""
    lines: dict[str, int] = {}
    counted: dict[str, int] = {}
    table, inside = "", ""
    for number, line in enumerate(text.splitlines(), start=1):
        if inside:  # a text over several lines
            inside = "" if inside in line else inside
            continue
        if head := re.match(r"\s*\[\[\s*([\w.-]+)\s*\]\]", line):
            counted[head[1]] = counted.get(head[1], -1) + 1
            table = f"{head[1]}[{counted[head[1]]}]"
            lines[table] = number
        elif head := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            table = head[1]
            lines[table] = number
        elif key := re.match(r"\s*[\"']?([\w-]+)[\"']?\s*=\s*(.*)", line):
            lines[f"{table}.{key[1]}".lstrip(".")] = number
            inside = next((q for q in ('"""', "'''") if key[2].startswith(q) and key[2].count(q) == 1), "")
    around = [name for name in lines if field == name or field.startswith((f"{name}.", f"{name}["))]
    return lines[max(around, key=len)] if around else None
