"""What files say: whatever may be said survives being written, and whatever may not is one line that names its key."""

import copy
import dataclasses
import functools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import metadata, networks, task

import dvn_cli
from dvn_cli.errors import InputError
from dvn_cli.store.file import TensorData, read_checkpoint, read_header, read_state, write
from dvn_cli.store.lookup import find_task
from dvn_cli.store.metadata import StateMetadata, check_level
from dvn_cli.store.schema import dumps, loads, parse
from dvn_cli.store.slicing import count, slice_file

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dvn_cli.__file__).parents[1])}
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e9)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
RECIPES = st.dictionaries(st.text(), JSON, max_size=3)
EPOCHS = st.integers(0, 10**6)
TRAINING = st.fixed_dictionaries(
    {"recipe": RECIPES},
    optional={
        "versions": st.dictionaries(st.text(), st.text(), max_size=2),
        "device": st.none() | st.text(),
        "threads": st.none() | st.integers(1, 64),
        "epochs": st.none() | EPOCHS,
        "restarts": st.lists(EPOCHS, max_size=3),
        "capture_error": st.none() | st.text(),
    },
)
RESIZE = {
    "interpolation": st.sampled_from(["nearest", "bilinear", "bicubic"]),
    "crop_pct": st.floats(0.1, 2),
    "crop_mode": st.sampled_from(["center", "squash", "border"]),
}
PREPROCESSING = st.fixed_dictionaries(
    {
        "origin": st.text(),
        "mean": st.none() | st.lists(NUMBERS, min_size=3, max_size=3),
        "std": st.none() | st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3),
        **RESIZE,
    }
)
DATA = st.none() | st.fixed_dictionaries({"spec": RECIPES, "base": st.none() | st.text()})


@settings(deadline=None, max_examples=60)
@given(networks(), st.none() | TRAINING, st.none() | PREPROCESSING, DATA, st.fixed_dictionaries({}, optional=RESIZE))
def test_whatever_may_be_said_survives(tmp_path_factory, network, training, preprocessing, data, resize):
    _, stored, described = network
    folder = tmp_path_factory.mktemp("said")
    tasks = [{**each, "data": data, **resize} for each in described["tasks"]]
    before = metadata(**{**described, "tasks": tasks, "preprocessing": preprocessing, "training": training})
    before = type(before)(**{**vars(before), "aliases": {"other": min(before.tensors)}})
    arrays = {name: TensorData(dtype, data.shape, data) for name, (dtype, data) in stored.items()}
    write(folder / "a.safetensors", arrays, before)
    header = read_checkpoint(folder / "a.safetensors")
    assert header.metadata == before
    slice_file(header, 1, 1, folder / "s.safetensors")
    cut_out = read_header(folder / "s.safetensors").metadata
    own = dataclasses.replace(before.backbone, num_classes=len(before.tasks[0].classes))
    assert cut_out.divided == {**before.divided, "backbone": own}
    assert (cut_out.task, cut_out.task_number, cut_out.level) == (
        parse(type(cut_out.task), {**tiny.as_json(before.tasks[0]), "data": None}),
        1,
        1,
    )


@settings(deadline=None, max_examples=30)
@given(RECIPES, st.lists(RECIPES, max_size=3), st.none() | NUMBERS, st.lists(EPOCHS, max_size=3))
def test_whatever_a_state_may_say_survives(tmp_path_factory, recipe, history, best, restarts):
    path = tmp_path_factory.mktemp("said") / "state.safetensors"
    tasks = metadata().tasks
    for of_tasks, images in ((None, ()), (tasks, ((3, 4), (5, 0)))):
        before = StateMetadata(recipe, 3, tuple(history), best, 7, tuple(restarts), of_tasks, images)
        write(path, {}, before)
        assert read_state(path).metadata == before


def test_keys_of_newer_writers_are_passed_over(file):
    said = {**tiny.said(file), "checksums": None, "colour": {"deep": [1]}}
    said["tasks"][0]["colour"] = "red"
    tiny.write_plainly(file, tiny.arrays(), said)
    assert read_checkpoint(file).metadata == metadata()


