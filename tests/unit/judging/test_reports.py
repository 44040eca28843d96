"""JUnit, HTML, and the bug that explains the failures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from ferrum_ref.judging.diagnosis import diagnose
from ferrum_ref.judging.html import boxes, html_page, maps_of, worst_cases
from ferrum_ref.judging.junit import junit_xml
from ferrum_ref.judging.subject import adapted, open_subject
from ferrum_ref.parity.cells import gather
from ferrum_ref.parity.mutants.catalogue import MUTANTS
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.runner import FAILED, CaseResult, Selection, draw_case, run
from ferrum_ref.parity.subject import FunctionSubject
from ferrum_ref.parity.units import STORAGES

SMALL = Selection(("rms_norm", "linear"), ("fp32", "bf16"), only_small=True)


def results(attribute: str) -> list[CaseResult]:
    return list(run(open_subject(f"subjects_for_tests:{attribute}"), SMALL))


@pytest.mark.clause("PA-JUNIT-1")
def test_junit_counts_and_says_what_the_report_says() -> None:
    found = results("forgetful")
    root = ElementTree.fromstring(junit_xml("mine \x00 & <you>", found))
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["rms_norm", "linear"]
    assert int(suites["rms_norm"].get("failures", "")) == sum(r.status == FAILED for r in found)
    assert int(suites["linear"].get("skipped", "")) == int(suites["linear"].get("tests", ""))
    failure = next(case.find("failure") for case in suites["rms_norm"] if case.find("failure") is not None)
    assert failure is not None
    assert "run it again: ferrum-ref parity --backend subjects_for_tests:forgetful" in str(failure.text)
    assert root.get("name") == "parity of mine ? & <you>"


class Outline(HTMLParser):
    """Checks that tags close, and keeps what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.clause("PA-HTML-1", "PA-HTML-2")
def test_the_page_stands_alone_and_shows_every_cell() -> None:
    subject = open_subject("subjects_for_tests:forgetful")
    page = html_page("mine, judged", gather(results("forgetful")), subject, ["this looks like a bug"])
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.fetched == []
    assert page.count('<td class="failed"') == 2
    assert page.count('<td class="unsupported"') == 2
    assert "this looks like a bug" in page
    maps = [json.loads(text) for text in re.findall(r"data-values='([^']*)'", page)]
    assert maps
    assert max(value for row in maps[0] for value in row if value is not None) > 1


@pytest.mark.clause("PA-HTML-1")
def test_without_failures_the_nearest_to_the_bound_are_shown() -> None:
    cells = gather(results("honest"))
    shown = worst_cases(cells)
    assert [result.ratio_det for result in shown] == sorted((r.ratio_det for r in shown), reverse=True)
    assert "Nearest to the bound" in html_page("t", cells, open_subject("subjects_for_tests:honest"))


@pytest.mark.clause("PA-HTML-2")
def test_a_map_keeps_the_largest_of_each_box() -> None:
    ratios = np.zeros((100, 300))
    ratios[77, 211], ratios[3, 5] = 7.0, np.nan
    found = boxes(ratios)
    assert (len(found), len(found[0])) == (48, 96)
    assert sorted((v for row in found for v in row if v), reverse=True) == [7.0]
    assert [value for row in found for value in row].count(None) == 1
    assert boxes(np.array(3.0)) == [[3.0]]


@pytest.mark.clause("PA-HTML-2", "PA-HTML-3", "PA-DIAGNOSIS-3")
def test_a_subject_that_raises_has_words_escaped_and_no_map() -> None:
    subject, found = open_subject("subjects_for_tests:markup"), results("markup")
    page = html_page("t", gather(found), subject)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert maps_of(subject, next(result for result in found if result.status == FAILED)) == []
    assert diagnose(subject, found) == []


@pytest.mark.clause("PA-DIAGNOSIS-1", "PA-DIAGNOSIS-2")
def test_a_bug_of_someone_elses_is_named() -> None:
    subject = open_subject("subjects_for_tests:forgetful")
    found = diagnose(subject, results("forgetful"))
    assert [(one.operation, one.dtype) for one in found] == [("rms_norm", "fp32"), ("rms_norm", "bf16")]
    assert all(one.explained == one.looked_at for one in found)
    names = {bug.name for bug in MUTANTS if bug.run.__name__ == "without_variance"}
    assert {one.bug for one in found} == names
    assert str(found[0]).startswith("rms_norm fp32: this looks like the bug ")


@pytest.mark.clause("PA-DIAGNOSIS-1")
@pytest.mark.parametrize("operation", ["rms_norm", "rotary_embedding", "silu_mul", "linear", "softmax"])
def test_every_bug_of_the_library_is_recognised(operation: str) -> None:
    """As itself, or as one whose numbers are the same on every failed case."""
    for bug in [one for one in MUTANTS if one.operation == operation and "bf16" in one.dtypes]:
        subject = FunctionSubject("x", {operation: bug.run}, {operation: bug.algorithm})
        with np.errstate(all="ignore"):  # bugs overflow
            judged = list(run(subject, Selection((operation,), ("bf16",), only_small=True)))
        failures = [result for result in judged if result.status == FAILED]
        if not failures:  # it shows in the larger cases only
            continue
        (found,) = diagnose(subject, failures)
        twin = next(one for one in MUTANTS if one.operation == operation and one.name == found.bug)
        if twin is not bug:
            inputs = draw_case(operation_named(operation), STORAGES["bf16"], failures[0].case_index, 0)
            with np.errstate(all="ignore"):
                pairs = list(zip(twin.run(inputs), bug.run(inputs), strict=True))
            assert all(a.shape == b.shape for a, b in pairs), (bug.name, found.bug)


@pytest.mark.clause("PA-DIAGNOSIS-3")
def test_the_wrong_element_type_is_no_bug_of_the_library() -> None:
    """Right numbers in float32 for bf16 inputs agree with every bug that does not show in bf16."""
    subject = adapted("wide", {"linear": lambda x, weight: x.astype(np.float32) @ weight.astype(np.float32).T})
    judged = list(run(subject, Selection(("linear",), ("bf16",), only_small=True)))
    assert {result.status for result in judged} == {FAILED}
    assert diagnose(subject, judged) == []


@pytest.mark.clause("PA-DIAGNOSIS-3")
def test_an_operation_that_shares_a_declaration_shares_the_bugs() -> None:
    bug = next(one for one in MUTANTS if one.name == "eps forgotten")
    subject = FunctionSubject("x", {"tensor_rms_norm": bug.run})
    with np.errstate(all="ignore"):
        judged = list(run(subject, Selection(("tensor_rms_norm",), ("fp32",), only_small=True)))
    (found,) = diagnose(subject, judged)
    assert (found.operation, found.bug) == ("tensor_rms_norm", bug.name)


@pytest.mark.clause("PA-DIAGNOSIS-2")
def test_numbers_that_no_bug_gives_are_left_unexplained() -> None:
    random = np.random.default_rng(0)

    def noise(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:  # type: ignore[type-arg]
        return random.standard_normal(x.shape).astype(x.dtype)

    subject = adapted("noise", {"rms_norm": noise})
    assert diagnose(subject, list(run(subject, Selection(("rms_norm",), ("fp32",), only_small=True)))) == []
