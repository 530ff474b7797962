"""What `dvn eval` shows and files."""

import csv
import errno
import json
import os
import shutil
import sys

import pytest
from pictures import DIGITS, KEYS, results

from dvn_cli import report
from dvn_cli.errors import DvnError
from dvn_cli.evaluation.intervals import top1_interval


def test_the_table_fits_80_columns(dvn):
    code, out, err = dvn()
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    header, _, *rows = (line.split() for line in out.splitlines() if line.strip())
    assert header == ["task", "level", "density", "top-1", "95", "%", "CI", "top-5", "loss", "images"]
    assert [row[:3] for row in rows] == [
        ["1", "colours", "1"],
        ["1", "colours", "2"],
        *[["2", "digits", n] for n in "12"],
    ]
    low, high = map(float, rows[0][6].split("-"))
    assert low < float(rows[0][5]) < high


def test_a_wide_terminal_gets_all_columns(dvn, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    header, _, *rows = (line.split() for line in dvn()[1].splitlines() if line.strip())
    columns = ["task", "level", "units", "params", "density", "top-1", "95", "%", "CI", "top-5", "loss", "images"]
    assert header == columns
    assert rows[3][3:5] == ["1", "2"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_is_filed(dvn, made, tmp_path):
    name = str(tmp_path / os.fsdecode(b"m\xff.safetensors"))
    shutil.copy(made / "dvn.safetensors", name)
    outputs = {option: str(tmp_path / option[2:]) for option in ("--report", "--summary", "--junit")}
    for ending in (".csv", ".json"):
        words = [*outputs.items(), ("--results-file", str(tmp_path / f"results{ending}"))]
        assert dvn(name, "--task", "2", "--min-accuracy", "0", *(word for pair in words for word in pair))[0] == 0
    assert json.loads((tmp_path / "results.json").read_text())["results"][0]["file"] == name
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0]["file"] == name.replace("\udcff", "\\udcff")
    assert "m\\udcff.safetensors" in (tmp_path / "report").read_text(encoding="utf-8")


def test_accuracy_of_each_class(dvn, made):
    """Of every level, and as many images as the split has of the class; together they are the task's."""
    code, out, _ = dvn("--per-class", "--json")
    found = json.loads(out)["results"]
    assert code == 0
    for row in found:
        right = sum(each["top1"] * each["images"] / 100 for each in row["per_class"] if each["images"])
        assert sum(each["images"] for each in row["per_class"]) == row["images"]
        assert 100 * right / row["images"] == pytest.approx(row["top1"])
    assert [each["class"] for each in found[2]["per_class"]] == ["0", "1", "2"]
    _, out, _ = dvn("--per-class", "--task", "2", "--results-file", "classes.csv")
    lines = [line.split() for line in out.splitlines() if line.strip()]
    place = lines.index(["top-1", "in", "%,", "95", "%", "CI:", "2", "digits", "level", "1", "level", "2", "images"])
    pairs = zip(lines[place + 2 : place + 8 : 2], lines[place + 3 : place + 8 : 2], strict=True)
    for number, (line, limits) in enumerate(pairs):
        levels = [row["per_class"][number] for row in found[2:]]
        assert line == [str(number), *(f"{each['top1']:.1f}" for each in levels), str(levels[0]["images"])]
        assert limits == [report.limits(top1_interval(each["top1"], each["images"])) for each in levels]
    assert "per_class" not in (made / "classes.csv").read_text()
    assert "per_class" not in dvn("--json")[1]


def test_networks_of_one_name_in_two_files_are_told_apart(dvn, made, monkeypatch):
    shutil.copy(made / "dvn.safetensors", made / "twin.safetensors")
    monkeypatch.setenv("COLUMNS", "120")
    gated = ("--min-accuracy", "0", "--summary", "twins.md")
    _, out, _ = dvn("dvn.safetensors", "twin.safetensors", "--task", "2", "--level", "1", *gated)
    results, _, gate = out.partition("gate: passed")
    lines = [line.strip() for line in results.splitlines()]
    assert lines.index("dvn.safetensors") < lines.index("twin.safetensors")
    assert sum("2 digits" in line for line in lines) == 2
    summary = [line.split(" | ")[:3] for line in (made / "twins.md").read_text().splitlines()[2:]]
    assert summary[0] == ["| file", "task", "level"]
    for file, row in zip(("dvn.safetensors", "twin.safetensors"), summary[2:], strict=True):
        assert f"2 digits, level 1 of '{file}' " in gate
        assert row == [f"| {file}", "2 digits", "1"]


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--task", "digits"], [(2, 1), (2, 2)]),
    (["--level", "2"], [(1, 2), (2, 2)]),
    (["--task", "2", "--level", "1"], [(2, 1)]),
    (["--task", "digits", "s11.safetensors", "s21.safetensors", *DIGITS], [(2, 1)]),
    (["--task", "number:2", "s11.safetensors", "s21.safetensors", *DIGITS], [(2, 1)]),
    (["--level", "1", "s12.safetensors", "dvn.safetensors"], [(1, 1), (2, 1)]),
])  # fmt: skip
def test_a_choice_of_networks(dvn, arguments, expected):
    assert [(row["task"], row["level"]) for row in results(dvn("--json", *arguments))] == expected


def test_results_in_a_file(dvn, made):
    code, out, _ = dvn("--json", "--results-file", "r.json")
    assert code == 0
    assert json.loads((made / "r.json").read_text()) == json.loads(out)
    dvn("--results-file", "r.csv")
    with open(made / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == KEYS
    assert rows[1]["units"] == "1 2"
    assert float(rows[1]["top1"]) == json.loads(out)["results"][1]["top1"]


def test_results_are_shown_or_filed_where_the_other_fails(dvn, made, monkeypatch):
    whole = dvn("--json")[1]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, out, err = dvn("--json", "--results-file", "late.json")
    assert (code, out) == (1, whole)
    assert err == "dvn: cannot write 'late.json': No space left on device\n"
    assert not (made / "late.json").exists()

    def refused(*_: object) -> None:
        raise DvnError("cannot write to stdout: No space left on device")

    monkeypatch.setattr("dvn_cli.report.show", refused)
    assert dvn("--results-file", "late.json")[0] == 1
    assert (made / "late.json").read_text() == whole.rstrip("\n")


@pytest.mark.parametrize("columns", [0, 1, 24, 40, 60, 79])
def test_a_narrow_terminal_hides_no_accuracy(dvn, monkeypatch, columns):
    """Other columns go first; what is shown is shown in full."""
    whole = results(dvn("--json"))
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = dvn()
    assert (code, err) == (0, "")
    assert "…" not in out
    header, _, *lines = out.replace("95 % CI", "interval").splitlines()
    assert max(map(len, lines)) <= (max(columns, 24) if columns else 80)
    place = header.split().index("top-1") - len(header.split())
    shown = [line.split()[place] for line in lines if len(line.split()) >= len(header.split())]
    assert shown == [f"{row['top1']:.2f}" for row in whole]
