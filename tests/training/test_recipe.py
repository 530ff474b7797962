"""Recipes: what comes with dvn runs, what is wrong is told in one line, and no key is without effect."""

import functools
import io
import itertools
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import synthetic
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import DataSets
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, TanhLRScheduler

from dvn_cli import cli
from dvn_cli.backbones import resolve
from dvn_cli.dividing import partition_backbone
from dvn_cli.errors import InputError
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.file import write
from dvn_cli.store.metadata import TrainingRecord
from dvn_cli.training import recipes
from dvn_cli.training.experiment import prepare
from dvn_cli.training.methods import METHODS
from dvn_cli.training.recipe import (
    BackboneKeys,
    OptimizerKeys,
    Recipe,
    SaveKeys,
    ScheduleKeys,
    SequentialKeys,
    TaskKeys,
)
from dvn_cli.training.schedule import factor
from dvn_cli.training.session import Session

SHIPPED = sorted(path for folder in recipes.FOLDERS for path in folder.rglob("*.yaml"))


def by_name(path: Path) -> str:
    return path.stem


# The recipes that come with dvn


def test_some_come_with_dvn() -> None:
    assert {"digits", "j1"} <= {path.stem for path in SHIPPED}
    assert set(recipes.shipped().values()) == set(SHIPPED), "a recipe in a folder that its name does not lead to"


@pytest.mark.parametrize("path", SHIPPED, ids=by_name)
def test_first_line_is_the_command(path: Path) -> None:
    """And what follows it, up to the first empty line, are commands too."""
    lines = path.read_text().splitlines()
    commands = [shlex.split(line.removeprefix("#")) for line in lines[: lines.index("#")]]
    assert commands[0] == ["dvn", "train", path.stem]
    for dvn, train, name, *words in commands:
        assert (dvn, train, recipes.find(name)) == ("dvn", "train", path)
        recipes.read(path, [word for word in words if "=" in word])


def scales(path: Path) -> list[str]:
    return ["full", *yaml.safe_load(path.read_text()).get("scales", {})]


@pytest.mark.parametrize("path", SHIPPED, ids=by_name)
def test_every_scale_setting_and_method(path: Path) -> None:
    """Without the data; and no two of a file's scales are the same."""
    read = {}
    for scale, setting, method in itertools.product(scales(path), recipes.SETTINGS, METHODS):
        recipe = recipes.read(path, [f"scale={scale}", f"setting={setting}", f"method={method}"])
        assert (recipe.scale, recipe.setting, recipe.method) == (scale, setting, method)
        read[scale, setting, method] = recipe.model_copy(update={"scale": "", "setting": "", "method": ""})
    assert all(a != b for (of_a, a), (of_b, b) in itertools.combinations(read.items(), 2) if of_a[:2] != of_b[:2])


def session_of(path: Path, folder: Path, *overrides: str) -> Session:
    return prepare(recipes.read(path, overrides), path.parent, folder / "dvn.safetensors", small.CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "scale"),
    [
        pytest.param(path, scale, id=f"{path.stem}-{scale}")
        for path in SHIPPED
        for scale in scales(path)
        if scale != "full"
    ],
)
def test_takes_two_steps(path: Path, scale: str, data_sets: DataSets, tmp_path: Path) -> None:
    """In each of its stages, in which every network has its turn; at full scale see the stored losses."""
    session = session_of(path, tmp_path, *synthetic.overrides(path, data_sets, scale), "setting=modern")
    assert session.run.steps == 2
    session.train(small.nothing, small.nothing)
    losses = [np.concatenate(entry["loss"]).astype(float) for entry in session.run.history]
    assert np.isfinite(np.nansum(losses))
    assert not np.isnan(losses).all(axis=0).any(), "a network was never trained"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", SHIPPED, ids=by_name)
def test_every_method_has_its_networks(path: Path, method: str, data_sets: DataSets, tmp_path: Path) -> None:
    """In the order and with the levels of each recipe: none is left out of all stages."""
    run = session_of(path, tmp_path, *synthetic.overrides(path, data_sets), f"method={method}").run
    assert {network for stage in run.stages for network in stage.learn} == set(run.network) - {
        student for stage in run.stages for student, teacher in stage.distilled if student != teacher
    }


# What is wrong


