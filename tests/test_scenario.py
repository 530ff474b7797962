"""`dvn bench --scenario`: the paper's tables and figures from the records of runs."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from dvn_cli import benchmark, plot, scenario
from dvn_cli.cli import main
from dvn_cli.training.methods import METHODS

PARAMS = {1: 1_853_900, 2: 7_380_276}
Networks = Sequence[Mapping[int, float]]
"""Of each task the accuracy of its networks by number of units."""

EVEN: Networks = ({1: 90.0, 2: 92.0}, {1: 70.0, 2: 73.0})
OWN: Networks = ({1: 91.0}, {2: 72.0})


def record(folder: Path, method: str, seed: int = 0, networks: Networks = EVEN, **keys: Any) -> Path:
    """The record of a run of two tasks, `tens` and `hundreds`; `keys` of its recipe, dotted ones as `a__b`."""
    recipe: dict[str, Any] = {"scenario": "j1", "method": method, "seed": seed, "epochs": 2, "threads": 1}
    recipe["tasks"] = [{"name": name, "data": {"path": f"/{seed}"}} for name in ("tens", "hundreds")]
    results = [
        {"task": task, "name": recipe["tasks"][task - 1]["name"], "level": level, "units": list(range(1, units + 1))}
        | {"params": PARAMS[units], "density": PARAMS[units] / PARAMS[max(of)], "top1": accuracy, "images": 100}
        for task, of in enumerate(networks, 1)
        for level, (units, accuracy) in enumerate(of.items(), 1)
    ]
    epochs = [
        {"epoch": epoch, "validation": [[accuracy - 10 / epoch for accuracy in of.values()] for of in networks]}
        for epoch in (1, 2)
    ]
    content = {"recipe": recipe | keys, "versions": {"dvn": "0.1.0", "torch": "2.15.0"}, "device": "cpu", "threads": 1}
    path = folder / f"{method}-{keys.get('scale', 'full')}-{seed}.run.json"
    path.write_text(json.dumps(content | {"stored": 7_500_000, "epochs": epochs, "test": results}))
    return path


def change(path: Path, to: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads(path.read_text())
    to(content)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def dvn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `dvn` in the test's folder; returns its exit code and what it wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dvn", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


def table(folder: Path, name: str = "j1") -> scenario.Table:
    (only,) = scenario.tables(scenario.find(name), scenario.read(name, [folder]))
    return only


def row(of: scenario.Table, method: str, units: scenario.Units) -> scenario.Row:
    return next(row for row in of.rows if (row.method, row.units) == (method, units))


# The paper


@pytest.mark.parametrize("name", scenario.scenarios())
def test_the_papers_figures_agree_among_themselves(name: str) -> None:
    of = scenario.find(name)
    assert set(of.methods) <= set(METHODS)
    for figures in of.rows:
        assert figures.method in of.methods
        assert len(figures.accuracy) == len(of.tasks)
        assert isinstance(figures.units, int) or len(figures.units) == len(of.tasks)
        assert of.average == (figures.average is not None)
        if figures.average is not None:
            assert figures.average == pytest.approx(statistics.mean(figures.accuracy))
    if of.times is not None:
        assert of.times.task <= len(of.tasks)
        top = of.times.networks[-1]
        for network in of.times.networks:
            assert network.speedup in (None, pytest.approx(top.ms / network.ms, abs=0.05))
            assert network.density in (None, pytest.approx(100 * network.params / top.params, abs=0.05))


def test_all_scenarios_are_there() -> None:
    assert set(scenario.scenarios()) == {"j1", "j2", "j3", "h1", "s1", "s2"}
    at_hand = {name for name, of in scenario.scenarios().items() if of.rows}
    assert at_hand == {"j1", "h1", "s1"}  # Table 5 and the curves of Figures 5 and 6 are not


# Rows


def test_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((90.0, 92.0, 97.0)):
        record(tmp_path, "dvn", seed, ({1: accuracy, 2: 95.0}, {1: 70.0, 2: 70.0 + seed}))
    record(tmp_path, "baseline")
    made = table(tmp_path)
    first, second = row(made, "dvn", (1, 1)), row(made, "dvn", (2, 2))
    assert first.cells[0] == scenario.Cell(93.0, pytest.approx(13**0.5), 3)  # (9 + 1 + 16) / 2
    assert str(first.cells[0]) == "93.0±3.6"
    assert str(second.cells[0]) == "95.0±0.0"
    # of the means 82.5, 83, 83.5, not of the deviations
    assert second.average == scenario.Cell(83.0, 0.5, 3)
    alone = row(made, "baseline", (1, 1)).cells[0]
    assert alone == scenario.Cell(90.0, None, 1)
    assert str(alone) == "90.0"
    assert second.params == (PARAMS[2], PARAMS[2])
    assert second.stored == 7_500_000


def test_rows_stand_beside_the_papers_by_method_and_units(tmp_path: Path) -> None:
    for method in ("lwf", "dvn", "baseline"):
        record(tmp_path, method, networks=EVEN if method != "lwf" else ({2: 90.0}, {2: 70.0}))
    record(tmp_path, "nestednet", networks=OWN)
    made = table(tmp_path)
    expected = [
        ("baseline", (1, 1), 1, None),
        ("baseline", (2, 2), 2, (94.8, 76.4)),
        ("packnet", (1, 2), None, (94.5, 75.3)),
        ("nestednet", (1, 2), 1, (94.7, 76.7)),
        ("dvn", (1, 1), 1, (94.6, 75.0)),
        ("dvn", (2, 2), 2, (95.1, 77.3)),
        ("lwf", (2, 2), 1, None),
    ]
    assert [(r.method, r.units, r.level, r.paper and r.paper.accuracy) for r in made.rows] == expected
    assert [cell and cell.mean for cell in row(made, "nestednet", (1, 2)).cells] == [91.0, 72.0]
    assert row(made, "packnet", (1, 2)).cells == (None, None)
    assert made.tasks == ("tens", "hundreds")


def test_scales_and_settings_are_never_mixed(tmp_path: Path) -> None:
    for keys in ({}, {"scale": "small"}, {"setting": "modern", "seed": 1}):
        record(tmp_path, "dvn", **keys)
    made = scenario.tables(scenario.find("j1"), scenario.read("j1", [tmp_path]))
    labels = [("full", "modern"), ("full", "paper"), ("small", "paper")]
    assert [(one.scale, one.setting) for one in made] == labels
    assert [len(one.runs) for one in made] == [1, 1, 1]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    for seed in (0, 1, 4):
        record(tmp_path, "dvn", seed)
    record(tmp_path, "baseline", 1)
    record(tmp_path, "nestednet", 0, OWN)
    record(tmp_path, "nestednet", 1, OWN)
    expected = ("baseline, seeds 0 4", "packnet, no run", "nestednet, seed 4")
    assert table(tmp_path).missing == expected


def test_a_row_of_nothing_where_there_is_neither_run_nor_figure(tmp_path: Path) -> None:
    record(tmp_path, "dvn", scenario="s2")
    made = table(tmp_path, "s2")
    assert [(r.method, r.units) for r in made.rows[:2]] == [
        ("feature_extraction", (None, None)),
        ("da_cnn", (None, None)),
    ]
    assert made.ahead == []


def test_where_dvn_does_not_win_is_said_at_equal_units(tmp_path: Path) -> None:
    record(tmp_path, "dvn", networks=({1: 90.0, 2: 92.0}, {1: 70.0, 2: 73.0}))
    record(tmp_path, "baseline", networks=({1: 90.0, 2: 91.0}, {1: 70.5, 2: 72.0}))
    record(tmp_path, "nestednet", networks=({1: 91.5}, {2: 72.5}))
    made = table(tmp_path)
    assert [(a.column, a.units, a.method) for a in made.ahead] == [
        ("tens", 1, "nestednet"),
        ("hundreds", 1, "baseline"),
    ]
    best = [(r.method, r.units, column.name) for r in made.rows for column in made.columns(r) if made.is_best(column)]
    assert best == [
        ("baseline", (1, 1), "hundreds"),
        ("nestednet", (1, 2), "tens"),
        ("dvn", (2, 2), "tens"),
        ("dvn", (2, 2), "hundreds"),
    ]


def test_the_average_is_compared_where_the_paper_has_it(tmp_path: Path) -> None:
    record(tmp_path, "dvn", scenario="s1", networks=({1: 90.0, 2: 92.0}, {1: 70.0, 2: 73.0}))
    record(tmp_path, "lwf", scenario="s1", networks=({2: 94.0}, {2: 72.0}))
    record(tmp_path, "nestednet", scenario="s1", networks=({1: 89.0}, {2: 72.0}))
    made = table(tmp_path, "s1")
    assert [(a.column, a.units, a.method) for a in made.ahead] == [("tens", 2, "lwf"), ("average", 2, "lwf")]


def test_nobody_is_best_alone(tmp_path: Path) -> None:
    record(tmp_path, "dvn")
    made = table(tmp_path)
    assert not any(made.is_best(column) for r in made.rows for column in made.columns(r))


def test_in_what_methods_differ_is_said(tmp_path: Path) -> None:
    record(tmp_path, "dvn", optimizer={"lr": 0.1, "name": "sgd"}, threads=1)
    record(tmp_path, "baseline", optimizer={"lr": 0.2, "name": "sgd"}, threads=2, epochs=5)
    assert table(tmp_path).differences == ("epochs: baseline 5, dvn 2", "optimizer.lr: baseline 0.2, dvn 0.1")


def test_a_run_counts_once(tmp_path: Path) -> None:
    path = record(tmp_path, "dvn")
    file = tmp_path / "dvn-full-0.safetensors"
    file.touch()
    (only,) = scenario.read("j1", [path, file, tmp_path])
    assert only.checkpoint == file


# The command


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
        "baseline 2 91.0 72.0 7.5M 1",
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
    assert lines[3:14] == expected
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
    assert ours["top1"][0] == {"mean": 91.0, "std": pytest.approx(2**0.5), "runs": 2}
    assert (ours["units"], ours["seeds"], ours["paper"]["accuracy"]) == ([1, 1], [0, 1], [94.6, 75.0])
    assert [(a["column"], a["units"], a["method"]) for a in made["ahead"]] == [("tens", 1, "baseline")]
    assert made["missing"] == ["baseline, seed 1", "packnet, no run", "nestednet, no run"]
    assert [cost["paper"]["ms"] for cost in made["costs"]] == [0.11, 0.3]
    assert made["measured"] is None


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


# Figures


@pytest.mark.parametrize("name", ["j1", "h1"])
def test_plots_are_images(name: str, tmp_path: Path, dvn: Callable[..., tuple[int, str, str]]) -> None:
    pytest.importorskip("matplotlib")
    for seed in (0, 1):
        record(tmp_path, "dvn", seed, scenario=name)
    record(tmp_path, "nestednet", 0, OWN, scenario=name)
    code, out, _ = dvn("bench", "--scenario", name, "--plots", "new/plots")
    assert code == 0
    png, svg = (tmp_path / "new" / "plots" / f"{name}-full-paper.{suffix}" for suffix in ("png", "svg"))
    assert f"new/plots/{png.name} is written" in out
    with Image.open(png) as image:
        image.verify()
        assert image.size[0] > 1000
    texts = [element.text for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]
    unit = {"j1": "dvn, 1 unit", "h1": "dvn"}[name]
    axis = {"j1": "accuracy on validation images, %", "h1": "parameters of the network, millions"}[name]
    assert {"tens", "hundreds", unit, axis} <= set(texts)
    before = svg.read_bytes()
    assert dvn("bench", "--scenario", name, "--plots", "new/plots", "--json")[0] == 0
    assert svg.read_bytes() == before


def test_curves_are_means_over_seeds_by_epoch(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for seed in (0, 1):
        record(tmp_path, "dvn", seed, ({1: 90.0 + 4 * seed, 2: 95.0}, {1: 70.0, 2: 73.0}))
    # a method that learns one task after the other
    late = change(record(tmp_path, "packnet", 0, OWN), lambda content: content["epochs"][0].update(validation=None))
    change(late, lambda content: content["epochs"][1].update(validation=[[None], [62.0]]))
    first, second = plot.draw(table(tmp_path)).axes
    lines = [[[float(value) for value in of] for of in line.get_data()] for line in first.lines]
    assert lines == [[[1, 2], [82.0, 87.0]], [[1, 2], [85.0, 90.0]]]
    packnet = second.lines[0]
    assert [[float(value) for value in of] for of in packnet.get_data()] == [[2], [62.0]]


def test_points_are_means_over_seeds_by_parameters(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for seed in (0, 1):
        record(tmp_path, "dvn", seed, ({1: 90.0 + 4 * seed, 2: 95.0}, {1: 70.0, 2: 73.0}), scenario="h1")
    first, _ = plot.draw(table(tmp_path, "h1")).axes
    sizes, means = ([float(value) for value in of] for of in first.lines[0].get_data())
    assert sizes == [PARAMS[1] / 1e6, PARAMS[2] / 1e6]
    assert means == [92.0, 95.0]


def test_a_plot_that_cannot_be_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dvn: Callable[..., tuple[int, str, str]]
) -> None:
    pytest.importorskip("matplotlib")
    path = record(tmp_path, "dvn")
    change(path, lambda content: [entry.update(validation=None) for entry in content["epochs"]])
    code, _, err = dvn("bench", "--scenario", "j1", "--plots", ".")
    assert (code, err.count("\n")) == (2, 1)
    assert "no run held out images for validation" in err
    assert not list(tmp_path.glob("*.png"))
    code, _, err = dvn("bench", "--scenario", "j1", "--plots", path.name)
    assert (code, err.count("\n")) == (2, 1)
    assert f"cannot write to the folder '{path.name}'" in err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = dvn("bench", "--scenario", "j1", "--plots", ".")
    assert (code, err) == (2, "dvn: plots need matplotlib: pip install 'dvn[plot]'\n")


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

    def measure(targets: Sequence[benchmark.Target], *_: object) -> list[benchmark.Result]:
        assert [(target.task, target.level) for target in targets] == [(2, 1), (2, 2)]
        return [
            benchmark.Result("", 2, "all", level, 1, 1.0, 1, (seconds,) * 3, None, 0.008 / seconds)
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
