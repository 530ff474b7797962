"""The file format: writing it, atomically, reading it, its checksums, and whatever else may be in a file's place."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from tiny import array, f32, metadata, tensors

import dvn_cli
from dvn_cli.errors import DvnError, InputError
from dvn_cli.files import atomic
from dvn_cli.store import file as store_file
from dvn_cli.store.file import CHECKED, TensorData, read_checkpoint, read_header, read_state, write
from dvn_cli.store.metadata import StateMetadata
from dvn_cli.store.slicing import slice_file

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dvn_cli.__file__).parents[1])}

# Writing


def test_same_bytes_as_safetensors_own_writer(tmp_path):
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(7), "ü": np.zeros((0, 2), np.float32)}
    names = {"float32": "F32", "int64": "I64"}
    tensors = {n: TensorData(names[a.dtype.name], a.shape, a) for n, a in arrays.items()}
    state = StateMetadata(recipe={}, epochs_done=0, history=(), best=None)
    write(tmp_path / "x", tensors, state)
    with safetensors.safe_open(tmp_path / "x", "np") as opened:
        safetensors.numpy.save_file(arrays, tmp_path / "y", opened.metadata())
    ours, theirs = (tmp_path / "x").read_bytes(), (tmp_path / "y").read_bytes()
    length = 8 + int.from_bytes(ours[:8], "little")
    assert (ours[:8], ours[length:]) == (theirs[:8], theirs[length:])
    assert json.loads(ours[8:length]) == json.loads(theirs[8:length])


def test_write_takes_bytes_views_and_strided_arrays(tmp_path):
    values = np.arange(12, dtype=np.uint16).reshape(3, 4)
    forms = [values.tobytes(), memoryview(values), bytearray(values), np.asfortranarray(values), lambda: iter(values)]
    for form in forms:
        write(tmp_path / "x", {"a": TensorData("BF16", (3, 4), form)}, StateMetadata({}, 0, (), None))
        assert np.array_equal(array(read_state(tmp_path / "x"), "a"), values)


def test_write_refuses_data_that_does_not_fit(file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"shared/bn.mean: 8 bytes for F32 of shape"):
        write(file, {**tensors(), "shared/bn.mean": TensorData("F32", (4,), bytes(8))}, metadata())
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(file, tensors(), metadata(training={"recipe": {"loss": float("nan")}}))
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_no_other(file, monkeypatch, function):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(DvnError, match=r"^cannot write '.*dvn.safetensors': No space left on device$") as caught:
        write(file, tensors(), metadata())
    assert caught.value.exit_code == 1
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_write_that_the_system_cuts_short(file):
    resource = pytest.importorskip("resource")
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DvnError, match="File too large"):
            write(file, {"a": f32(1_000_000)}, StateMetadata({}, 0, (), None))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_interrupted_write_leaves_the_old_file_and_no_other(file):
    before = file.read_bytes()

    def blocks():
        yield np.zeros(1, np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(file, {"a": TensorData("U8", (2,), blocks)}, StateMetadata({}, 0, (), None))
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


KEEP_WRITING = """
import itertools, sys
import numpy as np
from dvn_cli.store.file import TensorData, write
from dvn_cli.store.metadata import StateMetadata

for version in itertools.count():
    array = np.full(500_000, version, np.uint32)
    tensors = {f"shared/{i}": TensorData("U32", array.shape, array) for i in range(4)}
    write(sys.argv[1], tensors, StateMetadata({}, version, (), None))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    file = tmp_path / "dvn.safetensors"
    killed_while_writing = 0
    for seed in range(100):
        if seed >= 8 and killed_while_writing:
            break
        file.unlink(missing_ok=True)
        writer = subprocess.Popen([sys.executable, "-c", KEEP_WRITING, str(file)], env=ENVIRONMENT)
        try:
            end = time.monotonic() + 30
            while not file.exists() and writer.poll() is None and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(random.Random(seed).random() * 0.1)
            assert writer.poll() is None
        finally:
            writer.kill()
            writer.wait()
        header = read_state(file)
        assert len(header.tensors) == 4
        assert all((array(header, name) == header.metadata.epochs_done).all() for name in header.tensors)
        others = set(os.listdir(tmp_path)) - {file.name}
        killed_while_writing += len(others)
        assert len(others) <= 1
        assert all(name.startswith(".") and name.endswith(".tmp") for name in others)
    assert killed_while_writing  # or the test shows nothing
    file.unlink()
    other = tmp_path / "other.json"  # whatever is written there next
    with atomic(other) as opened:
        opened.write(b"{}")
    assert os.listdir(tmp_path) == [other.name]


