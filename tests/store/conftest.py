"""A tiny checkpoint in the working directory."""

from pathlib import Path

import pytest
from tiny import metadata, tensors

from dvn_cli.store.file import write


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("dvn.safetensors", tensors(), metadata())
    return tmp_path / "dvn.safetensors"
