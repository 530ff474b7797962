"""A baseline, and what comes of a comparison with it."""

import functools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import COLOURS, DIGITS, PICTURES, altered, results, write_folder

from dvn_cli.errors import InputError
from dvn_cli.evaluation import baseline
from dvn_cli.evaluation.intervals import change_interval


@pytest.fixture
def saved(dvn, made) -> Path:
    code, _, err = dvn("--save-baseline", "base.json")
    assert (code, err) == (0, "base.json is written\n")
    return made / "base.json"


def checks(ran: tuple[int, str, str]) -> dict[tuple[str, int], dict]:
    return {(check["name"], check["level"]): check for check in json.loads(ran[1])["gate"]["checks"]}


def test_it_is_saved_though_nobody_reads_on(dvn, made, unread):
    unread()
    assert dvn("--per-class", "--save-baseline", "unread.json")[0] == 1
    assert baseline.read(made / "unread.json").tasks


def test_a_bit_for_each_image(dvn, saved):
    read = baseline.read(saved)
    assert [(task.name, task.images, len(task.networks)) for task in read.tasks] == [
        ("colours", 45, 2),
        ("digits", 40, 2),
    ]
    rows = results(dvn("--json"))
    networks = [(task.images, network) for task in read.tasks for network in task.networks]
    for (images, network), row in zip(networks, rows, strict=True):
        assert 100 * network.bits(images).mean() == pytest.approx(row["top1"])
        assert len(network.right) == 8  # 45 and 40 bits in base 64
    assert read.tasks[0].classes == COLOURS
    assert {"dvn", "torch", "pillow", "python"} <= read.versions.keys()


@pytest.mark.parametrize("batch_size", ["256", "7"])
def test_the_same_networks_pass_whatever_holds_them(dvn, saved, batch_size):
    ran = dvn("--baseline", "base.json", "--json", "--batch-size", batch_size)
    assert (ran[0], ran[2]) == (0, "")
    assert {check["found"] for check in checks(ran).values()} == {"the same network: no image flips"}
    cut = dvn("s21.safetensors", *DIGITS, "--task", "2", "--level", "1", "--baseline", "base.json", "--json")
    assert (cut[0], list(checks(cut))) == (0, [("digits", 1)])


def test_a_network_that_is_worse_or_gone_fails(dvn, saved, made):
    content = json.loads(saved.read_text())
    content["tasks"][0]["networks"][0] |= {"right": "////////", "top1": 100.0}
    (made / "perfect.json").write_text(json.dumps(content))
    ran = dvn("--baseline", "perfect.json", "--tolerance", "1", "--json")
    assert ran[0] == 1
    assert ran[2].startswith("dvn: task 'colours', level 1 of 'dvn.safetensors': -")
    found = checks(ran)
    assert {key: check["verdict"] for key, check in found.items()} == {
        ("colours", 1): "failed", ("colours", 2): "passed", ("digits", 1): "passed", ("digits", 2): "passed"
    }  # fmt: skip
    check = found["colours", 1]
    assert (check["gained"], check["lost"]) == (0, 45 - round(0.45 * results(dvn("--json"))[0]["top1"]))
    assert check["change"] == pytest.approx(-100 * check["lost"] / 45)
    assert check["interval"] == pytest.approx(change_interval(check["gained"], check["lost"], 45))

    ran = dvn("s11.safetensors", *PICTURES, "--baseline", "base.json", "--json")
    assert ran[0] == 1
    assert [check["verdict"] for check in checks(ran).values()] == ["passed", "failed", "failed", "failed"]
    assert "task 'colours', level 2: it is gone: the baseline has it (3 of 4 networks fail)" in ran[2]


