"""Orders of units that are learned from how the gradients of tasks agree."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small

from dvn_cli import report
from dvn_cli.cli.watching import affinity_tables
from dvn_cli.errors import DvnError, InputError
from dvn_cli.store.file import read_checkpoint
from dvn_cli.store.slicing import slice_file
from dvn_cli.training import building

TASKS = [
    {"name": "some", "data": small.data(classes="0-4")},
    {"name": "swapped", "data": small.data(groups={"0": 4, "1": 3, "2": 2, "3": 1, "4": 0})},
    {"name": "some again", "data": small.data(classes="0-4")},
]
KEYS: dict[str, Any] = {"orders": "learned", "units": 3, "tasks": TASKS, "epochs": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    small.trained(folder, **KEYS)
    return folder


def test_tasks_that_agree(whole: Path) -> None:
    """Tasks of one kind want the same of the weights, others, that have to tell the same images, do not."""
    tasks = read_checkpoint(whole / "dvn.safetensors").metadata.tasks
    rows = [task.affinity for task in tasks]
    assert [row[number] for number, row in enumerate(rows)] == pytest.approx([1, 1, 1], abs=1e-3)
    assert rows[0][2] == rows[2][0] > max(rows[0][1], rows[1][2])
    assert [task.order[:2] for task in tasks][::2] == [(1, 3), (3, 1)]
    record = json.loads((whole / "dvn.run.json").read_text())["tasks"]
    assert [(tuple(task["order"]), tuple(task["affinity"])) for task in record] == [
        (task.order, task.affinity) for task in tasks
    ]


def test_what_is_said_of_it(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = read_checkpoint(whole / "dvn.safetensors").metadata.tasks
    report.show(report.console(), *affinity_tables(tasks))
    first, _, third = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[2:]]
    assert first.startswith(f"1 some 3 some again ({tasks[0].affinity[2]:.2f})")
    assert third.endswith(f"2 swapped ({min(tasks[2].affinity):.2f})")
    alone = [replace(tasks[0], affinity=()), replace(tasks[0], affinity=(1.0,))]
    assert [affinity_tables([task]) for task in alone] == [[], []]


def test_resumed_with_the_orders_that_it_had(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without comparing tasks again, whose gradients other threads may round otherwise; so does a finished run."""
    with pytest.raises(small.Stopped):
        small.session(tmp_path, **KEYS).train(*small.stop_after(1))
    monkeypatch.setattr(building, "affinity", lambda _: pytest.fail("compared again"))
    small.trained(tmp_path, resume=True, **KEYS)
    assert (tmp_path / "dvn.safetensors").read_bytes() == (whole / "dvn.safetensors").read_bytes()
    longer = small.session(tmp_path, "epochs=3", resume=True, **KEYS).run.network
    assert tuple(longer.tasks) == read_checkpoint(tmp_path / "dvn.safetensors").metadata.tasks


def test_a_slice_says_nothing_of_other_tasks(whole: Path, tmp_path: Path) -> None:
    slice_file(read_checkpoint(whole / "dvn.safetensors"), 1, 1, tmp_path / "slice.safetensors")
    assert b"affinity" in (whole / "dvn.safetensors").read_bytes()
    assert b"affinity" not in (tmp_path / "slice.safetensors").read_bytes()


def test_an_order_that_a_task_is_given_stays(tmp_path: Path) -> None:
    tasks = [TASKS[0], TASKS[1] | {"order": [1, 2, 3]}, TASKS[2]]
    notes: list[str] = []
    network = small.session(tmp_path, note=notes.append, **KEYS | {"tasks": tasks}).run.network
    assert [task.order[0] for task in network.tasks] == [1, 1, 3]
    assert notes == ["comparing tasks by their gradients, in a few steps of networks of all units"]


@pytest.mark.parametrize("words", ["learning=sequential", "method=baseline", "method=nestednet", "method=packnet"])
def test_nothing_to_learn_orders_for(tmp_path: Path, words: str) -> None:
    with pytest.raises(InputError, match="orders learned compares tasks on weights that they share"):
        small.session(tmp_path, words, **KEYS)


def test_gradients_that_are_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(DvnError, match=r"compare tasks is not a number: a lower optimizer.lr may help"):
        small.session(tmp_path, "optimizer.lr=1e20", **KEYS)
