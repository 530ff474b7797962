"""What machines that test others read of an evaluation: JUnit XML, a summary in Markdown, GitHub's annotations."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from dvn_cli import report
from dvn_cli.evaluation.gates import Check, Gate, Named
from dvn_cli.evaluation.measure import Evaluation
from dvn_cli.files import atomic

_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 does not have, escaped or not."""

Cases = dict[tuple[Named, str | None], list[Check]]


def _cases(rows: Sequence[Evaluation], gate: Gate) -> Cases:
    """The checks of each network, of those that are gone too."""
    cases: Cases = {(Named(row.task, row.name, row.level), row.file): [] for row in rows}
    for check in gate.checks:
        cases.setdefault((check.network, check.file), []).append(check)
    return cases


def write_junit(path: Path, rows: Sequence[Evaluation], gate: Gate) -> None:
    """Writes JUnit XML: a test case for each network, a failure of which says every check that failed.

    What too few images leave undecided is an error, unless the gate counts it as passed or failed.

    Raises:
        InputError, DvnError: as `atomic`.
    """
    suite = ElementTree.Element("testsuite", name="dvn eval")
    counts = {"failure": 0, "error": 0}
    for (network, file), checks in _cases(rows, gate).items():
        name = f"task {network.task} {network.name}, level {network.level}"
        case = ElementTree.SubElement(suite, "testcase", classname=_xml(file or "baseline"), name=_xml(name), time="0")
        for verdict, tag in (("failed", "failure"), ("undecided", "error")):
            wrong = [check for check in checks if gate.counts_as(check) == verdict]
            if wrong and len(case) == 0:
                counts[tag] += 1
                told = ElementTree.SubElement(case, tag, type=wrong[0].kind, message=_xml(wrong[0].found))
                told.text = _xml("\n".join(f"{check.asked}: {check.found}" for check in wrong))
        passed = [check for check in checks if gate.counts_as(check) == "passed"]
        if passed:
            out = ElementTree.SubElement(case, "system-out")
            out.text = _xml("\n".join(f"{check.asked}: {check.found}" for check in passed))
    totals = {"tests": len(suite), "failures": counts["failure"], "errors": counts["error"], "skipped": 0, "time": 0}
    for key, value in totals.items():
        suite.set(key, str(value))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    with atomic(path) as opened:
        opened.write(ElementTree.tostring(root, "utf-8", xml_declaration=True))


def _xml(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)


def markdown(rows: Sequence[Evaluation], gate: Gate) -> str:
    """Returns a summary in Markdown: a row for each network, with its file where there are several.

    A step of GitHub's has one file for all commands, so it begins with a heading.
    """
    measured = {(Named(row.task, row.name, row.level), row.file): row for row in rows}
    several = len({row.file for row in rows}) > 1
    lines = [
        f"### dvn eval: {gate.in_words}",
        "",
        "| file " * several + "| task | level | parameters | top-1 in % | 95 % CI | images | checks |",
        "|---" * several + "|---|--:|--:|--:|--:|--:|---|",
    ]
    for key, checks in _cases(rows, gate).items():
        (network, file), row = key, measured.get(key)
        figures = ["", "", "", ""]
        if row is not None:
            figures = [report.short(row.params), f"{row.top1:.2f}", report.limits(row.interval), f"{row.images:,}"]
        told = "<br>".join(
            f"{_SIGNS[check.verdict]} {_markdown(f'{check.verdict}: {check.asked}; {check.found}')}" for check in checks
        )
        files = [_markdown(file or "")] * several
        cells = [*files, _markdown(f"{network.task} {network.name}"), str(network.level), *figures, told]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_SIGNS = {"passed": "✅", "failed": "❌", "undecided": "❔"}


def _markdown(text: str) -> str:
    """A text as it is, in a cell of a table: what Markdown and HTML would read otherwise is escaped."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def annotations(gate: Gate) -> list[str]:
    """Returns a workflow command of GitHub Actions for each check that did not pass.

    See "Workflow commands for GitHub Actions" in GitHub's documentation for what is escaped.
    """
    lines = []
    for check in gate.checks:
        if check.verdict != "passed":
            level = {"failed": "error", "undecided": "warning", "passed": "notice"}[gate.counts_as(check)]
            lines.append(f"::{level} title=dvn eval::{_command(str(check))}")
    return lines


def _command(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
