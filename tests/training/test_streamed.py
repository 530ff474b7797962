"""Runs whose images are read by worker processes: the same losses as from memory, resumed or not, damaged or not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small
import torch
from PIL import Image

from dvn_cli.data import Pool, Split, memory, pool, task
from dvn_cli.errors import InputError
from dvn_cli.evaluation.measure import evaluate

STREAMED = ["tasks.*.data.load=stream", "tasks.*.data.workers=1"]
CROPPED = [
    "save_every.steps=1",
    "tasks.*.data.size=8",
    "tasks.*.data.augment=resized-crop",
    "tasks.*.data.mixup=0.2",
    *STREAMED,
]


def test_a_streamed_run_has_the_losses_of_one_in_memory(tmp_path: Path) -> None:
    kept = small.trained(tmp_path, "inplace_distillation=true").run
    streamed = small.trained(tmp_path, "inplace_distillation=true", *STREAMED).run
    assert all(isinstance(data.test.pool, Pool) for data in streamed.data.values())
    assert small.history(streamed) == small.history(kept)


def test_a_run_goes_on_where_less_memory_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images, kept in memory so far, are streamed, and nothing that is computed is another for it."""
    whole = small.trained(tmp_path).run
    with pytest.raises(small.Stopped):
        small.session(tmp_path, force=True).train(*small.stop_after(1, 1))
    monkeypatch.setattr(task, "ESTIMATED_ON", 9)
    monkeypatch.setattr(pool, "memory", SimpleNamespace(available=lambda: 6000, in_words=memory.in_words))
    resumed = small.trained(tmp_path, "tasks.*.data.workers=0", resume=True).run
    assert all(isinstance(data.train.pool, Pool) for data in resumed.data.values())
    assert small.history(resumed) == small.history(whole)


@pytest.mark.parametrize("step", [0, 2])
def test_a_streamed_run_goes_on_with_another_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Between two epochs and within one, where images of the steps done are not read again."""
    whole = small.trained(tmp_path, *CROPPED).run
    with pytest.raises(small.Stopped):
        small.session(tmp_path, *CROPPED, force=True).train(*small.stop_after(1, step))
    begun: list[int] = []  # numbers of batches that are read
    read = Split.read

    def reading(split: Split, chosen: Any, device: Any = "cpu", seed: int | None = None) -> Any:
        if seed is not None:
            begun.append(len(chosen))
        return read(split, chosen, device, seed)

    monkeypatch.setattr(Split, "read", reading)
    resumed = small.trained(tmp_path, *CROPPED, "tasks.*.data.workers=2", resume=True).run
    assert small.history(resumed) == small.history(whole)
    assert begun[0] == (1 if step else 2)
    assert all(map(torch.equal, whole.network.state_dict().values(), resumed.network.state_dict().values()))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of photographs of different sizes; the fourth to train on is cut off."""
    draw = np.random.default_rng(0)
    for number in range(16):
        path = tmp_path / "photographs" / ("test" if number < 4 else "train") / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (*draw.integers(8, 20, 2), 3), dtype=np.uint8)).save(path)
    path = tmp_path / "photographs" / "train" / "a" / "08.png"
    path.write_bytes(path.read_bytes()[:-100])
    return tmp_path / "photographs"


def recipe(photographs: Path, **keys: Any) -> dict[str, Any]:
    data = {"source": "folder", "path": str(photographs), "load": "stream", "workers": 1, "validation": 0, **keys}
    given = {"mean": [0.5] * 3, "std": [0.5] * 3}
    return {
        "backbone": {"name": "wrn_10_1", "input_size": 8},
        "tasks": [{"name": "photographs", "data": data | given}],
        "batch_size": 4,
    }


def test_a_damaged_photograph_ends_a_run_that_goes_on_without_it(photographs: Path) -> None:
    keys = recipe(photographs)
    with pytest.raises(InputError, match=r"train image .*/08.png cannot be read: .*; on_bad_image=skip leaves such "):
        small.trained(photographs.parent, **keys)
    notes: list[str] = []
    keys = recipe(photographs, on_bad_image="skip")
    session = small.session(photographs.parent, resume=True, note=notes.append, **keys)
    session.train(small.nothing, small.nothing)
    warnings = [note for note in notes if note.startswith("warning")]
    assert warnings == [f"warning: {json.loads(session.files.record.read_text())['left_out']}"]
    assert f"1 image is left out: train image {photographs}/train/a/08.png cannot be read" in warnings[0]


def test_images_of_different_sizes_are_brought_to_the_backbones(photographs: Path) -> None:
    notes: list[str] = []
    session = small.session(photographs.parent, note=notes.append, **recipe(photographs))
    assert "task 'photographs': images are brought to the backbone's 8x8; size sets another one" in notes
    assert session.run.data[1].input_size == (8, 8)
    assert session.run.network.tasks[0].data.spec["size"] == [8, 8]
    given = small.session(photographs.parent, "tasks.0.data.size=16", **recipe(photographs))
    assert given.run.data[1].input_size == (16, 16)


def test_a_damaged_test_image_is_left_out_of_an_evaluation(photographs: Path) -> None:
    session = small.session(photographs.parent, **recipe(photographs, on_bad_image="skip"))
    session.run.network.save(session.files.checkpoint)
    notes: list[str] = []
    (photographs / "test" / "b" / "01.png").write_bytes(b"")
    results = evaluate(session.files.checkpoint, note=notes.append)
    assert [result.images for result in results] == [3, 3]
    assert "test/b/01.png" in next(note for note in notes if note.startswith("warning: 1 image is left out"))
