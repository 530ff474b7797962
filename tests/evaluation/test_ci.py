"""What CI reads: JUnit, the summary, annotations, and the JSON document against its schema."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import schema
import yaml
from markdown_it import MarkdownIt

from dvn_cli.errors import DvnError
from dvn_cli.evaluation import ci
from dvn_cli.evaluation.gates import Check, Gate, Named
from dvn_cli.evaluation.measure import Evaluation
from dvn_cli.files import append, encoded

NAME = "a|b <i>\x1b[1m*"
ROWS = [
    Evaluation(1, NAME, level, (1,), 1234, 0.5, 90.0, None, 0.1, 50, file="file.safetensors") for level in (1, 2, 3)
]
CHECKS = [
    Check("min_accuracy", Named(1, NAME, 1), "file.safetensors", "top-1 >= 80 %", "top-1 is 90.00 %", "passed", 10),
    Check("baseline", Named(1, NAME, 1), "file.safetensors", "change >= -1", "100 %: 1\n2", "failed", -3),
    Check("baseline", Named(1, NAME, 2), "file.safetensors", "change >= -1", "too few", "undecided", -1),
    Check("baseline", Named(1, NAME, 4), None, "change >= -1", "it is gone", "failed"),
]

# What readers of JUnit XML (Jenkins, GitLab, GitHub's reporters) agree on, of what dvn writes.
JUNIT = """<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema">
  <xs:complexType name="told" mixed="true">
    <xs:attribute name="type" type="xs:string" use="required"/>
    <xs:attribute name="message" type="xs:string" use="required"/>
  </xs:complexType>
  <xs:complexType name="case">
    <xs:sequence>
      <xs:choice minOccurs="0">
        <xs:element name="failure" type="told"/>
        <xs:element name="error" type="told"/>
      </xs:choice>
      <xs:element name="system-out" type="xs:string" minOccurs="0"/>
    </xs:sequence>
    <xs:attribute name="classname" type="xs:string" use="required"/>
    <xs:attribute name="name" type="xs:string" use="required"/>
    <xs:attribute name="time" type="xs:decimal" use="required"/>
  </xs:complexType>
  <xs:complexType name="suite">
    <xs:sequence><xs:element name="testcase" type="case" minOccurs="0" maxOccurs="unbounded"/></xs:sequence>
    <xs:attribute name="name" type="xs:string" use="required"/>
    <xs:attribute name="tests" type="xs:nonNegativeInteger" use="required"/>
    <xs:attribute name="failures" type="xs:nonNegativeInteger" use="required"/>
    <xs:attribute name="errors" type="xs:nonNegativeInteger" use="required"/>
    <xs:attribute name="skipped" type="xs:nonNegativeInteger" use="required"/>
    <xs:attribute name="time" type="xs:decimal" use="required"/>
  </xs:complexType>
  <xs:element name="testsuites"><xs:complexType><xs:sequence>
    <xs:element name="testsuite" type="suite" maxOccurs="unbounded"/>
  </xs:sequence></xs:complexType></xs:element>
