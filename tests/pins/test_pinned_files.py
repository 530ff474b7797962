"""Files that earlier versions wrote open, are sliced and give the logits that they gave."""

import gzip
import json
from pathlib import Path

import pinned
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import dvn_cli
from dvn_cli.cli import app

VERSIONS = sorted(folder.name for folder in pinned.FILES.iterdir())


@pytest.fixture(params=VERSIONS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the files of a version."""
    for path in (pinned.FILES / request.param).glob("*.gz"):
        (tmp_path / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    (tmp_path / "logits.json").write_bytes((pinned.FILES / request.param / "logits.json").read_bytes())
    return tmp_path


def test_logits(stored: Path, request: pytest.FixtureRequest) -> None:
    for name, networks in json.loads((stored / "logits.json").read_text()).items():
        found = dict(pinned.networks(dvn_cli.load(stored / name)))
        assert set(found) == set(networks)
        if request.config.getoption("exact"):
            assert found == networks
        for network, logits in found.items():
            ours, theirs = torch.tensor(logits), torch.tensor(networks[network])
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, n=network: f"{n}: {text}")


def test_slice(stored: Path) -> None:
    """The slice that is cut today has the tensors and all that the metadata said then; it may say more."""
    again = stored / "again.safetensors"
    words = ["slice", str(stored / "trained.safetensors"), "--task", "2", "--level", "1", "-o", str(again)]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    with safe_open(stored / "slice.safetensors", "pt") as old, safe_open(again, "pt") as new:
        assert set(old.keys()) == set(new.keys())
        for name in old.keys():  # noqa: SIM118
            assert torch.equal(old.get_tensor(name), new.get_tensor(name)), name
        before, now = (json.loads(file.metadata()["dvn"]) for file in (old, new))
        before["task"]["data"] = None  # of which the first slices said where it is
        now["task"] = {key: now["task"][key] for key in before["task"]}
        assert {key: now[key] for key in before} == before


def test_eval(stored: Path) -> None:
    for words in (["trained.safetensors"], ["slice.safetensors", "--data", "source=digits"]):
        words = ["eval", str(stored / words[0]), *words[1:], "--json"]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0
        assert all(0 < row["top1"] <= 100 for row in json.loads(done.stdout)["results"])
