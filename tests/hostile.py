"""Damaged files of every kind that dvn reads, from a seed: what damages them, and what reads each kind.

`python tests/hostile.py COUNT [KIND ...]` tries so many of each kind, each in a process of its own with limits of time
and memory, every tenth with the whole command, and says what came of them.
"""

import base64
import contextlib
import copy
import functools
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

from dvn_cli import cli
from dvn_cli.errors import DvnError
from dvn_cli.store.file import TensorData, read_header, write

PINNED = Path(__file__).parent / "pins" / "files" / "0.1.0"
SECONDS, BYTES = 60, 2 << 30
"""What a damaged file may take."""

DEEP, HUGE = "@deep@", "@huge@"
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 2**31, 2**63, 10**400, HUGE, 1.5, -1e308, float("nan"), float("inf")),
    *("", "x" * 5000, "a\0b", "\ud800", "../..", "~nobody/x", "1" * 5000, [], {}, [[]], [None], {"": {}}, DEEP),
)


# What damages


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, repeats, overwrites or inserts bytes somewhere, more often near the beginning or the end."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        place = rng.choice((rng.randrange(len(content) + 1), rng.randrange(min(64, len(content)) + 1)))
        place = rng.choice((place, place, max(0, len(content) - place)))
        length = rng.choice((1, 1, 2, 4, 8, 64, 1000))
        kind = rng.randrange(6)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            content[place:place] = content[place : place + length] * rng.choice((1, 10))
        elif kind == 3:
            content[place : place + length] = rng.choice((b"\0", b"\xff", b"\x7f", b"[", b"9")) * length
        elif kind == 4:
            content[place:place] = rng.randbytes(length)
        else:
            del content[place : place + length]
    return bytes(content)


def of_value(value: Any, rng: random.Random) -> Any:
    """Replaces, removes, repeats or renames one value of what JSON or YAML holds."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2))):
        parents = [inner for inner in _walk(value) if isinstance(inner, dict | list) and inner]
        if not parents:
            return copy.deepcopy(rng.choice(VALUES))
        parent = rng.choice(parents)
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        kind = rng.randrange(8)
        if kind < 4:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 4:
            del parent[key]
        elif kind == 5:
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"x": parent[key]}
        elif kind == 6 and isinstance(parent[key], int | float):
            parent[key] = type(parent[key])(parent[key] + rng.choice((-1, 1, 1000)))
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[rng.choice(("x", "", "a.b", "a\0b"))] = copy.deepcopy(parent[key])
    return value


def _walk(value: Any) -> Iterator[Any]:
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _walk(inner)


def as_json(value: Any) -> str:
    return json.dumps(value).replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000).replace(f'"{HUGE}"', "9" * 5000)


def of_json(content: bytes, rng: random.Random) -> bytes:
    return as_json(of_value(json.loads(content), rng)).encode()


def of_header(content: bytes, rng: random.Random) -> bytes:
    """Damages the header of a safetensors file, or the metadata in it."""
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    if "dvn" in header.get("__metadata__", {}) and rng.random() < 0.8:
        header["__metadata__"]["dvn"] = as_json(of_value(json.loads(header["__metadata__"]["dvn"]), rng))
    else:
        header = of_value(header, rng)
    text = as_json(header).encode()
    return len(text).to_bytes(8, "little") + text + content[length:]


def of_graph(content: bytes, rng: random.Random) -> bytes:
    """Damages the graph that a file keeps, with checksums of what has become of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.safetensors"
        path.write_bytes(content)
        header = read_header(path)
        tensors = {
            name: TensorData(stored.dtype, stored.shape, bytes(header.read(name, 0, stored.nbytes)))
            for name, stored in header.tensors.items()
        }
        unpacked = zlib.decompress(base64.b64decode(header.metadata.graph))
        said, _, constants = unpacked.partition(b"\0")
        packed = of_json(said, rng) + b"\0" + constants if rng.random() < 0.9 else of_bytes(unpacked, rng)
        write(path, tensors, replace(header.metadata, graph=base64.b64encode(zlib.compress(packed)).decode()))
        return path.read_bytes()


