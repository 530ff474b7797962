"""A checkpoint of two units and four channels, small enough to know by heart, and files written without dvn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from hypothesis import strategies as st

from dvn_cli.store.file import ITEM_SIZE, Header, TensorData
from dvn_cli.store.metadata import CheckpointMetadata
from dvn_cli.store.schema import dumps, loads, parse

BACKBONE = {"source": "timm", "name": "tiny", "num_classes": 4, "in_chans": 3, "input_size": [8, 8]}


def task(name: str, order: list[int], levels: list[int], classes: int = 3) -> dict[str, Any]:
    return {
        "name": name,
        "classes": [f"class {i}" for i in range(classes)],
        "input_size": [8, 8],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "order": order,
        "levels": levels,
        "data": None,
    }


def content(**changes: Any) -> dict[str, Any]:
    """Of two units over 4 channels: unit 1 owns 0 and 1, unit 2 owns 3, and 2 belongs to all."""
    return {
        "backbone": BACKBONE,
        "units": 2,
        "axes": [[[[0, 2]], [[3, 4]]]],
        "tensors": {
            "conv.weight": {"axes": [0, None], "owner": "shared", "trainable": True},
            "bn.mean": {"axes": [0], "owner": "network", "trainable": False},
            "fc.weight": {"axes": [None, 0], "owner": "network", "trainable": True},
        },
        "class_axis": [["fc.weight", 0]],
        "tasks": [task("low digits", [1, 2], [1, 2]), task("odd", [2, 1], [1, 2], classes=2)],
        "training": None,
        **changes,
    }


def metadata(**changes: Any) -> CheckpointMetadata:
    return parse(CheckpointMetadata, content(**changes))


def f32(*shape: int, seed: int = 0) -> TensorData:
    return TensorData("F32", shape, np.random.default_rng(seed).standard_normal(shape, np.float32))


def tensors() -> dict[str, TensorData]:
    return {
        "shared/conv.weight": f32(4, 5),
        "shared/bn.mean": f32(4, seed=1),
        "task/2/level/1/bn.mean": f32(2, seed=2),
        "shared/fc.weight": f32(3, 4, seed=3),
        "task/1/fc.weight": f32(3, 4, seed=4),
    }


def array(header: Header, name: str) -> np.ndarray:
    """A tensor as unsigned integers of its item size."""
    stored = header.tensors[name]
    return np.frombuffer(header.read(name, 0, stored.nbytes), f"<u{ITEM_SIZE[stored.dtype]}").reshape(stored.shape)


def said(path: Path) -> dict[str, Any]:
    """The JSON in a file's metadata."""
    with safetensors.safe_open(path, "np") as file:
        return json.loads(file.metadata()["dvn"])


def write_plainly(path: Path, arrays: dict[str, np.ndarray], dvn: Any) -> None:
    """Writes whatever is given, without a checksum; a text is written as it is."""
    text = dvn if isinstance(dvn, str) else json.dumps(dvn)
    safetensors.numpy.save_file(arrays, path, {"dvn": text})


def arrays() -> dict[str, np.ndarray]:
    return {name: tensor.data for name, tensor in tensors().items()}


def as_json(value: Any) -> Any:
    return loads(dumps(value))


# Random checkpoints


@st.composite
def networks(draw: st.DrawFn):
    """A random checkpoint, with the owner of every index of its axes (0: all) and the full arrays for the oracle."""
    units = draw(st.integers(1, 4))
    owners = draw(st.lists(st.lists(st.integers(0, units), min_size=1, max_size=8), min_size=1, max_size=3))
    axes = [[[[i, i + 1] for i, o in enumerate(owner) if o == u] for u in range(1, units + 1)] for owner in owners]
    if draw(st.booleans()):  # the same indices in runs as long as they can be
        axes = [[_joined(runs) for runs in axis] for axis in axes]
    tasks = []
    for number in range(draw(st.integers(1, 3))):
        order = draw(st.permutations(range(1, units + 1)))
        levels = sorted(draw(st.sets(st.integers(1, len(order)), min_size=1)))
        tasks.append(task(f"task {number}", order, levels, draw(st.integers(1, 4))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    listed, stored, class_axis = {}, {}, []
    for number in range(draw(st.integers(1, 4))):
        name, dtype = f"layer.{number}.weight", draw(st.sampled_from(sorted(ITEM_SIZE)))
        dims = draw(st.lists(st.one_of(st.none(), st.integers(0, len(axes) - 1)), max_size=4))
        shape = tuple(draw(st.integers(0, 5)) if axis is None else len(owners[axis]) for axis in dims)
        trainable = dtype[0] in "FC" and draw(st.booleans())
        listed[name] = {"axes": dims, "owner": "shared", "trainable": trainable}
        if None in dims and draw(st.booleans()):
            class_axis.append([name, dims.index(None)])
        for prefix in draw(st.sets(st.sampled_from([f"task/{t + 1}/" for t in range(len(tasks))]))) | {"shared/"}:
            data = rng.integers(0, 256, (*shape, ITEM_SIZE[dtype]), np.uint8)
            stored[prefix + name] = (dtype, data.view(f"u{ITEM_SIZE[dtype]}").reshape(shape))
        if draw(st.booleans()):
            index = indices(owners, dims, shape, name, class_axis, tasks[0], 1)
            narrow = tuple(map(len, index))
            data = rng.integers(0, 256, (*narrow, ITEM_SIZE[dtype]), np.uint8)
            stored[f"task/1/level/1/{name}"] = (dtype, data.view(f"u{ITEM_SIZE[dtype]}").reshape(narrow))
    described = content(units=units, axes=axes, tensors=listed, tasks=tasks, class_axis=class_axis)
    return owners, stored, described


def indices(owners, dims, shape, name, class_axis, entry, level) -> list[list[int]]:
    """What a network has of each dimension of a tensor."""
    units = entry["order"][: entry["levels"][level - 1]]
    return [
        [
            i
            for i in range(size)
            if (axis is None or owners[axis][i] == 0 or owners[axis][i] in units)
            and not ([name, dim] in class_axis and i >= len(entry["classes"]))
        ]
        for dim, (size, axis) in enumerate(zip(shape, dims, strict=True))
    ]


def _joined(runs: list[list[int]]) -> list[list[int]]:
    joined: list[list[int]] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
    return joined
