"""`compile`: the same networks, compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
import yaml


@pytest.mark.slow
def test_compiled_networks_learn_the_same_and_go_on(tmp_path: Path) -> None:
    keys = ("compile=true", "tasks=[{name: all, data: {source: digits, train_images: 40, test_images: 20}}]")
    with pytest.raises(small.Stopped):
        small.session(tmp_path, *keys).train(*small.stop_after(1))
    compiled = small.trained(tmp_path, *keys, resume=True)
    plain = small.trained(tmp_path, *keys, "compile=false")
    for ours, theirs in zip(small.history(compiled.run), small.history(plain.run), strict=True):
        for key, value in theirs.items():
            torch.testing.assert_close(torch.tensor(ours[key]), torch.tensor(value), rtol=1e-3, atol=0, msg=key)
    graphs = {network: compiled.run.network._plans[(*network, True)][0] for network in compiled.run.network}
    assert not any(isinstance(graph, torch.nn.Module) for graph in graphs.values())


@pytest.mark.slow
def test_a_compiler_that_is_missing_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small.content()))
    command = [sys.executable, "-m", "dvn_cli", "train", "small.yaml", "compile=true"]
    environment = {**os.environ, "CXX": "/not/there", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("dvn: ")]
    assert len(lines) == 1
    assert "torch.compile does not work here, leave out compile: " in lines[0]
    assert "No working C++ compiler found" in lines[0]
