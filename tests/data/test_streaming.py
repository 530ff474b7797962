"""Images that are read anew whenever they are needed: the same batches as from memory, whoever reads them."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dvn_cli.data import DataSpec, Pool, Reader, decode, drawn, load_task, load_test, memory, pool
from dvn_cli.errors import DvnError, InputError

PHOTOGRAPHS = 24


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of two classes of photographs of different sizes, and the same images in a parquet file."""
    root, draw = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    rows = []
    for split, count in (("train", PHOTOGRAPHS), ("test", 10)):
        for number in range(count):
            height, width = draw.integers(20, 40, 2)
            image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
            path = root / "folder" / split / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            rows.append((split, number % 2, path.read_bytes()))
        of_split = [row for row in rows if row[0] == split]
        table = pa.table(
            {"image": [{"bytes": b, "path": None} for *_, b in of_split], "label": [r[1] for r in of_split]}
        )
        (root / "parquet").mkdir(exist_ok=True)
        pq.write_table(table, root / "parquet" / f"{split}.parquet", row_group_size=5)
    return root


def spec(root, source="folder", **keys):
    path = str(root / {"folder": "folder", "hf": "parquet"}[source])
    return DataSpec(**{"source": source, "path": path, "size": 16, "validation": 0.25, **keys})


def passes(data, size=4, count=2, seed=0, **keys):
    """What the batches of some passes are, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return [batch for _ in range(count) for batch in data.train_batches(size, generator, **keys)]


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert all(map(torch.equal, batch, other))


@pytest.mark.parametrize("source", ["folder", "hf"])
def test_streamed_batches_are_those_from_memory(photographs, source):
    kept = load_task(spec(photographs, source, augment="crop-flip", load="memory"))
    streamed = load_task(spec(photographs, source, augment="crop-flip", load="stream", workers=0))
    assert isinstance(streamed.train.pool, Pool)
    assert (kept.mean, kept.std, kept.input_size) == (streamed.mean, streamed.std, streamed.input_size)
    assert kept.counts == streamed.counts == {"train": 18, "validation": 6, "test": 10}
    assert_same(passes(kept), passes(streamed))
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(kept, part).images, getattr(streamed, part).images)
    assert_same(*([(batch,) for batch in drawn(d.train, d.mean, d.std, seed=3, count=5)] for d in (kept, streamed)))


CHANGED = {"augment": "resized-crop", "aa": "rand-m9-mstd0.5", "reprob": 0.5, "mixup": 0.2, "cutmix": 1.0}


@pytest.mark.parametrize(("source", "keys"), [("hf", {"augment": "crop"}), ("folder", CHANGED)])
def test_batches_do_not_depend_on_the_number_of_workers(photographs, source, keys):
    data = [load_task(spec(photographs, source, load="stream", workers=workers, **keys)) for workers in (0, 1, 4)]
    state = torch.get_rng_state()
    alone, *others = map(passes, data)
    assert torch.equal(torch.get_rng_state(), state)  # what dropout draws is not moved
    for other in others:
        assert_same(alone, other)


def test_a_pass_is_another_one_each_time_and_goes_on_from_the_state_of_its_generator(photographs):
    data = load_task(spec(photographs, workers=0, **CHANGED))
    generator = torch.Generator().manual_seed(5)
    first = list(data.train_batches(18, generator))
    state = generator.get_state()
    second = list(data.train_batches(18, generator))
    assert not torch.equal(first[0][0].sort(0).values, second[0][0].sort(0).values)
    generator = torch.Generator()
    generator.set_state(state)
    assert_same(second, list(data.train_batches(18, generator)))


@pytest.mark.parametrize("keys", [{"augment": "crop-flip"}, CHANGED])
def test_a_pass_can_be_entered_at_any_batch(photographs, monkeypatch, keys):
    data = load_task(spec(photographs, load="stream", workers=0, **keys))
    whole = list(data.train_batches(4, torch.Generator().manual_seed(5)))
    read = []
    decoded = Pool.decoded
    monkeypatch.setattr(
        Pool, "decoded", lambda self, indices, *args: (read.extend(indices), decoded(self, indices, *args))[1]
    )
    generator = torch.Generator().manual_seed(5)
    assert_same(whole[3:], list(data.train_batches(4, generator, skip=3)))
    assert len(read) == 4 * (len(whole) - 3)
    assert_same(passes(data, seed=5)[len(whole) :], list(data.train_batches(4, generator)))


def test_only_the_row_groups_that_hold_images_of_a_batch_are_read(photographs, monkeypatch):
    data = load_task(spec(photographs, "hf", load="stream", workers=0))
    read = []
    iterate = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, **keys: (read.extend(keys["row_groups"]), iterate(self, **keys))[1]
    )
    chosen = torch.arange(len(data.test))
    assert len(next(data.test.read([chosen[6:8]]))[0]) == 2
    assert read == [1]


@pytest.fixture
def damaged(photographs, tmp_path):
    """The same photographs, two of which to train on and one to test on are cut off."""
    shutil.copytree(photographs / "folder", tmp_path / "folder")
    for path in (*sorted((tmp_path / "folder" / "train" / "a").iterdir())[3:5], tmp_path / "folder/test/b/03.png"):
        path.write_bytes(path.read_bytes()[:-900])
    return tmp_path


@pytest.mark.parametrize("load", ["memory", "stream"])
def test_a_damaged_image_is_named_or_left_out(damaged, load):
    keys = {"validation": 0, "mean": [0.5] * 3, "std": [0.5] * 3, "load": load, "workers": 1}
    with pytest.raises(
        InputError, match=r"train image .*/a/\d+.png cannot be read: .*; on_bad_image=skip leaves "
    ) as e:
        passes(load_task(spec(damaged, **keys)))
    assert "\n" not in str(e.value)
    reader = Reader()
    data = reader.task(spec(damaged, on_bad_image="skip", **keys)).load()
    batches = passes(data, count=1)
    if load == "memory":
        assert data.counts == {"train": 22, "validation": 0, "test": 9}
        assert any("2 images are left out: train image" in note for note in reader.notes)
    else:  # the next image takes the place
        assert [len(labels) for _, labels in batches] == [4] * 6
        assert len({image.numpy().tobytes() for images, _ in batches for image in images}) == 22
    assert "2 images are left out: train image" in pool.left_out(data.train.bad)
    assert [len(images) for images, _ in data.test.read(torch.arange(len(data.test)).split(len(data.test)))] == [9]
    assert pool.left_out(data.bad).startswith("3 images are left out: ")


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_many_images_in_a_row_that_cannot_be_read_leave_batches_whole(photographs, tmp_path, augment):
    """As a copy that was interrupted leaves them; each is decoded once in a pass."""
    shutil.copytree(photographs / "folder", tmp_path / "folder")
    whole = load_task(spec(tmp_path, load="stream", workers=0, validation=0, on_bad_image="skip", augment=augment))
    for path in sorted((tmp_path / "folder" / "train" / "a").iterdir())[1:]:
        path.write_bytes(b"")
    batches = passes(whole, size=8, count=1)
    assert [(len(images), len(labels)) for images, labels in batches] == [(8, 8)] * (PHOTOGRAPHS // 8)
    assert len(whole.train.bad) == PHOTOGRAPHS // 2 - 1


def test_white_is_looked_for_once(tmp_path, monkeypatch):
    """Of floats, in the process that the workers come of."""
    for part in ("train", "test"):
        for number in range(4):
            path = tmp_path / "folder" / part / "ab"[number % 2] / f"{number}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16), number / 4, dtype=np.float32)).save(path)
    data, white_of = load_task(spec(tmp_path, load="stream", workers=1, validation=0)), decode.white_of

    def noting(*given, **keys):
        (tmp_path / f"{os.getpid()}-{len(list(tmp_path.iterdir()))}").touch()
        return white_of(*given, **keys)

    monkeypatch.setattr(decode, "white_of", noting)
    data.train.pool._white.cache_clear()
    data.train.pool._looked_for_white = False
    passes(data, size=2, count=3)
    assert [path.name.split("-")[0] for path in tmp_path.iterdir() if path.is_file()] == [str(os.getpid())]


def test_what_is_left_out_is_named_briefly(damaged):
    data = load_task(spec(damaged, on_bad_image="skip", validation=0, workers=0, load="stream"))
    data.train.pool.leave_out(map(str, range(9)))
    assert pool.left_out(data.bad).startswith("11 images are left out: ")
    assert pool.left_out(data.train.bad).endswith("; 0; and 8 more")


def test_images_none_of_which_can_be_read_end_it(damaged):
    for path in (damaged / "folder" / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    for load in ("memory", "stream"):
        with pytest.raises(InputError, match=r"none of the images of .* can be read: train image "):
            passes(load_task(spec(damaged, on_bad_image="skip", load=load, size=None)))
    given = {"validation": 0, "mean": [0.5] * 3, "std": [0.5] * 3, "load": "stream"}
    with pytest.raises(InputError, match=r"none of the images of .* can be read: train image "):
        passes(load_task(spec(damaged, on_bad_image="skip", **given)))


def test_a_split_of_which_none_can_be_read_is_said(photographs, tmp_path):
    """Where others of its data set can."""
    keys = {"on_bad_image": "skip", "validation": 1 / PHOTOGRAPHS}
    kept = load_task(spec(photographs, **keys))
    assert kept.counts["validation"] == 1
    shutil.copytree(photographs / "folder", tmp_path / "folder")
    for path in (tmp_path / "folder" / "train").rglob("*.png"):
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)))
        if torch.equal(pixels.permute(2, 0, 1), kept.validation.images[0]):
            path.write_bytes(b"")
    with pytest.raises(InputError, match=r"^none of the images of .*/folder can be read: train image "):
        load_task(spec(tmp_path, **keys))


def test_streamed_images_of_different_sizes_are_one_line(photographs):
    with pytest.raises(InputError, match=r"^images of .* have different sizes \(\d+x\d+ and \d+x\d+\): set size$"):
        assert load_test(spec(photographs, size=None, load="stream", workers=1))[0].images is None


def test_a_worker_that_is_killed_is_one_line(photographs, monkeypatch):
    data = load_task(spec(photographs, load="stream", workers=1))
    monkeypatch.setattr(Pool, "decoded", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DvnError, match=r"^a process that reads images of .* was ended by the system, .* workers or "):
        passes(data)


def test_workers_leave_sigterm_to_the_main_process(photographs, monkeypatch):
    """`timeout` and batch systems send it to both; the step that is under way still gets its images."""
    data = load_task(spec(photographs, load="stream", workers=1))
    expected, decoded = passes(data), Pool.decoded

    def after_sigterm(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return decoded(*given)

    monkeypatch.setattr(Pool, "decoded", after_sigterm)
    assert_same(passes(data), expected)


def test_a_process_that_fails_between_two_batches_ends(photographs):
    """Python keeps what was raised, the frames with it and so the workers, which it waits for at its exit."""
    code = (
        "from dvn_cli.data import DataSpec, load_task; import torch, sys\n"
        "keys = dict(source='folder', path=sys.argv[1], size=16, load='stream', workers=2)\n"
        "batches = load_task(DataSpec(**keys)).train_batches(4, torch.Generator())\n"
        "next(batches)\n"
        "raise ValueError('in the script')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(photographs / "folder")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ValueError: in the script")
    assert done.stderr.count("Traceback") == 1


def test_small_sets_are_kept_and_larger_ones_streamed(photographs, monkeypatch):
    assert isinstance(load_task(spec(photographs)).train.pool, torch.Tensor)
    monkeypatch.setattr(pool, "RESIDENT", 10 * 3 * 16 * 16)
    reader = Reader()
    data = reader.task(spec(photographs, workers=2)).load()
    assert (type(data.train.pool), type(data.test.pool)) == (Pool, torch.Tensor)
    assert any(
        note.startswith("24 images of 3x16x16") and note.endswith("are read whenever they are needed, by 2 processes")
        for note in reader.notes
    )
    assert isinstance(load_test(spec(photographs))[0].pool, torch.Tensor)
    monkeypatch.setattr(memory, "available", lambda: 0)
    with pytest.raises(InputError, match="set load to stream"):
        load_task(spec(photographs, load="memory"))


@pytest.mark.parametrize(("limit", "keys"), [(17 * 3 * 16 * 16, {}), (2**30, {"augment": "resized-crop"})])
def test_mean_and_std_are_estimated_where_there_are_too_many_images(photographs, monkeypatch, limit, keys):
    from dvn_cli.data import task

    whole = load_task(spec(photographs))
    monkeypatch.setattr(task, "ESTIMATED_ON", 9)
    exact = [load_task(spec(photographs, load=load, workers=0)) for load in ("memory", "stream")]
    assert [(data.mean, data.std) for data in exact] == [(whole.mean, whole.std)] * 2
    monkeypatch.setattr(task, "RESIDENT", limit)
    reader = Reader()
    some = reader.task(spec(photographs, load="stream", workers=0, **keys)).load()
    assert any("mean and std are estimated on 9 images" in note for note in reader.notes)
    assert some.mean != whole.mean
    assert np.allclose(some.mean, whole.mean, atol=0.02)
    if not keys:
        assert load_task(spec(photographs, load="memory")).mean == some.mean
    given = Reader()
    given.task(spec(photographs, load="stream", mean=[0.1] * 3, std=[0.2] * 3, **keys)).load()
    assert not any("estimated" in note for note in given.notes)


def test_an_image_that_is_turned_upright_has_the_size_of_others(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.new("RGB", (4, 8)).save(tmp_path / split / name / "0.jpg", exif=exif)
            Image.new("RGB", (8, 4)).save(tmp_path / split / name / "1.jpg")
    data = load_task(DataSpec(source="folder", path=str(tmp_path), load="stream", workers=0, validation=0))
    assert data.train.images.shape == (4, 3, 4, 8)


def test_white_is_one_value_for_all_streamed_images(tmp_path):
    """As in memory; a batch is no measure."""
    for split, name, number in (("train", "a", 0), ("train", "b", 1), ("test", "a", 2), ("test", "b", 3)):
        (tmp_path / split / name).mkdir(parents=True)
        Image.fromarray(np.full((2, 2), [0.5, 200, 1, 1][number], dtype=np.float32)).save(
            tmp_path / split / name / "x.tif"
        )
    keys = {"source": "folder", "path": str(tmp_path), "validation": 0}
    kept, streamed = (load_task(DataSpec(load=load, workers=1, **keys)) for load in ("memory", "stream"))
    assert kept.train.images[:, 0, 0, 0].tolist() == [0, 200]
    assert_same(passes(kept, size=1), passes(streamed, size=1))
