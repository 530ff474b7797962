"""Which elements of which tensors each method trains in each stage, to the bit; described by units, not by its code."""

import fnmatch
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import small
import torch
from torch import Tensor

from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.training.loop import Run

STATISTICS = ("*.running_mean", "*.running_var", "*.num_batches_tracked")


class Place(NamedTuple):
    """Of an element: whose it is, what it is of, and the units whose channels it connects."""

    task: int  # 0: shared
    level: int  # 0: of the task, or shared
    statistic: bool
    units: frozenset[int]


Moved = Callable[[Place], bool]


def places(network: DeepVirtualNetwork, name: str) -> tuple[Tensor, dict[int, Place]]:
    """The place of each element of a tensor, as a key, by what the file says of its axes."""
    parts = name.split("/")
    task, level = int(parts[1]) if parts[0] == "task" else 0, int(parts[3]) if "level" in parts else 0
    statistic = any(fnmatch.fnmatch(name, pattern) for pattern in STATISTICS)
    metadata, shape = network.partition.metadata(), network.file_tensors()[name].shape
    keys = torch.zeros(shape, dtype=torch.long)
    for dim, axis in enumerate(metadata.tensors[parts[-1]].axes if not level else ()):
        along = torch.zeros(shape[dim], dtype=torch.long)
        for unit, runs in enumerate(metadata.axes[axis] if axis is not None else (), 1):
            for start, stop in runs:
                along[start:stop] = 1 << unit
        keys |= along.view(-1, *(1,) * (len(shape) - dim - 1))
    units = {key: frozenset(u for u in range(1, 9) if key >> u & 1) for key in keys.unique().tolist()}
    return keys, {key: Place(task, level, statistic, of) for key, of in units.items()}


def stages(run: Run) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """All tensors before the first step of each stage and after its last."""
    before: list[dict[str, Tensor]] = []
    after: list[dict[str, Tensor]] = []
    ends = list(itertools.accumulate(stage.epochs for stage in run.stages))

    def begins(*_: object) -> None:
        if len(before) == run.stages.index(run.stage):
            before.append(small.copied(run.network))

    def epoch(run: Run) -> None:
        if run.epochs_done in ends:
            after.append(small.copied(run.network))

    run.network.register_forward_pre_hook(begins)
    run.run(epoch, small.nothing)
    return list(zip(before, after, strict=True))


def everything(_: Place) -> bool:
    return True


def all_but_statistics_of(*networks: tuple[int, int]) -> Moved:
    return lambda e: not (e.statistic and (e.task, e.level) in networks)


ONE, TWO = frozenset({1}), frozenset({2})
SEQUENTIAL = "learning=sequential"
CASES: dict[str, tuple[list[str], list[Moved]]] = {
    # At the lowest levels alone, nobody uses what connects the two units.
    "jointly": (["levels=[1]"], [lambda e: e.units <= {e.task} if e.task else len(e.units) == 1]),
    "baseline": (["method=baseline"], [everything]),
    "nestednet": (["method=nestednet"], [lambda e: e.task != 1 or e.units <= ONE]),
    "nestednet one by one": (
        ["method=nestednet", SEQUENTIAL],
        [
            lambda e: e.task in (0, 1) and e.units <= ONE,
            lambda e: e.task != 1 or (e.units <= ONE and not e.statistic),
        ],
    ),
    "packnet": (
        ["method=packnet", "sequential.warmup_epochs=1"],
        [
            lambda e: e.task in (0, 1) and e.units <= ONE,
            lambda e: e.task == 2 or (e.task == 0 and 2 in e.units),
        ],
    ),
    "feature_extraction": (["method=feature_extraction"], [lambda e: e.task != 2, lambda e: e.task == 2]),
    "da_cnn": (["method=da_cnn"], [lambda e: e.task != 2, lambda e: e.task == 2]),
    "lwf": (
        ["method=lwf", "sequential.warmup_epochs=1"],
        [lambda e: e.task != 2, lambda e: e.task == 2, all_but_statistics_of((1, 1))],
    ),
    "one by one": ([SEQUENTIAL], [lambda e: e.task != 2, all_but_statistics_of((1, 1), (1, 2))]),
    "growing": (
        [SEQUENTIAL, "sequential={old: distilled, grow: true, warmup_epochs: 1}"],
        [
            lambda e: e.task in (0, 1) and e.level != 2 and e.units <= ONE,
            lambda e: e.task == 2 or (e.task, e.level) == (1, 2) or 2 in e.units,
            all_but_statistics_of((1, 1)),
        ],
    ),
    "growing beside the old": (
        [SEQUENTIAL, "sequential={grow: true, warmup_epochs: 1}"],
        [lambda e: e.task in (0, 1) and e.units <= ONE, lambda e: e.task == 2 or (e.task == 0 and 2 in e.units)],
    ),
}
OPTIMIZERS = {
    "sgd": "{lr: 0.02, momentum: 0.9, weight_decay: 0.1}",
    "adamw": "{name: adamw, lr: 0.002, momentum: 0.9, weight_decay: 0.1}",
}