DEEP: list[Any] = functools.reduce(lambda inner, _: [inner], range(150), [])
AXIS = ["axes", 0, 0, 0]
WRONG = [
    (["units"], 3, "'axes.0' is of 2 units, not of 3"),
    (["units"], 0, "'units' is 0, not 1 to 65,536"),
    (["units"], True, "'units' is True, not an integer"),
    (["units"], 2.0, "'units' is 2.0, not an integer"),
    (["units"], 10**30, "'units' is 10000"),
    (["backbone", "name"], None, "'backbone.name' is None, not a text"),
    (["backbone", "source"], "hub", "'backbone.source' is 'hub', not 'timm' or 'torchvision' or 'python'"),
    (["backbone", "num_classes"], 1 << 21, "'backbone.num_classes' is 2097152, not 1 to 1,048,576"),
    (["backbone", "input_size"], [8], "'backbone.input_size' is a list, not a list of 2"),
    (["backbone", "input_size", 1], 65_537, "'backbone.input_size.1' is 65537, not 1 to 65,536"),
    (["backbone", "in_chans"], 1, "task 'low digits' has not one mean and one std for each of 1 channels"),
    (["backbone", "num_classes"], 2, "task 'low digits' has 3 classes, the backbone's classifier 2"),
    (AXIS, [1, 0], "'axes.0' has runs of indices that are not ascending and apart"),
    (AXIS, [0, 4], "'axes.0' has runs of indices that are not ascending and apart"),
    (AXIS, [0, 1, 2], "'axes.0.0.0' is a list, not a list of 2"),
    (AXIS, [-1, 1], "'axes.0.0.0.0' is -1, not 0 to "),
    (["axes", 0, 1, 0], [3, 9], "'axes.0' has indices up to 9, a dimension of '.*' only 4"),
    (["axes"], [], "'tensors.*axes' has an axis that is not listed"),
    (["tensors", "bn.mean", "axes"], [None, 0], "'shared/bn.mean' has 1 dimensions, not 2"),
    (["tensors", "bn.mean", "trainable"], 1, "'tensors.bn.mean.trainable' is 1, not true or false"),
    (["tensors", "bn.mean", "owner"], "me", "'tensors.bn.mean.owner' is 'me', not 'shared' or"),
    (["tensors", "bn..mean"], {"axes": [], "trainable": False}, "'tensors' has 'bn..mean', which is no tensor's name"),
    (["tensors", "a/b"], {"axes": [], "trainable": False}, "'tensors' has 'a/b', which is no tensor's name"),
    (["tensors", "more"], {"axes": [], "trainable": False}, "it has no tensor 'more' for task 1, level 1"),
    (["class_axis", 0, 1], 2, "'class_axis' has dimension 2 of 'fc.weight', which is not there"),
    (["class_axis", 0, 0], "x", "'class_axis' has dimension 0 of 'x', which is not there"),
    (["aliases"], {"other": "x"}, "'other'.* is not another name of a tensor that is listed"),
    (["rule"], {"assign": "odd"}, "'rule' is not usable: channels are assigned even, importance or sorted, not 'odd'"),
    (["rule"], {"round_to": 0}, "'rule' is not usable: widths are rounded"),
    (["tasks"], [], "'tasks' has 0 tasks"),
    (["tasks", 0, "order"], [1, 1], "'tasks.0' is not usable: its order does not name each unit once"),
    (["tasks", 0, "order"], [1], "the order of task 'low digits' is of 1 units, not of 2|its levels are not ascending"),
    (["tasks", 0, "levels"], [2, 1], "'tasks.0' is not usable: its levels are not ascending"),
    (["tasks", 0, "levels"], [1, 3], "'tasks.0' is not usable: its levels are not ascending"),
    (["tasks", 0, "classes"], [], "'tasks.0' is not usable: a task has 1 to 1,048,576 classes, not 0"),
    (["tasks", 1, "classes", 1], 7, "'tasks.1.classes.1' is 7, not a text"),
    (["tasks", 1, "std", 0], 0, "'tasks.1' is not usable: std is of pixels"),
    (["tasks", 1, "mean", 0], "0", "'tasks.1.mean.0' is '0', not a number"),
    (["tasks", 1, "interpolation"], "cubic", "'tasks.1' is not usable: no interpolation 'cubic'; did you mean"),
    (["tasks", 1, "crop_pct"], 9, "'tasks.1' is not usable: crop_pct is a share"),
    (["tasks", 1, "data"], {"spec": []}, "'tasks.1.data.base' is missing"),
    (["tasks", 1, "name"], "\ud800", "'tasks.1' is not usable: its name is no text in UTF-8"),
    (["training"], {"epochs": 1}, "'training.recipe' is missing"),
    (["training"], {"recipe": {"x": DEEP}}, "'training.recipe.x' is nested more than 100 deep"),
    (["preprocessing"], 1, "'preprocessing' is 1, not an object"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_a_wrong_value_is_one_line(file, path, value, message):
    said = changed({**tiny.said(file), "checksums": None}, path, value)
    tiny.write_plainly(file, tiny.arrays(), said)
    with pytest.raises(InputError, match=rf"^'{file}' is damaged: .*{message}") as caught:
        read_header(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        write(file, tiny.tensors(), parse(type(metadata()), loads(dumps(said))))


def changed(said: Any, path: list[Any], value: Any) -> Any:
    said = copy.deepcopy(said)
    inner = said
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return said


VALUES = [None, True, -1, 0, 1, 7, 10**30, 1.5, "", "x", "\ud800", [], [1], [[]], [None], {}, {"x": 1}, [[0, 1]]]


def places(said: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = said.items() if isinstance(said, dict) else enumerate(said) if isinstance(said, list) else ()
    return [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]


def test_any_value_in_place_of_any_other(file):
    """Either it may be said, and the file can be used, or it is one line; for a checkpoint and a slice."""
    slice_file(read_checkpoint(file), 2, 1, "slice.safetensors")
    generator = random.Random(0)
    for path in (file, Path("slice.safetensors")):
        said, refused = {**tiny.said(path), "checksums": None}, 0
        arrays = safetensors.numpy.load_file(path)
        cases = [(place, value) for place in places(said) for value in VALUES]
        for place, value in generator.sample(cases, 400):
            tiny.write_plainly(path, arrays, changed(said, list(place), value))
            refused += "\n" not in (problem(path) or "\n")
        assert refused > 300


def problem(path: Path) -> str | None:
    """What is wrong with a file, if it cannot be used."""
    try:
        header = read_header(path)
        for network in header.metadata.networks:
            count(header, *network)
    except InputError as error:
        return str(error)
    return None


def test_find_task_and_check_level():
    tasks = metadata(tasks=[task(name, [1, 2], [1, 2]) for name in ("low digits", "1", "7")]).tasks
    assert [find_task(tasks, given) for given in ("2", 1, 2, "low digits", "7")] == [2, 1, 2, 1, 3]
    assert [find_task(tasks, f"name:{given}") for given in ("1", "low digits", "7")] == [2, 1, 3]
    assert [find_task(tasks, f"number:{given}") for given in (1, 2, 3)] == [1, 2, 3]
    both = r"the number of one task and the name of another \(1 'low digits', 2 '1'\): write number:1 or name:1"
    with pytest.raises(InputError, match=both):
        find_task(tasks, "1")
    listed = "the tasks are 1 'low digits', 2 '1', 3 '7'"
    with pytest.raises(InputError, match=f"there is no task '4'; {listed}"):
        find_task(tasks, "4")
    with pytest.raises(InputError, match="there is no task '99"):
        find_task(tasks, "9" * 5000)
    with pytest.raises(InputError, match="there is no task '0'"):
        find_task(tasks, 0)
    with pytest.raises(
        InputError, match=r"there is no task 'low_digits'; did you mean 'low digits'\? " + listed.capitalize()
    ):
        find_task(tasks, "low_digits")
    own = metadata(tasks=[task(name, [1, 2], [1, 2]) for name in ("2", "1", "name:1")]).tasks
    assert find_task(own, "name:1") == 3
    assert find_task(own, "name:name:1") == 3
    with pytest.raises(InputError, match="there is no task 'number:4'"):
        find_task(own, "number:4")
    for level in (-1, 0, 3):
        with pytest.raises(InputError, match=f"there is no level {level}; task '7' has levels 1 to 2"):
            check_level(tasks[2], level)


def test_the_store_needs_neither_torch_nor_pydantic():
    code = "import sys, dvn_cli.store.slicing; print(*{'torch', 'timm', 'pydantic', 'safetensors'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert done.stdout == "\n"
