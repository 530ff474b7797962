"""The file format, its atomic writing, and `dvn slice`, on tiny checkpoints made here."""

import errno
import itertools
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
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner

from dvn_cli import checkpoint
from dvn_cli.checkpoint import ITEM_SIZE, Tensor, count, cut, kept_runs, read_header, slice_file, write
from dvn_cli.cli.slice import slice_command
from dvn_cli.errors import DvnError, InputError
from dvn_cli.files import atomic

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
BACKBONE = {"source": "timm", "name": "tiny", "num_classes": 3, "in_chans": 3, "input_size": [8, 8]}


def task(name: str, order: list[int], levels: list[int], classes: int = 3) -> dict:
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


def f32(*shape: int, seed: int = 0) -> Tensor:
    return Tensor("F32", shape, np.random.default_rng(seed).standard_normal(shape, np.float32))


def metadata(**changes) -> dict:
    """Of two units over 4 channels: unit 1 owns 0 and 1, unit 2 owns 3, and 2 is kept by all."""
    return {
        "format": 1,
        "kind": "checkpoint",
        "backbone": BACKBONE,
        "units": 2,
        "axes": [[[[0, 2]], [[3, 4]]]],
        "tensors": {
            "conv.weight": {"axes": [0, None], "owner": "shared", "dtype": "F32", "trainable": True},
            "bn.mean": {"axes": [0], "owner": "network", "dtype": "F32", "trainable": False},
            "fc.weight": {"axes": [None, 0], "owner": "network", "dtype": "F32", "trainable": True},
        },
        "class_axis": [["fc.weight", 0]],
        "tasks": [task("low digits", [1, 2], [1, 2]), task("odd", [2, 1], [1, 2], classes=2)],
        "training": None,
        **changes,
    }


def tensors() -> dict[str, Tensor]:
    return {
        "shared/conv.weight": f32(4, 5),
        "shared/bn.mean": f32(4, seed=1),
        "task/2/level/1/bn.mean": f32(2, seed=2),
        "shared/fc.weight": f32(3, 4, seed=3),
        "task/1/fc.weight": f32(3, 4, seed=4),
    }


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("dvn.safetensors", tensors(), metadata())
    return tmp_path / "dvn.safetensors"