def test_write_through_a_link_replaces_its_target(file):
    (file.parent / "folder").mkdir()
    link = file.parent / "folder" / "link.safetensors"
    link.symlink_to(file)
    write(link, {"a": f32(7)}, StateMetadata({}, 7, (), None))
    assert link.is_symlink()
    assert read_state(file).metadata.epochs_done == 7


def test_write_where_there_is_no_writing(file):
    with pytest.raises(InputError, match=r"^cannot write 'no/where': there is no folder '.*/no'$"):
        write("no/where", tensors(), metadata())
    with pytest.raises(InputError, match="there is no folder"):
        write(file / "inside", tensors(), metadata())
    with pytest.raises(InputError, match="it is a folder"):
        write(file.parent, tensors(), metadata())
    with pytest.raises(InputError, match="it is not a regular file"):
        write("/dev/null", tensors(), metadata())
    if os.geteuid():  # root may write anywhere
        file.parent.chmod(0o500)
        with pytest.raises(InputError, match="Permission denied"):
            write(file, tensors(), metadata())


# Bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: b"", "is no checkpoint: it ends after 0 bytes"),
        (lambda whole: whole[:7], "is no checkpoint: it ends after 7 bytes"),
        (lambda whole: whole[:60], "is truncated: it ends within its header, after 60 bytes"),
        (lambda whole: whole[:-1], r"is truncated: it has (\d+) of (\d+) bytes"),
        (lambda whole: b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a safetensors file; a checkpoint is what"),
        (lambda whole: b"PK\x03\x04" + bytes(100), "is not a safetensors file"),
        (lambda whole: whole[:8] + b"{" * (len(whole) - 8), "is damaged: "),
        (lambda whole: whole + b"more", "is damaged: "),
        (lambda whole: whole.replace(b'"F32","shape":[4,5]', b'"F32","shape":[5,5]'), "is damaged: "),
        (
            lambda whole: safetensors.numpy.save({"a": np.zeros(2)}),
            r"holds plain weights, no checkpoint; `dvn partition BACKBONE --weights .*` makes one",
        ),
        (
            lambda whole: safetensors.numpy.save({"a": np.zeros(2)}, {"dvn": "{"}),
            "is damaged: it is no JSON",
        ),
        (
            lambda whole: safetensors.numpy.save({"a": np.zeros(2)}, {"dvn": "[]"}),
            "is damaged: it is a list, not an object",
        ),
    ],
)
def test_bad_files(file, content, message):
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("dvn", "message"),
    [
        ({"format": 2}, "has format 2, this dvn reads up to 1: update dvn"),
        ({"kind": "optimizer"}, "has kind 'optimizer', not checkpoint or slice"),
        ({"kind": "training state"}, "has kind 'training state', not checkpoint or slice"),
        ({"format": None}, "is damaged: 'format' is None, not an integer"),
        (DEEP, "is damaged: it is nested too deeply"),
        (f'{{"format":{"9" * 5000}}}', "is damaged: it is no JSON: Exceeds the limit"),
        ('{"format":NaN}', "is damaged: it is no JSON: NaN is no number"),
        ('{"format":1e999}', "is damaged: it is no JSON: 1e999 is no number"),
        ('{"format":1,"format":1}', "is damaged: it is no JSON: an object has a key twice"),
        ({"checksums": "00000000"}, "is damaged: what it says is not what was written"),
        ({"checksums": 7}, "is damaged: 'checksums' is 7, not a text"),
    ],
)
def test_bad_metadata(file, dvn, message):
    changed = dvn if isinstance(dvn, str) else {"format": 1, "kind": "checkpoint", **tiny.content(), **dvn}
    tiny.write_plainly(file, tiny.arrays(), changed)
    with pytest.raises(InputError, match=message) as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared/bn.mean": None}, "it has no tensor 'bn.mean' for task 1, level 1"),
        ({"shared/bn.mean": f32(4, 1)}, "'shared/bn.mean' has 2 dimensions, not 1"),
        ({"shared/bn.mean": TensorData("F16", (4,), bytes(8))}, "'.*bn.mean' has dtype F"),
        ({"shared/fc.weight": f32(3, 5)}, "'?(shared|task/1)/fc.weight'? has shape"),
        ({"shared/conv.weight": f32(3, 5)}, "'axes.0' has indices up to 4, a dimension of 'conv.weight' only 3"),
        ({"task/2/level/1/bn.mean": f32(3)}, "'?(shared|task/2/level/1)/bn.mean'? has shape"),
        ({"shared/other": f32(1)}, "its metadata does not speak of its tensor 'shared/other'"),
        ({"other": f32(1)}, "its metadata does not speak of its tensor 'other'"),
        ({"task/3/bn.mean": f32(4)}, "its metadata does not speak of its tensor 'task/3/bn.mean'"),
        ({"task/2/level/3/bn.mean": f32(4)}, "its metadata does not speak of its tensor 'task/2/level/3/bn.mean'"),
        (
            dict.fromkeys(["shared/conv.weight"], TensorData("I32", (4, 5), bytes(80))),
            "'shared/conv.weight' is trainable and of dtype I32",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_metadata_are_neither_written_nor_read(file, changes, message):
    changed = {name: tensor for name, tensor in {**tensors(), **changes}.items() if tensor is not None}
    before = file.read_bytes()
    with pytest.raises(InputError, match=f"cannot write 'dvn.safetensors': {message}"):
        write("dvn.safetensors", changed, metadata())
    assert file.read_bytes() == before
    kinds = {"F32": np.float32, "F16": np.float16, "I32": np.int32}
    arrays = {name: np.zeros(tensor.shape, kinds[tensor.dtype]) for name, tensor in changed.items()}
    tiny.write_plainly(file, arrays, {"format": 1, "kind": "checkpoint", **tiny.content()})
    with pytest.raises(InputError, match=f"'{file}' is damaged: {message}"):
        read_header(file)


def test_a_header_that_lies_of_its_bytes(file):
    """Offsets that overlap, leave a gap, are negative or huge; sizes that are no sizes."""
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:length])
    name = "shared/bn.mean"
    begin, end = header[name]["data_offsets"]
    entries = [{"data_offsets": [begin + shift, end + shift]} for shift in (4, -4, 10**30, -(10**30))]
    entries += [{"shape": shape} for shape in ([5], [-4], ["4"], [2**62, 4], 4, None, [10**30])]
    entries += [{"dtype": dtype} for dtype in ("F33", 7, None, "I64")]
    entries += [{"data_offsets": [begin]}, {"data_offsets": None}]
    for entry in [*({**header[name], **each} for each in entries), None, [], "x"]:
        text = json.dumps({**header, name: entry}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + whole[length:])
        with pytest.raises(InputError, match=r"is (damaged|truncated): "):
            read_header(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"cannot read '.*pipe': it is not a regular file"):
        read_header(tmp_path / "pipe")


