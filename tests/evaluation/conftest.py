from pathlib import Path

import pytest
import torch
from pictures import COLOURS, MEAN, STD, write_folder

from dvn_cli import cli
from dvn_cli.backbones import resolve
from dvn_cli.dividing import partition_backbone
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.file import read_checkpoint
from dvn_cli.store.metadata import Task
from dvn_cli.store.slicing import slice_file


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of a task by folder, a checkpoint, all its slices, and a fresh partition."""
    root = tmp_path_factory.mktemp("eval")
    write_folder(root / "recipes" / "pictures" / "test", COLOURS)
    torch.manual_seed(0)
    spec = resolve("wrn_10_1", num_classes=6, in_chans=1, input_size=(8, 8))
    module = spec.build()
    partition = partition_backbone(spec, 2, module=module)
    colours = {"spec": {"source": "folder", "path": "pictures"}, "base": str(root / "recipes")}
    digits = {"spec": {"source": "digits", "classes": "0-2", "test_images": 40}, "base": str(root)}
    tasks = [
        Task("colours", COLOURS, (8, 8), MEAN, STD, (1, 2), (1, 2), colours, affinity=(1.0, -0.25)),
        Task("digits", ("0", "1", "2"), (8, 8), MEAN, STD, (2, 1), (1, 2), digits, affinity=(-0.25, 1.0)),
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
