"""Networks of many kinds in every format, each file run in an environment of its own: what its logits are.

    python tests/formats/panel.py -o FILE.csv --python onnx=/path/to/python --formats pt2 onnx

Without `--python` this one's interpreter runs the files, from which dvn, timm and torch are hidden where a runtime does
not need them. Norms are not trivial, their statistics those of random images; two tasks, of 9 classes and of 5, the
second of which has images of half the pixels a side where the stem takes them.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dvn_cli
from dvn_cli.errors import DvnError, InputError
from dvn_cli.export import Form
from dvn_cli.formats import FORMATS, NotExpressible
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.tasks import default_tasks

MODELS = {
    **{"test_resnet": 64, "test_convnext": 64, "torchvision/shufflenet_v2_x0_5": 64, "densenet121": 64},
    **{"mobilenetv3_small_050": 64, "test_efficientnet": 32, "ghostnet_050": 64, "regnety_002": 64},
    **{"test_vit": 160, "levit_128s": 224, "mobilevit_xxs": 64, "efficientvit_b0": 64},
}
"""Architectures, and the sizes of their images: plain CNNs, mobile ones, attention, and hybrids of the two."""

UNITS = 3


def checkpoint(name: str, path: Path) -> None:
    """Writes a partition whose norms have the statistics of random images."""
    torch.manual_seed(0)
    network = dvn_cli.divide(name, units=UNITS, num_classes=9, input_size=MODELS[name])
    size = MODELS[name] // 2
    try:
        network.partition.check_images((size, size))
    except InputError:  # its stem has no stride for these
        size = MODELS[name]
    tasks = default_tasks(UNITS, 9, (MODELS[name],) * 2, (0.5,) * 3, (0.25,) * 3)[:1]
    tasks.append(default_tasks(UNITS, 5, (size, size), (0.5,) * 3, (0.25,) * 3)[1])
    network = DeepVirtualNetwork(network.partition, tasks, network.file_tensors())
    network.make_private()
    with torch.no_grad():
        for tensor_name, parameter in network.named_parameters():
            if parameter.ndim == 1:  # norms' weights of zero would hide what their branches do
                parameter.uniform_(0.5, 1.5) if "weight" in tensor_name else parameter.normal_(0, 0.1)
        for task, level in network:
            network(torch.randn(8, 3, *tasks[task - 1].input_size), task, level, training=True)
    network.save(path)


def rows(name: str, formats: list[str], pythons: dict[str, str]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        checkpoint(name, Path(place) / "dvn.safetensors")
        levels = range(1, UNITS + 1)
        folders = {level: Path(place) / str(level) for level in levels}
        expected = {level: logits(Path(place) / "dvn.safetensors", level, folders[level]) for level in levels}
        for each in formats:
            files, table = [], {}
            for level, (pixels, _) in expected.items():
                table[level] = {"model": name, "pixels": pixels, "level": level, "format": each}
                file = folders[level] / f"network{FORMATS[each].ending}"
                try:
                    cut = dvn_cli.slice(Path(place) / "dvn.safetensors", 1 + level % 2, level, file, form=Form(each))
                except DvnError as error:
                    result = "none" if isinstance(error, NotExpressible) else "failed"
                    table[level] |= {"result": result, "note": str(error)}
                else:
                    files.append(cut.file)
                    table[level] |= {"result": "failed", "bytes": cut.bytes}
            command = [pythons.get(each, sys.executable), Path(__file__).with_name("run_file.py"), each, *files]
            done = subprocess.run(command, capture_output=True, text=True)  # all levels, as most of it is imports
            for file in files:
                row, there = table[int(file.parent.name)], file.with_name("logits.npy")
                if not there.exists():
                    row["note"] = done.stderr.strip().splitlines()[-1]
                    continue
                found, right = np.load(there), expected[row["level"]][1]
                there.unlink()
                row["difference"] = float(np.abs(found - right).max() / np.abs(right).max())
                same = bool((found.argmax(1) == right.argmax(1)).all())
                row["result"] = "right" if row["difference"] <= 1e-4 and same else "wrong"
            yield from table.values()


def logits(checkpoint: Path, level: int, folder: Path) -> tuple[int, np.ndarray]:
    """Writes images to a folder; returns how many pixels they have a side, and what the slice of the level gives."""
    folder.mkdir()
    network = dvn_cli.load(dvn_cli.slice(checkpoint, 1 + level % 2, level, folder / "slice.safetensors").file)
    images = np.random.default_rng(0).standard_normal((3, 3, *network.task.input_size)).astype(np.float32)
    np.save(folder / "images.npy", images)
    with torch.no_grad():
        return images.shape[-1], network(torch.from_numpy(images)).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=[n for n, f in FORMATS.items() if not f.missing][1:])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--python", action="append", default=[], metavar="FORMAT=INTERPRETER")
    given = parser.parse_args()
    columns = ["model", "pixels", "level", "format", "result", "difference", "bytes", "note"]
    with open(given.output, "w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        for name in given.models:
            for row in rows(name, given.formats, dict(each.split("=", 1) for each in given.python)):
                table.writerow(row)
                file.flush()


if __name__ == "__main__":
    main()
