"""Plans, a level for each task, against every choice there is."""

import gzip
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import dvn_cli
from dvn_cli import planning
from dvn_cli.budget import known_levels
from dvn_cli.cli import app
from dvn_cli.errors import DvnError, InputError
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.planning import Holdings, best_levels, holdings
from dvn_cli.store.file import ITEM_SIZE, read_checkpoint
from dvn_cli.store.shapes import source
from dvn_cli.units.order import paper_order

pytest.importorskip("scipy")

TRAINED = Path(__file__).parent / "pins/files/0.1.0/trained.safetensors.gz"


@pytest.fixture(autouse=True)
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trained checkpoint of two tasks with two levels in the working directory, and its networks' accuracies."""
    monkeypatch.chdir(tmp_path)
    path = Path("dvn.safetensors")
    path.write_bytes(gzip.decompress(TRAINED.read_bytes()))
    recorded([[50.0, 90.0], [60.0, 80.0]])
    return path


def recorded(accuracies: list[list[float]]) -> None:
    header = read_checkpoint("dvn.safetensors")
    rows = [
        {"task": task, "name": header.metadata.tasks[task - 1].name, "level": level, "top1": accuracy}
        | {"top1_interval": [accuracy - 1, accuracy + 1]}
        | {"params": known_levels(header, task)[level - 1].params}
        for task, own in enumerate(accuracies, 1)
        for level, accuracy in enumerate(own, 1)
    ]
    Path("eval.json").write_text(json.dumps({"results": rows}))


def run(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["slice", "--plan", "--results", "eval.json", *words, "--json"])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def together(levels: tuple[int, ...]) -> int:
    """The bytes of one network of each task, found element by element."""
    header = read_checkpoint("dvn.safetensors")
    metadata, held = header.metadata, dict[str, np.ndarray]()
    for (number, task), level in zip(enumerate(metadata.tasks, 1), levels, strict=True):
        for name in metadata.tensors:
            file_name = source(header.tensors, name, number, level + 1)
            stored = header.tensors[file_name]
            mask = held.setdefault(file_name, np.zeros(stored.shape, dtype=bool))
            if "/level/" in file_name or not stored.shape:
                mask[...] = True
                continue
            runs = metadata.assignment.runs(name, stored.shape, task.units(level + 1), len(task.classes))
            mask[np.ix_(*[np.r_[tuple(slice(*run) for run in along)].astype(int) for along in runs])] = True
    return sum(int(mask.sum()) * ITEM_SIZE[header.tensors[name].dtype] for name, mask in held.items())


def test_what_networks_hold_is_counted_once() -> None:
    held = holdings(read_checkpoint("dvn.safetensors"))
    sizes = {levels: held.together(levels) for levels in itertools.product(range(2), repeat=2)}
    assert sizes == {levels: together(levels) for levels in sizes}
    assert len(set(sizes.values())) >= 3


