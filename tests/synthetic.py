"""Small noisy images in place of the data sets of the recipes that come with dvn."""

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from dvn_cli.training import recipes

SIZES = {
    "cifar10": (32, {"label": 10}),
    "cifar100": (32, {"fine_label": 100, "coarse_label": 20}),
    "tiny-imagenet": (64, {"label": 200}),
    "tiny-imagenet-mini": (64, {"label": 200}),
    "imagenette96-mini": (96, {"label": 10}),
    "STL10": (96, {"label": 10}),
    "photos": (32, {"label": 10}),
}
"""Pixels, and columns of classes, of what the recipes learn."""

DataSets = Callable[[str], Path]
"""Returns the folder of parquet files that stands for a data set."""


def data_sets(folder: Path) -> DataSets:
    """Returns what makes, once, a few noisy images of each class of a data set, in a folder below the given one."""

    @functools.cache
    def make(name: str) -> Path:
        size, columns = SIZES[name]
        (folder / name).mkdir()
        rng = np.random.default_rng(0)
        images = []
        for _ in range(max(40, *columns.values())):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "bmp")
            images.append({"bytes": file.getvalue(), "path": None})
        labels = {column: [n % count for n in range(len(images))] for column, count in columns.items()}
        named = {name: {"_type": "ClassLabel", "names": list(map(str, range(n)))} for name, n in columns.items()}
        about = {"huggingface": json.dumps({"info": {"features": {"img": {"_type": "Image"}, **named}}})}
        for split in ("train", "test"):
            table = pa.table({"img": images, **labels}).replace_schema_metadata(about)
            pq.write_table(table, folder / name / f"{split}-00000-of-00001.parquet")
        return folder / name

    return make


def overrides(path: Path, data_sets: DataSets, scale: str = "full") -> list[str]:
    """Returns overrides of a recipe for a narrow backbone, 20 images of each task and two steps an epoch."""
    content = recipes.resolved(yaml.safe_load(path.read_text()), [f"scale={scale}"], str(path))
    found = [f"scale={scale}", "backbone.name=wrn_10_1", "batch_size=8", "epochs=1", "threads=1"]
    if content.get("sequential", {}).get("warmup_epochs"):
        found.append("sequential.warmup_epochs=1")
    if content["backbone"].get("pretrained"):
        found += ["backbone.pretrained=false", "widths=even"]  # random weights say nothing of widths
    for number, task in enumerate(content["tasks"]):
        data = dict(task["data"])
        if data["source"] == "folder":
            data["size"] = None  # that of the stand-ins
        if data["source"] != "digits":
            name = (data.get("path") or data["name"]).rpartition("/")[2]
            data |= {"source": "hf", "name": None, "path": str(data_sets(name)), "label": data.get("label", "label")}
        # 18 of them to learn from
        found.append(f"tasks.{number}.data={json.dumps(data | {'train_images': 20, 'test_images': 10})}")
    return found
