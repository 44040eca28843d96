"""Results as JUnit XML, which build servers read.  Clause: PA-JUNIT-1 (specs/judging.md)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from xml.etree import ElementTree

from ferrum_ref.parity.report import case_lines
from ferrum_ref.parity.runner import FAILED, PASSED, CaseResult

_UNPRINTABLE: Final = re.compile("[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(name: str, results: Iterable[CaseResult]) -> str:
    """One test suite an operation, one test case a result; what is neither passed nor failed is skipped. Pure."""
    suites: dict[str, list[CaseResult]] = {}
    for result in results:
        suites.setdefault(result.operation, []).append(result)
    root = ElementTree.Element("testsuites", name=_printable(f"parity of {name}"))
    for operation, members in suites.items():
        failures = sum(result.status == FAILED for result in members)
        skipped = sum(result.status not in (FAILED, PASSED) for result in members)
        suite = ElementTree.SubElement(root, "testsuite", name=operation, tests=str(len(members)), errors="0")
        suite.attrib |= {"failures": str(failures), "skipped": str(skipped)}
        for result in members:
            title = f"{result.dtype} case {result.case_index} seed {result.seed}: {result.label}"
            case = ElementTree.SubElement(suite, "testcase", classname=f"parity.{operation}", name=_printable(title))
            if result.status == FAILED:
                failure = ElementTree.SubElement(case, "failure", message=_printable(_message(result)))
                failure.text = _printable("\n".join([*case_lines(result), f"run it again: {result.reproduce}"]))
            elif result.status != PASSED:
                ElementTree.SubElement(case, "skipped", message=_printable(f"{result.status}: {result.message}"))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _message(result: CaseResult) -> str:
    """What a build server shows of a failure: the fault, and which elements are wrong."""
    extent = result.verdict.extent if result.verdict is not None else ""
    return "; ".join(filter(None, (result.message, extent)))


def _printable(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return _UNPRINTABLE.sub("?", text)
