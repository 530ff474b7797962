"""The rows of the paper's tables, from the records of runs."""

from pathlib import Path

import pytest
from runs import EVEN, OWN, PARAMS, change, record, row, table

from dvn_cli.data import DataSpec
from dvn_cli.data.spec import MAY_DIFFER
from dvn_cli.files import run_record
from dvn_cli.paper import figures, records, tables
from dvn_cli.paper.tables import Cell
from dvn_cli.training.recipe import Recipe


def test_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((90.0, 92.0, 97.0)):
        record(tmp_path, "dvn", seed, ({1: accuracy, 2: 95.0}, {1: 70.0, 2: 70.0 + seed}))
    record(tmp_path, "baseline")
    made = table(tmp_path)
    first, second = row(made, "dvn", (1, 1)), row(made, "dvn", (2, 2))
    assert first.cells[0] == Cell(93.0, pytest.approx(13**0.5), 3)  # (9 + 1 + 16) / 2
    assert str(first.cells[0]) == "93.0±3.6"
    assert str(second.cells[0]) == "95.0±0.0"
    # of the means 82.5, 83, 83.5, not of the deviations
    assert second.average == Cell(83.0, 0.5, 3)
    alone = row(made, "baseline", (1, 1)).cells[0]
    assert alone == Cell(90.0, None, 1, pytest.approx((82.6, 94.5), abs=0.05))  # of 100 images
    assert str(alone) == "90.0\n82.6-94.5"
    assert Cell.of([90.0]) == Cell(90.0, None, 1)  # a record of before does not say of how many
    assert second.params == (PARAMS[2], PARAMS[2])
    assert second.stored == 7_500_000


def test_runs_may_differ_in_how_they_were_computed(tmp_path: Path) -> None:
    """In what `--resume` takes too."""
    record(tmp_path, "dvn")
    change(record(tmp_path, "dvn", 1, threads=2, save_every={"minutes": 10}), lambda content: [
        task["data"].update(load="stream", workers=3, on_bad_image="skip") for task in content["recipe"]["tasks"]
    ])  # fmt: skip
    assert row(table(tmp_path), "dvn", (1, 1)).cells[0] == Cell(90.0, 0.0, 2)
    marked = [
        {name for name, field in keys.model_fields.items() if MAY_DIFFER in field.metadata}
        for keys in (Recipe, DataSpec)
    ]
    assert marked == list(records.MAY_DIFFER)


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
    made = tables.tables(figures.find("j1"), records.read("j1", [tmp_path]))
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


@pytest.mark.parametrize("name", ["dvn.safetensors", "m.v1", "m.v1.safetensors"])
def test_a_run_counts_once(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    path = record(tmp_path, "dvn").rename(run_record(file))
    file.touch()
    (only,) = records.read("j1", [path, file, tmp_path])
    assert only.checkpoint == file
