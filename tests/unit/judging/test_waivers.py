"""Known failures: what a waiver covers, until when, and what becomes of one that is not needed."""

from __future__ import annotations

import datetime
import math
from dataclasses import replace
from pathlib import Path

import pytest

from ferrum_ref.errors import FerrumIOError, InvalidFormatError
from ferrum_ref.judging.subject import open_subject
from ferrum_ref.judging.waivers import Waiver, read_waivers, waived
from ferrum_ref.parity.cells import gather, has_failed
from ferrum_ref.parity.report import summary_line
from ferrum_ref.parity.runner import FAILED, WAIVED, CaseResult, Selection, run

DAY = datetime.date(2027, 1, 31)
FULL = '[[waiver]]\noperation = "rms_norm"\ndtype = "fp32"\nreason = "known"\nexpires = 2027-01-31\n'


def results(attribute: str = "forgetful") -> list[CaseResult]:
    return list(
        run(
            open_subject(f"subjects_for_tests:{attribute}"), Selection(("rms_norm",), ("fp32", "bf16"), only_small=True)
        )
    )


def waiver(dtype: str = "*", probe: str = "") -> Waiver:
    return Waiver("rms_norm", dtype, "known", DAY, probe)


@pytest.mark.clause("PA-WAIVER-1")
def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text(FULL + 'probe = "near sqrt"\nat_most = 3\n')
    assert read_waivers(path) == [Waiver("rms_norm", "fp32", "known", DAY, "near sqrt", 3.0)]
    path.write_text("")
    assert read_waivers(path) == []


@pytest.mark.clause("PA-WAIVER-1", "PA-WAIVER-5", "PA-WAIVER-6")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FULL.replace("rms_norm", "rms_morn"), "waiver 1: operation: there is no 'rms_morn'"),
        (FULL.replace("fp32", "fp4"), "waiver 1: dtype: got 'fp4'"),
        (FULL.replace('"known"', '" "'), "waiver 1: reason: got ' ', expected a text"),
        (FULL.replace("2027-01-31", '"soon"'), "waiver 1: expires: got 'soon', expected a date"),
        (FULL.replace("expires = 2027-01-31\n", ""), "waiver 1: expires: got None"),
        (FULL + FULL.replace("reason", "excuse"), "waiver 2: excuse: unknown field"),
        (FULL + "probe = 3\n", "waiver 1: probe: got 3"),
        (FULL + 'probe = "neddle"\n', "waiver 1: probe: no case of rms_norm has 'neddle' in its label"),
        (FULL + "at_most = 1.0\n", "waiver 1: at_most: got 1.0, expected an err/bound above 1"),
        (FULL + "at_most = true\n", "waiver 1: at_most: got True"),
        ("waiver = 3", "expected \\[\\[waiver\\]\\] entries"),
        ("other = 3", "expected \\[\\[waiver\\]\\] entries"),
        ("[[waiver", "read waivers"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "w.toml").write_text(text)
    with pytest.raises(InvalidFormatError, match=said):
        read_waivers(tmp_path / "w.toml")
    with pytest.raises(FerrumIOError, match="No such file"):
        read_waivers(tmp_path / "absent.toml")


@pytest.mark.clause("PA-WAIVER-2")
def test_covered_failures_are_waived_through_the_last_day() -> None:
    found = list(waived(results(), [waiver("fp32")], DAY))
    states = {(result.dtype, result.status) for result in found}
    assert ("fp32", WAIVED) in states
    assert ("fp32", FAILED) not in states
    assert ("bf16", FAILED) in states
    assert sorted(r.case_index for r in found) == sorted(r.case_index for r in results())
    cells = gather(list(waived(results(), [waiver()], DAY)))
    assert not has_failed(cells)
    assert "waived" in summary_line(cells)
    assert "waived" not in summary_line(gather(results("honest")))


@pytest.mark.clause("PA-WAIVER-5")
def test_what_is_worse_than_the_waiver_says_fails() -> None:
    worst = max(result.ratio_det for result in results() if result.status == FAILED)
    for at_most, states in ((worst, {WAIVED}), (1.5, {WAIVED, FAILED})):
        limited = replace(waiver(), at_most=at_most)
        failing = [one for one in waived(results(), [limited], DAY) if one.status in (FAILED, WAIVED)]
        assert {one.status for one in failing} <= states
        assert all(
            "its waiver is for err/bound up to 1.5 (known)" in one.message for one in failing if one.status == FAILED
        )
    lost = replace(results()[0], status=FAILED, verdict=None, ratio_det=math.inf, message="the process died (SIGSEGV)")
    (told,) = waived([lost], [replace(waiver(), at_most=1e9)], DAY)
    assert told.status == FAILED
    assert next(waived([lost], [waiver()], DAY)).status == WAIVED


@pytest.mark.clause("PA-WAIVER-3")
def test_an_expired_waiver_does_nothing_but_say_so() -> None:
    found = list(waived(results(), [waiver()], DAY + datetime.timedelta(days=1)))
    failed = [result for result in found if result.status == FAILED]
    assert len(failed) == sum(result.status == FAILED for result in results())
    assert all(result.message.endswith("its waiver expired on 2027-01-31 (known)") for result in failed)


@pytest.mark.clause("PA-WAIVER-4")
def test_a_waiver_that_is_not_needed_fails() -> None:
    found = list(waived(results("honest"), [waiver("bf16")], DAY))
    failed = [result for result in found if result.status == FAILED]
    assert len(failed) == 1
    assert "cases pass, but rms_norm bf16 is waived (known); remove the waiver" in failed[0].message
    assert len(found) == len(results("honest"))


@pytest.mark.clause("PA-WAIVER-4")
def test_a_waiver_of_what_was_not_judged_does_nothing() -> None:
    skipped = [replace(result, status="skipped") for result in results("honest")]
    for judged in (skipped, results("honest")):
        found = list(waived(judged, [waiver(probe="no such label"), Waiver("linear", "*", "r", DAY)], DAY))
        assert found == judged


@pytest.mark.clause("PA-WAIVER-2")
def test_a_part_of_the_label_narrows_it() -> None:
    found = list(waived(results(), [waiver(probe="near sqrt")], DAY))
    assert {result.label for result in found if result.status == WAIVED} == {"shape=4x33 near sqrt(eps)"}
    assert any(result.status == FAILED for result in found)
