"""What must stay as it is, computed and written: `python tests/pins/pinned.py losses` or `... files NAME`.

Write the losses anew after a deliberate change of what is computed, or, before a change that should leave them alone,
on one's own machine: `pytest tests/pins -m '' --exact` then wants the same bits. Files are never written anew, only
added: every later version opens those of all earlier ones.
"""

import gzip
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

LOSSES = HERE / "losses.json"
FILES = HERE / "files"

Losses = list[list[list[float | None]]]  # by epoch, task and level; None where a network is not trained


def cases() -> dict[str, tuple[Path, list[str]]]:
    """Returns each recipe with each method, and the digits as they come, by name: the file and its overrides."""
    from dvn_cli.training import recipes
    from dvn_cli.training.methods import METHODS

    found = {
        f"{name}-{method}": (path, [f"method={method}"])
        for name, path in recipes.shipped().items()
        for method in METHODS
    }
    short = ["epochs=2", "tasks.*.data.train_images=200", "tasks.*.data.test_images=10"]
    return {**found, "digits": (recipes.find("digits"), short)}


def losses(name: str, data_sets: Any, folder: Path) -> Losses:
    """Trains a case on the CPU and returns its losses."""
    import synthetic

    from dvn_cli.training import recipes
    from dvn_cli.training.experiment import prepare

    path, words = cases()[name]
    if name != "digits":
        words = [*synthetic.overrides(path, data_sets), *words]
    session = prepare(recipes.read(path, words), path.parent, folder / f"{name}.safetensors", torch.device("cpu"))
    session.train(lambda _: None, lambda *_: None)
    return [entry["loss"] for entry in session.run.history]


def write_losses() -> None:
    import synthetic

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data_sets = synthetic.data_sets(Path(folder))
        found = {name: losses(name, data_sets, Path(folder)) for name in cases()}
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
    LOSSES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def images(input_size: tuple[int, int], channels: int = 1) -> Tensor:
    """Returns three images (3, C, H, W) that need no random numbers."""
    count = 3 * channels * input_size[0] * input_size[1]
    return (torch.arange(count) * 37 % 101 / 50 - 1).view(3, channels, *input_size)


def networks(opened: Any) -> Iterator[tuple[str, list[list[float]]]]:
    """Yields the name and the logits of every network that a file holds, as `dvn_cli.load` opens it."""
    with torch.no_grad():
        if not hasattr(opened, "tasks"):
            yield "slice", opened(images(opened.task.input_size)).tolist()
            return
        for number, task in enumerate(opened.tasks, 1):
            for level in range(1, len(task.levels) + 1):
                yield f"{number}-{level}", opened(images(task.input_size), number, level).tolist()


def write_files(version: str) -> None:
    """Writes a trained checkpoint, a slice of it and a fresh partition, with the `dvn_cli` that is imported.

    Weights are rounded, so that the files compress to little.
    """
    import dvn_cli
    from dvn_cli.cli import app

    target = FILES / version
    target.mkdir()
    data = {"source": "digits", "train_images": 40, "test_images": 20, "validation": 0.2}
    recipe = {
        "backbone": {"name": "wrn_10_1", "in_chans": 1},
        "units": 2,
        "tasks": [{"name": "low", "data": {**data, "classes": "0-4"}}, {"name": "all", "data": data}],
        "epochs": 2,
        "batch_size": 16,
        "threads": 1,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        trained, fresh, cut = (folder / f"{name}.safetensors" for name in ("trained", "fresh", "slice"))

        def dvn(*words: object) -> None:
            app(list(map(str, words)), standalone_mode=False)

        dvn("train", folder / "recipe.yaml", "-o", trained)
        words = ("--units", 2, "--in-chans", 1, "--input-size", 8, "--num-classes", 4)
        dvn("partition", "wrn_10_1", *words, "-o", fresh)
        for path in (trained, fresh):
            network = dvn_cli.load(path)
            with torch.no_grad():
                for tensor in network.file_tensors().values():
                    if tensor.ndim > 1:
                        tensor.copy_((tensor * 8).round() / 8)
            network.save(path)
        dvn("slice", trained, "--task", 2, "--level", 1, "-o", cut)
        logits = {}
        for path in (trained, fresh, cut):
            (target / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
            logits[path.name] = dict(networks(dvn_cli.load(path)))
        (target / "logits.json").write_text(json.dumps(logits, indent=1) + "\n")


if __name__ == "__main__":
    write_losses() if sys.argv[1] == "losses" else write_files(sys.argv[2])
