"""The images that `dvn eval` takes, and those of `--data`."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from pictures import COLOURS, MEAN, STD, counted, picture, results, write_folder
from PIL import Image

import dvn_cli
from dvn_cli.data import batches
from dvn_cli.errors import InputError
from dvn_cli.evaluation.measure import open_files
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.metadata import Task
from dvn_cli.training.experiment import prepare
from dvn_cli.training.recipes import parse


def test_a_folder_of_classes(dvn, made):
    own = results(dvn("--json", "--task", "1"))
    code, out, err = dvn("--json", "--task", "1", "--data", "recipes/pictures")
    assert (code, json.loads(out)["results"]) == (0, own)
    assert err == "images: the images by class in 'recipes/pictures'\n"
    flat = results(dvn("--json", "--task", "1", "--data", "recipes/pictures/test"))
    assert flat == own
    limited = results(dvn("--json", "--task", "1", "--data", "recipes/pictures", "--data", "test_images=12"))
    assert limited[0]["images"] == 12


def test_images_of_another_size_are_resized(dvn, tmp_path):
    write_folder(tmp_path / "large", COLOURS, size=16)
    rows = results(dvn("--json", "--task", "1", "--data", str(tmp_path / "large")))
    assert rows[0]["images"] == 45
    code, _, err = dvn("--task", "1", "--data", str(tmp_path / "large"), "--data", "size=16")
    assert (code, err.splitlines()[-1]) == (
        2,
        "dvn: task 'colours': its images are 8x8: leave out size, or give that",
    )


def test_classes_are_matched_by_name(dvn, tmp_path, made):
    """In parquet files that number the classes the other way round."""
    names = COLOURS[::-1]
    rows = [(label, index) for label in range(6) for index in range(5 + label)]
    pictures = [Image.fromarray(picture(label, index)) for label, index in rows]
    for (label, index), image in zip(rows, pictures, strict=True):
        image.save(tmp_path / f"{label}-{index}.png")
    table = pa.table({
        "img": [{"bytes": (tmp_path / f"{label}-{index}.png").read_bytes()} for label, index in rows],
        "label": [5 - label for label, _ in rows],
    })  # fmt: skip
    features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "test-0.parquet")
    code, out, err = dvn("--json", "--task", "1", "--data", str(tmp_path / "data"))
    assert code == 0, err
    assert "images: the parquet files in" in err
    own = results(dvn("--json", "--task", "1"))
    for one, other in zip(own, json.loads(out)["results"], strict=True):
        assert (one["top1"], one["top5"], one["images"]) == (other["top1"], other["top5"], other["images"])


def test_numbers_stand_for_classes_in_order(dvn, tmp_path):
    own = results(dvn("--json", "--task", "1"))
    write_folder(tmp_path / "numbers", tuple("012345"))
    code, out, err = dvn("--json", "--task", "1", "--data", str(tmp_path / "numbers"))
    assert (code, json.loads(out)["results"]) == (0, own)
    assert (
        "task 'colours': the images' classes have other names and are taken in order: '0' is taken for 'black'" in err
    )
    code, out, err = dvn("--json", "fresh.safetensors", "--data", "recipes/pictures")
    assert code == 0
    assert "'black' is taken for '0'" in err
    write_folder(tmp_path / "padded", tuple(f"0{number}" for number in "012345"))
    code, out, err = dvn("--json", "fresh.safetensors", "--data", str(tmp_path / "padded"))
    assert code == 0, err
    assert "'00' is taken for '0'" in err


@pytest.mark.parametrize(("names", "images", "differ"), [
    ("012345", "123456", "lack '0' and have '6'"),
    ("123456", "012345", "lack '6' and have '0'"),
    ("012345", ("6", "7", "8", "9", "10", "dog"), "6 classes ('10', '6', '7' and 3 more), the task 6 others ('0', "),
])  # fmt: skip
def test_numbers_are_names_where_both_sides_have_some(dvn, made, tmp_path, names, images, differ):
    opened = dvn_cli.load(made / "fresh.safetensors")
    tasks = [replace(opened.tasks[0], classes=tuple(names))]
    DeepVirtualNetwork(opened.partition, tasks, opened.file_tensors()).save(made / "numbers.safetensors")
    write_folder(tmp_path / "numbers", tuple(images), images=1)
    code, out, err = dvn("numbers.safetensors", "--data", str(tmp_path / "numbers"))
    assert (code, out) == (2, "")
    assert differ in err


@pytest.mark.parametrize(("names", "options", "message"), [
    (("black", "blue", "grey", "green", "red", "white"), [],
     "task 'colours': the images have 6 classes, the task 6: they lack 'olive' and have 'green'"),
    (tuple("abcdef"), [], "the images have 6 classes ('a', 'b', 'c' and 3 more), the task 6 others ('black', "),
    ((*COLOURS, "yellow"), [], "the images have 7 classes, the task 6: they have 'yellow' as well"),
    ((*COLOURS, "yellow"), ["--data", "classes=[black, blue, grey, olive, red, white]"], None),
    (("black", "blue", "grey", "green", "red", "white"),
     ["--data", "groups={black: [black], blue: [blue], grey: grey, olive: green, red: red, white: white}"], None),
])  # fmt: skip
def test_classes_that_differ(dvn, tmp_path, names, options, message):
    write_folder(tmp_path / "other", names, images=1)
    code, _, err = dvn("--task", "1", "--data", str(tmp_path / "other"), *options)
    assert (code, message is None) in ((2, False), (0, True)), err
    assert (message or "images") in err


@pytest.mark.parametrize("options", [
    [], ["--data", "classes=[black, blue, grey, olive, red, white]"],
    ["--data", "groups={black: black, blue: blue, grey: [], olive: olive, red: [], white: [white]}"],
])  # fmt: skip
def test_images_that_lack_some_classes(dvn, made, tmp_path, options):
    """They are evaluated among all the task's classes, by a checkpoint and by a slice."""
    some = [label for label, name in enumerate(COLOURS) if name not in ("grey", "red")]
    write_folder(tmp_path / "some", tuple(COLOURS[label] for label in some))  # image i is of the i-th folder's look
    pixels = [picture(place, index) for place in range(4) for index in range(5 + place)]
    labels = [label for place, label in enumerate(some) for _ in range(5 + place)]
    expected = counted(made / "s11.safetensors", pixels, labels)
    for file in ("dvn.safetensors", "s11.safetensors"):
        code, out, err = dvn(file, "--task", "1", "--level", "1", "--json", "--data", str(tmp_path / "some"), *options)
        assert code == 0, err
        (row,) = json.loads(out)["results"]
        assert (row["top1"], row["top5"], row["loss"]) == pytest.approx(expected, rel=1e-5)
        note = "task 'colours': there are no images of 'grey', 'red', of its 6 classes\n"
        assert err.endswith(note)
        assert err.count("\n") == 2


