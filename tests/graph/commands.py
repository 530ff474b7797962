"""The panel through the commands that a person types: does each of them work on every backbone?

    python tests/graph/commands.py --jobs 2   run what commands.csv beside this file lacks, and add it

For each model, in a folder of its own: `dvn partition NAME --units 2 --json`, `dvn slice --task 2 --level 1`, both
files opened with `dvn_cli.load`, `dvn train` for one step of two tasks (one with fewer classes than the partition), and
`dvn bench`. Commands run by `dvn_cli.cli.main` within one process for each model, of one thread, forked of one that has
imported torch. Rows are appended as they are done, and models that the table has are not run again.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import panel
import table
import torch
from torch import Tensor

import dvn_cli
from dvn_cli.cli import main as dvn_main
from dvn_cli.errors import DvnError
from dvn_cli.network import DeepVirtualNetwork, VirtualNetwork
from dvn_cli.reference import first_tensor

TABLE = Path(__file__).parent / "commands.csv"
LARGEST = 1.5e9  # parameters: training holds them, their gradients and the file that is written
MEMORY = 14e9  # bytes of one process
TOLERANCE = 1e-4  # of logits in single precision, relative to the greatest
CLASSES = 6  # of the partition; those of the tasks are 4 and 6
STEPS = ("partition", "slice", "load", "train", "bench")

MORE = [
    *(f"torchvision/{name}" for name in ("swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b")),
    *(f"torchvision/regnet_x_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")),
    *(f"torchvision/regnet_y_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf", "128gf")),
    *("torchvision/maxvit_t", "timm/efficientformer_l1", "timm/efficientformer_l3", "timm/efficientformer_l7"),
]
"""Models beside those of panel.txt: larger ones of families that a command once failed on."""

RECIPE = """
partition: dvn.safetensors
tasks:
  - {{name: four, data: {{source: digits, classes: 0-3, size: {size}, {data}}}}}
  - {{name: six, data: {{source: digits, classes: 0-5, size: {size}, {data}}}}}
epochs: 1
batch_size: 6
optimizer: {{lr: 0.0001, momentum: 0, nesterov: false}}
threads: 1
"""
DATA = "train_images: 6, test_images: 6, validation: 0"


@dataclass
class Row:
    """One model.

    Attributes:
        outcome: `passed`, `refused` (exit code 2), `failed`, or `too large` to be tried.
        reason: which command did not do what it should, and the first line of what it said.
        partition, slice, load, train, bench: the exit code of each, `ok` for `load`; empty where it was not run.
        partition_s, ...: seconds.
    """

    name: str
    params: int = 0
    size: int = 0
    outcome: str = "failed"
    reason: str = ""
    partition: str = ""
    slice: str = ""
    load: str = ""
    train: str = ""
    bench: str = ""
    partition_s: float = 0.0
    slice_s: float = 0.0
    load_s: float = 0.0
    train_s: float = 0.0
    bench_s: float = 0.0
    peak_mb: int = 0

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"

    @property
    def seconds(self) -> float:
        """Of all commands."""
        return sum(getattr(self, f"{step}_s") for step in STEPS)


class _FailedError(Exception):
    def __init__(self, code: str, line: str) -> None:
        super().__init__(line)
        self.code = code


def names() -> dict[str, int]:
    """The models and, of those of the panel, their parameters."""
    return dict.fromkeys(MORE, 0) | panel.chosen()


def dvn(*words: object) -> str:
    """Runs a command within this process. Returns its stdout."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", ["dvn", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            dvn_main()
        except SystemExit as end:
            code = end.code or 0
        except Exception as error:
            raise _FailedError("traceback", _place(error)) from error
    if code:
        raise _FailedError(str(code), next((line for line in err.getvalue().splitlines() if line[:4] == "dvn:"), ""))
    return out.getvalue()


def _place(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:150]} ({Path(last.filename).name}:{last.lineno})"


def go_through(name: str, largest: float = LARGEST) -> Row:
    """Runs all commands on a model, in a temporary folder, up to the first that fails."""
    row = Row(name)
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="dvn-commands-") as folder:
        os.chdir(folder)
        try:
            _go_through(row, largest)
        except DvnError as error:  # outside of a command: no size of images does
            row.outcome, row.reason = "refused", f"{error}"
        except Exception as error:
            row.reason = _place(error)
        finally:
            os.chdir(before)
    row.peak_mb = panel.peak()
    return row


def _go_through(row: Row, largest: float) -> None:
    spec = panel.spec_of(row.name)
    row.params, row.size = sum(p.numel() for p in spec.build("meta").parameters()), spec.input_size[0]
    if row.params > largest:
        row.outcome = "too large"
        row.reason = f"{row.params / 1e9:.1f} billion parameters"
        return
    Path("recipe.yaml").write_text(RECIPE.format(size=row.size, data=DATA))
    images = torch.rand(2, 3, *spec.input_size, generator=torch.Generator().manual_seed(0))
    steps: dict[str, Callable[[], None]] = {
        "partition": lambda: _partition(row),
        "slice": lambda: _slice(),
        "load": lambda: _load(images),
        "train": lambda: _train(),
        "bench": lambda: _bench(),
    }
    for step in STEPS:
        start = time.perf_counter()
        try:
            steps[step]()
        except _FailedError as error:
            row.outcome = "refused" if error.code == "2" else "failed"
            if "too little memory" in str(error):  # of those that `MEMORY` leaves a process
                row.outcome = "too large"
            row.reason = f"{step}: {error}"
            setattr(row, step, error.code)
            return
        except Exception as error:
            row.reason = f"{step}: {_place(error)}"
            setattr(row, step, "wrong")
            return
        finally:
            setattr(row, f"{step}_s", round(time.perf_counter() - start, 2))
        setattr(row, step, "ok" if step == "load" else "0")
    row.outcome = "passed"


