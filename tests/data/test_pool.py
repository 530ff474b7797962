"""Images held once, only those that are used, and only where they fit."""

import io
import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dvn_cli.data import DataSpec, Reader, Split, batches, decode, load_task, load_test, memory, to_device
from dvn_cli.errors import InputError


@pytest.fixture
def decoded(monkeypatch):
    """The images that are decoded, as messages call them."""
    seen = []
    upright = decode.upright
    monkeypatch.setattr(decode, "upright", lambda item: (seen.append(item.where), upright(item))[1])
    return seen


def load(*specs, channels=1):
    reader = Reader()
    plans = [reader.task(spec, channels=channels) for spec in specs]
    return [plan.load() for plan in plans]


def digits(**fields):
    return DataSpec(source="digits", **fields)


def same(split, other):
    return torch.equal(split.images, other.images) and torch.equal(split.labels, other.labels)


def test_tasks_of_one_data_set_share_its_images(decoded):
    specs = [digits(), digits(classes="0-4"), digits(groups={"a": "0-1", "b": [7]}), digits(seed=3, validation=0.3)]
    tasks = load(*specs)
    assert len(decoded) == len(set(decoded)) == 1797
    for part in ("train", "test"):
        assert len({getattr(task, part).pool.data_ptr() for task in tasks}) == 1
    assert all(task.train.pool is task.validation.pool for task in tasks)
    for task, spec in zip(tasks, specs, strict=True):
        alone = load_task(spec, channels=1)
        assert all(same(getattr(task, part), getattr(alone, part)) for part in ("train", "validation", "test"))
        assert (task.mean, task.std) == (alone.mean, alone.std)
    assert [len(pool) for pool in (load(digits(size=9), digits())[0].train.pool,)] == [1297]


def test_only_images_that_a_task_uses_are_decoded(decoded):
    limits = {"train_images": 30, "test_images": 20}
    low, high = load(digits(classes="0-4", **limits), digits(classes="5-9", train_images=40))
    assert len(decoded) == len(set(decoded))
    assert len(low.train.pool) == len(high.train.pool) == 70
    assert len(low.test.pool) == 20 + len(high.test)
    assert (len(low.train), len(low.validation), len(low.test)) == (27, 3, 20)


def test_images_of_other_sizes_are_others():
    small, large = load(digits(), digits(size=9))
    assert (small.input_size, large.input_size) == ((8, 8), (9, 9))


def parquet(path, count, rows_per_group=7):
    def image(number):
        buffer = io.BytesIO()
        Image.new("L", (2, 2), number).save(buffer, "png")
        return {"bytes": buffer.getvalue(), "path": None}

    for shard in range(2):
        rows = range(shard * count, (shard + 1) * count)
        table = pa.table({"image": [image(number) for number in rows], "label": [number % 2 for number in rows]})
        pq.write_table(table, path / f"train-{shard}.parquet", row_group_size=rows_per_group)
    pq.write_table(table, path / "test.parquet")


@given(st.integers(2, 60), st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_of_parquet_files_any_rows_are_read(tmp_path_factory, limit, seed):
    folder = tmp_path_factory.mktemp("parquet")
    parquet(folder, 30)
    spec = DataSpec(source="hf", path=str(folder), validation=0, train_images=limit, seed=seed)
    data = load_task(spec, channels=1)
    values = data.train.images[:, 0, 0, 0].tolist()
    assert len(set(values)) == limit
    assert values == sorted(values)
    assert [value % 2 for value in values] == data.train.labels.tolist()


def test_a_damaged_image_in_a_parquet_file_is_named_by_its_row(tmp_path):
    parquet(tmp_path, 20)
    table = pq.read_table(tmp_path / "train-1.parquet")
    images = table["image"].to_pylist()
    images[13]["bytes"] = images[13]["bytes"][: images[13]["bytes"].index(b"IDAT") + 8]
    table = table.set_column(0, "image", pa.array(images, table["image"].type))
    pq.write_table(table, tmp_path / "train-1.parquet", row_group_size=7)
    with pytest.raises(InputError, match=r"train image in row 13 of .*/train-1.parquet cannot be read: "):
        load_task(DataSpec(source="hf", path=str(tmp_path), validation=0))


def test_a_validation_split_of_parquet_files_and_of_torchvision(tmp_path, monkeypatch):
    parquet(tmp_path, 20)
    pq.write_table(pq.read_table(tmp_path / "test.parquet").slice(0, 6), tmp_path / "validation.parquet")
    reader = Reader()
    data = reader.task(DataSpec(source="hf", path=str(tmp_path))).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 6, 20)
    assert reader.notes == [f"{tmp_path}: trains on train, validates on validation and tests on test"]

    from torchvision import datasets

    class Flowers:
        """Of three splits, and with labels that are known before an image is decoded."""

        classes = ("rose", "tulip")

        def __init__(self, root, split="train"):
            if split not in ("train", "val", "test"):
                raise ValueError(split)
            self._labels = [0, 1] * {"train": 10, "val": 3, "test": 2}[split]

        def __len__(self):
            return len(self._labels)

        def __getitem__(self, index):
            opened.append(index)
            return Image.new("L", (2, 2), index), self._labels[index]

    opened = []
    monkeypatch.setattr(datasets, "Flowers", Flowers, raising=False)
    monkeypatch.setattr(datasets, "__all__", [*datasets.__all__, "Flowers"])
    spec = DataSpec(source="torchvision", name="Flowers", path=str(tmp_path))
    data = load_task(spec)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 6, 4)
    held_out = load_task(spec.model_copy(update={"validation": 0.1}))
    assert (len(held_out.train), len(held_out.validation)) == (18, 2)
    opened.clear()
    load_test(spec.model_copy(update={"test_images": 1}))
    assert len(opened) == 6  # to see that the labels are right and how large images are, and the one