def test_the_advice_about_other_classes_works(dvn, tmp_path):
    names = (*COLOURS[:4], "a, b: c", "yes")
    write_folder(tmp_path / "other", names, images=1)
    command = ["--task", "1", "--data", str(tmp_path / "other")]
    code, _, err = dvn(*command)
    assert code == 2
    assert "they lack 'red', 'white' and have 'a, b: c', 'yes'" in err
    leave_out = err[err.index("--data 'classes") : err.index(" leaves out")]
    code, _, err = dvn(*command, *shlex.split(leave_out))
    assert code == 0, err
    groups = {**{name: [name] for name in COLOURS[:4]}, "red": ["yes"], "white": ["a, b: c"]}
    written = yaml.safe_dump(groups, default_flow_style=True).strip()
    code, _, err = dvn(*command, "--data", f"groups={written}")
    assert (code, err.count("\n")) == (0, 1), err
    code, _, err = dvn(*command, "--data", "groups={scarlet: [black, yes]}")
    assert code == 2
    assert "groups={NEW: [OLD], ...} gives names of the task's classes" in err


def test_numbers_for_names_of_some_classes(dvn, tmp_path):
    """A classifier whose classes are named by numbers, on images of a few of them."""
    write_folder(tmp_path / "two", ("1", "4"))
    own = results(dvn("--json", "fresh.safetensors", "--data", str(tmp_path / "two")))
    assert own[0]["images"] == 11
    write_folder(tmp_path / "named", ("olive", "red"))
    for groups in ("{1: olive, 4: red}", "{1: [0], 4: [1]}", "{'1': [olive], '4': 1}"):
        words = ("--data", str(tmp_path / "named"), "--data", f"groups={groups}")
        assert results(dvn("--json", "fresh.safetensors", *words)) == own