# Cutting


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
        order = draw(st.permutations(range(1, units + 1)))[: draw(st.integers(1, units))]
        levels = sorted(draw(st.sets(st.integers(1, len(order)), min_size=1)))
        tasks.append(task(f"task {number}", order, levels, draw(st.integers(1, 4))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    listed, stored, class_axis = {}, {}, []
    for number in range(draw(st.integers(1, 4))):
        name, dtype = f"layer.{number}.weight", draw(st.sampled_from(sorted(ITEM_SIZE)))
        dims = draw(st.lists(st.one_of(st.none(), st.integers(0, len(axes) - 1)), max_size=4))
        shape = tuple(draw(st.integers(0, 5)) if axis is None else len(owners[axis]) for axis in dims)
        listed[name] = {"axes": dims, "owner": "shared", "dtype": dtype, "trainable": draw(st.booleans())}
        if None in dims and draw(st.booleans()):
            class_axis.append([name, dims.index(None)])
        for prefix in draw(st.sets(st.sampled_from([f"task/{t + 1}/" for t in range(len(tasks))]))) | {"shared/"}:
            data = rng.integers(0, 256, (*shape, ITEM_SIZE[dtype]), np.uint8)
            stored[prefix + name] = (dtype, data.view(f"u{ITEM_SIZE[dtype]}").reshape(shape))
        if draw(st.booleans()):
            stored[f"task/1/level/1/{name}"] = ("I32", np.array([1, 2, 3], np.uint32))
    described = metadata(units=units, axes=axes, tensors=listed, tasks=tasks, class_axis=class_axis)
    return owners, stored, described


def _joined(runs: list[list[int]]) -> list[list[int]]:
    joined: list[list[int]] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
    return joined


@settings(deadline=None, max_examples=150)
@given(networks(), st.sampled_from([1, 16, checkpoint.BLOCK]), st.randoms())
def test_slice_equals_fancy_indexing(tmp_path_factory, network, block, shuffler):
    owners, stored, described = network
    folder = tmp_path_factory.mktemp("slice")
    to_write = [(name, Tensor(dtype, data.shape, data)) for name, (dtype, data) in stored.items()]
    write(folder / "a.safetensors", dict(to_write), described)
    shuffler.shuffle(to_write)
    write(folder / "b.safetensors", dict(to_write), dict(reversed(described.items())))
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()

    header = read_header(folder / "a.safetensors")
    classes = {(name, dim) for name, dim in described["class_axis"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "BLOCK", block)
        for number, entry in enumerate(described["tasks"], 1):
            previous: set[int] = set()
            for level in range(1, len(entry["levels"]) + 1):
                kept = set(entry["order"][: entry["levels"][level - 1]])
                assert previous < kept
                previous = kept
                counts = slice_file(header, number, level, folder / "s.safetensors")
                cut_out = read_header(folder / "s.safetensors")
                assert cut_out.tensors.keys() == described["tensors"].keys()
                assert cut_out.metadata["kept"] == sorted(kept)
                assert counts == count(header, number, level) == count(cut_out)
                for name, info in described["tensors"].items():
                    if (narrow := f"task/{number}/level/{level}/{name}") in stored:
                        dtype, expected = stored[narrow]
                    else:
                        dtype, full = stored.get(f"task/{number}/{name}") or stored[f"shared/{name}"]
                        index = [
                            [
                                i
                                for i in range(size)
                                if (axis is None or owners[axis][i] == 0 or owners[axis][i] in kept)
                                and not ((name, dim) in classes and i >= len(entry["classes"]))
                            ]
                            for dim, (size, axis) in enumerate(zip(full.shape, info["axes"], strict=True))
                        ]
                        expected = full[np.ix_(*(np.array(i, int) for i in index))] if index else full
                    assert cut_out.tensors[name].dtype == dtype
                    assert cut_out.raw(name).shape == expected.shape
                    assert np.array_equal(cut_out.raw(name), expected)
                elements = {name: cut_out.raw(name).size for name in cut_out.tensors}
                assert counts.elements == sum(elements.values())
                assert counts.params == sum(
                    n for name, n in elements.items() if described["tensors"][name]["trainable"]
                )
                content = (folder / "s.safetensors").read_bytes()
                assert len(content) == 8 + int.from_bytes(content[:8], "little") + counts.bytes
                slice_file(header, number, level, folder / "again.safetensors")
                assert (folder / "again.safetensors").read_bytes() == content


@given(st.lists(st.integers(0, 4), max_size=12), st.sets(st.integers(1, 4)))
def test_kept_runs_are_maximal_and_cover_what_is_kept(owner, kept):
    axis = [[(i, i + 1) for i, o in enumerate(owner) if o == unit] for unit in range(1, 5)]
    runs = kept_runs(axis, kept, len(owner))
    assert [i for start, stop in runs for i in range(start, stop)] == [
        i for i, o in enumerate(owner) if o == 0 or o in kept
    ]
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(runs))


def test_slice_opens_with_plain_safetensors(file):
    slice_file(read_header(file), 2, 1, "s.safetensors")
    arrays = safetensors.numpy.load_file("s.safetensors")
    full = {name: tensor.data for name, tensor in tensors().items()}
    assert arrays.keys() == {"conv.weight", "bn.mean", "fc.weight"}
    assert np.array_equal(arrays["conv.weight"], full["shared/conv.weight"][[2, 3]])
    assert np.array_equal(arrays["bn.mean"], full["task/2/level/1/bn.mean"])
    assert np.array_equal(arrays["fc.weight"], full["shared/fc.weight"][:2, [2, 3]])
    with safe_open("s.safetensors", framework="numpy") as opened:
        dvn = json.loads(opened.metadata()["dvn"])
    assert dvn["kind"] == "slice"
    assert dvn["task"] == metadata()["tasks"][1]
    assert (dvn["task_number"], dvn["level"], dvn["kept"]) == (2, 1, [2])
    assert b"low digits" not in Path("s.safetensors").read_bytes()


def test_counts_of_a_known_network(file):
    header = read_header(file)
    assert count(header, 1, 2) == checkpoint.Counts(params=20 + 12, elements=20 + 4 + 12, bytes=36 * 4)
    assert count(header, 2, 1) == checkpoint.Counts(params=10 + 4, elements=10 + 2 + 4, bytes=16 * 4)


# Writing


def test_same_bytes_as_safetensors_own_writer(tmp_path):
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(7), "ü": np.zeros((0, 2), np.float32)}
    names = {"float32": "F32", "int64": "I64"}
    write(tmp_path / "x", {n: Tensor(names[a.dtype.name], a.shape, a) for n, a in arrays.items()}, {"format": 1})
    safetensors.numpy.save_file(arrays, tmp_path / "y", {"dvn": '{"format":1}'})
    ours, theirs = (tmp_path / "x").read_bytes(), (tmp_path / "y").read_bytes()
    length = 8 + int.from_bytes(ours[:8], "little")
    assert (ours[:8], ours[length:]) == (theirs[:8], theirs[length:])
    assert json.loads(ours[8:length]) == json.loads(theirs[8:length])


def test_write_takes_bytes_views_and_strided_arrays(tmp_path):
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    forms = [array.tobytes(), memoryview(array), bytearray(array), np.asfortranarray(array), lambda: iter(array)]
    for form in forms:
        write(tmp_path / "x", {"a": Tensor("BF16", (3, 4), form)}, metadata(tensors={}))
        assert np.array_equal(read_header(tmp_path / "x").raw("a"), array)


def test_write_refuses_data_that_does_not_fit(file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match="shared/a: 8 bytes for F32 of shape"):
        write(file, {"shared/a": Tensor("F32", (3,), bytes(8))}, metadata())
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(file, tensors(), metadata(training={"loss": float("nan")}))
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_no_other(file, monkeypatch, function):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(DvnError, match=r"^cannot write '.*dvn.safetensors': No space left on device$") as caught:
        write(file, {}, metadata())
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
            write(file, {"shared/a": f32(1_000_000)}, metadata())
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
        write(file, {"shared/a": Tensor("U8", (2,), blocks)}, metadata())
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


KEEP_WRITING = """
import itertools, sys
import numpy as np
from dvn_cli.checkpoint import Tensor, write

for version in itertools.count():
    array = np.full(500_000, version, np.uint32)
    tensors = {f"shared/{i}": Tensor("U32", array.shape, array) for i in range(4)}
    metadata = {"format": 1, "kind": "checkpoint", "units": 1, "axes": [], "tensors": {}, "tasks": []}
    write(sys.argv[1], tensors, {**metadata, "training": {"version": version}})
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
        header = read_header(file)
        assert len(header.tensors) == 4
        assert all((header.raw(name) == header.metadata["training"]["version"]).all() for name in header.tensors)
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
    write(link, {}, metadata(units=7))
    assert link.is_symlink()
    assert read_header(file).metadata["units"] == 7


def test_write_where_there_is_no_writing(file):
    with pytest.raises(InputError, match=r"^cannot write 'no/where': there is no folder '.*/no'$"):
        write("no/where", {}, metadata())
    with pytest.raises(InputError, match="there is no folder"):
        write(file / "inside", {}, metadata())
    with pytest.raises(InputError, match="it is a folder"):
        write(file.parent, {}, metadata())
    with pytest.raises(InputError, match="it is not a regular file"):
        write("/dev/null", {}, metadata())
    if os.geteuid():  # root may write anywhere
        file.parent.chmod(0o500)
        with pytest.raises(InputError, match="Permission denied"):
            write(file, {}, metadata())


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
            "is damaged: its metadata is not JSON",
        ),
        (
            lambda whole: safetensors.numpy.save({"a": np.zeros(2)}, {"dvn": "[]"}),
            "its metadata has no format and kind",
        ),
    ],
)
def test_bad_files(file, content, message):
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, this dvn reads up to 1: update dvn"),
        ({"kind": "optimizer"}, "has kind 'optimizer': it is neither a checkpoint nor a slice"),
        ({"tasks": [{"name": "x"}]}, "its metadata has no usable 'tasks'"),
        ({"axes": []}, "its axes do not say which unit owns which indices"),
        ({"axes": [[[[0]], []]]}, "its axes do not say which unit owns which indices"),
    ],
)
def test_bad_metadata(file, changes, message):
    write(file, tensors(), metadata(**changes))
    with pytest.raises(InputError, match=message):
        read_header(file)


def test_checkpoint_that_lacks_tensors(file):
    write(file, {name: tensor for name, tensor in tensors().items() if "bn" not in name}, metadata())
    with pytest.raises(InputError, match=r"is damaged: it has no tensor 'bn.mean' for task 2, level 2"):
        cut(read_header(file), 2, 2)
    write(file, {**tensors(), "shared/bn.mean": f32(4, 1)}, metadata())
    with pytest.raises(InputError, match=r"is damaged: 'shared/bn.mean' has 2 dimensions, not 1"):
        cut(read_header(file), 2, 2)


def test_no_file(file):
    with pytest.raises(
        InputError, match=r"^there is no checkpoint 'dvm.safetensors'; did you mean 'dvn.safetensors'\?$"
    ):
        read_header("dvm.safetensors")
    with pytest.raises(InputError, match=r"there is no checkpoint 'no/x.safetensors'; `dvn partition` and `dvn train`"):
        read_header("no/x.safetensors")
    with pytest.raises(InputError, match=r"cannot read '.*': Is a directory"):
        read_header(file.parent)


def test_find_task_and_check_level():
    dvn = metadata(tasks=[task(name, [1, 2], [1, 2]) for name in ("low digits", "1", "7")])
    assert [checkpoint.find_task(dvn, given) for given in ("2", 1, 2, "low digits", "7")] == [2, 1, 2, 1, 3]
    assert [checkpoint.find_task(dvn, f"name:{given}") for given in ("1", "low digits", "7")] == [2, 1, 3]
    assert [checkpoint.find_task(dvn, f"number:{given}") for given in (1, 2, 3)] == [1, 2, 3]
    both = r"the number of one task and the name of another \(1 'low digits', 2 '1'\): write number:1 or name:1"
    with pytest.raises(InputError, match=both):
        checkpoint.find_task(dvn, "1")
    listed = "the tasks are 1 'low digits', 2 '1', 3 '7'"
    with pytest.raises(InputError, match=f"there is no task '4'; {listed}"):
        checkpoint.find_task(dvn, "4")
    with pytest.raises(InputError, match="there is no task '0'"):
        checkpoint.find_task(dvn, 0)
    with pytest.raises(
        InputError, match=r"there is no task 'low_digits'; did you mean 'low digits'\? " + listed.capitalize()
    ):
        checkpoint.find_task(dvn, "low_digits")
    own = metadata(tasks=[task(name, [1, 2], [1, 2]) for name in ("2", "1", "name:1")])
    assert checkpoint.find_task(own, "name:1") == 3
    assert checkpoint.find_task(own, "name:name:1") == 3
    with pytest.raises(InputError, match="there is no task 'number:4'"):
        checkpoint.find_task(own, "number:4")
    for level in (-1, 0, 3):
        with pytest.raises(InputError, match=f"there is no level {level}; task '7' has levels 1 to 2"):
            checkpoint.check_level(dvn, 3, level)


# The command


app = typer.Typer()
app.command()(slice_command)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_command_with_its_defaults(file):
    line = run("--task", "odd", "--level", "1")
    size = Path("dvn-task2-level1.safetensors").stat().st_size
    assert line == f"dvn-task2-level1.safetensors  odd  level 1 of 2  units 2  14 parameters  {size / 1e6:,.2f} MB\n"
    os.mkdir("folder")
    run("--task", "2", "--level", "1", "-o", "folder")
    run(str(file), "--task", "2", "--level", "1", "-o", "s.safetensors")
    content = Path("dvn-task2-level1.safetensors").read_bytes()
    assert Path("folder/dvn-task2-level1.safetensors").read_bytes() == content
    assert Path("s.safetensors").read_bytes() == content


def test_command_for_all_with_json(file):
    result = json.loads(run("--all", "--json"))
    assert result["checkpoint"] == "dvn.safetensors"
    assert [(each["task"], each["name"], each["level"], each["units"]) for each in result["slices"]] == [
        (1, "low digits", 1, [1]),
        (1, "low digits", 2, [1, 2]),
        (2, "odd", 1, [2]),
        (2, "odd", 2, [1, 2]),
    ]
    for each in result["slices"]:
        assert each["bytes"] == Path(each["file"]).stat().st_size
        assert each["params"] == count(read_header(each["file"])).params
    assert len(os.listdir("dvn-slices")) == 4
    assert len(run("--all", "-o", "a/b").splitlines()) == len(os.listdir("a/b")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which network? Give `--task T --level L` for one of them, or `--all` for every one"),
        (["--task", "1"], "which network?"),
        (["--level", "1"], "which network?"),
        (["--all", "--task", "1", "--level", "1"], "which network?"),
        (["--all", "--format", "onnx"], "there is no format 'onnx'; --format takes safetensors"),
        (["--task", "3", "--level", "1"], "there is no task '3'; the tasks are 1 'low digits', 2 'odd'"),
        (["--task", "1", "--level", "3"], "there is no level 3; task 'low digits' has levels 1 to 2"),
        (["no.safetensors", "--all"], "there is no checkpoint 'no.safetensors'"),
        (["--task", "1", "--level", "1", "-o", "dvn.safetensors"], "that is the checkpoint itself"),
        (["--all", "-o", "dvn.safetensors"], "cannot write to the folder 'dvn.safetensors': '"),
        (["--task", "1", "--level", "1", "-o", "trained.safetensors"], "is a trained checkpoint (tasks: odd; "),
    ],
)
def test_command_with_bad_input(file, arguments, message):
    write("trained.safetensors", {}, metadata(tasks=[task("odd", [1, 2], [1, 2])], training={"epochs": 2}))
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    with pytest.raises(InputError) as caught:
        run(*arguments)
    assert message in str(caught.value)
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == before


def test_a_full_disk_leaves_no_folder(file, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DvnError, match=r"cannot write 'a/dvn-task1-level1.safetensors': No space left on device"):
        run("--all", "-o", "a")
    assert os.listdir(file.parent) == [file.name]


def test_a_slice_holds_nothing_of_where_it_was_made(file):
    """Equal tasks whose images lie elsewhere give equal bytes."""
    for home in ("ann", "bob"):
        data = {"spec": {"source": "folder", "path": "secret"}, "base": f"/home/{home}"}
        tasks = [{**each, "data": data} for each in metadata()["tasks"]]
        record = {"recipe": {"name": home}, "epochs": 1}
        write(f"{home}.safetensors", tensors(), metadata(tasks=tasks, training=record))
        run(f"{home}.safetensors", "--task", "2", "--level", "1", "-o", f"{home}-slice.safetensors")
    content = Path("ann-slice.safetensors").read_bytes()
    assert content == Path("bob-slice.safetensors").read_bytes()
    assert not any(word in content for word in (b"ann", b"secret", b"home"))


def test_command_on_a_slice(file):
    run("--task", "2", "--level", "1", "-o", "s.safetensors")
    message = r"^'s.safetensors' is a slice already \(task 'odd', level 1\); give the checkpoint it was cut from$"
    with pytest.raises(InputError, match=message):
        run("s.safetensors", "--all")
    with pytest.raises(InputError, match="is a slice already"):
        cut(read_header("s.safetensors"), 1, 1)
    write("less.safetensors", {"conv.weight": f32(2, 5)}, read_header("s.safetensors").metadata)
    with pytest.raises(InputError, match="does not hold the tensors that its metadata lists"):
        read_header("less.safetensors")


SLICE_AND_TELL = """
import sys, time
start = time.perf_counter()
import typer
from dvn_cli.cli.slice import slice_command
app = typer.Typer()
app.command()(slice_command)
app(sys.argv[1:], standalone_mode=False)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(peak, *sorted({name.split(".")[0] for name in sys.modules} & {"torch", "timm", "torchvision", "pyarrow"}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of memory from Linux's /proc")
@pytest.mark.parametrize("level", ["1", "4"])
def test_slicing_100_mb_takes_little_memory_and_no_torch(tmp_path, level):
    width, units = 512, 4
    axis = [[[u * width // units, (u + 1) * width // units]] for u in range(units)]
    # Many tensors, whose pages must not add up, and one of 60 MB, which must not be held as a whole.
    shapes = {f"conv{i}.weight": (width, width, 3, 3) for i in range(5)} | {"fc.weight": (width, 60, width, 1)}
    described = metadata(
        units=units,
        axes=[axis],
        tensors={
            name: {"axes": [0 if size == width else None for size in shape], "dtype": "F32", "trainable": True}
            for name, shape in shapes.items()
        },
        class_axis=[],
        tasks=[task("all", [1, 2, 3, 4], [1, 2, 3, 4])],
    )
    full = {f"shared/{name}": Tensor("F32", shape, np.ones(shape, np.float32)) for name, shape in shapes.items()}
    write(tmp_path / "dvn.safetensors", full, described)
    assert (tmp_path / "dvn.safetensors").stat().st_size > 100_000_000
    command = [sys.executable, "-c", SLICE_AND_TELL, "--task", "1", "--level", level]
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    peak_kb, *heavy = result.stdout.splitlines()[-1].split()
    assert not heavy
    assert int(peak_kb) < 75_000
