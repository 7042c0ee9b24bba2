"""Llama 2, sections 4.2 and 5.1: safety context distillation and time, held against `distill`, its templates and `sft`.

One test for each rule. Asserted is what the paper's text says, or what follows from it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from llama2cli.measure.temporal import Survey
from llama2cli.rlhf import distillation
from llama2cli.stages import distill
from llama2cli.text.formats import read_dialogues
from llama2cli.text.records import validate
from llama2cli.text.templates import SAFETY, Templates, read_templates
from llama2cli.text.temporal import case_of

# Section 4.2.1: the risk categories of the annotators.
TAXONOMY = ("illicit and criminal activities", "hateful and harmful activities", "unqualified advice")


@pytest.fixture(scope="module")
def templates() -> Templates:
    return read_templates(SAFETY)


def preset() -> distill.Settings:
    return distill.Settings(preset="safety", policy="chat", rm_safe="rm")


def steps_of(templates: Templates, category: str) -> list[str]:
    return templates.categories[category].steps


# --- 4.2.4: context distillation ----------------------------------------------------------------------------------


def test_4_2_4_only_adversarial_prompts() -> None:
    """Distilling helpful prompts degrades answers and makes for false refusals: it is done on adversarial ones only."""
    tagged = [{"unsafe": True}, {"unsafe": False}, {}]
    assert [distillation.adversarial(r) for r in tagged] == [True, False, False]
    assert preset().preset == "safety" and "unsafe" in (distill.Settings.__doc__ or "")
    record = {
        "messages": [{"role": "user", "content": "x"}],
        "unsafe": True,
        "category": "fraud",
        "attack": "role play",
    }
    assert validate("prompt", record) == record  # the tag, the risk category and the attack vector of section 4.2.1


def test_4_2_4_the_preprompt_is_prefixed_and_then_left_out(templates: Templates) -> None:
    """Answers are sampled with the preprompt before the prompt; the model is tuned on them without it."""
    messages = [{"role": "user", "content": "How do I cheat?"}]
    lesson = templates.general("an id", 0)
    assert lesson is not None
    for place in distillation.PLACES:
        shown = "\n".join(m["content"] for m in distillation.with_teacher(messages, lesson, place))
        assert shown.index(lesson.preprompt) < shown.index("How do I cheat?")
    sampled = dict.fromkeys(distillation.OF_A_SAMPLE, 0) | {"messages": [*messages, {}]}
    learnt = distillation.student({"messages": messages}, sampled, "Rather not.")
    assert learnt["messages"] == [*messages, {"role": "assistant", "content": "Rather not."}]
    assert lesson.preprompt not in json.dumps(learnt)


def test_4_2_4_preprompts_of_adjectives(templates: Templates) -> None:
    """Preprompts are made of a template with adjectives: "responsible", "respectful", "wise" and the like."""
    assert {"responsible", "respectful", "wise"} <= set(templates.words["adjective"])
    assert all("{adjective}" in teacher.preprompt for teacher in templates.teachers)
    drawn = {templates.general(str(i), 0).preprompt for i in range(200)}
    assert len(drawn) > 50


def test_4_2_4_a_category_has_its_answer_template(templates: Templates) -> None:
    """Where the annotator named a risk category, the answer template of that category is given."""
    for name in TAXONOMY:
        lesson = templates.lesson({"category": name}, "an id", 0)
        assert lesson is not None and lesson.kind == "template" and name in lesson.preprompt


def test_table_39_shape_of_an_answer_template(templates: Templates) -> None:
    """A line that the question may elicit unsafe behaviour, the category's name, then the template, numbered."""
    first, *rest = templates.of_category(templates.categories["fraud"], "an id", 0).preprompt.splitlines()
    assert "unsafe" in first and "illicit and criminal activities" in first
    numbers = [line.split(".")[0] for line in rest if re.match(r"\d+\. ", line)]
    assert numbers == ["1", "2", "3", "4"]