def of_yaml(content: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
        return b"\n".join([b"a0: &a0 x", *map(str.encode, levels), content.replace(b"5", b"*a9", 1)])
    if kind == 1:
        odd = (
            *("!!python/object:os.system x", "!!binary YQ==", "!!set {a}", "!!timestamp x", "!!int x", "!!float x"),
            *("&a [*a]", "1:" * 9000, "0x" + "f" * 9000, "2024-99-99", "? {a: b}\n: c", "<<: *b", "{<<: 3}"),
        )
        keys = content.decode().splitlines()
        place = rng.randrange(len(keys))
        keys[place] = f"{keys[place].partition(':')[0]}: {rng.choice(odd)}"
        return "\n".join(keys).encode()
    value = of_value(yaml.safe_load(content), rng)
    return as_json(value).encode() if kind == 2 else yaml.safe_dump(json.loads(json.dumps(value))).encode()


def of_weights(content: bytes, rng: random.Random) -> bytes:
    """Damages what torch pickled: values that are no plain tensors, nesting, and how the archive is packed."""
    state = torch.load(io.BytesIO(content))
    name = rng.choice(list(state))
    tensor = state[name]
    real = tensor.float().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    odd: list[Callable[[], Any]] = [
        lambda: tensor.to_sparse() if tensor.ndim else tensor,
        lambda: real.to_sparse_csr(),
        lambda: torch.quantize_per_tensor(real, 0.1, 0, torch.qint8),
        lambda: tensor.to("meta"),
        lambda: torch.nested.nested_tensor([real]),
        lambda: torch.empty(1).expand(10**12),
        lambda: torch.empty(1, 1, 1, 1).expand(10**6, 10**6, 3, 3),
        lambda: torch.full(tensor.shape, float("nan")),
        *(lambda dtype=dtype: torch.zeros(tensor.shape, dtype=dtype) for dtype in (
            torch.complex64, torch.bool, torch.int8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint16,
        )),
        lambda: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor,
        lambda: torch.zeros(0), lambda: [tensor], lambda: {"x": tensor}, lambda: None, lambda: "x", lambda: 3,
    ]  # fmt: skip
    kind = rng.randrange(7)
    if kind < 3:
        state[name] = rng.choice(odd)()
    elif kind == 3:
        state = {rng.choice(("state_dict", "ema", "", "a\0b")): state, "ema": state, 3: state, "x": rng.choice(VALUES)}
    elif kind == 4:
        for _ in range(3000):
            state = {"x": state}
    elif kind == 5:
        state["x"] = state
    else:
        inner: Any = state
        for _ in range(40):
            inner = {"a": inner, "b": inner}
        state = inner
    saved = io.BytesIO()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        torch.save(state, saved, _use_new_zipfile_serialization=rng.random() < 0.7)
    finally:
        sys.setrecursionlimit(limit)
    return saved.getvalue()


def of_table(content: bytes, rng: random.Random) -> bytes:
    """Gives a parquet file columns of other types, other values, far too many rows, or another description."""
    table = pq.read_table(io.BytesIO(content))
    count = len(table)
    columns: list[Callable[[], Any]] = [
        lambda: [None] * count, lambda: [b""] * count, lambda: [b"x" * 10**6] * count, lambda: list(range(count)),
        lambda: [2**63 - 1] * count, lambda: [-(2**63)] * count, lambda: ["\0"] * count, lambda: [1.5] * count,
        lambda: [{"bytes": None, "path": "x"}] * count, lambda: [[1]] * count, lambda: [True] * count,
        lambda: [{"bytes": "x"}] * count, lambda: pa.array(["x"] * count).dictionary_encode(),
        lambda: pa.array([b"\xff"] * count).cast(pa.string(), safe=False),
    ]  # fmt: skip
    kind = rng.randrange(4)
    if kind < 2:
        name = rng.choice(table.schema.names)
        table = table.set_column(table.schema.names.index(name), name, pa.array(rng.choice(columns)()))
    elif kind == 2:
        table = table.take(pa.array([0] * 10**6))
    else:
        features = json.loads(table.schema.metadata[b"huggingface"])
        table = table.replace_schema_metadata({"huggingface": as_json(of_value(features, rng))})
    saved = io.BytesIO()
    pq.write_table(table, saved)
    return saved.getvalue()


def zip_bomb(content: bytes, rng: random.Random) -> bytes:
    """Packs a tensor of an archive of torch's as zeros, far more of them once they are unpacked."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        bomb = rng.choice([name for name in old.namelist() if "/data/" in name])
        for name in old.namelist():
            new.writestr(name, bytes(100 << 20) if name == bomb else old.read(name))
    return out.getvalue()


# What is damaged, and what reads it


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        make: Writes whole ones into a folder.
        damaged: Which of them are damaged, as a pattern.
        damage: How, besides `of_bytes`.
        read: Reads what the folder holds, as a part of a command does.
        words: The command that does.
    """

    make: Callable[[Path], None]
    damaged: str
    damage: tuple[Callable[[bytes, random.Random], bytes], ...]
    read: Callable[[Path], Any]
    words: Callable[[Path], list[Any]]


DATA = {"source": "digits", "train_images": 40, "test_images": 20, "validation": 0.2}
RECIPE = {
    "backbone": {"name": "wrn_10_1", "in_chans": 1},
    "units": 2,
    "tasks": [{"name": "low", "data": {**DATA, "classes": ["0", "1", "2"]}}, {"name": "all", "data": DATA}],
    "levels": [1, 2],
    "epochs": 2,
    "batch_size": 16,
    "optimizer": {"lr": 0.05},
    "schedule": {"name": "step", "milestones": [0.5]},
    "threads": 1,
}


def _unpack(name: str, folder: Path) -> None:
    (folder / name).write_bytes(gzip.decompress((PINNED / f"{name}.gz").read_bytes()))


def _recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))


