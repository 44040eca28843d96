"""`ferrum-ref parity` on backends that behave badly, and the reports that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ferrum_ref.cli.main import main

SUBJECTS = Path(__file__).parents[1] / "judging"
ONE = ("--op", "rms_norm", "--dtype", "bf16", "--small", "--model", "none")


def parity(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, attribute: str, *options: str
) -> tuple[int, str, str]:
    monkeypatch.syspath_prepend(str(SUBJECTS))
    try:
        code = main(["parity", "--backend", f"subjects_for_tests:{attribute}", *ONE, *options])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.clause("PA-PRODUCT-1", "PA-ISOLATED-2", "PA-ISOLATED-3")
@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("hanging", "no result within 1.5 s: the kernel hangs"),
        ("crashing", "the process died (SIGSEGV)"),
        ("raising", "ZeroDivisionError: a kernel's own mistake"),
        ("nan", "err/bound is inf"),
        ("flat", "shape ("),
    ],
)
def test_bad_behaviour_is_a_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, attribute: str, said: str
) -> None:
    code, out, err = parity(capsys, monkeypatch, attribute, "--time-limit", "1.5" if attribute == "hanging" else "30")
    assert code == 1
    assert said in out
    assert "Traceback" not in out + err


@pytest.mark.clause("PA-PRODUCT-1", "PA-DIAGNOSIS-2")
def test_the_bug_is_named_and_the_reports_are_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page, xml = tmp_path / "report.html", tmp_path / "report.xml"
    code, out, _ = parity(capsys, monkeypatch, "forgetful", "--html", str(page), "--junit", str(xml))
    assert code == 1
    assert "rms_norm bf16: this looks like the bug" in out
    assert "this looks like the bug" in page.read_text()
    assert "<canvas" in page.read_text()
    assert int(ElementTree.fromstring(xml.read_text())[0].get("failures", "0")) > 0
    code, out, _ = parity(capsys, monkeypatch, "forgetful", "--json", "--in-process")
    assert code == 1
    assert json.loads(out)["diagnoses"][0].startswith("rms_norm bf16: this looks like the bug")


@pytest.mark.clause("PA-PRODUCT-1", "PA-WAIVER-2")
def test_waivers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text('[[waiver]]\noperation = "rms_norm"\ndtype = "*"\nreason = "known"\nexpires = 2999-01-31\n')
    code, out, _ = parity(capsys, monkeypatch, "forgetful", "--waivers", str(path))
    assert code == 0
    assert "waived" in out


@pytest.mark.clause("PA-PRODUCT-1")
def test_what_cannot_be_written_or_read_is_told_before_anything_is_judged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for options in (("--html", str(tmp_path / "no" / "x.html")), ("--waivers", str(tmp_path / "absent.toml"))):
        code, out, err = parity(capsys, monkeypatch, "hanging", *options)
        assert code == 2
        assert "No such file or directory" in err
        assert err.count("\n") == 1
        assert not out
    code, _, err = parity(capsys, monkeypatch, "honest", "--time-limit", "0")
    assert code == 2
    assert "the time limit is 0 s" in err
