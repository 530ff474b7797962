"""`dvn train` as it is typed, and what can be typed after it."""

import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import dvn_cli
from dvn_cli import cli
from dvn_cli.data import DataSpec, batches, load_test
from dvn_cli.errors import DvnError
from dvn_cli.network import DeepVirtualNetwork, VirtualNetwork
from dvn_cli.training import recipes, state
from dvn_cli.training.experiment import prepare
from dvn_cli.training.loop import Run
from dvn_cli.training.session import Session

# `dvn` in a process of its own


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    run = [sys.executable, "-c", "from dvn_cli.cli import main; main()", *words]
    more = {"PYTHONPATH": str(Path(dvn_cli.__file__).parents[1])}
    # With the signal as a shell leaves it: whoever runs the tests in the background may have it ignored.
    return subprocess.Popen(
        run,
        cwd=folder,
        env=os.environ | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def dvn(folder: Path, *words: str) -> str:
    process = start(folder, *words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def stopped(folder: Path, sign: signal.Signals, line: str, *words: str) -> tuple[int, str]:
    """Sends a signal when a line is seen on stderr; returns the exit code, and what came after that line."""
    process = start(folder, *words)
    assert process.stderr is not None
    before = []
    for text in process.stderr:
        before.append(text)
        if text.startswith(line):
            process.send_signal(sign)
            break
    else:
        pytest.fail(f"no {line!r} in {''.join(before)}")
    _, err = process.communicate(timeout=300)
    return process.returncode, err


WORDS = (
    *("train", "digits", "epochs=4", "backbone.name=wrn_10_1", "units=2"),
    *("tasks.*.data.train_images=700", "tasks.*.data.test_images=200", "save_every.steps=2"),
)


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run that was killed, stopped with SIGTERM and with Ctrl-C, and what it said from then on."""
    folder = tmp_path_factory.mktemp("typed")
    code, _ = stopped(folder, signal.SIGKILL, "epoch 1/4", *WORDS)
    assert code == -signal.SIGKILL
    assert "dvn.safetensors" not in {path.name for path in folder.iterdir()}
    told = []
    for sign, line in ((signal.SIGTERM, "epoch 2/4"), (signal.SIGINT, "epoch 3/4")):
        code, rest = stopped(folder, sign, line, *WORDS, "--resume")
        assert code == 128 + sign
        told.append(rest)
    return folder, [*told, dvn(folder, *WORDS, "--resume")]


@pytest.mark.parametrize("place", [0, 1])
def test_stopped_by_a_signal(typed: tuple[Path, list[str]], place: int) -> None:
    """Most likely within an epoch, after any step of it."""
    told = [line for line in typed[1][place].splitlines() if line and not line.startswith("epoch ")]
    assert len(told) == 1
    where = rf"(epoch {place + 2}|epoch {place + 3}|step \d+ of epoch {place + 3})"
    assert re.fullmatch(rf"stopped after {where}: the same command with --resume goes on from there", told[0])


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    """At any moment; no more than an interval is lost, and the losses are those of a run that nobody killed."""
    words, chance, places = (*WORDS, "save_every.minutes=0.0001"), random.Random(0), [(0, 0)]
    file = tmp_path / "dvn.state.safetensors"
    for _ in range(3):
        before = file.stat().st_mtime_ns if file.exists() else None
        process = start(tmp_path, *words, "--resume")
        while process.poll() is None and (not file.exists() or file.stat().st_mtime_ns == before):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))  # less than the run takes, on a fast machine too
        process.kill()
        process.communicate()
        metadata = state.read(file).metadata
        places.append((metadata.epochs_done, metadata.steps_done))
    assert places == sorted(set(places))
    dvn(tmp_path, *words, "--resume")
    as_if_nothing_had_interrupted_it(tmp_path, tmp_path / "alone")


def test_table(typed: tuple[Path, list[str]]) -> None:
    lines = typed[1][2].splitlines()
    assert lines[0].split() == ["top-1", "in", "%,", "95", "%", "CI", "level", "1", "level", "2", "images"]
    assert [line.split()[:2] for line in lines[2::2]] == [["1", "low"], ["2", "high"], ["3", "digits"], ["4", "parity"]]
    record = json.loads((typed[0] / "dvn.run.json").read_text())
    shown = [float(value) for line in lines[2::2] for value in line.split()[2:4]]
    assert shown == pytest.approx([row["top1"] for row in record["test"]], abs=0.006)
    limits = [float(limit) for line in lines[3::2] for cell in line.split() for limit in cell.split("-")]
    assert limits == pytest.approx([limit for row in record["test"] for limit in row["top1_interval"]], abs=0.06)


def test_only_these_files(typed: tuple[Path, list[str]]) -> None:
    """Leftovers of the killed process are gone too."""
    assert {"dvn.safetensors", "dvn.run.json"} == {p.name for p in typed[0].iterdir() if "task" not in p.name} - {
        "dvn-slices"
    }


def test_as_if_nothing_had_interrupted_it(typed: tuple[Path, list[str]], tmp_path: Path) -> None:
    as_if_nothing_had_interrupted_it(typed[0], tmp_path / "alone")


def as_if_nothing_had_interrupted_it(folder: Path, alone: Path) -> None:
    path = recipes.find("digits")
    alone.mkdir()
    session = prepare(recipes.read(path, WORDS[2:]), path.parent, alone / "dvn.safetensors", small.CPU)
    session.train(small.nothing, small.nothing)
    record = json.loads((folder / "dvn.run.json").read_text())
    for mine, theirs in zip(session.run.history, record["epochs"], strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}
    ours, theirs = (load_file(where / "dvn.safetensors") for where in (alone, folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_then_slice_and_eval(typed: tuple[Path, list[str]]) -> None:
    """No further argument; every slice equals the network that it was cut from, and so does what is told of it."""
    folder = typed[0]
    assert "dvn-task2-level1.safetensors" in dvn(folder, "slice", "--task", "2", "--level", "1")
    whole = json.loads(dvn(folder, "eval", "--json"))["results"]
    assert [(row["task"], row["level"]) for row in whole] == [
        (task, level) for task in (1, 2, 3, 4) for level in (1, 2)
    ]
    of_training = json.loads((folder / "dvn.run.json").read_text())["test"]
    for row, then in zip(whole, of_training, strict=True):
        assert row["loss"] == pytest.approx(then["loss"], abs=1e-5)
        assert row | {"loss": 0, "file": None} == then | {"loss": 0}
    dvn(folder, "slice", "--all")
    files = sorted(path.relative_to(folder) for path in (folder / "dvn-slices").glob("*.safetensors"))
    assert len(files) == len(whole)
    data = ("--data", "source=digits", "--data", "test_images=200")
    of_slices = json.loads(dvn(folder, "eval", *map(str, files[4:6]), *data, "--json"))["results"]
    for row, of_slice, file in zip(whole[4:6], of_slices, files[4:6], strict=True):
        assert of_slice["loss"] == pytest.approx(row["loss"], abs=1e-5)
        assert of_slice | {"loss": 0, "file": ""} == row | {"loss": 0, "file": ""}, file

    network = dvn_cli.load(folder / "dvn.safetensors")
    assert isinstance(network, DeepVirtualNetwork)
    for row, file in zip(whole, files, strict=True):
        alone = dvn_cli.load(folder / file)
        assert isinstance(alone, VirtualNetwork)
        assert alone.task.data is None
        data_of_task = network.tasks[row["task"] - 1].data
        assert data_of_task is not None
        assert data_of_task.base is None, "digits need no folder"
        split, _ = load_test(DataSpec.model_validate(data_of_task.spec), channels=1)
        with torch.no_grad():
            for images, _ in batches(split, 250, mean=alone.task.mean, std=alone.task.std):
                expected = network(images, row["task"], row["level"])
                assert (alone(images) - expected).abs().max() <= 1e-5
        same = (folder / "dvn-task2-level1.safetensors").read_bytes() == (folder / file).read_bytes()
        assert same == (row["task"] == 2 and row["level"] == 1)


# `dvn` in this process


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(small.content()))
    return tmp_path


def ends(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["dvn", "train", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_json(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """One document on stdout, all else on stderr; the files are named as asked."""
    assert ends(monkeypatch, "small.yaml", "--json", "-o", "my.safetensors") == 0
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert document["checkpoint"] == "my.safetensors"
    assert {path.name for path in here.iterdir()} == {"small.yaml", "my.safetensors", "my.run.json"}
    assert document["results"] == json.loads(Path("my.run.json").read_text())["test"]
    assert [(row["name"], row["level"], row["images"]) for row in document["results"]] == [
        (name, level, 20) for name in ("low", "all") for level in (1, 2)
    ]
    assert "epoch 2/2: loss " in err
    assert err.endswith("my.safetensors is written; my.run.json says how it went\n")


def test_what_is_told_fits(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """80 columns, with no line broken, and names as they are."""
    monkeypatch.setenv("COLUMNS", "80")
    assert ends(monkeypatch, "small.yaml", "tasks.0.name='[red]low'", "tasks.0.order=[2, 1]", "tasks.1.levels=[2]") == 0
    lines = capfd.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "wrn_10_1, 2 units (none free), 3 networks, on cpu: 2 epochs of 2 steps"
    assert lines[3].split() == ["1", "[red]low", "5", "32", "8", "20", "2", "|", "1"]
    assert lines[4].split() == ["2", "all", "10", "32", "8", "20", "2", "1"]
    assert lines[5] == "task 1 [red]low: classes '0', '1', '2', '3', '4'"
    assert lines[6].startswith("task 2 all: classes '0', '1', ")
    assert lines[7].split() == ["task", "level", "units", "parameters", "density", "of", "all", "units", "MACs"]
    assert [line.split()[:4] for line in lines[9:12]] == [
        ["1", "[red]low", "1", "1"],
        ["1", "[red]low", "2", "2"],
        ["2", "all", "1", "2"],
    ]
    assert lines[12].startswith("epoch 1/2: loss ")


def test_the_classes_are_told_and_recorded(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By name, of groups with what they are made of, before the first epoch; and what has no images to test on."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("1", "10", "2", "yes"):
        for split, count in (("train", 6), ("test", 2)):
            if (split, name) != ("test", "10"):
                (here / split / name).mkdir(parents=True)
                for index in range(count):
                    Image.new("L", (8, 8), 9 * index).save(here / split / name / f"{index}.png")
    words = [
        "tasks.*.data={source: folder, path: .}",
        "tasks.0.data.classes=[yes, 2, 10]",
        "tasks.1.data.groups={no: [10, yes], 0: [1, 2]}",
        "epochs=1",
    ]
    assert ends(monkeypatch, "small.yaml", *words) == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"{here}: trains on train (10 % of that is held out to validate on) and tests on test"
    first = lines.index("task 1 low: classes 'yes', '2', '10'")
    assert lines[first : first + 3] == [
        "task 1 low: classes 'yes', '2', '10'",
        "task 1 low: no test images of '10'",
        "task 2 all: classes 'no' ('10', 'yes'), '0' ('1', '2')",
    ]
    assert any(line.startswith("epoch 1/1: ") for line in lines[first + 3 :])
    record = json.loads(Path("dvn.run.json").read_text())
    assert record["tasks"] == [
        {"name": "low", "classes": ["yes", "2", "10"], "images": {"train": 16, "validation": 2, "test": 4}},
        {
            "name": "all",
            "classes": ["no", "0"],
            "images": {"train": 22, "validation": 2, "test": 6},
            "groups": {"no": ["10", "yes"], "0": ["1", "2"]},
        },
    ]
    assert record["recipe"]["tasks"][0]["data"]["classes"] == ["yes", 2, 10]
    trained = dvn_cli.load("dvn.safetensors").tasks
    assert [task.classes for task in trained] == [("yes", "2", "10"), ("no", "0")]
    assert trained[1].data.spec["groups"] == {"no": ["10", "yes"], "0": ["1", "2"]}


@pytest.mark.parametrize(
    ("content", "override", "message"),
    [
        (b"GIF89a", "seed=1", "task 'all': train image .*/train/b/7.gif (cannot be read: .*|is not an image .*)"),
        (b"", "tasks.1.data.size=30000", r"12 images of 1x30000x30000 of .* take [\d.]+ GiB, and .*: set a .*"),
    ],
)
def test_images_that_cannot_be_had_are_one_line(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    content: bytes,
    override: str,
    message: str,
) -> None:
    """And nothing is written."""
    monkeypatch.setattr("dvn_cli.data.memory.available", lambda: 2**30)
    for split, name in itertools.product(("train", "test"), "ab"):
        (here / split / name).mkdir(parents=True)
        for index in range(6):
            Image.new("L", (8, 8), 9 * index).save(here / split / name / f"{index}.gif")
    if content:
        (here / "train" / "b" / "7.gif").write_bytes(content)
    before = sorted(here.rglob("*"))
    words = ["tasks.1.data={source: folder, path: .}", "tasks.0.data.size=8", override]
    assert ends(monkeypatch, "small.yaml", *words) == 2
    assert re.fullmatch(f"dvn: {message}\n", capfd.readouterr().err)
    assert sorted(here.rglob("*")) == before


def test_one_task_after_the_other(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In two runs: the second adds its task to what the first has written, and `dvn eval` knows them both."""
    tasks = small.content()["tasks"]
    words = ("learning=sequential", "sequential={old: distilled, grow: true, warmup_epochs: 1}")
    assert ends(monkeypatch, "small.yaml", *words, f"tasks={tasks[:1]}", "levels=[1]", "-o", "first.safetensors") == 0
    assert (
        capfd.readouterr().err.splitlines()[0] == "wrn_10_1, 2 units (1 free), 1 network, on cpu: 2 epochs of 2 steps"
    )
    second = (*words, f"tasks={tasks[1:]}", "continues=first.safetensors", "backbone=", "units=")
    assert ends(monkeypatch, "small.yaml", *second, "--json") == 0
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert lines[0] == "wrn_10_1, 2 units (none free), 4 networks, on cpu: 3 epochs of 2 steps"
    assert lines[3].split() == ["1", "low", "5", "-", "-", "-", "1", "|", "2"]
    assert lines[4].split() == ["2", "all", "10", "32", "8", "20", "2", "|", "1"]
    assert [line.split(":")[0] for line in lines if line.startswith("epoch ")] == [f"epoch {n}/3" for n in (1, 2, 3)]
    assert {(row["name"], row["level"]) for row in json.loads(out)["results"]} == {("all", 1), ("all", 2)}
    record = json.loads(Path("dvn.run.json").read_text())
    assert [entry["stage"] for entry in record["epochs"]] == [1, 2, 2]
    assert record["epochs"][0]["loss"][0][0] is None, "held by nobody while the new parts warm up"
    monkeypatch.setattr("sys.argv", ["dvn", "eval", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    results = json.loads(capfd.readouterr().out)["results"]
    assert [(row["name"], row["level"], row["images"]) for row in results] == [
        (name, level, 20) for name in ("low", "all") for level in (1, 2)
    ]
    assert ends(monkeypatch, "small.yaml", *second, "-o", "first.safetensors") == 2
    told = capfd.readouterr().err
    assert told == "dvn: 'first.safetensors' is what the recipe starts from: give another output with -o\n"


def test_not_a_number(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, one line that names task and level, and the old files as they were."""
    assert ends(monkeypatch, "small.yaml") == 0
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    capfd.readouterr()
    assert ends(monkeypatch, "small.yaml", "optimizer.lr=1e30", "--force") == 1
    out, err = capfd.readouterr()
    assert out == ""
    told = [line for line in err.splitlines() if line.startswith("dvn: ")]
    assert len(told) == 1
    assert err.endswith(f"{told[0]}\n")
    assert re.match(r"dvn: the loss of task '(low|all)', level [12], is not a number after epoch 1, step 2: ", told[0])
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_resume(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def ctrl_c(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_epoch", ctrl_c)
        assert ends(monkeypatch, "small.yaml", "--resume") == 130
    told = capfd.readouterr().err
    assert told.startswith("there is nothing to resume: the run starts from its beginning\n")
    assert "stopped before the first step: nothing has been written\n" in told
    assert [path.name for path in here.iterdir()] == ["small.yaml"]

    epoch = Run._epoch
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_epoch", lambda run, step: ctrl_c() if run.epochs_done else epoch(run, step))
        assert ends(monkeypatch, "small.yaml") == 130
    assert "stopped after epoch 1: the same command with --resume goes on from there" in capfd.readouterr().err

    assert ends(monkeypatch, "small.yaml", "seed=3", "--resume") == 2
    told = capfd.readouterr().err
    assert told == "dvn: the interrupted run had seed=0, not 3: resume it as it was, or start again with --force\n"

    with monkeypatch.context() as patch:
        patch.setattr("dvn_cli.evaluation.measure.evaluate_all", ctrl_c)
        assert ends(monkeypatch, "small.yaml", "--resume") == 130
    told = capfd.readouterr().err
    assert "going on after epoch 1\n" in told
    assert "stopped after training: dvn.safetensors is written, `dvn eval` measures it" in told
    record = json.loads(Path("dvn.run.json").read_text())
    assert len(record["epochs"]) == 2
    assert "test" not in record
    assert ends(monkeypatch, "small.yaml", "--resume") == 0
    out, told = capfd.readouterr()
    assert told.startswith("'dvn.safetensors' has 2 epochs: measuring it\n")
    assert out.startswith("top-1 in %")
    assert ends(monkeypatch, "small.yaml", "--resume", "--json") == 0
    out, told = capfd.readouterr()
    assert told == "dvn.safetensors has all of its 2 epochs: there is nothing left to do\n"
    assert json.loads(out)["results"] == json.loads(Path("dvn.run.json").read_text())["test"]


def test_typed_twice(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The second time it is said what is there and what to do; nothing is replaced but with --force."""
    assert ends(monkeypatch, "small.yaml", "epochs=1") == 0
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    capfd.readouterr()
    assert ends(monkeypatch, "small.yaml", "epochs=1") == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"dvn: 'dvn.safetensors' is a trained checkpoint \(tasks: low, all; 1 epoch, written [0-9-]{10} [0-9:]{5}\): "
        r"-o writes elsewhere, --force replaces it, --resume trains it on to more epochs\n",
        err,
    )
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before
    assert ends(monkeypatch, "small.yaml", "epochs=1", "--resume", "--force") == 2
    assert "not both" in capfd.readouterr().err
    assert ends(monkeypatch, "small.yaml", "epochs=1", "--force") == 0


def test_a_full_disk_loses_no_result(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are shown before they are filed."""

    def full(*_: object) -> None:
        raise DvnError("cannot write 'dvn.run.json': No space left on device")

    monkeypatch.setattr(Session, "finish", full)
    assert ends(monkeypatch, "small.yaml", "epochs=1", "--json") == 1
    out, err = capfd.readouterr()
    assert len(json.loads(out)["results"]) == 4
    assert err.endswith("dvn: cannot write 'dvn.run.json': No space left on device\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_the_characters(here: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """Shows others in their place."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    assert ends(monkeypatch, "small.yaml", "epochs=1", "tasks.0.name=猫 ça") == 0
    for stream in (out, err):
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert f"1 ? {'?' if encoding == 'ascii' else 'ç'}a" in text


def test_no_control_codes_in_a_log(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever is asked of colours, as on GitHub Actions."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert ends(monkeypatch, "small.yaml", "epochs=1") == 0
    assert "\x1b" not in capfd.readouterr().err