def _state(folder: Path) -> None:
    from dvn_cli.training import recipes
    from dvn_cli.training.experiment import prepare

    _recipe(folder)
    session = prepare(recipes.read(folder / "recipe.yaml"), folder, folder / "dvn.safetensors", torch.device("cpu"))

    class Stopped(Exception):
        pass

    def stop(_: Any) -> None:
        raise Stopped

    with contextlib.suppress(Stopped):
        session.train(stop, lambda *_: None)


def _module() -> Any:
    from dvn_cli.backbones import resolve

    torch.manual_seed(0)
    spec = resolve("wrn_8_1", num_classes=4, in_chans=1, input_size=(8, 8))
    return spec, spec.build()


def _weights(folder: Path) -> None:
    state = _module()[1].state_dict()
    torch.save(state, folder / "weights.pth")


def _graph(folder: Path) -> None:
    import dvn_cli

    network = dvn_cli.divide("wrn_8_1", units=2, num_classes=4, in_chans=1, input_size=8)
    network.save(folder / "graph.safetensors")


def _safe_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(_module()[1].state_dict(), folder / "weights.safetensors")


def _read_weights(path: Path) -> None:
    from dvn_cli.backbones import load_weights

    spec, module = _module()
    load_weights(module, spec, path)


def _picture(number: int, kind: str = "png", size: int = 6) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert("P" if kind == "gif" else "RGB").save(file, kind)
    return file.getvalue()