def _partition(row: Row) -> None:
    words = ("partition", row.name, "--units", 2, "--num-classes", CLASSES, "--input-size", row.size, "--json")
    try:
        document = json.loads(dvn(*words))
    finally:
        left = os.listdir()
    assert [level["level"] for level in document["levels"]] == [1, 2], document["levels"]
    assert all(level["macs"] > 0 for level in document["levels"]), document["levels"]
    assert sorted(left) == ["dvn.safetensors", "recipe.yaml"], left


def _slice() -> None:
    (cut,) = json.loads(dvn("slice", "--task", 2, "--level", 1, "--json"))["slices"]
    assert cut["bytes"] == os.path.getsize(cut["file"]), cut


def _load(images: Tensor) -> None:
    """The slice gives what the checkpoint gives, and the top level what the backbone gives that is built anew."""
    whole, cut = dvn_cli.load("dvn.safetensors"), dvn_cli.load("dvn-task2-level1.safetensors")
    assert isinstance(whole, DeepVirtualNetwork)
    assert isinstance(cut, VirtualNetwork)
    module = whole.partition.spec.build()
    tensors = whole.tensors(1, 2)
    state = module.state_dict()  # some modules read the version that it has beside its tensors
    state.update(tensors)
    state.update({name: tensors[first] for name, first in whole.partition.aliases.items()})
    module.load_state_dict(state)
    with torch.no_grad():
        _same(cut(images), whole(images, 2, 1))
        _same(whole(images, 1, 2), first_tensor(module(images)))


def _same(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape == (2, CLASSES), (a.shape, b.shape)
    difference, greatest = float((a - b).abs().max()), float(b.abs().max())  # which is 0 where a classifier starts so
    assert difference <= TOLERANCE * greatest, (difference, greatest)


def _train() -> None:
    document = json.loads(dvn("train", "recipe.yaml", "--device", "cpu", "-o", "trained.safetensors", "--json"))
    assert len(document["results"]) == 4, document["results"]
    left = {"recipe.yaml", "dvn.safetensors", "dvn-task2-level1.safetensors", "trained.safetensors", "trained.run.json"}
    assert set(os.listdir()) == left, os.listdir()


def _bench() -> None:
    few = ("--num-warm-iter", 1, "--num-bench-iter", 2, "--threads", 1, "--device", "cpu")
    document = json.loads(dvn("bench", "--task", 1, *few, "--json"))
    assert [result["level"] for result in document["results"]] == [1, 2], document["results"]


def _limited(name: str, largest: float) -> Row:
    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(MEMORY), int(MEMORY)))
    return go_through(name, largest)


def run(models: Sequence[str], jobs: int, limit: float, largest: float = LARGEST) -> Iterator[Row]:
    """Yields a row for each model, as they are done; for the arguments see `main`."""
    for name, row in panel.in_processes(models, _limited, (largest,), jobs, limit):
        yield Row(name, reason=row) if isinstance(row, str) else row


def summary(rows: Sequence[Row]) -> str:
    counts = Counter(row.outcome for row in rows)
    passed = [row for row in rows if row.passed]
    lines = [f"{len(rows)} models: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())]
    for step in STEPS:
        seconds = sorted(getattr(row, f"{step}_s") for row in passed)
        if seconds:
            lines.append(f"{step}: median {seconds[len(seconds) // 2]:.1f} s, worst {seconds[-1]:.1f} s")
    lines += [f"{row.outcome} {row.name}: {row.reason}" for row in rows if not row.passed]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models; by default all of panel.txt and some more")
    parser.add_argument("--again", action="store_true", help="run them again, the table has them or not")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one model")
    parser.add_argument("--largest", type=float, default=LARGEST, help="parameters of the largest model to try")
    parser.add_argument("-o", "--output", type=Path, default=TABLE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = names()
    asked = args.names or sorted(sizes, key=lambda name: -sizes[name])
    rows = {row.name: row for row in table.read(args.output, Row) if not (args.again and row.name in asked)}
    table.write(args.output, list(rows.values()))
    for row in run([name for name in asked if name not in rows], args.jobs, args.limit, args.largest):
        table.append(args.output, [row])
        print(row.outcome, row.name, row.reason, f"{row.seconds:.0f} s", file=sys.stderr, flush=True)
    done = sorted(table.read(args.output, Row), key=lambda row: row.name)
    table.write(args.output, done)
    print(summary(done))


if __name__ == "__main__":
    main()