def test_no_file(file):
    with pytest.raises(
        InputError, match=r"^there is no checkpoint 'dvm.safetensors'; did you mean 'dvn.safetensors'\?$"
    ):
        read_header("dvm.safetensors")
    with pytest.raises(InputError, match=r"there is no checkpoint 'no/x.safetensors'; `dvn partition` and `dvn train`"):
        read_header("no/x.safetensors")
    with pytest.raises(InputError, match=r"cannot read '.*': it is a folder"):
        read_header(file.parent)
    with pytest.raises(InputError, match="cannot read"):
        read_header("a\0b")
    with pytest.raises(InputError, match="cannot read"):
        read_header("a" * 4000)


# Checksums


def contents(path: Path) -> dict[str, bytes]:
    """All that a file holds."""
    header = read_header(path)
    return {name: bytes(header.read(name, 0, stored.nbytes)) for name, stored in header.tensors.items()}


def test_every_flipped_bit_is_found(file):
    """Wherever it is in a checkpoint or a slice, but for the key `checksums`, without which a file is of old."""
    slice_file(read_checkpoint(file), 2, 2, "slice.safetensors")
    generator = random.Random(0)
    for path in (file, Path("slice.safetensors")):
        whole = path.read_bytes()
        for _ in range(300):
            place, bit = generator.randrange(len(whole)), 1 << generator.randrange(8)
            if 0 <= place - whole.index(b"checksums") < len("checksums"):
                continue
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            with pytest.raises(InputError) as caught:
                contents(path)
            assert "\n" not in str(caught.value)
        path.write_bytes(whole)
        contents(path)