def check(run: Run, moved: list[Moved]) -> None:
    """Every element, whether it moved in each stage or not; and that a stage begins where the last one ended."""
    seen = stages(run)
    network = run.network
    assert len(seen) == len(moved) == len(run.stages)
    for number, ((before, after), rule) in enumerate(zip(seen, moved, strict=True), 1):
        for name, tensor in before.items():
            keys, of = places(network, name)
            expected = torch.zeros(tensor.shape, dtype=torch.bool)
            for key, place in of.items():
                expected |= (keys == key) & rule(place)
            changed = tensor != after[name]
            assert not (changed & ~expected).any(), f"{name} changes in stage {number}"
            # Of many elements one may have come back to where it was.
            assert (expected & ~changed).sum() <= expected.sum() / 1000, f"{name} stays in stage {number}"
    for (_, ended), (begun, _), stage in zip(seen[:-1], seen[1:], run.stages[1:], strict=True):
        known = {f"task/{task}/level/{level}/" for task, level in stage.before} | {"shared/"}
        known |= {f"task/{task}/conv1" for task, _ in stage.before}
        for name in ended:
            assert torch.equal(ended[name], begun[name]) or not name.startswith(tuple(known)), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_trained(tmp_path: Path, case: str, optimizer: str) -> None:
    """With momentum and weight decay, which move what is merely without gradient."""
    overrides, moved = CASES[case]
    check(small.session(tmp_path, *overrides, f"optimizer={OPTIMIZERS[optimizer]}").run, moved)


def test_three_tasks_that_grow(tmp_path: Path) -> None:
    """What the first has learnt is not forgotten for what the second did when the third brings both of them a level."""
    three = [{"name": name, "data": small.data()} for name in ("one", "two", "three")]
    overrides = [
        "units=3",
        "epochs=1",
        SEQUENTIAL,
        "sequential={old: distilled, grow: true}",
        f"optimizer={OPTIMIZERS['sgd']}",
    ]
    run = small.session(tmp_path, *overrides, tasks=three).run
    check(
        run,
        [
            lambda e: e.task in (0, 1) and e.level < 2 and e.units <= ONE,
            lambda e: e.task < 3 and e.level < 3 and e.units <= ONE | TWO and not (e.statistic and e[:2] == (1, 1)),
            all_but_statistics_of((1, 1), (1, 2), (2, 1), (2, 2)),
        ],
    )


def test_what_a_new_task_begins_with(tmp_path: Path) -> None:
    """The stem of the one before, the norms of the last network of the same units, and a classifier of its own."""
    run = small.session(tmp_path, SEQUENTIAL).run
    fresh = small.copied(run.network)
    _, (begun, _) = stages(run)
    assert torch.equal(begun["task/2/conv1.weight"], begun["task/1/conv1.weight"])
    for name in run.network.partition.shapes:
        if "bn" in name:
            of_both = begun[f"task/2/level/2/{name}"]
            assert torch.equal(of_both, begun[f"task/1/level/2/{name}"]), name
            assert not torch.equal(of_both, fresh[f"task/1/level/2/{name}"]), name
            assert torch.equal(begun[f"task/2/level/1/{name}"], fresh[f"task/2/level/1/{name}"]), "of unit 2 alone"
        elif name.startswith("fc."):
            for level in (1, 2):
                assert torch.equal(begun[f"task/2/level/{level}/{name}"], fresh[f"task/2/level/{level}/{name}"])


def test_norms_without_running_statistics(tmp_path: Path) -> None:
    """They are shared, and frozen with the units that they are of; and so is what no unit owns."""
    words = ["method=packnet", "backbone={name: test_vit, in_chans: 1}", "tasks.*.data.size=32"]
    run = small.session(tmp_path, *words, f"optimizer={OPTIMIZERS['adamw']}").run
    assert any("norm" in name for name in run.network.file_tensors() if name.startswith("shared/"))
    check(run, CASES["packnet"][1])


@pytest.mark.parametrize("method", ["da_cnn", "lwf"])
def test_what_a_network_owns_is_in_the_backbones_order(tmp_path: Path, method: str) -> None:
    """The same in every process: by their places an optimizer knows its parameters when a run is resumed."""
    network = small.session(tmp_path, f"method={method}", "epochs=1").run.network
    for task, level in network:
        start = f"task/{task}/level/{level}/"
        names = [name.removeprefix(start) for name in network.file_tensors() if name.startswith(start)]
        assert names == [name for name in network.partition.shapes if name in names]
