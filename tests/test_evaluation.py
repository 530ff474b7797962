"""`dvn eval` as it is typed, against accuracy counted here with numpy on the logits of what `dvn_cli.load` gives."""

import csv
import errno
import json
import math
import os
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
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dvn_cli
from dvn_cli import cli
from dvn_cli.backbones import resolve
from dvn_cli.checkpoint import read_checkpoint, slice_file
from dvn_cli.data import Split, batches
from dvn_cli.errors import DvnError, InputError
from dvn_cli.evaluation import accuracy_table, evaluate, evaluate_all, open_files
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.partition import Partition
from dvn_cli.tasks import Task
from dvn_cli.training.recipe import parse
from dvn_cli.training.session import Session

MEAN, STD = (0.3,), (0.25,)
COLOURS = ("black", "blue", "grey", "olive", "red", "white")
PICTURES = ("--data", "recipes/pictures")
DIGITS = ("--data", "source=digits", "--data", "classes=0-2", "--data", "test_images=40")
KEYS = ["task", "name", "level", "units", "params", "density", "top1", "top5", "loss", "images", "file"]


def picture(label: int, index: int, size: int = 8) -> np.ndarray:
    rng = np.random.default_rng(100 * label + index)
    return np.clip(rng.normal(40 * label, 30, (size, size)), 0, 255).astype(np.uint8)


