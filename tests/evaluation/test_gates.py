"""When `dvn eval` fails."""

import json
import math

import pytest
import torch
from pictures import PICTURES, results
from safetensors import safe_open
from safetensors.torch import load_file, save_file


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
        said = json.loads(file.metadata()["dvn"])
    del said["checksums"]  # of the other bytes
    tensors["fc.bias"] = torch.full_like(tensors["fc.bias"], math.nan)
    save_file(tensors, made / "nan.safetensors", {"dvn": json.dumps(said)})

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