def test_too_few_images(dvn, saved, made):
    """Another network of which no image flips: what 45 images do not show, 10,000 may."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("task/1/level/1/fc.weight", "task/1/level/1/fc.bias"):
            tensors[name] *= 2

    altered(made / "dvn.safetensors", made / "other.safetensors", change)
    command = ("other.safetensors", "--task", "1", "--level", "1", "--baseline", "base.json")
    code, out, err = dvn(*command)
    assert code == 3
    assert "undecided" in out
    assert err.endswith(" images would do, not 45 (1 of 1 networks are undecided)\n")
    for undecided, code in (("pass", 0), ("fail", 1)):
        ran = dvn(*command, "--undecided", undecided, "--json")
        assert ran[0] == code
        (check,) = checks(ran).values()
        assert check["verdict"] == "undecided"
        assert json.loads(ran[1])["gate"]["verdict"] == f"{undecided}ed"
        assert check["images_needed"] > 45
    assert dvn(*command, "--tolerance", "30")[0] == 0


def test_no_number_is_no_baseline_and_fails(dvn, saved, made):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["task/2/level/1/fc.bias"][0] = math.nan

    altered(made / "dvn.safetensors", made / "nan.safetensors", change)
    code, _, err = dvn("nan.safetensors", "--baseline", "base.json", "--save-baseline", "new.json")
    assert code == 1
    assert err.startswith("dvn: task 'digits', level 1 of 'nan.safetensors': the loss is not a number")
    assert not (made / "new.json").exists()


def test_other_data_fail(dvn, saved, made):
    def one(*data: str) -> str:
        ran = dvn("--task", "colours", "--level", "1", "--baseline", "base.json", "--json", *data)
        (check,) = checks(ran).values()
        assert (ran[0], check["verdict"]) == (1, "failed")
        return check["found"]

    assert one("--data", "recipes/pictures", "--data", "test_images=40") == "there are 40 images, 45 in the baseline"
    write_folder(made / "others" / "test", COLOURS[::-1])
    for number, name in enumerate(COLOURS):  # as many of each class, and other pixels
        folder = made / "others" / "test" / name
        files = sorted(folder.iterdir())
        for file in files[: max(0, len(files) - 5 - number)]:
            file.unlink()
        for extra in range(len(files), 5 + number):
            (folder / f"{extra}.png").write_bytes(files[0].read_bytes())
    assert one("--data", "others") == "the images are not the baseline's"
    content = json.loads(saved.read_text())
    content["tasks"][0]["labels_sha256"] = "0"
    saved.write_text(json.dumps(content))
    assert one() == "the labels of the images are not the baseline's"
    content["tasks"][0]["classes"][:2] = content["tasks"][0]["classes"][1::-1]
    saved.write_text(json.dumps(content))
    assert one() == "its 6 classes are not the baseline's 6, or in another order"


def test_a_network_that_the_baseline_lacks_is_said(dvn, saved, made):
    content = json.loads(saved.read_text())
    del content["tasks"][1]["networks"][0]
    saved.write_text(json.dumps(content))
    code, _, err = dvn("--baseline", "base.json")
    assert (code, err) == (0, "task 'digits', level 1 is not in the baseline\n")


@pytest.mark.parametrize(("change", "options", "lacking"), [
    (lambda c: c["tasks"].pop(0), ["--task", "colours"], "no network of task 'colours'"),
    (lambda c: c["tasks"][0]["networks"].pop(0), ["--task", "1", "--level", "1"], "no network of task '1', level 1"),
    (lambda c: [task["networks"].pop() for task in c["tasks"]], ["--level", "2"], "no network of level 2"),
    (lambda c: c.update(tasks=[]), ["--min-accuracy", "0"], "no network"),
])  # fmt: skip
def test_a_baseline_of_which_nothing_would_be_compared(dvn, saved, made, monkeypatch, change, options, lacking):
    content = json.loads(saved.read_text())
    change(content)
    saved.write_text(json.dumps(content))
    monkeypatch.setattr("dvn_cli.evaluation.measure.measure_together", lambda *_, **__: pytest.fail("computed"))
    code, out, err = dvn("--baseline", "base.json", *options)
    assert (code, out) == (2, "")
    assert err == f"dvn: the baseline has {lacking}: nothing would be compared\n"


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c.pop("versions"), "'base.json' is no baseline: 'versions' is missing"),
    (lambda c: c.update(format=2), "'base.json' is no baseline: 'format' is 2, not 1 to 1"),
    (lambda c: c["tasks"][0]["networks"][0].update(top1=99.0), "'base.json' is no baseline: 'tasks.0' is not usable: "),
    (lambda c: c["tasks"][0]["networks"][0].update(right="?"), "'base.json' is no baseline: 'tasks.0' is not usable: "),
])  # fmt: skip
def test_files_that_are_no_baseline(dvn, saved, made, monkeypatch, change, message):
    content = json.loads(saved.read_text())
    change(content)
    saved.write_text(json.dumps(content))
    monkeypatch.setattr("dvn_cli.evaluation.measure.measure_together", lambda *_, **__: pytest.fail("computed"))
    code, out, err = dvn("--baseline", "base.json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"dvn: {message}")


def test_two_networks_of_one_task_and_level_make_no_baseline(dvn, made, monkeypatch):
    monkeypatch.setattr("dvn_cli.evaluation.measure.measure_together", lambda *_, **__: pytest.fail("computed"))
    code, _, err = dvn("dvn.safetensors", "dvn.safetensors", "--save-baseline", "twice.json")
    assert (code, err) == (2, "dvn: a baseline has one network of each task and level: 'colours', 1 is there twice\n")


def test_a_file_that_is_none_is_named():
    with pytest.raises(InputError, match=r"there is no file 'none\.json'"):
        baseline.read("none.json")


@pytest.mark.parametrize(("gain", "loss", "expected"), [
    (0.004, 0.004, {"passed": 850}), (0.004, 0.012, {"undecided": 950}), (0.004, 0.028, {"failed": 930})
])  # fmt: skip
def test_simulated_regressions(gain: float, loss: float, expected: dict[str, int]) -> None:
    """1,000 comparisons on 2,000 images, 0.8 points tolerated: no more false alarms and misses than is promised.

    Promised are 2.5 % of either; 40 of 1,000 are three standard deviations more.
    """
    images, tolerance, change = 2000, 0.8, 100 * (gain - loss)
    draws = np.random.default_rng(0).multinomial(images, [gain, loss, 1 - gain - loss], size=1000)
    judged = functools.cache(lambda gained, lost: baseline.decide(change_interval(gained, lost, images), tolerance))
    verdicts = Counter(judged(int(gained), int(lost)) for gained, lost, _ in draws)
    assert change < -tolerance or verdicts["failed"] <= 40
    assert change > -tolerance or verdicts["passed"] <= 40
    assert all(verdicts[verdict] >= least for verdict, least in expected.items())