def test_flipped_bits_are_found_when_a_part_is_cut(tmp_path):
    """In tensors of many blocks; a slice that uses nothing of a damaged block is cut all the same."""
    rows = 4096
    axes = [[[[0, rows // 2]], [[rows // 2, rows]]]]
    described = metadata(axes=axes, tensors={"a.weight": {"axes": [0, None], "trainable": True}}, class_axis=[])
    path, output = tmp_path / "big.safetensors", tmp_path / "slice.safetensors"
    write(path, {"shared/a.weight": f32(rows, 100)}, described)
    whole = path.read_bytes()
    start = len(whole) - rows * 400
    generator = random.Random(1)
    for _ in range(30):
        place = generator.randrange(rows * 400)
        path.write_bytes(whole[: start + place] + bytes([whole[start + place] ^ 16]) + whole[start + place + 1 :])
        checkpoint = read_checkpoint(path)
        owner = 1 if place < rows * 200 else 2
        for task, level in ((owner, 1), (1, 2)):
            with pytest.raises(InputError, match=r"is damaged: its tensor 'shared/a.weight' has other bytes"):
                slice_file(checkpoint, task, level, output)
            assert not output.exists()
        if abs(place - rows * 200) > CHECKED:
            slice_file(read_checkpoint(path), 3 - owner, 1, output)
            output.unlink()


def test_each_block_is_checked_once(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write(path, {"a": f32(1_000_000), "b": f32(3)}, StateMetadata({}, 0, (), None))
    checked, real = [], store_file.crc
    header = read_state(path)
    monkeypatch.setattr(store_file, "crc", lambda data: checked.append(len(data)) or real(data))
    generator = random.Random(0)
    expected = f32(1_000_000).data.tobytes()
    for _ in range(50):
        start, stop = sorted(generator.randrange(4_000_001) for _ in range(2))
        assert header.read("a", start, stop) == expected[start:stop]
    assert header.read("a", 0, 4_000_000) == expected
    assert sum(checked) == 4_000_000


def test_a_file_from_before_there_were_checksums_opens(file):
    plain = {key: value for key, value in tiny.said(file).items() if key != "checksums"}
    tiny.write_plainly(Path("old.safetensors"), tiny.arrays(), plain)
    assert read_header("old.safetensors").checksums == {}
    assert contents(Path("old.safetensors")) == contents(file)


def test_a_file_that_is_written_again_by_others_stays_valid(file):
    """Checksums are of what is said and stored, not of the order in which it lies there."""
    said = tiny.said(file)
    tiny.write_plainly(Path("again.safetensors"), dict(reversed(tiny.arrays().items())), said)
    assert contents(Path("again.safetensors")) == contents(file)


def test_what_was_opened_is_read_whatever_replaces_it(file):
    before, header = contents(file), read_checkpoint(file)
    write(file, {name: f32(*tensor.shape, seed=9) for name, tensor in tensors().items()}, metadata())
    assert header.read("shared/bn.mean", 0, 16) == before["shared/bn.mean"] != contents(file)["shared/bn.mean"]
    write(file, {"a": f32(100_000)}, StateMetadata({}, 0, (), None))
    state = read_state(file)
    os.truncate(file, 300_000)
    with pytest.raises(InputError, match="is truncated: it ends within its tensor 'a'"):
        state.read("a", 0, 400_000)