</xs:schema>"""


@pytest.mark.parametrize(("undecided", "totals", "tags"), [
    ("undecided", (4, 2, 1), ["failure system-out", "error", "", "failure"]),
    ("failed", (4, 3, 0), ["failure system-out", "failure", "", "failure"]),
    ("passed", (4, 2, 0), ["failure system-out", "system-out", "", "failure"]),
])  # fmt: skip
def test_junit(tmp_path, undecided, totals, tags):
    ci.write_junit(tmp_path / "junit.xml", ROWS, Gate(CHECKS, undecided))
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    (suite,) = root
    assert (root.tag, suite.tag, suite.get("name")) == ("testsuites", "testsuite", "dvn eval")
    assert tuple(int(suite.get(key) or -1) for key in ("tests", "failures", "errors")) == totals
    assert [" ".join(inner.tag for inner in case) for case in suite] == tags
    cases = [(case.get("classname"), case.get("name")) for case in suite]
    assert cases[0] == ("file.safetensors", "task 1 a|b <i>\ufffd[1m*, level 1")
    assert [name for name, _ in cases] == ["file.safetensors"] * 3 + ["baseline"]
    failure = suite[0][0]
    assert failure.attrib == {"type": "baseline", "message": "100 %: 1\n2"}
    assert failure.text == "change >= -1: 100 %: 1\n2"


@pytest.mark.parametrize("undecided", ["undecided", "failed", "passed"])
def test_junit_has_its_schema(tmp_path, undecided):
    xmlschema = pytest.importorskip("xmlschema")
    file = tmp_path / "junit.xml"
    ci.write_junit(file, ROWS, Gate(CHECKS, undecided))
    validator, text = xmlschema.XMLSchema(JUNIT), file.read_text()
    validator.validate(text)
    wrong = ((' tests="4"', ""), (' failures="', ' failures="many'), ("failure", "fault"), (' type="baseline"', ""))
    assert all(not validator.is_valid(text.replace(*each)) for each in wrong)


def test_the_summary_is_added_to_what_is_there(tmp_path):
    file = tmp_path / "summary.md"
    for _ in range(2):
        append(file, encoded(ci.markdown(ROWS, Gate(CHECKS))))
    lines = file.read_text().splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert lines[0] == "### dvn eval: failed"
    assert [line.replace("\\|", "").count("|") for line in lines[2:8]] == [8] * 6  # of as many cells
    assert lines[4].startswith("| 1 a\\|b &lt;i&gt;\x1b\\[1m\\* | 1 | 1.2K | 90.00 | 78.6-95.7 | 50 | ✅ passed: ")
    assert lines[4].endswith("<br>❌ failed: change &gt;= -1; 100 %: 1 2 |")
    assert lines[7].startswith("| 1 a\\|b &lt;i&gt;\x1b\\[1m\\* | 4 |  |  |  |  | ❌ failed: ")


def test_a_summary_is_added_to_beside_others(tmp_path):
    """Which have the same file open; it begins a line where theirs has no end."""
    file = tmp_path / "summary.md"
    file.write_text("of mine")
    file.chmod(0o640)
    with open(file, "ab") as other:
        append(file, b"### dvn eval\n")
        other.write(b"of mine too\n")
    assert file.read_text() == "of mine\n### dvn eval\nof mine too\n"
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_summary_on_a_full_disk():
    with pytest.raises(DvnError, match=r"^cannot write '/dev/full': No space left on device$"):
        append("/dev/full", b"### dvn eval\n")


def test_the_summary_as_it_is_rendered():
    """By a parser of GitHub's kind of Markdown, which rich has: a table, in which names are as they are written."""
    rendered = MarkdownIt("commonmark").enable("table").render(ci.markdown(ROWS, Gate(CHECKS)))
    root = ElementTree.fromstring(f"<div>{rendered}</div>".replace("\x1b", "").replace("<br>", "<br/>"))
    head, *body = ([cell.text for cell in row] for row in root.iter("tr"))
    assert head == ["task", "level", "parameters", "top-1 in %", "95 % CI", "images", "checks"]
    assert [row[:2] for row in body] == [[f"1 {NAME}".replace("\x1b", ""), level] for level in "1234"]
    assert [len(row) for row in body] == [7] * 4


def test_annotations():
    name = "task 'a|b <i>\x1b[1m*', level"
    assert ci.annotations(Gate(CHECKS)) == [
        f"::error title=dvn eval::{name} 1 of 'file.safetensors': 100 %25: 1%0A2",
        f"::warning title=dvn eval::{name} 2 of 'file.safetensors': too few",
        f"::error title=dvn eval::{name} 4: it is gone",
    ]
    assert ci.annotations(Gate(CHECKS, "passed"))[1].startswith("::notice ")


def test_undecided_checks_that_count_as_passed_are_told():
    assert ci.markdown(ROWS, Gate(CHECKS[2:3])).startswith("### dvn eval: undecided\n")
    lenient = Gate(CHECKS[2:3], "passed")
    assert ci.markdown(ROWS, lenient).startswith("### dvn eval: passed, undecided counted as passed\n")
    assert ci.markdown(ROWS, Gate(CHECKS[:1], "passed")).startswith("### dvn eval: passed\n")


def test_all_of_it_from_one_command(dvn, made, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert dvn("--save-baseline", "base.json")[2] == "base.json is written\n"
    validator = schema.validator("eval")
    outputs = ("--junit", "junit.xml", "--summary", "summary.md", "--results-file", "results.json")
    code, out, err = dvn("--json", "--baseline", "base.json", "--min-accuracy", "task=1,level=1:100", *outputs)
    assert code == 1
    document = json.loads(out)
    assert json.loads((made / "results.json").read_text()) == document
    for content in (document, json.loads(dvn("--json")[1])):
        validator.validate(content)
    for wrong in ({"gate": {}}, {"results": [{}]}, {"schema_version": 2}):
        assert not validator.is_valid(document | wrong)
    annotation, line = (line for line in err.splitlines() if "no floor" not in line)
    assert annotation.startswith("::error title=dvn eval::task 'colours', level 1 of 'dvn.safetensors': top-1 is ")
    assert line.startswith("dvn: task 'colours', level 1")
    assert (made / "summary.md").read_text().startswith("### dvn eval: failed\n")
    assert ElementTree.parse(made / "junit.xml").getroot()[0].get("failures") == "1"


@pytest.mark.slow
def test_the_steps_of_the_workflow(tmp_path):
    """The one that README tells to copy, but for what GitHub has of its own and `pip install`."""
    root = Path(__file__).parents[2] / ".github"
    steps = yaml.safe_load((root / "workflows" / "gates.yml").read_text())["jobs"]["gates"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands[0] == "pip install ."
    shutil.copytree(root, tmp_path / ".github")
    (tmp_path / "dvn").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dvn_cli "$@"\n')
    (tmp_path / "dvn").chmod(0o755)
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(root.parent)}
    environment = os.environ | paths | {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    for command in commands[1:]:
        done = subprocess.run(
            ["bash", "-e", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "summary.md").read_text().startswith("### dvn eval: passed\n")
    assert ElementTree.parse(tmp_path / "junit.xml").getroot()[0].get("tests") == "16"
