"""The page says what was found, why, and how sure it is, and loads nothing from elsewhere."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from report_support import BARS, LINES, RESULT, ROOFLINE, make_run

from benchmarks import html
from benchmarks.core import QUESTIONS, Result

FOUR = {
    f"suite{number}": replace(RESULT, question=number, plots=[plot])
    for number, plot in enumerate((LINES, LINES, BARS, ROOFLINE), 1)
}
VOID = ("meta", "img", "br")


class Page(HTMLParser):
    """Elements, and whether they are closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_every_question_is_answered() -> None:
    page = Page(html.page(make_run(**FOUR)))
    for number, question in QUESTIONS.items():
        assert f"{number}. {question}" in page.text
        assert html.WHY[number] in page.text
    # In short, and with its table.
    assert page.text.count("Fused is 1.5 times as fast & no less.") == 2 * len(FOUR)
    assert "Not measured in this run" not in page.text
    for part in ("12.3 ±0.5", "a [note]", "abcdef0", "run <it>", "no compiler"):
        assert part in page.text


def test_many_answers_are_shortened() -> None:
    answers = [f"finding {number} of many" for number in range(html.AT_ONCE)]
    few = Page(html.page(make_run(things=replace(RESULT, answers=answers)))).text
    assert few.count("of many") == 2 * len(answers)
    answers.append("another of many")
    many = Page(html.page(make_run(things=replace(RESULT, answers=answers)))).text
    assert many.count("of many") == 1 + len(answers)


def test_how_sure() -> None:
    page = Page(html.page(make_run(things=RESULT)))
    text = re.sub(r"\s+", " ", page.text)
    assert "Suites that passed: 1 of 1." in text
    assert "Each of the 2 times or rates is a median" in text and "within ±2.0 % of it" in text
    assert "0 of 2 bars are met, 1 could not be measured here." in text
    assert "was idle before the run" in text


def test_warnings() -> None:
    run = make_run(facts={"load": 3.0}, things=RESULT)
    page = Page(html.page({**run, "unfinished": ["head"]}))
    assert "Take the figures with care: the machine is busy: load average 3.0." in page.text
    assert "cut off before head" in page.text
    assert "idle" not in page.text


def test_failed_suite_shows_its_reason_and_no_figures() -> None:
    run = make_run(things=Result("things", failure="check failed: <off>", question=2))
    page = Page(html.page(run))
    assert "No figures are shown: check failed: <off>" in page.text
    assert "shown without figures: things" in page.text
    assert not page.all("img")


def test_nothing_measured() -> None:
    text = Page(html.page(make_run())).text
    assert text.count("Not measured in this run (preset quick)") == len(QUESTIONS)


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = html.page(make_run(**FOUR))
    page = Page(text)
    assert not page.all("script") and not page.all("link")
    images = page.all("img")
    assert len(images) == len(FOUR)
    for image in images:
        kind, data = (image["src"] or "").split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert all((link["href"] or "")[1:] in targets for link in page.all("a"))
    assert "http" not in text and "url(" not in text


EVIL = "<script>\"&'</script>"


@pytest.mark.parametrize("field", ["title", "notes", "answers", "failure", "rows", "plots"])
def test_everything_is_escaped(field: str) -> None:
    value = {
        "title": EVIL,
        "notes": [EVIL],
        "answers": [EVIL],
        "failure": EVIL,
        "rows": [{"way": EVIL}],
        "plots": [replace(LINES, title="ours", note=EVIL)],
    }[field]
    page = Page(html.page(make_run(things=replace(RESULT, **{field: value}))))
    assert not page.all("script")
    assert EVIL in page.text


def test_facts_are_escaped() -> None:
    page = Page(html.page(make_run(facts={"processor": EVIL}, things=RESULT)))
    assert not page.all("script")
    assert EVIL in page.text