def test_table_39_criminal(templates: Templates) -> None:
    """Immediate concerns where there are any; refuse; context and lawful alternatives; an invitation to go on."""
    concerns, refuse, context, invite = steps_of(templates, "criminal")
    assert "danger" in concerns and concerns.startswith("If ")
    assert "Decline" in refuse and "lawful" in context and "Invite" in invite


def test_table_39_explicit(templates: Templates) -> None:
    """Immediate concerns where there are any; refuse."""
    concerns, refuse = steps_of(templates, "explicit")
    assert "danger" in concerns and concerns.startswith("If ") and "Decline" in refuse


def test_table_13_disinformation(templates: Templates) -> None:
    """Refute at once; evidence with sources; where to read on."""
    refute, evidence, onward = steps_of(templates, "disinformation")
    assert "not true" in refute and "comes from" in evidence and "sources" in onward


def test_4_2_4_kept_where_the_safety_reward_model_prefers_it() -> None:
    """Only examples on which the distilled output gets a better score than the original answer, each for itself."""
    assert preset().gated_by == "safe" and preset().samples == 1
    pairs = [(0.2, 0.9), (0.9, 0.2), (0.5, 0.5)]  # without, with
    kept = [distillation.gate([taught], [plain], [True]) is not None for plain, taught in pairs]
    assert kept == [True, False, False]


def test_fig_16_what_the_gate_does_to_the_mean() -> None:
    """Scores rise where they were low and may fall where they were high; with the gate the mean can only rise."""
    plain, taught = [0.1, 0.3, 0.9, 0.95], [0.8, 0.7, 0.6, 0.99]
    gated = [t if distillation.gate([t], [p], [True]) is not None else p for p, t in zip(plain, taught)]
    assert gated == [0.8, 0.7, 0.9, 0.99] and all(g >= p for g, p in zip(gated, plain))
    assert sum(gated) > sum(taught) and sum(gated) > sum(plain)


def test_the_templates_can_be_replaced() -> None:
    """The wording is ours; a file of one's own takes its place."""
    fields = {f.name for f in dataclasses.fields(distill.Settings)}
    assert {"templates", "show_templates", "place", "gate", "samples"} <= fields


# --- 5.1: time ----------------------------------------------------------------------------------------------------


def test_5_1_each_example_has_two_dates() -> None:
    """The date of the query, and that of the event, before which the question makes no sense."""
    fact = {"question": "Who was first on the moon?", "answer": "Neil Armstrong", "event_date": "1969-07-20"}
    after, before = (case_of({**fact, "query_date": date}) for date in ("2023", "1960"))
    assert after is not None and after.after and after.dialogue()[-1]["content"] == "Neil Armstrong"
    assert before is not None and not before.after and "not happened yet" in before.dialogue()[-1]["content"]
    assert "2023" in after.prompt[0]["content"] and after.prompt[0]["role"] == "system"


@pytest.mark.parametrize(("year", "knows"), [("2023", True), ("852", False)])
def test_5_1_the_year_852_and_2023(year: str, knows: bool) -> None:
    """The paper's own probe: the same question in the year 852 and in 2023 (Fig. 22)."""
    fact = {"question": "How long ago did Barack Obama become president?", "answer": "14 years ago"}
    case = case_of({**fact, "event_date": "2009-01-20", "query_date": year})
    assert case is not None and case.after is knows
    assert case.prompt[0]["content"] == f"It is the year {year}."
    told = Survey().add("He became president 14 years ago.", case.gold, case.after)
    denied = Survey().add("That has not happened yet.", case.gold, case.after)
    assert (told, denied) == (knows, not knows)


def test_5_1_they_are_fine_tuning_data(tmp_path: Path) -> None:
    """A thousand such examples were used in supervised fine-tuning."""
    fact = {"question": "Who won?", "answer": "Ann", "event_date": "2020", "query_date": "2021"}
    path = tmp_path / "facts.jsonl"
    path.write_text((json.dumps(fact) + "\n") * 1000)
    records = [record for _, record in read_dialogues([path], format="temporal")]
    assert len(records) == 1000 and all(validate("dialogue", r) for r in records)
