"""When `dvn eval` fails: floors, and losses that are no numbers."""

import json
import math

import pytest
import torch
from pictures import PICTURES, altered, results

from dvn_cli.errors import InputError
from dvn_cli.evaluation.gates import Floor, Named, check_rows, choose_floors, parse_floor, read_floors
from dvn_cli.evaluation.measure import Evaluation


def test_the_gate(dvn):
    rows = results(dvn("--json"))
    lowest = min(rows, key=lambda row: row["top1"])
    code, out, err = dvn("--json", "--min-accuracy", repr(lowest["top1"]))
    assert (code, err) == (0, "")
    gate = json.loads(out)["gate"]
    worst = {key: lowest[key] for key in ("task", "name", "level", "top1", "file")}
    assert [check["verdict"] for check in gate.pop("checks")] == ["passed"] * 4
    assert gate == {"verdict": "passed", "passed": True, "min_accuracy": lowest["top1"], "worst": worst}

    code, out, err = dvn("--json", "--min-accuracy", repr(lowest["top1"] + 1e-6))
    assert code == 1
    assert json.loads(out)["gate"]["passed"] is False
    assert err.count("\n") == 1
    assert f"task '{lowest['name']}', level {lowest['level']} of 'dvn.safetensors': top-1 is" in err
    assert "(1 of 4 networks" in err

    code, out, err = dvn("--min-accuracy", "100")
    assert code == 1
    assert "1 colours" in out
    assert "not 100 % (4 of 4 networks fail)" in err
    assert dvn("--min-accuracy", "0")[0] == 0


def test_every_network_has_its_floor(dvn, made):
    rows = results(dvn("--json"))
    (made / "gates.yaml").write_text("all: 1\ntask=colours,level=2: 2\nlevel=2: 3\n")
    code, out, err = dvn("--json", "--gates", "gates.yaml", "--min-accuracy", "task=2,level=1:100")
    assert code == 1
    assert err.startswith("dvn: task 'digits', level 1 of 'dvn.safetensors': top-1 is ")
    assert err.endswith(" %, not 100 % (1 of 4 networks fail)\n")
    gate = json.loads(out)["gate"]
    assert [check["min_accuracy"] for check in gate["checks"]] == [1, 2, 100, 3]
    assert [check["top1"] for check in gate["checks"]] == [row["top1"] for row in rows]
    assert (gate["min_accuracy"], gate["worst"]["name"]) == (1, "digits")

    code, out, err = dvn("--min-accuracy", "task=digits,level=1:1")
    assert (code, [line for line in err.splitlines() if "has no floor" in line]) == (0, err.splitlines())
    assert err.splitlines()[1] == "task 'colours', level 2 has no floor"
    assert "gate: passed" in out
    code, out, err = dvn("--gates", "gates.yaml", "--task", "digits", "--level", "2", "--json")
    assert [check["min_accuracy"] for check in json.loads(out)["gate"]["checks"]] == [3]
    assert err == "no network of task=colours,level=2 is evaluated: what is asked of it is not checked\n"
    code, out, err = dvn("--task", "digits", "--min-accuracy", "task=colours:1", "--min-accuracy", "task=digit:99")
    assert (code, out) == (2, "")
    assert err == "dvn: no network of task=colours; task=digit is evaluated: none of the floors would be checked\n"


def test_what_is_said_of_fewer_networks_goes_before_and_of_two_alike_the_later():
    networks = [Named(1, "a", 1), Named(1, "a", 2), Named(2, "b,level=1", 1)]
    texts = ["task=a,level=2:5", "task=1:6", "7", "task=a:8", "task=b,level=1,level=1:9"]
    chosen, lines = choose_floors([parse_floor(text) for text in texts], networks)
    assert [floor and floor.accuracy for floor in chosen] == [8, 5, 9]
    assert lines == []
    with pytest.raises(InputError, match=r"there is a floor for task=aa, and no such network; did you mean 'a'\?"):
        choose_floors([Floor(5, "aa")], networks)
    assert choose_floors([Floor(5, "aa"), Floor(6)], networks, partial=True)[0] == [Floor(6)] * 3


@pytest.mark.parametrize(("right", "images", "said"), [(23, 500, "4.60"), (47498, 50000, "94.99"), (1, 3, "33.33")])
def test_what_is_told_of_a_missed_floor_is_what_it_is_or_less(right, images, said):
    row = Evaluation(1, "a", 1, (1,), 1, 1.0, 100 * right / images, None, 0.1, images)
    (check,) = check_rows([row], [Floor(95)])
    assert (check.verdict, check.found) == ("failed", f"top-1 is {said} %, not 95 %")


@pytest.mark.parametrize(("content", "message"), [
    ("all: 101", "'gates.yaml' is in per cent, 0 to 100, not 101"),
    ("all: yes", "'gates.yaml' is in per cent, 0 to 100, not True"),
    ("all: 0.7", "'gates.yaml' is in per cent: give 70 for 0.7"),
    ("level=1,task=2: 7", "'gates.yaml': give task=T, level=L, task=T,level=L or all, not 'level=1,task=2'"),
    ("task=2: [7]", "'gates.yaml' is in per cent, 0 to 100, not [7]"),
    ("", "'gates.yaml' holds no floors: give lines such as `all: 70` and `task=2,level=1: 74.5`"),
    ("all: 7\nall: 8", "cannot read 'gates.yaml': key 'all' is there twice, in lines 1 and 2"),
])  # fmt: skip
def test_files_that_are_no_gates(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gates.yaml").write_text(content)
    with pytest.raises(InputError) as raised:
        read_floors("gates.yaml")
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("gate", [[], ["--min-accuracy", "0"]])
def test_nan_fails_and_is_null_in_json(dvn, made, gate):
    altered(
        made / "s12.safetensors",
        made / "nan.safetensors",
        lambda tensors: tensors.update({"fc.bias": torch.full_like(tensors["fc.bias"], math.nan)}),
    )

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    code, out, err = dvn("--json", "s11.safetensors", "nan.safetensors", *gate, *PICTURES)
    document = json.loads(out, parse_constant=refuse)
    assert code == 1
    assert "task 'colours', level 2 of 'nan.safetensors': the loss is not a number (1 of " in err
    assert [row["loss"] is None for row in document["results"]] == [False, True]
    assert document["results"][1]["top1"] == 0
    assert (document["gate"] or {"passed": False})["passed"] is False
    assert "nan" in dvn("nan.safetensors", *PICTURES)[1]