@pytest.fixture
def dvn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `dvn train` as typed, in a folder with `small.yaml`, and expects it to refuse: returns its one line."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(small.content()))

    def refused(*words: str) -> str:
        before = sorted(tmp_path.iterdir())
        monkeypatch.setattr("sys.argv", ["dvn", "train", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2
        assert out == ""
        assert err.startswith("dvn: ")
        assert err.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before
        return err

    return refused


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("epoch=3", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("optimizer.learning_rate=1", "unknown key 'optimizer.learning_rate'"),
        ("optimizer.moment=1", "did you mean 'momentum'?"),
        ("tasks.0.data.class=0-4", "unknown key 'tasks.0.data.class'; did you mean 'classes'?"),
        ("tasks.0.levles=[1]", "did you mean 'levels'?"),
        ("tasks[0].data.size=16", "unknown key 'tasks[0].data.size': parts of a key are separated by dots alone; did "),
        ("tasks[0].data.size=16", "did you mean 'tasks.0.data.size'?"),
        ("tasks[*].name[1]=16", "did you mean 'tasks.*.name.1'?"),
        ("tasks.0.data.size]=16", "unknown key 'tasks.0.data.size]': parts of a key are separated by dots alone\n"),
        ("int=1", "unknown key 'int'; did you mean 'units'?"),
        ("str=1", "unknown key 'str'; known here: scenario, scale"),
        ("backbone.str=1", "unknown key 'backbone.str'; known here: name, input_size"),
        ("tasks.0.data.constrained-int=1", "unknown key 'tasks.0.data.constrained-int'"),
        ("tasks.0.data.groups={int: [[]], b: [1]}", "tasks.0.data.groups.int"),
        ("xyzzy.a.b=1", "unknown key 'xyzzy'; known here: scenario, scale, setting, method, "),
        ("epochs=many", "epochs: input should be a valid integer, not 'many'"),
        ("epochs=true", "epochs: input should be a valid integer, not True"),
        ("epochs=", "epochs: input should be a valid integer, not None"),
        ("epochs=0", "epochs: input should be greater than 0, not 0"),
        ("optimizer.lr=-1", "optimizer.lr: input should be greater than 0, not -1"),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number"),
        ("optimizer.lr=1e39", "optimizer.lr: input should be less than or equal to"),
        ("optimizer.weight_decay=1e39", "optimizer.weight_decay: input should be less than or equal to"),
        ("optimizer.momentum=1", "optimizer.momentum: input should be less than 1"),
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay: input should be a finite number"),
        ("optimizer.name=adamx", "optimizer: no optimizer 'adamx'; did you mean 'adamax'?"),
        ("optimizer.name=kron", "optimizer: no optimizer 'kron'"),
        ("optimizer=sgd", "optimizer: input should be a valid dictionary"),
        ("schedule.milestones=[0.5, 2]", "schedule.milestones.1: input should be less than 1"),
        ("backbone.input_size=big", "backbone.input_size: input should be a valid integer, not 'big'"),
        ("backbone.in_chans=2", "backbone.in_chans: input should be 1 or 3"),
        ("threads=99999999999", "threads: input should be less than or equal to 1024"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
        ("tasks=[]", "tasks: list should have at least 1 item"),
        ("tasks=3", "tasks: input should be a valid list"),
        ("epochs", "'epochs' is no override: give key=value"),
        ("=3", "'=3' is no override: give key=value"),
        ("units.x=1", "units has no keys: there is no units.x"),
        ("units.x.y=1", "units has no keys: there is no units.x"),
        ("tasks.2.name=x", "tasks.2: give a number from 0 to 1"),
        ("tasks.one.name=x", "tasks.one: give a number from 0 to 1"),
        ("tasks.-1.name=x", "tasks.-1: give a number from 0 to 1"),
        ("epochs=[1", "the value of epochs is not YAML: [1"),
        ("epochs=2024-13-45", "the value of epochs is not YAML: 2024-13-45"),
        ("method=dvm", "small.yaml: no method 'dvm'; did you mean 'dvn'?"),
        ("method=xyzzy", "no method 'xyzzy'; known are dvn, baseline, nestednet, packnet, feature_extraction, "),
        ("method=[dvn]", "method: input should be a valid string"),
        ("scale=small", "small.yaml: scale is one of full, not 'small'"),
        ("scale=[1]", "small.yaml: scale is one of full, not '[1]'"),
        ("scale=", "small.yaml: scale is one of full, not 'None'"),
        ("setting=moderm", "small.yaml: setting is one of paper, modern, not 'moderm'"),
        ("setting={}", "small.yaml: setting is one of paper, modern, not '{}'"),
        ("learning=both", "learning: input should be 'joint' or 'sequential', not 'both'"),
        ("sequential.temperature=0", "sequential.temperature: input should be greater than 0, not 0"),
        ("sequential.temp=2", "unknown key 'sequential.temp'; did you mean 'temperature'?"),
        ("sequential.warmup_epochs=-1", "sequential.warmup_epochs: input should be greater than or equal to 0"),
        ("tasks.*.data.train_images=2", "task 'low': 2 images are too few"),
        (
            "tasks.1.data={source: digits, train_images: 1, validation: 0, size: 4}",
            "task 'all' is trained on one image at a time, of which 'layer",
        ),
        ("tasks.*.levles=[1]", "unknown key 'tasks.0.levles'; did you mean 'levels'?"),
        ("tasks.*.data.x.y=1", "unknown key 'tasks.0.data.x'"),
        ("epochs.*=1", "epochs has no keys: there is no epochs.*"),
        ("add_units=1", "add_units adds to a checkpoint: give continues"),
        ("partition=x.safetensors", "give one of backbone (with units), partition and continues"),
        ("units=", "units is missing"),
        ("tasks.1.name=low", "two tasks have the name 'low'"),
        ("tasks.0.name=", "tasks.0.name: input should be a valid string"),
        ("tasks.0.order=[1, 1]", "tasks.0.order: name each of the units 1 to 2 once, not [1, 1]"),
        ("tasks.0.order=[1]", "tasks.0.order: name each of the units 1 to 2 once, not [1]"),
        ("levels=[2, 1]", "ascending, up to 2, not [2, 1]"),
        ("levels=[1, 1]", "ascending, up to 2, not [1, 1]"),
        ("tasks.1.levels=[1, 2, 3]", "the levels of task 'all' are cumulative numbers of units, ascending, up to 2"),
        ("levels=[]", "up to 2, not []"),
        ("tasks.0.order=[]", "tasks.0.order: name each of the units 1 to 2 once, not []"),
        ("tasks.0.data.classes=[3]", "task 'low': a task needs at least 2 classes, not 1"),
        ("tasks.0.data.classes=3-11", "task 'low': no classes '3-11': they are numbered 0 to 9"),
        ("tasks.0.data={source: hf, path: not-there}", "task 'low': no folder"),
        ("tasks.0.data={source: folder, path: not-there}", "task 'low': no folder"),
        ("tasks.0.data={source: folder}", "tasks.0.data: source folder needs path"),
        ("tasks.0.data.source=digit", "tasks.0.data.source: input should be 'digits', "),
        ("tasks.0.data.train_images=2", "task 'low': 2 images are too few"),
        ("units=500", "cannot be divided into 500 units"),
        ("backbone.name=wrn_11_1", "wrn_11_1"),
        ("backbone.name=resnt18", "did you mean 'resnet18'?"),
        ("backbone.input_size=32", "images of 8x8 cannot meet those of 32x32"),
        ("backbone.weights=no.pth", "there is no file 'no.pth'"),
        ("backbone.pretrained=true", "there are no pretrained weights of wrn_10_1"),
    ],
)
def test_refused(dvn: Callable[..., str], override: str, told: str) -> None:
    assert told in dvn("small.yaml", override)


def test_what_excludes_each_other(dvn: Callable[..., str]) -> None:
    assert "give weights or pretrained" in dvn("small.yaml", "backbone.weights=x", "backbone.pretrained=true")
    assert "units is given by the partition" in dvn("small.yaml", "partition=x", "backbone=")
    assert "units is given by the checkpoint" in dvn("small.yaml", "continues=x", "backbone=")
    assert "with method=packnet all tasks have the same order" in dvn(
        "small.yaml", "method=packnet", "tasks.0.order=[1, 2]"
    )
    assert "task 'all' takes the recipe's level 2" in dvn("small.yaml", "method=packnet", "levels=[2]")
    growing = ("learning=sequential", "sequential.grow=true")
    assert "task 'low' has no level within 1 of the 2 units" in dvn("small.yaml", *growing, "levels=[2]")
    for key in ("select=best", "patience=3"):
        assert "test images choose nothing" in dvn("small.yaml", key, "tasks.1.data.validation=0")
    taught, told = (
        "teacher=x.safetensors",
        "acts on labels: with teacher 'x.safetensors' all learn from that file instead",
    )
    for key in ("label_smoothing=0.1", "tasks.1.class_weights=balanced"):
        assert f"{key.partition('=')[0].rpartition('.')[2]} {told}" in dvn("small.yaml", taught, key)
    assert "patience is for tasks that are learnt together" in dvn("small.yaml", "patience=3", "method=packnet")


def test_no_such_file(dvn: Callable[..., str]) -> None:
    assert "there is no recipe 'digit'; did you mean 'digits'?" in dvn("digit")
    assert "there is no recipe 'qqq': give a file, or the name of one that comes with dvn, digits, " in dvn("qqq")
    assert "there is no checkpoint 'x'" in dvn("small.yaml", "partition=x", "backbone=", "units=")
    assert "there is no device" in dvn("small.yaml", "--device", "cuda:99")
    assert "unknown device 'gpu'" in dvn("small.yaml", "--device", "gpu")


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (b"", "'odd.yaml' is no recipe: a recipe is a mapping of keys"),
        (b"- 1\n- 2\n", "'odd.yaml' is no recipe"),
        (b"\x89PNG\xff\xfe\x00", "cannot read the recipe 'odd.yaml'"),
        (b"a: [1\nb: 2", "cannot read the recipe 'odd.yaml'"),
        (b"a: 2024-13-45", "cannot read the recipe 'odd.yaml'"),
        (b"units: 2\nbackbone: {name: wrn_10_1}", "odd.yaml: 'tasks' is missing"),
        (b"1: 2", "odd.yaml: "),
        (
            b"units: 2\nepochs: 1\nunits: 3",
            "odd.yaml: key 'units' is there twice, in lines 1 and 3: leave one out",
        ),
        (b"tasks:\n- {name: a, data: {}, name: b}", "odd.yaml: key 'tasks.0.name' is there twice, in lines 2 and 2"),
    ],
)
def test_no_recipe(dvn: Callable[..., str], written: bytes, told: str) -> None:
    Path("odd.yaml").write_bytes(written)
    assert told in dvn("odd.yaml")