def test_labels_that_the_images_contradict_are_not_believed(tmp_path, monkeypatch):
    from torchvision import datasets

    class Shifted:
        def __init__(self, root, train=True):
            self.targets = [1, 2] * 5

        def __len__(self):
            return 10

        def __getitem__(self, index):
            return Image.new("L", (2, 2)), self.targets[index] - 1

    monkeypatch.setattr(datasets, "Shifted", Shifted, raising=False)
    monkeypatch.setattr(datasets, "__all__", [*datasets.__all__, "Shifted"])
    assert load_task(DataSpec(source="torchvision", name="Shifted", path=str(tmp_path))).classes == ("0", "1")


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_a_split_of_a_pool_gives_the_batches_of_its_images(data):
    pool = torch.randint(0, 256, (20, 3, 4, 5), dtype=torch.uint8)
    indices = torch.tensor(data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=15, unique=True)))
    labels = torch.arange(len(indices))
    shared, alone = Split(pool, labels, indices), Split(pool[indices], labels)
    assert torch.equal(shared.images, alone.images)
    for seed in (None, data.draw(st.integers(0, 99))):
        passes = []
        for split in (shared, alone):
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            options = {"mean": [0.1] * 3, "std": [0.2] * 3, "generator": generator, "augment": "crop-flip"}
            passes.append(list(batches(split, data.draw(st.just(4)), **options)))
        for one, other in zip(*passes, strict=True):
            assert all(itertools.starmap(torch.equal, zip(one, other, strict=True)))


def test_on_a_device_shared_images_are_there_once():
    splits = [task.train for task in load(digits(classes="0-4"), digits(classes="5-9"))]
    moved = to_device([*splits, Split(torch.zeros(1, 1, 2, 2), torch.zeros(1))], "meta")
    assert moved[0].pool is moved[1].pool
    assert moved[2].pool is not moved[0].pool
    tensors = [tensor for split in moved[:2] for tensor in (split.pool, split.labels, split.indices)]
    assert all(tensor.is_meta for tensor in tensors)


def test_images_that_do_not_fit_are_streamed_or_refused_before_one_is_decoded(monkeypatch, decoded):
    needed = 1797 * 8 * 8
    kept = digits(load="memory")
    monkeypatch.setattr(memory, "available", lambda: needed)
    load(kept)
    decoded.clear()
    monkeypatch.setattr(memory, "available", lambda: needed - 1)
    with pytest.raises(InputError, match=r"1,297 images of 1x8x8 of digits, .* take 0.1 MiB, and 0.1 MiB "):
        load(kept)
    assert decoded == []
    load(digits(train_images=1000, load="memory"))
    [task] = load(digits())
    assert not isinstance(task.train.pool, torch.Tensor)
    assert isinstance(task.test.pool, torch.Tensor)  # the smallest split first, in half of what is free
    monkeypatch.setattr(memory, "available", lambda: 3 * needed)
    _, task = load(kept, digits(size=9))
    assert not isinstance(task.train.pool, torch.Tensor)  # for which there would be room, but for what is to be kept
    monkeypatch.setattr(memory, "available", lambda: 10**9)
    with pytest.raises(InputError, match=r"take .* GiB, and 0.9 GiB .*: set load to stream, a smaller size, fewer "):
        load(kept, digits(size=40000, load="memory"))
    with pytest.raises(InputError, match=r"500 images of 3x40000x40000 of digits take 2,235.2 GiB, .*: set a "):
        load_test(digits(size=40000))
    monkeypatch.setattr(memory, "available", lambda: None)  # where the system does not say
    load(kept)


def test_memory_that_ends_while_images_are_decoded_is_the_same_line(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(decode, "eight_bit", full)
    with pytest.raises(InputError, match=r"1,297 images of 1x8x8 of digits take 0.1 MiB, and .* free: set load to "):
        load(digits())


def test_the_least_of_what_the_system_and_its_groups_leave(tmp_path, monkeypatch):
    def write(folder, **files):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)

    two = {"memory__current": "500\n", "memory__stat": "anon 300\ninactive_file 200\n"}
    write(tmp_path, **two)  # the root of the groups has no limit
    write(tmp_path / "job", memory__max="10000\n", **two)
    write(tmp_path / "job" / "step", memory__max="max\n", **two)
    one = {"memory__usage_in_bytes": "4000\n", "memory__stat": "total_inactive_file 1000\n"}
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712\n", **one)
    write(tmp_path / "memory" / "box", memory__limit_in_bytes="8000\n", **one)
    membership = tmp_path / "membership"
    membership.write_text("0::/job/step\n")
    assert list(memory._control_groups(membership, tmp_path)) == [9700]
    membership.write_text("5:cpu,cpuacct:/box\n4:memory:/box\n0::/\n")
    assert min(memory._control_groups(membership, tmp_path)) == 5000
    assert list(memory._control_groups(tmp_path / "none", tmp_path)) == []
    assert 2**20 < memory.available() < 2**50
    monkeypatch.setattr(memory, "_address_space", lambda: iter([12345]))
    assert memory.available() == 12345
    for place in ("_machine", "_control_groups", "_address_space"):
        monkeypatch.setattr(memory, place, lambda *_: iter([]))
    assert memory.available() is None


def test_the_limit_on_address_space_counts():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    assert soft == resource.RLIM_INFINITY
    try:
        resource.setrlimit(resource.RLIMIT_AS, (2**44, hard))
        assert 0 < next(memory._address_space()) < 2**44
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