def test_a_shared_classifier_counts_by_its_classes() -> None:
    network = dvn_cli.divide("wrn_10_1", units=2, num_classes=5, in_chans=1, input_size=8)
    tasks = [replace(task, classes=task.classes[:count]) for task, count in zip(network.tasks, (5, 3), strict=True)]
    DeepVirtualNetwork(network.partition, tasks, network.file_tensors()).save("dvn.safetensors")
    test_what_networks_hold_is_counted_once()


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[dict[int, float]], Holdings, int]:
    tasks, levels, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 8))
    size, most = st.integers(0, 1000), st.integers(0, levels)
    held = Holdings(
        np.array([draw(size) for _ in range(blocks)]),
        np.array([[draw(most) for _ in range(tasks)] for _ in range(blocks)]),
        [np.cumsum([draw(st.integers(0, 50)) for _ in range(levels)]) for _ in range(tasks)],
    )
    values = [
        draw(st.dictionaries(st.integers(0, levels - 1), st.integers(0, 1000).map(lambda n: n / 10), min_size=1))
        for _ in range(tasks)
    ]
    sizes = [held.together(each) for each in itertools.product(*values)]
    return values, held, draw(st.integers(max(min(sizes), 1), max(*sizes, 1, 2)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_no_choice_is_better(problem: tuple[list[dict[int, float]], Holdings, int]) -> None:
    values, held, budget = problem
    chosen = best_levels(values, held, budget)

    def rank(levels: tuple[int, ...]) -> tuple[float, int]:
        return round(sum(own[level] for own, level in zip(values, levels, strict=True)), 4), -held.together(levels)

    fitting = [levels for levels in itertools.product(*values) if held.together(levels) <= budget]
    assert held.together(chosen) <= budget
    assert rank(tuple(chosen)) == max(map(rank, fitting))


def of_paper(units: int, seed: int) -> tuple[list[dict[int, float]], Holdings]:
    """As many tasks as units, in the paper's order, with random widths and accuracies."""
    draw = np.random.default_rng(seed)
    width = draw.integers(1, 20, (units, 5))
    pairs = list(itertools.combinations_with_replacement(range(units), 2))
    sizes = np.array([36 * (1 + (a != b)) * int(width[a] @ width[b]) for a, b in pairs])
    orders = [paper_order(task, units) for task in range(1, units + 1)]
    first = np.array([[max(order.index(a + 1), order.index(b + 1)) for order in orders] for a, b in pairs])
    curve = [60 + 35 * (1 - np.exp(-np.arange(units) / draw.uniform(1, 6))) for _ in orders]
    values = [dict(enumerate(np.round(each + draw.normal(0, 0.5, units), 1).tolist())) for each in curve]
    return values, Holdings(sizes, first, [200 * np.arange(1, units + 1) for _ in orders])


def test_sixteen_tasks_of_sixteen_levels() -> None:
    values, held = of_paper(16, 0)
    budget = held.together([15] * 16) // 5
    chosen = best_levels(values, held, budget)
    value = sum(own[level] for own, level in zip(values, chosen, strict=True))
    assert held.together(chosen) <= budget
    for task, level in itertools.product(range(16), range(16)):  # none of the neighbours is better
        other = [level if place == task else own for place, own in enumerate(chosen)]
        gain = values[task][level] - values[task][chosen[task]]
        assert held.together(other) > budget or gain <= 1e-6
    smaller = best_levels(values, held, held.together(chosen) - 1)
    assert sum(own[level] for own, level in zip(values, smaller, strict=True)) < value


def test_a_budget_is_kept_to_the_byte() -> None:
    held = Holdings(np.array([10**12, 10**9 + 1]), np.array([[0], [1]]), [np.array([0, 0])])
    assert best_levels([{0: 1.0, 1: 2.0}], held, 10**12 + 10**9) == [0]
    assert best_levels([{0: 1.0, 1: 2.0}], held, 10**12 + 10**9 + 1) == [1]


def test_of_equally_accurate_plans_the_smaller_one_is_taken() -> None:
    for cheap in range(3):
        own = [np.array([0, 50 if task == cheap else 100]) for task in range(3)]
        held = Holdings(np.array([1000]), np.array([[0, 0, 0]]), own)
        chosen = best_levels([{0: 50.0, 1: 60.0}] * 3, held, 1120)
        assert chosen == [int(task == cheap) for task in range(3)]


def test_the_plan_is_printed_and_with_an_output_written() -> None:
    sizes = {levels: together(levels) for levels in itertools.product(range(2), repeat=2)}
    document = run("--budget", str(sizes[1, 0]))
    assert document["plan"]["budget_bytes"] == sizes[1, 0]
    assert [(each["task"], each["level"], each["accuracy"]) for each in document["plan"]["levels"]] == [
        (1, 2, 90),
        (2, 1, 60),
    ]
    assert (document["plan"]["bytes"], document["plan"]["accuracy"]) == (sizes[1, 0], 75)
    assert document["slices"] == []
    assert sorted(path.name for path in Path().iterdir()) == ["dvn.safetensors", "eval.json"]
    name = read_checkpoint("dvn.safetensors").metadata.tasks[1].name
    document = run("--budget", str(max(sizes[1, 0], sizes[0, 1])), "--weights", f"{name}=3.5", "-o", "plan")
    assert [each["level"] for each in document["plan"]["levels"]] == [1, 2]
    assert math.isclose(document["plan"]["accuracy"], (50 + 3.5 * 80) / 4.5)
    assert [Path(cut["file"]).name for cut in document["slices"]] == [
        "dvn-task1-level1.safetensors",
        "dvn-task2-level2.safetensors",
    ]
    manifest = json.loads(Path("plan/manifest.json").read_text())
    assert [(cut["task"], cut["level"], cut["top1"]) for cut in manifest["slices"]] == [(1, 1, 50), (2, 2, 80)]
    shown = CliRunner().invoke(app, ["slice", "--plan", "--budget", "1MB", "--results", "eval.json"]).stdout
    assert "nothing is written" in shown
    told = CliRunner().invoke(app, ["slice", "--plan", "--budget", "1MB", "--results", "eval.json", "--dtype", "bf16"])
    assert told.stderr == "the plan counts what networks weigh in fp32: files in bf16 are smaller\n"
    assert "85.0 %" in shown
    assert "90.0 % (89.0-91.0)" in shown


def test_what_no_plan_meets_is_said() -> None:
    least = together((0, 0))
    with pytest.raises(DvnError, match=rf"the lowest levels of all tasks hold .* \({least:,} bytes\)") as error:
        run("--budget", str(least - 1))
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--plan needs --budget"),
        (["--budget", "much"], "--budget is an amount such as 2MB, not 'much'"),
        (["--budget", "1MB", "--task", "1"], "a plan chooses a level for each task: leave out --task"),
        (["--budget", "1MB", "--max-bytes", "1MB"], "a plan chooses a level for each task"),
        (["--budget", "1MB", "--weights", "1"], "--weights is TASK=WEIGHT, such as 1=2, not '1'"),
        (["--budget", "1MB", "--weights", "1=-1"], "the weight of a task is above 0, not -1"),
        (["--budget", "1MB", "--weights", "none=1"], "no task 'none'"),
    ],
)
def test_what_cannot_be_planned_is_said(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(*words)


def test_accuracies_of_all_tasks_are_needed() -> None:
    recorded([[50.0, 90.0]])
    with pytest.raises(InputError, match=r"no accuracy of task '.*' is recorded: give --results FILE of `dvn eval"):
        run("--budget", "1MB")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"a plan needs scipy, not installed here: pip install 'dvn\[plan\]'"):
        run("--budget", "1MB")