@pytest.mark.parametrize("way", ["utf-8-sig", "utf-16", "crlf", "pipe", "stdin"])
def test_any_way_to_write_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Relative paths start from the working directory where the recipe is no file in a folder."""
    text = yaml.safe_dump(small.content(scenario="ça"), allow_unicode=True)
    path = tmp_path / "recipe.yaml"
    if way == "pipe":  # as the shell hands it over for `<(...)`
        monkeypatch.chdir(tmp_path)
        end, start = os.pipe()
        with open(start, "wb") as file:
            file.write(text.encode())
        found = recipes.find(f"/dev/fd/{end}")
        read = recipes.read(found)
        os.close(end)
        assert recipes.folder(found) == Path()
    elif way == "stdin":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "ascii"))
        read = recipes.read(recipes.find("-"))
        assert recipes.folder(recipes.find("-")) == Path()
    else:
        raw = text.replace("\n", "\r\n").encode() if way == "crlf" else text.encode(way)
        path.write_bytes(raw)
        read = recipes.read(recipes.find(str(path)))
        assert recipes.folder(path) == tmp_path
    assert read == recipes.parse(small.content(scenario="ça"), "small.yaml")


def test_folder(dvn: Callable[..., str]) -> None:
    Path("folder").mkdir()
    assert "there is no recipe 'folder'" in dvn("folder")
    assert "cannot write 'folder': it is a folder" in dvn("small.yaml", "-o", "folder")
    assert "there is no folder" in dvn("small.yaml", "-o", "none/x.safetensors")


def test_scales_settings_and_stars(tmp_path: Path) -> None:
    """What is given goes before the setting, that before the scale, and that before the file."""
    changes = {"epochs": 7, "optimizer.decay_norms": True, "tasks.*.data.train_images": 30, "schedule.name": "constant"}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(small.content(scales={"tiny": changes, "deep": {"backbone.name": "wrn_16_1"}})))
    plain = recipes.read(path)
    assert plain == recipes.read(path, ["scale=full", "setting=paper"])
    tiny = recipes.read(path, ["scale=tiny"])
    assert (tiny.scale, tiny.epochs, tiny.schedule.name) == ("tiny", 7, "constant")
    assert [task.data.train_images for task in tiny.tasks] == [30, 30]
    assert [task.data.classes for task in tiny.tasks] == ["0-4", None], "nothing else is changed"
    both = recipes.read(path, ["scale=tiny", "setting=modern", "epochs=3", "tasks.*.data.train_images=25"])
    assert (both.epochs, both.schedule.name, both.optimizer.decay_norms) == (3, "cosine", False)
    assert [task.data.train_images for task in both.tasks] == [25, 25]
    off = recipes.read(path, ["setting=modern", "backbone.zero_init_last=false", "inplace_distillation=false"])
    assert (off.backbone.zero_init_last, off.inplace_distillation, off.optimizer.decay_norms) == (False, False, False)
    path.write_text(yaml.safe_dump(small.content(scale="tiny", setting="modern", scales={"tiny": changes})))
    in_file = recipes.read(path)
    assert (in_file.epochs, in_file.schedule.name) == (7, "cosine")
    assert recipes.read(path, ["scale=full", "setting=paper"]).epochs == 2
    path.write_text(yaml.safe_dump(small.content(scales={"tiny": {"setting": "modern"}})))
    assert recipes.read(path, ["scale=tiny"]).schedule.name == "cosine"


@pytest.mark.parametrize(
    ("scales", "told"),
    [
        ("tiny", "scales is a mapping of names to the keys that each overrides"),
        ({"tiny": 3}, "scales is a mapping of names to the keys that each overrides"),
        ({"tiny": {"epoch": 3}}, "unknown key 'epoch'; did you mean 'epochs'?"),
        ({"tiny": {"tasks.5.name": "x"}}, "tasks.5: give a number from 0 to 1, or *"),
        ({"tiny": {1: 2}}, "unknown key '1'"),
        ({1: {}}, "scale is one of full, 1, not 'tiny'"),
    ],
)
def test_no_scale(dvn: Callable[..., str], scales: Any, told: str) -> None:
    Path("small.yaml").write_text(yaml.safe_dump(small.content(scales=scales)))
    assert told in dvn("small.yaml", "scale=tiny")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PATHS = [
    *(f"{part}{key}" for part, keys in (("", Recipe), ("backbone.", BackboneKeys)) for key in keys.model_fields),
    *(f"optimizer.{key}" for key in OptimizerKeys.model_fields),
    *(f"schedule.{key}" for key in ScheduleKeys.model_fields),
    *(f"sequential.{key}" for key in SequentialKeys.model_fields),
    *(f"save_every.{key}" for key in SaveKeys.model_fields),
    *(f"tasks.0.{key}" for key in TaskKeys.model_fields),
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PATHS) | st.text(max_size=8), values | st.text(max_size=8))
def test_any_value_is_taken_or_refused(path: str, value: Any) -> None:
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)
    try:
        taken = recipes.parse(recipes.resolved(small.content(), [f"{path}={text}"], "x"), "x")
    except InputError:
        return
    assert recipes.parse(json.loads(json.dumps(taken.model_dump(mode="json"), allow_nan=False)), "x") == taken


# No key is without effect

CHANGES = {
    "scenario": "j1",
    "scale": "tiny",
    "setting": "modern",
    "method": "nestednet",
    "learning": "sequential",
    "sequential": "{temperature: 3}",
    "sequential.old": "frozen",
    "sequential.grow": "true",
    "sequential.replay": "10",
    "sequential.temperature": "3",
    "sequential.weight": "0.5",
    "sequential.squared_temperature": "true",
    "sequential.warmup_epochs": "1",
    "sequential.lr_factor": "0.5",
    "continues": "not-there.safetensors",
    "add_units": "1",
    "backbone": "{name: wrn_10_2, in_chans: 1}",
    "backbone.name": "wrn_10_2",
    "backbone.input_size": "4",
    "backbone.in_chans": "3",
    "backbone.weights": "not-there.pth",
    "backbone.pretrained": "true",
    "backbone.zero_init_last": "true",
    "partition": "not-there.safetensors",
    "units": "3",
    "divide": "inner",
    "assign": "importance",
    "widths": "macs",
    "orders": "shared",
    "compensate": "false",
    "fit_classifiers": "false",
    "round_to": "5",
    "tasks": str([small.content()["tasks"][0]]),
    "tasks.0.name": "other",
    "tasks.0.data": str(small.data(classes="0-4", augment="crop", pad=2)),
    "tasks.0.order": "[2, 1]",
    "tasks.0.levels": "[2]",
    "tasks.0.batch_size": "8",
    "tasks.0.weight": "2",
    "tasks.0.class_weights": "balanced",
    "levels": "[2]",
    "epochs": "1",
    "batch_size": "8",
    "accumulate": "2",
    "optimizer": "{lr: 0.04}",
    "optimizer.name": "adamw",
    "optimizer.lr": "0.04",
    "optimizer.momentum": "0.8",
    "optimizer.nesterov": "false",
    "optimizer.weight_decay": "0.1",
    "optimizer.decay_norms": "false",
    "optimizer.layer_decay": "0.5",
    "optimizer.norm_lr_factor": "0.5",
    "optimizer.clip_grad": "0.5",
    "schedule": "{name: step, milestones: [0.1]}",
    "schedule.name": "cosine",
    "schedule.milestones": "[0.1]",
    "schedule.gamma": "0.3",
    "schedule.power": "2",
    "schedule.min_factor": "0.1",
    "schedule.warmup": "0.3",
    "reduction": "mean",
    "inplace_distillation": "true",
    "teacher": "next",
    "label_smoothing": "0.1",
    "levels_per_step": "sandwich",
    "unlock": "0.5",
    "ema": "0.5",
    "select": "best",
    "patience": "1",
    "precision": "bf16",
    "memory_format": "contiguous",
    "save_every": "{steps: 1}",
    "save_every.steps": "1",
    "save_every.minutes": "0.000001",
    "sync_bn": "true",
    "compile": "true",
    "threads": "2",
    "seed": "1",
}

SEQUENTIAL = ("learning=sequential",)
BASES = {key: SEQUENTIAL for key in CHANGES if key.partition(".")[0] in ("sequential", "continues")}
BASES["memory_format"] = ("backbone.in_chans=3",)
BASES["levels_per_step"] = ("units=4",)
BASES["schedule.power"] = BASES["schedule.min_factor"] = ("schedule.name=poly",)
BASES["patience"] = ("epochs=4",)
BASES["widths"] = ("backbone.weights=w.pth", "assign=sorted")
BASES["compensate"] = BASES["fit_classifiers"] = ("backbone.weights=w.pth",)
"""With which overrides a key is tried where it means nothing without them."""


def outcome(folder: Path, *overrides: str) -> dict[str, Any]:
    """All that a recipe can have an effect on, and nothing that repeats its words; of an error, its message."""
    threads: list[int] = []
    compiled: list[bool] = []
    states: list[Any] = []
    torch.manual_seed(5)
    torch.save(resolve("wrn_10_1", 10, 1).build().state_dict(), folder / "w.pth")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "set_num_threads", threads.append)
            patch.setattr(torch, "compile", lambda made, **_: (compiled.append(True), made)[1])
            patch.setattr("dvn_cli.training.session.write", lambda *given: (states.append(given), write(*given)))
            session = small.trained(folder, *overrides, scales={"tiny": {"epochs": 1}})
    except InputError as error:
        return {"error": str(error)}
    network = session.run.network
    return {
        "tensors": {name: tensor.detach().numpy().tobytes() for name, tensor in network.file_tensors().items()},
        "tasks": [replace(task, data=None) for task in network.tasks],
        "history": small.history(session.run),
        "best": session.run.best,
        "threads": threads,
        "compiled": len(compiled),
        "states written": len(states),
        "in a table": json.loads(session.files.record.read_text())["recipe"]["scenario"],
    }


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    @functools.cache
    def made(*overrides: str) -> dict[str, Any]:
        result = outcome(tmp_path_factory.mktemp("unchanged"), *overrides)
        assert "error" not in result
        return result

    return made


def test_every_key_is_tried() -> None:
    assert set(CHANGES) == set(PATHS)


@pytest.mark.parametrize("key", CHANGES)
def test_every_key_has_an_effect(
    key: str, unchanged: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what lies in the working directory would be suggested
    base = BASES.get(key, ())
    in_place_of = ["backbone=", "units="] if key in ("partition", "continues") else []
    changed = outcome(tmp_path, *base, *in_place_of, f"{key}={CHANGES[key]}")
    assert changed != unchanged(*base)
    no_checkpoint = "there is no checkpoint 'not-there.safetensors'; `dvn partition` and `dvn train` write one"
    errors = {
        "backbone.weights": "there is no file 'not-there.pth'",
        "backbone.pretrained": "there are no pretrained weights of wrn_10_1",
        "partition": no_checkpoint,
        "continues": no_checkpoint,
        "add_units": "small.yaml: add_units adds to a checkpoint: give continues",
    }
    assert changed.get("error") == errors.get(key)


@pytest.mark.parametrize("done", [0.0, 0.1, 0.25, 0.5, 0.75, 0.999])
def test_schedules(done: float) -> None:
    """Each against the formula as written in words."""

    def at(**keys: Any) -> float:
        return factor(ScheduleKeys(**keys), done)

    assert at(name="constant") == 1
    assert at(name="step", milestones=[0.2, 0.5], gamma=0.1) == pytest.approx(
        1 if done < 0.2 else 0.1 if done < 0.5 else 0.01
    )
    assert at(name="cosine") == pytest.approx(np.cos(done * np.pi / 2) ** 2)
    for name, of_timm in (("poly", PolyLRScheduler), ("tanh", TanhLRScheduler), ("cosine", CosineLRScheduler)):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1)
        power = {"power": 2} if name == "poly" else {}
        theirs = of_timm(optimizer, t_initial=1000, lr_min=0.1, **power)
        theirs.step(int(done * 1000))
        assert at(name=name, min_factor=0.1, **power) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert at(name="constant", warmup=0.2) == pytest.approx(min(done / 0.2, 1))


# Where the weights come from


def test_weights(tmp_path: Path) -> None:
    """A file of weights is what the networks start from."""
    torch.manual_seed(5)
    spec = small.session(tmp_path).run.network.partition.spec
    module = spec.build()
    torch.save(module.state_dict(), tmp_path / "w.pth")
    network = small.session(tmp_path, "backbone.weights=w.pth").run.network
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images, 2, 2), module(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("classes", [10, 13])
def test_partition(tmp_path: Path, classes: int) -> None:
    """Networks of a partition's file, made for another number of classes too: their logits are its first ones."""
    first = small.session(tmp_path)
    torch.manual_seed(5)
    partition = partition_backbone(replaced(first, classes), 2)
    module = partition.spec.build()
    tasks = first.run.network.tasks
    DeepVirtualNetwork.from_backbone(partition, module, tasks).save(tmp_path / "p.safetensors")
    words = ("backbone=", "units=", "partition=p.safetensors", "seed=7")
    session = small.session(tmp_path, *words)
    assert torch.initial_seed() == 7, "dropout is repeatable too"
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        for task, count in ((1, 5), (2, 10)):
            logits = session.run.network.eval()(images, task, 2)
            torch.testing.assert_close(logits, module(images)[:, :count], atol=1e-5, rtol=0)
    session.train(small.nothing, small.nothing)
    again = small.trained(tmp_path, *words)
    assert small.history(again.run) == small.history(session.run)
    assert session.run.network.training_record is not None


def replaced(session: Session, classes: int) -> Any:
    spec = session.run.network.partition.spec
    return replace(spec, num_classes=classes)


def test_no_partition(tmp_path: Path) -> None:
    first = small.session(tmp_path)
    words = ("backbone=", "units=", "partition=p.safetensors")
    partition = partition_backbone(replaced(first, 5), 2)
    tasks = first.run.network.tasks[:1]
    fresh = DeepVirtualNetwork.from_backbone(partition, partition.spec.build(), tasks)
    fresh.save(tmp_path / "p.safetensors")
    with pytest.raises(InputError, match=r"task 'all' has 10 classes, .* 5: partition with --num-classes 10"):
        small.session(tmp_path, *words)
    fresh.training_record = TrainingRecord({})
    fresh.save(tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="has been trained already"):
        small.session(tmp_path, *words)
