"""`dvn bench --scenario`: the paper's tables from the records of runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import schema
from runs import EVEN, change, record

from dvn_cli import benchmark
from dvn_cli.training.methods import METHODS


def test_the_table_as_printed(tmp_path: Path, dvn: Callable[..., tuple[int, str, str]]) -> None:
    for seed in (0, 1):
        record(tmp_path, "dvn", seed, ({1: 90.0, 2: 92.0 + seed}, {1: 70.0, 2: 73.0}), scale="small")
    record(tmp_path, "baseline", 0, ({1: 90.5, 2: 91.0}, {1: 69.0, 2: 72.0}), scale="small")
    code, out, err = dvn("bench", "--scenario", "J1")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "J1, CIFAR-10 and CIFAR-100 jointly, WRN-32-4, k = 2; scale small, setting paper"
    assert lines[1] == "method units tens hundreds stored runs"
    expected = [
        "baseline 1 90.5 69.0 7.5M 1",
        "82.6-94.5 59.4-77.2",
        "baseline 2 91.0 72.0 7.5M 1",
        "83.8-95.2 62.5-79.9",
        "Table 1 94.8 76.4 14.8M",
        "packnet 1, 2 - - - -",
        "Table 1 94.5 75.3 -",
        "nestednet 1, 2 - - - -",
        "Table 1 94.7 76.7 -",
        "dvn 1 90.0±0.0 70.0±0.0 7.5M 2",
        "Table 1 94.6 75.0 -",
        "dvn 2 92.5±0.7 73.0±0.0 7.5M 2",
        "Table 1 95.1 77.3 -",
    ]
    assert lines[3:16] == expected
    text = " ".join(lines)
    assert "3 runs, seeds 0 1, on cpu (3); dvn 0.1.0, torch 2.15.0" in text
    assert "parameters by units: 1: 1.9M, 2: 7.4M" in text
    assert "Table 1 is of the full scale, these runs are of scale small" in text
    assert "these are not the paper's tasks by name: it has CIFAR-10, CIFAR-100" in text
    assert "missing: baseline, seed 1; packnet, no run; nestednet, no run" in text
    assert "dvn does not win: tens, 1 unit: baseline 90.50, dvn 90.00±0.00" in text
    assert "1 1.9M 1.9M 25.1 - - 0.11 - -" in lines  # of section 4.3, none measured


@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_is_cut_off(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dvn: Callable[..., tuple[int, str, str]]
) -> None:
    """Four tasks of long names, all methods, deviations, one with units of its own for each task: the widest table."""
    names = [f"tiny-imagenet-{n}" for n in range(4)]
    for method in METHODS:
        for seed in (0, 1):
            path = record(tmp_path, method, seed, [{1: 50.0 + seed, 2: 60.0 + seed}] * 2, scenario="j2")

            def to(content: dict[str, Any]) -> None:
                results = content["test"]
                content["test"] = [r | {"task": n, "name": names[n - 1]} for r in results[:2] for n in range(1, 5)]

            change(path, to)
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = dvn("bench", "--scenario", "j2")
    assert code == 0
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out
    assert out.count("50.5±0.7") == out.count("60.5±0.7") == 4 * len(METHODS)
    assert "the paper's accuracies (Figure 5) are not at hand" in out
    # units, parameters, density, ms, speed-up: of Table 2, beside nothing
    assert "4 - 29.8M - 100.0 - 1.05 - 1.0" in [" ".join(line.split()) for line in out.splitlines()]


def test_json_is_one_document(tmp_path: Path, dvn: Callable[..., tuple[int, str, str]]) -> None:
    record(tmp_path, "dvn", 0)
    record(tmp_path, "dvn", 1, ({1: 92.0, 2: 92.0}, {1: 70.0, 2: 73.0}))
    record(tmp_path, "baseline", 0, ({1: 95.0, 2: 91.0}, {1: 60.0, 2: 62.0}))
    code, out, err = dvn("bench", "--scenario", "j1", ".", "--json", "--results-file", "results.json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "results.json").read_text()) == document
    (made,) = document["tables"]
    ours = next(r for r in made["rows"] if r["method"] == "dvn" and r["level"] == 1)
    assert ours["top1"][0] == {"mean": 91.0, "std": pytest.approx(2**0.5), "runs": 2, "interval": None}
    assert (ours["units"], ours["seeds"], ours["paper"]["accuracy"]) == ([1, 1], [0, 1], [94.6, 75.0])
    assert [(a["column"], a["units"], a["method"]) for a in made["ahead"]] == [("tens", 1, "baseline")]
    assert made["missing"] == ["baseline, seed 1", "packnet, no run", "nestednet, no run"]
    assert [cost["paper"]["ms"] for cost in made["costs"]] == [0.11, 0.3]
    assert made["measured"] is None
    validator = schema.validator("bench")
    validator.validate(document)
    assert not validator.is_valid(document | {"plots": None})


def test_tables_come_without_torch(tmp_path: Path) -> None:
    record(tmp_path, "dvn")
    code = "import sys; from dvn_cli.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "bench", "--scenario", "j1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def _foreign(folder: Path) -> None:
    (folder / "foreign.run.json").write_text('{"name": "else"}')


def _cut_short(folder: Path) -> None:
    path = record(folder, "dvn")
    path.write_text(path.read_text()[:200])


def _interrupted(folder: Path) -> None:
    change(record(folder, "dvn"), lambda content: content.pop("test"))


def _not_a_number(folder: Path) -> None:
    change(record(folder, "dvn"), lambda content: content["test"][0].update(top1=float("nan")))


def _too_large(folder: Path) -> None:
    change(record(folder, "dvn"), lambda content: content["test"][0].update(params=10**400))


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.run.json")


def _one_task(folder: Path) -> None:
    record(folder, "dvn", networks=EVEN[:1])


def _other_tasks(folder: Path) -> None:
    record(folder, "dvn")
    change(record(folder, "lwf"), lambda content: content["test"][0].update(name="fives"))


def _other_recipe(folder: Path) -> None:
    record(folder, "dvn")
    record(folder, "dvn", 1, optimizer={"lr": 0.5})


def _twice(folder: Path) -> None:
    record(folder, "dvn").rename(folder / "again.run.json")
    record(folder, "dvn")


def _of_another(folder: Path) -> None:
    record(folder, "dvn", scenario="h1")
    change(record(folder, "lwf", 1, scenario="h1"), lambda content: content.pop("test"))  # not this table's matter
    record(folder, "lwf", scenario=None)


@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    [
        (None, ["--scenario", "j5"], "no scenario 'j5'; did you mean 'j"),
        (None, ["--scenario", "table"], "no scenario 'table'; the paper has j1, j2, j3, h1, s1, s2"),
        (None, ["--scenario", "j1"], "there are no runs of j1 in '.': `dvn train j1` makes one"),
        (_of_another, ["--scenario", "j1"], "there are no runs of j1 in '.' (runs of others: 3)"),
        (_of_another, ["--scenario", "j1", "dvn-full-0.run.json"], "the run of 'dvn-full-0.run.json' is of h1"),
        (None, ["--scenario", "j1", "none.run.json"], "there is no 'none.run.json'"),
        (lambda f: (f / "x.safetensors").touch(), ["--scenario", "j1", "x.safetensors"], "'x.run.json' is missing"),
        (_foreign, ["--scenario", "j1"], "'foreign.run.json' is no record of a run: recipe"),
        (_cut_short, ["--scenario", "j1"], "'dvn-full-0.run.json' is no record of a run: it is not JSON"),
        (_not_a_number, ["--scenario", "j1"], "is no record of a run: test.0.top1"),
        (_too_large, ["--scenario", "j1"], "is no record of a run: test.0.params"),
        (_pipe, ["--scenario", "j1"], "cannot read 'pipe.run.json': it is not a regular file"),
        (_interrupted, ["--scenario", "j1"], "has no accuracies on test images"),
        (_one_task, ["--scenario", "j1"], "has 1 tasks, the scenario has 2"),
        (_other_tasks, ["--scenario", "j1"], "task 1 is 'fives' in 'lwf-full-0.run.json' and 'tens' in others"),
        (_other_recipe, ["--scenario", "j1"], "are both dvn but have optimizer.lr=None and 0.5"),
        (_twice, ["--scenario", "j1"], "'again.run.json' and 'dvn-full-0.run.json' are both dvn with seed 0"),
        (None, ["--scenario", "j1", "--task", "1"], "leave out --task"),
        (None, ["--plots", "."], "give --scenario too"),
    ],
)
def test_what_cannot_be_shown_is_told_in_one_line(
    prepare: Callable[[Path], object] | None,
    words: list[str],
    message: str,
    tmp_path: Path,
    dvn: Callable[..., tuple[int, str, str]],
) -> None:
    if prepare is not None:
        prepare(tmp_path)
    code, out, err = dvn("bench", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


# A real run

SMALL = [
    "units=2",
    "backbone.name=wrn_10_1",
    "epochs=1",
    "scenario=j1",
    "tasks=[{name: low, data: {source: digits, classes: 0-4}}, {name: all, data: {source: digits}}]",
    "tasks.*.data.train_images=40",
    "tasks.*.data.test_images=20",
]


def test_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dvn: Callable[..., tuple[int, str, str]]) -> None:
    """Trained, tabled and, as it is given by its checkpoint, timed; the clock is not this test's matter."""
    code, out, err = dvn("train", "digits", *SMALL, "-o", "run.safetensors", "--json", "--device", "cpu")
    assert code == 0, err
    top1 = {(row["task"], row["level"]): row["top1"] for row in json.loads(out)["results"]}

    def measure(targets: Sequence[benchmark.Target], *_: object) -> list[benchmark.Measurement]:
        assert [(target.task, target.level) for target in targets] == [(2, 1), (2, 2)]
        return [
            benchmark.Measurement(
                *("", 2, "all", level, tuple(range(1, level + 1)), 1, 4, 1.0, 1),
                *((seconds,) * 3, None, 0.008 / seconds),
                batch_size=4,
            )
            for level, seconds in ((1, 0.002), (2, 0.008))
        ]

    monkeypatch.setattr(benchmark, "measure", measure)
    words = ("bench", "--scenario", "j1", "run.safetensors", "--batch-size", 4, "--device", "cpu")
    code, out, err = dvn(*words, "--json")
    assert code == 0, err
    (made,) = json.loads(out)["tables"]
    rows = [row for row in made["rows"] if row["method"] == "dvn"]
    cells = {(task, row["level"]): cell["mean"] for row in rows for task, cell in enumerate(row["top1"], 1)}
    assert cells == top1
    assert all(row["stored"] > row["params"][1] for row in rows)
    assert [(cost["units"], cost["ms"], cost["speedup"]) for cost in made["costs"]] == [(1, 0.5, 4.0), (2, 2.0, 1.0)]
    assert made["measured"]["batch_size"] == 4
    code, out, _ = dvn(*words)
    assert code == 0
    assert "ms an image at batch size 4 on " in " ".join(out.split())
    record = json.loads(Path("run.run.json").read_text())
    Path("run.run.json").write_text(json.dumps(record | {"recipe": record["recipe"] | {"seed": 5}}))
    told = "dvn: 'run.run.json' is the record of another run than that of 'run.safetensors'\n"
    assert dvn(*words) == (2, "", told)