def _parquet(folder: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split in ("train", "test"):
        images = [{"bytes": _picture(number), "path": None} for number in range(24)]
        table = pa.table({"image": images, "label": [number % 2 for number in range(24)]})
        pq.write_table(table.replace_schema_metadata(metadata), folder / f"{split}-0.parquet", row_group_size=8)


def _folder(folder: Path) -> None:
    kinds = ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "tga", "ico", "pcx")
    for split in ("train", "test"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for number, kind in enumerate(kinds):
                (folder / split / label / f"{number}.{kind}").write_bytes(_picture(number, kind, 16))


def _images(source: str, folder: Path) -> None:
    from dvn_cli.data import DataSpec, load_task

    load_task(DataSpec(source=source, path=str(folder), size=8))


def _train(source: str, folder: Path) -> list[Any]:
    data = json.dumps({"source": source, "path": str(folder), "size": 8})
    return [
        "train",
        "digits",
        "backbone.name=wrn_10_1",
        "backbone.in_chans=3",
        f"tasks=[{{name: a, data: {data}}}]",
        "epochs=1",
    ]


def _record(folder: Path) -> None:
    result = {
        "name": "a",
        "units": [1],
        "params": 100,
        "density": 0.5,
        "top1": 50.0,
        "top5": 90.0,
        "loss": 1.0,
        "images": 9,
    }
    record = {
        "recipe": {**RECIPE, "scenario": "j1", "scale": "small", "setting": "paper", "method": "dvn", "seed": 0,
                   "tasks": [{"name": name, "data": DATA} for name in ("cifar10", "cifar100")]},
        "versions": {"dvn": "0.1.0"},
        "device": "cpu",
        "stored": 400,
        "epochs": [{"epoch": 1, "stage": 1, "loss": [[1.0, 1.0]] * 2, "validation": [[50.0, 60.0]] * 2}],
        "test": [{**result, "task": task, "level": level} for task in (1, 2) for level in (1, 2)],
    }  # fmt: skip
    (folder / "dvn.run.json").write_text(json.dumps(record))


def _bench(folder: Path) -> list[Any]:
    return ["bench", "--scenario", "j1", folder / "dvn.run.json", "--json"]


def _command(words: list[Any]) -> None:
    cli.app(list(map(str, words)), standalone_mode=False)


def _load(path: Path) -> Any:
    import dvn_cli

    return dvn_cli.load(path)


def _read_recipe(folder: Path) -> None:
    from dvn_cli.training import recipes

    recipes.read(folder / "recipe.yaml")


def _read_state(folder: Path) -> None:
    from dvn_cli.training import state

    state.tensors(state.read(folder / "dvn.state.safetensors"))


def _partition(file: str, folder: Path) -> list[Any]:
    size = ("--num-classes", 4, "--in-chans", 1, "--input-size", 8)
    return ["partition", "wrn_8_1", "--units", 2, *size, "--weights", folder / file, "-o", folder / "p.safetensors"]


KINDS = {
    "checkpoint": Kind(
        functools.partial(_unpack, "trained.safetensors"),
        "trained.safetensors",
        (of_header, of_header),
        lambda folder: _command(["slice", folder / "trained.safetensors", "--all", "-o", folder / "slices", "--json"]),
        lambda folder: ["eval", folder / "trained.safetensors", "--json"],
    ),
    "slice": Kind(
        functools.partial(_unpack, "slice.safetensors"),
        "slice.safetensors",
        (of_header, of_header),
        lambda folder: _load(folder / "slice.safetensors"),
        lambda folder: ["eval", folder / "slice.safetensors", "--data", "source=digits", "--json"],
    ),
    "graph": Kind(
        _graph,
        "graph.safetensors",
        (of_graph,) * 5,
        lambda folder: _load(folder / "graph.safetensors").check(),
        lambda folder: ["slice", folder / "graph.safetensors", "--all", "-o", folder / "slices", "--json"],
    ),
    "state": Kind(
        _state,
        "dvn.state.safetensors",
        (of_header, of_header),
        _read_state,
        lambda folder: ["train", folder / "recipe.yaml", "-o", folder / "dvn.safetensors", "--resume"],
    ),
    "recipe": Kind(
        _recipe,
        "recipe.yaml",
        (of_yaml, of_yaml, of_yaml),
        _read_recipe,
        lambda folder: ["train", folder / "recipe.yaml", "-o", folder / "dvn.safetensors"],
    ),
    "weights": Kind(
        _weights,
        "weights.pth",
        (of_weights, of_weights, of_weights, zip_bomb),
        lambda folder: _read_weights(folder / "weights.pth"),
        functools.partial(_partition, "weights.pth"),
    ),
    "safetensors": Kind(
        _safe_weights,
        "weights.safetensors",
        (of_header,),
        lambda folder: _read_weights(folder / "weights.safetensors"),
        functools.partial(_partition, "weights.safetensors"),
    ),
    "parquet": Kind(
        _parquet, "*.parquet", (of_table,), functools.partial(_images, "hf"), functools.partial(_train, "hf")
    ),
    "images": Kind(_folder, "*/*/*", (), functools.partial(_images, "folder"), functools.partial(_train, "folder")),
    "record": Kind(_record, "dvn.run.json", (of_json,) * 3, lambda folder: _command(_bench(folder)), _bench),
}


def damage(kind: Kind, whole: Path, folder: Path, seed: object) -> Path:
    """Copies whole files and damages one of them, which is returned."""
    rng = random.Random(str(seed))
    shutil.copytree(whole, folder)
    file = rng.choice(sorted(path for path in folder.glob(kind.damaged) if path.is_file()))
    content = rng.choice((of_bytes, *kind.damage))(file.read_bytes(), rng)
    file.write_bytes(content)
    return file


# In processes of their own


class Outcome(NamedTuple):
    """What came of a damaged file: the exit code (70: a traceback, negative: a signal), seconds, bytes, and output."""

    code: int
    seconds: float
    bytes: int
    told: str

    @property
    def is_fault(self) -> bool:
        late = self.seconds > SECONDS or self.bytes > BYTES
        return self.code not in (0, 1, 2) or late or "Traceback" in self.told


def tried(kind: Kind, folder: Path, command: bool) -> Outcome:
    """Reads a folder, or runs the whole command on it, in a forked process with limits."""
    log, start = folder / "log", time.perf_counter()
    child = os.fork()
    if not child:
        code = 70
        try:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))  # for the machine's sake
            signal.alarm(2 * SECONDS)
            if command:
                from dvn_cli.training.loop import Run

                Run.run = lambda *_: sys.exit(0)  # type: ignore[method-assign]  # all is read: it would train now
                sys.argv = ["dvn", *map(str, kind.words(folder))]
                cli.main()
            else:
                kind.read(folder)
                code = 0
        except DvnError as error:
            print(error)
            code = error.exit_code
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    seconds, told = time.perf_counter() - start, log.read_text(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss << 10, told)


