"""The plots of a scenario."""

import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from runs import OWN, PARAMS, change, record, table

from dvn_cli.paper import plots


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
    first, second = plots.draw(table(tmp_path)).axes
    lines = [[[float(value) for value in of] for of in line.get_data()] for line in first.lines]
    assert lines == [[[1, 2], [82.0, 87.0]], [[1, 2], [85.0, 90.0]]]
    packnet = second.lines[0]
    assert [[float(value) for value in of] for of in packnet.get_data()] == [[2], [62.0]]


def test_points_are_means_over_seeds_by_parameters(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for seed in (0, 1):
        record(tmp_path, "dvn", seed, ({1: 90.0 + 4 * seed, 2: 95.0}, {1: 70.0, 2: 73.0}), scenario="h1")
    first, _ = plots.draw(table(tmp_path, "h1")).axes
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