def labels_by_grey(made: Path, tasks: list[Task], notes: list[str] | None = None) -> list[dict[int, int]]:
    """For each task the label of its test images that are filled with a grey level, as a checkpoint is evaluated."""
    opened = dvn_cli.load(made / "fresh.safetensors")
    DeepVirtualNetwork(opened.partition, tasks, opened.file_tensors()).save(made / "named.safetensors")
    (loaded,) = open_files([made / "named.safetensors"], note=None if notes is None else notes.append)
    found = []
    for number in range(1, len(tasks) + 1):
        images, labels = next(batches(loaded.splits[number], 999, mean=[0.0], std=[1.0]))
        greys = (255 * images[:, 0, 0, 0]).round().int()
        found.append(dict(zip(greys.tolist(), labels.tolist(), strict=True)))
    return found


def grey(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, np.uint8))


def test_the_tasks_own_classes_whatever_has_which_index_by_now(made, tmp_path):
    for value, name in enumerate("abcdef"):
        for split, count in (("train", 3), ("test", 1)):
            (tmp_path / "all" / split / name).mkdir(parents=True)
            for index in range(count):
                grey(value).save(tmp_path / "all" / split / name / f"{index}.png")
    content = {"backbone": {"name": "wrn_10_1", "in_chans": 1}, "units": 2, "batch_size": 4, "threads": 1}
    data = {"source": "folder", "path": ".", "validation": 0}
    keys = [
        {"name": "some", "data": {**data, "classes": "1-4"}},
        {"name": "two", "data": {**data, "groups": {"low": "0-2", "high": [4, 5, "d"]}}},
    ]
    recipe = parse({**content, "tasks": keys}, "r")
    session = prepare(recipe, tmp_path / "all", tmp_path / "d.safetensors", torch.device("cpu"))
    tasks = session.run.network.tasks
    assert tasks[1].data.spec["groups"] == {"low": ["a", "b", "c"], "high": ["e", "f", "d"]}
    for left_out in ((), ("train",), ("train", "test/b")):
        now = tmp_path / "-".join(("now", *left_out)).replace("/", "")
        shutil.copytree(tmp_path / "all", now)
        for folder in left_out:
            shutil.rmtree(now / folder)
        notes: list[str] = []
        moved = [replace(task, data=replace(task.data, base=str(now))) for task in tasks]
        some, two = labels_by_grey(made, moved, notes)
        b = {} if "test/b" in left_out else {1: 0}
        assert some == {**b, 2: 1, 3: 2, 4: 3}
        assert two == {0: 0, **b, 2: 0, 3: 1, 4: 1, 5: 1}
        assert ("task 'some': there are no images of 'b', of its 4 classes" in notes) == (not b)


def test_two_classes_of_one_name(made, tmp_path):
    """They are told apart where the images have the task's list of classes, and nowhere else."""
    names = ("crane", "dog", "crane")

    def task_with(images: tuple[str, ...], labels: list[int]) -> list[Task]:
        folder = tmp_path / "-".join(map(str, (*images, *labels)))
        folder.mkdir()
        for value in range(len(labels)):
            grey(value).save(folder / f"{value}.png")
        pixels = [{"bytes": (folder / f"{value}.png").read_bytes()} for value in range(len(labels))]
        table = pa.table({"img": pixels, "label": labels})
        features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": images}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, folder / "test-0.parquet")
        data = {"spec": {"source": "hf", "path": str(folder)}, "base": "."}
        return [Task("t", names, (8, 8), MEAN, STD, (1, 2), (1, 2), data)]

    assert labels_by_grey(made, task_with(names, [2, 0, 1])) == [{0: 2, 1: 0, 2: 1}]
    assert labels_by_grey(made, task_with(("crane", "dog"), [1, 1])) == [{0: 1, 1: 1}], "no crane is seen"
    for other in (("crane", "dog"), ("crane", "crane", "dog")):
        with pytest.raises(
            InputError, match="task 't': several classes are named 'crane': they are told apart only wh"
        ):
            labels_by_grey(made, task_with(other, [1, 0]))


def test_a_yaml_file_of_data(dvn, made, tmp_path):
    write_folder(tmp_path / "pictures" / "val", COLOURS)
    (tmp_path / "data.yaml").write_text("source: folder\npath: pictures\naugment: crop\n")
    rows = results(dvn("--json", "--task", "1", "--data", str(tmp_path / "data.yaml")))
    assert rows == results(dvn("--json", "--task", "1"))