def write_folder(root: Path, names: tuple[str, ...], images: int = 5, size: int = 8) -> Path:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(images + label):
            Image.fromarray(picture(label, index, size)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of a task by folder, a checkpoint, all its slices, and a fresh partition."""
    root = tmp_path_factory.mktemp("eval")
    write_folder(root / "recipes" / "pictures" / "test", COLOURS)
    torch.manual_seed(0)
    spec = resolve("wrn_10_1", num_classes=6, in_chans=1, input_size=(8, 8))
    module = spec.build()
    partition = Partition.create(spec, 2, module)
    colours = {"spec": {"source": "folder", "path": "pictures"}, "base": str(root / "recipes")}
    digits = {"spec": {"source": "digits", "classes": "0-2", "test_images": 40}, "base": str(root)}
    tasks = [
        Task("colours", COLOURS, (8, 8), MEAN, STD, (1, 2), (1, 2), colours),
        Task("digits", ("0", "1", "2"), (8, 8), MEAN, STD, (2, 1), (1, 2), digits),
    ]
    network = DeepVirtualNetwork.from_backbone(partition, module, tasks)
    network.make_private()
    with torch.no_grad():
        for name, tensor in network.file_tensors().items():
            if name.endswith("running_mean"):
                tensor.normal_(0, 0.2)
    network.save(root / "dvn.safetensors")
    for number, level in network:
        slice_file(read_checkpoint(root / "dvn.safetensors"), number, level, root / f"s{number}{level}.safetensors")
    plain = [Task("task1", tuple(map(str, range(6))), (8, 8), MEAN, STD, (1, 2), (1, 2))]
    DeepVirtualNetwork.from_backbone(partition, module, plain).save(root / "fresh.safetensors")
    return root


@pytest.fixture
def dvn(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `dvn eval` in the folder and returns its exit code, stdout and stderr."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dvn", "eval", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def results(ran: tuple[int, str, str]) -> list[dict]:
    code, out, err = ran
    assert code == 0, err
    return json.loads(out)["results"]


def counted(file: Path, pixels: list[np.ndarray], labels: list[int]) -> tuple[float, float, float]:
    """top-1, top-5 and loss, the long way round."""
    normalised = (np.stack(pixels)[:, None].astype(np.float64) / 255 - MEAN[0]) / STD[0]
    with torch.no_grad():
        out = dvn_cli.load(file)(torch.from_numpy(normalised).float()).double().numpy()
    order = np.argsort(-out, axis=1, kind="stable")
    hits = [list(row).index(label) for row, label in zip(order, labels, strict=True)]
    log_sum = np.log(np.exp(out - out.max(1, keepdims=True)).sum(1)) + out.max(1)
    loss = (log_sum - out[np.arange(len(labels)), labels]).mean()
    return 100 * np.mean([h == 0 for h in hits]), 100 * np.mean([h < 5 for h in hits]), loss


# What is measured


def test_all_networks_of_a_checkpoint_against_counting(dvn, made):
    rows = results(dvn("--json"))
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [(row["task"], row["name"], row["level"], row["units"]) for row in rows] == [
        (1, "colours", 1, [1]),
        (1, "colours", 2, [1, 2]),
        (2, "digits", 1, [2]),
        (2, "digits", 2, [1, 2]),
    ]
    labels = [label for label in range(6) for _ in range(5 + label)]
    pixels = [picture(label, index) for label in range(6) for index in range(5 + label)]
    for row in rows[:2]:
        top1, top5, loss = counted(made / f"s1{row['level']}.safetensors", pixels, labels)
        assert (row["top1"], row["top5"]) == (pytest.approx(top1), pytest.approx(top5))
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["images"] == 45
        assert row["file"] == "dvn.safetensors"
    assert rows[0]["top1"] != rows[1]["top1"]
    assert [(row["top5"], row["images"]) for row in rows[2:]] == [(None, 40)] * 2
    params = [sum(p.numel() for p in dvn_cli.load(made / f"s1{level}.safetensors").parameters()) for level in (1, 2)]
    assert [row["params"] for row in rows[:2]] == params
    assert [row["density"] for row in rows[:2]] == [params[0] / params[1], 1.0]


def test_slices_give_what_their_checkpoint_gives(dvn):
    whole = results(dvn("--json"))
    cut = results(dvn("--json", "s11.safetensors", "s12.safetensors", *PICTURES))
    cut += results(dvn("--json", "s21.safetensors", "s22.safetensors", *DIGITS))
    for one, other in zip(whole, cut, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-6)
        assert {k: v for k, v in one.items() if k not in ("file", "loss")} == {
            k: v for k, v in other.items() if k not in ("file", "loss")
        }
    assert [row["file"] for row in cut] == ["s11.safetensors", "s12.safetensors", "s21.safetensors", "s22.safetensors"]


def test_batch_size_changes_nothing(dvn):
    whole, *parts = (results(dvn("--json", "--batch-size", size)) for size in ("256", "1", "7"))
    for rows in parts:
        for one, other in zip(whole, rows, strict=True):
            assert (one["top1"], one["top5"], one["images"]) == (other["top1"], other["top5"], other["images"])
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)


@settings(deadline=None)
@given(st.data())
def test_any_logits_are_counted_exactly(data):
    """Ties go to the first class, logits that are not finite are wrong, whatever the batches are."""
    count, classes = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 8))
    values = st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0, math.nan, math.inf, -math.inf])
    rows = data.draw(st.lists(st.lists(values, min_size=classes, max_size=classes), min_size=count, max_size=count))
    out, labels = np.array(rows), data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    order = np.argsort(-out, axis=1, kind="stable").tolist()
    ranks = [
        order[i].index(label) if np.isfinite(out[i]).all() else classes for i, label in enumerate(labels)
    ]  # fmt: skip
    # An image whose pixel is its number, so that the network can look its logits up.
    split = Split(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels))
    task = Task("t", tuple(map(str, range(classes))), (1, 1), (0.0,), (1.0,), (1,), (1,))

    def network(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(out)[(images.flatten() * 255).round().long()]

    seen: list[int] = []
    batch_size = data.draw(st.integers(1, 13))
    result = evaluate(network, split, task, batch_size=batch_size, progress=seen.append)
    assert (sum(seen), max(seen)) == (count, min(count, batch_size))
    assert result.images == count
    assert result.top1 == 100 * sum(r < 1 for r in ranks) / count
    assert result.top5 == (100 * sum(r < 5 for r in ranks) / count if classes > 5 else None)
    assert math.isfinite(result.loss) == bool(np.isfinite(out).all())


def test_a_network_in_train_mode_is_refused():
    split = Split(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="eval mode"):
        evaluate(nn.Flatten().train(), split, Task("t", ("a", "b"), (1, 1), (0.0,), (1.0,), (1,), (1,)))


def test_evaluating_all_leaves_the_mode_and_takes_the_tasks_that_have_images(made):
    network = dvn_cli.load(made / "dvn.safetensors").train()
    before = {name: tensor.clone() for name, tensor in network.file_tensors().items()}
    split = Split(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2]))
    rows = evaluate_all(network, {2: split})
    assert network.training
    assert [(row.task, row.level, row.result.images) for row in rows] == [(2, 1, 3), (2, 2, 3)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.file_tensors().items())
    table = accuracy_table(network.tasks, rows)
    assert [column.header for column in table.columns] == ["top-1 in %", "level 1", "level 2", "images"]
    assert table.row_count == 1


# What is shown


def test_the_table_fits_80_columns(dvn):
    code, out, err = dvn()
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    header, _, *rows = (line.split() for line in out.splitlines() if line.strip())
    assert header == ["task", "level", "units", "params", "density", "top-1", "top-5", "loss", "images"]
    assert [row[:3] for row in rows] == [
        ["1", "colours", "1"],
        ["1", "colours", "2"],
        *[["2", "digits", n] for n in "12"],
    ]
    assert rows[3][3:5] == ["1", "2"]


def test_networks_of_one_name_in_two_files_are_told_apart(dvn, made):
    shutil.copy(made / "dvn.safetensors", made / "twin.safetensors")
    _, out, _ = dvn("dvn.safetensors", "twin.safetensors", "--task", "2", "--level", "1")
    lines = [line.strip() for line in out.splitlines()]
    assert lines.index("dvn.safetensors") < lines.index("twin.safetensors")
    assert sum("2 digits" in line for line in lines) == 2


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
    header, _, *lines = out.splitlines()
    assert max(map(len, lines)) <= (max(columns, 24) if columns else 80)
    place = header.split().index("top-1") - len(header.split())
    shown = [line.split()[place] for line in lines if len(line.split()) >= len(header.split())]
    assert shown == [f"{row['top1']:.2f}" for row in whole]


# The gate


def test_the_gate(dvn):
    rows = results(dvn("--json"))
    lowest = min(rows, key=lambda row: row["top1"])
    code, out, err = dvn("--json", "--min-accuracy", repr(lowest["top1"]))
    assert (code, err) == (0, "")
    gate = json.loads(out)["gate"]
    worst = {key: lowest[key] for key in ("task", "name", "level", "top1", "file")}
    assert gate == {"min_accuracy": lowest["top1"], "passed": True, "worst": worst}

    code, out, err = dvn("--json", "--min-accuracy", repr(lowest["top1"] + 1e-6))
    assert code == 1
    assert json.loads(out)["gate"]["passed"] is False
    assert err.count("\n") == 1
    assert f"task '{lowest['name']}', level {lowest['level']} of 'dvn.safetensors' reaches" in err
    assert "(1 of 4 networks" in err

    code, out, err = dvn("--min-accuracy", "100")
    assert code == 1
    assert "1 colours" in out
    assert "not 100 % (4 of 4 networks are below)" in err
    assert dvn("--min-accuracy", "0")[0] == 0


@pytest.mark.parametrize("gate", [[], ["--min-accuracy", "0"]])
def test_nan_fails_and_is_null_in_json(dvn, made, gate):
    tensors = load_file(made / "s12.safetensors")
    with safe_open(made / "s12.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors["fc.bias"] = torch.full_like(tensors["fc.bias"], math.nan)
    save_file(tensors, made / "nan.safetensors", metadata)

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    code, out, err = dvn("--json", "s11.safetensors", "nan.safetensors", *gate, *PICTURES)
    document = json.loads(out, parse_constant=refuse)
    assert code == 1
    assert "task 'colours', level 2 of 'nan.safetensors': the loss is not a number (1 of 2 networks)" in err
    assert [row["loss"] is None for row in document["results"]] == [False, True]
    assert document["results"][1]["top1"] == 0
    assert (document["gate"] or {"passed": False})["passed"] is False
    assert "nan" in dvn("nan.safetensors", *PICTURES)[1]


# Other images


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
    session = Session(recipe, tmp_path / "all", tmp_path / "d.safetensors", torch.device("cpu"))
    tasks = session.run.network.tasks
    assert tasks[1].data["spec"]["groups"] == {"low": ["a", "b", "c"], "high": ["e", "f", "d"]}
    for left_out in ((), ("train",), ("train", "test/b")):
        now = tmp_path / "-".join(("now", *left_out)).replace("/", "")
        shutil.copytree(tmp_path / "all", now)
        for folder in left_out:
            shutil.rmtree(now / folder)
        notes: list[str] = []
        moved = [replace(task, data={**task.data, "base": str(now)}) for task in tasks]
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


# What cannot be run as asked


@pytest.mark.parametrize(("arguments", "message"), [
    (["--min-accuracy", "0.95"], "--min-accuracy is in per cent: give 95 for 0.95"),
    (["--min-accuracy", "101"], "--min-accuracy is in per cent, 0 to 100, not 101"),
    (["--min-accuracy", "nan"], "--min-accuracy is in per cent, 0 to 100, not nan"),
    (["--batch-size", "0"], "--batch-size is at least 1, not 0"),
    (["--results-file", "r.txt"], "--results-file ends with .csv or .json, not 'r.txt'"),
    (["--device", "gpu"], "unknown device 'gpu': give auto, cpu, cuda or mps"),
    (["--task", "colour"], "there is no task 'colour'; did you mean 'colours'?"),
    (["--level", "3"], "there is no level 3; task 'colours' has levels 1 to 2"),
    (["--level", "2", "s11.safetensors"], "none of the slices is of level 2: 's11.safetensors' (task 'colo"),
    (["dvm.safetensors"], "there is no checkpoint 'dvm.safetensors'; did you mean 'dvn.safetensors'?"),
    (["fresh.safetensors"], "task 'task1': the file does not say where its images are; give them with --data, "),
    (["s11.safetensors"], "task 'colours': the file does not say where its images are; give them with --data, "),
    (["--results-file", "no/r.json"], "cannot write 'no/r.json': there is no folder '"),
    (["--results-file", "taken/d.csv"], "cannot write 'taken/d.csv': it is a folder"),
    (["--data", "nowhere"], "--data nowhere: there is no such folder; give a folder, a YAML file or KEY=VALUE"),
    (["--data", "empty"], "--data empty: there are neither parquet files in it nor folders of classes"),
    (["--data", "source=folder"], "--data: source folder needs path"),
    (["--data", "source=digits", "--data", "clases=0-2"], "--data: unknown key 'clases'; did you mean 'classes'?"),
    (["--data", "mean=[0.5]"], "--data mean=[0.5]: 'mean' is for training; images are prepared as the task's were"),
])  # fmt: skip
def test_bad_input_in_one_line(dvn, made, monkeypatch, arguments, message):
    (made / "empty").mkdir(exist_ok=True)
    (made / "taken" / "d.csv").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr("dvn_cli.evaluation.evaluate", lambda *_, **__: pytest.fail("computed"))
    code, out, err = dvn(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"dvn: {message}")


def test_images_that_have_gone(dvn, made):
    (made / "recipes").rename(made / "moved")
    try:
        code, _, err = dvn()
    finally:
        (made / "moved").rename(made / "recipes")
    assert code == 2
    assert err.startswith("dvn: task 'colours': no folder ")
    assert err.endswith("pictures; --data gives other images\n")


def test_a_broken_file_is_found_before_anything_is_computed(dvn, made, monkeypatch):
    content = (made / "s22.safetensors").read_bytes()
    (made / "broken.safetensors").write_bytes(content[:-8])
    monkeypatch.setattr("dvn_cli.evaluation.evaluate", lambda *_, **__: pytest.fail("computed"))
    code, out, err = dvn("dvn.safetensors", "broken.safetensors")
    assert (code, out) == (2, "")
    assert err.startswith("dvn: 'broken.safetensors' is truncated")


def test_metadata_of_images_that_cannot_be_read(made):
    from dvn_cli.data import Reader
    from dvn_cli.evaluation import choose_images

    task = Task("t", ("a", "b"), (8, 8), MEAN, STD, (1,), (1,), {"spec": {"source": "film"}, "base": "."})
    with pytest.raises(InputError, match="task 't': what it says of its images cannot be read; give them with --data"):
        choose_images(Reader(), task, 1)
