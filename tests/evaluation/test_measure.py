"""`dvn eval` as it is typed, against accuracy counted here with numpy on the logits of what `dvn_cli.load` gives."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import DIGITS, KEYS, PICTURES, counted, picture, results
from torch import nn

import dvn_cli
from dvn_cli.data import Split
from dvn_cli.evaluation.measure import evaluate_all, measure
from dvn_cli.evaluation.rendering import accuracy_table
from dvn_cli.store.metadata import Task


def test_all_networks_of_a_checkpoint_against_counting(dvn, made):
    rows = results(dvn("--json"))
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [(row["task"], row["name"], row["level"], row["units"]) for row in rows] == [
        (1, "colours", 1, [1]),
        (1, "colours", 2, [1, 2]),
        (2, "digits", 1, [2]),
        (2, "digits", 2, [1, 2]),
    ]
    labels = [label for label in range(6) for _ in range(5 + label)]
    pixels = [picture(label, index) for label in range(6) for index in range(5 + label)]
    for row in rows[:2]:
        top1, top5, loss = counted(made / f"s1{row['level']}.safetensors", pixels, labels)
        assert (row["top1"], row["top5"]) == (pytest.approx(top1), pytest.approx(top5))
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["images"] == 45
        assert row["file"] == "dvn.safetensors"
    assert rows[0]["top1"] != rows[1]["top1"]
    assert [(row["top5"], row["images"]) for row in rows[2:]] == [(None, 40)] * 2
    params = [sum(p.numel() for p in dvn_cli.load(made / f"s1{level}.safetensors").parameters()) for level in (1, 2)]
    assert [row["params"] for row in rows[:2]] == params
    assert [row["density"] for row in rows[:2]] == [params[0] / params[1], 1.0]


def test_slices_give_what_their_checkpoint_gives(dvn):
    whole = results(dvn("--json"))
    cut = results(dvn("--json", "s11.safetensors", "s12.safetensors", *PICTURES))
    cut += results(dvn("--json", "s21.safetensors", "s22.safetensors", *DIGITS))
    for one, other in zip(whole, cut, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-6)
        assert {k: v for k, v in one.items() if k not in ("file", "loss")} == {
            k: v for k, v in other.items() if k not in ("file", "loss")
        }
    assert [row["file"] for row in cut] == ["s11.safetensors", "s12.safetensors", "s21.safetensors", "s22.safetensors"]


def test_batch_size_and_number_of_workers_change_nothing(dvn):
    streamed = ("--data", "recipes/pictures", "--data", "load=stream", "--task", "1", "--batch-size", "4", "--data")
    ways = [("--batch-size", size) for size in ("256", "1", "7")]
    ways += [(*streamed, f"workers={workers}") for workers in (0, 2)]
    whole, *parts = (results(dvn("--json", *options)) for options in ways)
    for rows in parts:
        for one, other in zip(whole[: len(rows)], rows, strict=True):
            assert (one["top1"], one["top5"], one["images"]) == (other["top1"], other["top5"], other["images"])
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)


@settings(deadline=None)
@given(st.data())
def test_any_logits_are_counted_exactly(data):
    """Ties go to the first class, logits that are not finite are wrong, whatever the batches are."""
    count, classes = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 8))
    values = st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0, math.nan, math.inf, -math.inf])
    rows = data.draw(st.lists(st.lists(values, min_size=classes, max_size=classes), min_size=count, max_size=count))
    out, labels = np.array(rows), data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    order = np.argsort(-out, axis=1, kind="stable").tolist()
    ranks = [
        order[i].index(label) if np.isfinite(out[i]).all() else classes for i, label in enumerate(labels)
    ]  # fmt: skip
    # An image whose pixel is its number, so that the network can look its logits up.
    split = Split(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels))
    task = Task("t", tuple(map(str, range(classes))), (1, 1), (0.0,), (1.0,), (1,), (1,))

    def network(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(out)[(images.flatten() * 255).round().long()]

    seen: list[int] = []
    batch_size = data.draw(st.integers(1, 13))
    result = measure(network, split, task, batch_size=batch_size, progress=seen.append)
    assert (sum(seen), max(seen)) == (count, min(count, batch_size))
    assert result.images == count
    assert result.top1 == 100 * sum(r < 1 for r in ranks) / count
    assert result.top5 == (100 * sum(r < 5 for r in ranks) / count if classes > 5 else None)
    assert math.isfinite(result.loss) == bool(np.isfinite(out).all())


def test_a_network_in_train_mode_is_refused():
    split = Split(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="eval mode"):
        measure(nn.Flatten().train(), split, Task("t", ("a", "b"), (1, 1), (0.0,), (1.0,), (1,), (1,)))


def test_evaluating_all_leaves_the_mode_and_takes_the_tasks_that_have_images(made):
    network = dvn_cli.load(made / "dvn.safetensors").train()
    before = {name: tensor.clone() for name, tensor in network.file_tensors().items()}
    split = Split(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2]))
    rows = evaluate_all(network, {2: split})
    assert network.training
    assert [(row.task, row.level, row.images) for row in rows] == [(2, 1, 3), (2, 2, 3)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.file_tensors().items())
    table = accuracy_table(rows)
    assert [column.header for column in table.columns] == ["top-1 in %, 95 % CI", "level 1", "level 2", "images"]
    assert table.row_count == 1
