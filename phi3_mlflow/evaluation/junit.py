"""The verdict as JUnit XML, the format in which CI systems show test results."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from phi3_mlflow.evaluation.gate import Verdict

_NOT_XML = re.compile(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(name: str, verdict: Verdict) -> str:
    """A test suite with one test case per threshold and one per comparison.

    Args:
        name: of the version.
        verdict: of the gate. A comparison that cannot tell is reported as skipped.
    """
    suite = ElementTree.Element("testsuite", name=_clean(f"gate of {name}"))
    failures = skipped = 0
    for check in verdict.checks:
        case = _case(suite, "thresholds", f"{check.metric} {check.bound}")
        if not check.passed:
            failures += 1
            _says(case, "failure", check.reason)
        elif check.unjudged:
            skipped += 1
            _says(case, "skipped", check.reason)
    for comparison in verdict.comparisons:
        group = f"champion {verdict.against}" if comparison.than == "champion" else "untrained base"
        case = _case(suite, group, f"{comparison.metric} {comparison.wanted}")
        if comparison in verdict.against_it:
            failures += 1
            _says(case, "failure", comparison.reason)
        elif not comparison.shown:
            skipped += 1
            _says(case, "skipped", comparison.reason)
    if not verdict.gated:
        # An empty suite is green in most systems.
        skipped += 1
        _says(_case(suite, "gate", verdict.gate), "skipped", verdict.why)
    cases = max(1, len(verdict.checks) + len(verdict.comparisons))
    suite.attrib.update(tests=str(cases), failures=str(failures), errors="0", skipped=str(skipped))
    ElementTree.indent(suite)
    text = ElementTree.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _case(suite: ElementTree.Element, group: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=_clean(group), name=_clean(name))


def _says(case: ElementTree.Element, kind: str, message: str) -> None:
    ElementTree.SubElement(case, kind, message=_clean(message)).text = _clean(message)


def _clean(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return _NOT_XML.sub("\ufffd", text)
