"""Small images, and accuracy counted on them with numpy."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dvn_cli

MEAN, STD = (0.3,), (0.25,)
COLOURS = ("black", "blue", "grey", "olive", "red", "white")
PICTURES = ("--data", "recipes/pictures")
DIGITS = ("--data", "source=digits", "--data", "classes=0-2", "--data", "test_images=40")
KEYS = [
    "task",
    "name",
    "level",
    "units",
    "params",
    "density",
    "top1",
    "top5",
    "loss",
    "images",
    "file",
    "top1_interval",
]


def picture(label: int, index: int, size: int = 8) -> np.ndarray:
    rng = np.random.default_rng(100 * label + index)
    return np.clip(rng.normal(40 * label, 30, (size, size)), 0, 255).astype(np.uint8)


def write_folder(root: Path, names: tuple[str, ...], images: int = 5, size: int = 8) -> Path:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(images + label):
            Image.fromarray(picture(label, index, size)).save(root / name / f"{index}.png")
    return root


def results(ran: tuple[int, str, str]) -> list[dict]:
    code, out, err = ran
    assert code == 0, err
    return json.loads(out)["results"]


def counted(file: Path, pixels: list[np.ndarray], labels: list[int]) -> tuple[float, float, float]:
    """top-1, top-5 and loss, the long way round."""
    normalised = (np.stack(pixels)[:, None].astype(np.float64) / 255 - MEAN[0]) / STD[0]
    with torch.no_grad():
        out = dvn_cli.load(file)(torch.from_numpy(normalised).float()).double().numpy()
    order = np.argsort(-out, axis=1, kind="stable")
    hits = [list(row).index(label) for row, label in zip(order, labels, strict=True)]
    log_sum = np.log(np.exp(out - out.max(1, keepdims=True)).sum(1)) + out.max(1)
    loss = (log_sum - out[np.arange(len(labels)), labels]).mean()
    return 100 * np.mean([h == 0 for h in hits]), 100 * np.mean([h < 5 for h in hits]), loss


def altered(file: Path, output: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Writes a copy of a checkpoint or a slice with other tensors."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        said = json.loads(opened.metadata()["dvn"])
    del said["checksums"]  # of the other bytes
    change(tensors)
    save_file(tensors, output, {"dvn": json.dumps(said)})