def faults(name: str, count: int, root: Path, first: int = 0) -> list[str]:
    """Tries so many damaged files of a kind; prints what came of them, and returns a line for each fault."""
    kind, whole, found = KINDS[name], root / name, []
    codes: Counter[int] = Counter()
    slowest, largest = Outcome(0, 0, 0, ""), Outcome(0, 0, 0, "")
    whole.mkdir()
    kind.make(whole)
    for number in range(first, first + count):
        folder = root / "case"
        damage(kind, whole, folder, f"{name} {number}")
        outcome = tried(kind, folder, command=number % 10 == 0)
        shutil.rmtree(folder)
        codes[outcome.code] += 1
        slowest = max(slowest, outcome, key=lambda one: one.seconds)
        largest = max(largest, outcome, key=lambda one: one.bytes)
        if outcome.is_fault:
            last = outcome.told.strip().splitlines()[-3:]
            found.append(f"{name} {number}: {outcome.code}, {outcome.seconds:.0f} s, {outcome.bytes >> 20} MiB: {last}")
            print(found[-1], flush=True)
    limits = f"{slowest.seconds:.1f} s, {largest.bytes >> 20} MiB at most"
    print(f"{name}: {count} files, exit codes {dict(codes)}, {len(found)} faults, {limits}", flush=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[2:] or KINDS:
            faults(name, int(sys.argv[1]), Path(folder))
