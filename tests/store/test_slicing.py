"""Networks cut out of tiny checkpoints, and `dvn slice`."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import array, content, f32, indices, metadata, networks, task, tensors
from typer.testing import CliRunner

import dvn_cli
from dvn_cli.cli.slice import slice_command
from dvn_cli.errors import DvnError, InputError
from dvn_cli.store import slicing
from dvn_cli.store.file import TensorData, read_checkpoint, read_header, write
from dvn_cli.store.slicing import BLOCK, Counts, count, slice_file

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dvn_cli.__file__).parents[1])}


@settings(deadline=None, max_examples=80)
@given(networks(), st.sampled_from([1, 16, BLOCK]), st.randoms())
def test_slice_equals_fancy_indexing(tmp_path_factory, network, block, shuffler):
    owners, stored, described = network
    folder = tmp_path_factory.mktemp("slice")
    to_write = [(name, TensorData(dtype, data.shape, data)) for name, (dtype, data) in stored.items()]
    write(folder / "a.safetensors", dict(to_write), metadata(**described))
    shuffler.shuffle(to_write)
    write(folder / "b.safetensors", dict(to_write), metadata(**dict(reversed(described.items()))))
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()

    header = read_checkpoint(folder / "a.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slicing, "BLOCK", block)
        for number, entry in enumerate(described["tasks"], 1):
            previous: set[int] = set()
            for level in range(1, len(entry["levels"]) + 1):
                kept = set(entry["order"][: entry["levels"][level - 1]])
                assert previous < kept
                previous = kept
                counts = slice_file(header, number, level, folder / "s.safetensors")
                cut_out = read_header(folder / "s.safetensors")
                assert cut_out.tensors.keys() == described["tensors"].keys()
                assert list(cut_out.metadata.kept) == sorted(kept)
                assert counts == count(header, number, level) == count(cut_out)
                for name, info in described["tensors"].items():
                    if (narrow := f"task/{number}/level/{level}/{name}") in stored:
                        dtype, expected = stored[narrow]
                    else:
                        dtype, full = stored.get(f"task/{number}/{name}") or stored[f"shared/{name}"]
                        index = indices(owners, info["axes"], full.shape, name, described["class_axis"], entry, level)
                        expected = full[np.ix_(*(np.array(i, int) for i in index))] if index else full
                    assert cut_out.tensors[name].dtype == dtype
                    assert array(cut_out, name).shape == expected.shape
                    assert np.array_equal(array(cut_out, name), expected)
                elements = {name: array(cut_out, name).size for name in cut_out.tensors}
                assert counts.elements == sum(elements.values())
                assert counts.params == sum(
                    n for name, n in elements.items() if described["tensors"][name]["trainable"]
                )
                content = (folder / "s.safetensors").read_bytes()
                assert len(content) == 8 + int.from_bytes(content[:8], "little") + counts.bytes
                slice_file(header, number, level, folder / "again.safetensors")
                assert (folder / "again.safetensors").read_bytes() == content


def test_slice_opens_with_plain_safetensors(file):
    slice_file(read_checkpoint(file), 2, 1, "s.safetensors")
    arrays = safetensors.numpy.load_file("s.safetensors")
    full = {name: tensor.data for name, tensor in tensors().items()}
    assert arrays.keys() == {"conv.weight", "bn.mean", "fc.weight"}
    assert np.array_equal(arrays["conv.weight"], full["shared/conv.weight"][[2, 3]])
    assert np.array_equal(arrays["bn.mean"], full["task/2/level/1/bn.mean"])
    assert np.array_equal(arrays["fc.weight"], full["shared/fc.weight"][:2, [2, 3]])
    with safe_open("s.safetensors", framework="numpy") as opened:
        dvn = json.loads(opened.metadata()["dvn"])
    assert dvn["kind"] == "slice"
    assert {**dvn["task"], **task("odd", [2, 1], [1, 2], classes=2)} == dvn["task"]
    assert (dvn["task_number"], dvn["level"], dvn["kept"]) == (2, 1, [2])
    assert b"low digits" not in Path("s.safetensors").read_bytes()


def test_counts_of_a_known_network(file):
    header = read_checkpoint(file)
    assert count(header, 1, 2) == Counts(params=20 + 12, elements=20 + 4 + 12, bytes=36 * 4)
    assert count(header, 2, 1) == Counts(params=10 + 4, elements=10 + 2 + 4, bytes=16 * 4)


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
    Path("s.bin").touch()  # as of mktemp, with nothing to lose
    for _ in range(2):  # in the place of a slice, whatever its name
        run("--task", "2", "--level", "1", "-o", "s.bin")
        assert Path("s.bin").read_bytes() == content


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
    assert len(list(Path("dvn-slices").glob("*.safetensors"))) == 4
    assert run("--all", "--json") == json.dumps(result, indent=2) + "\n"  # in the place of the older ones
    manifest = json.loads(Path("dvn-slices/manifest.json").read_text())
    assert [(each["task"], each["level"], each["bytes"]) for each in manifest["slices"]] == [
        (each["task"], each["level"], each["bytes"]) for each in result["slices"]
    ]
    assert len(run("--all", "-o", "a/b").splitlines()) == 4
    assert len(os.listdir("a/b")) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which network? Give `--task T --level L` for one of them, or `--all` for every one"),
        (["--task", "1"], "which network?"),
        (["--level", "1"], "which network?"),
        (["--all", "--task", "1", "--level", "1"], "which network?"),
        (["--all", "--format", "onx"], "there is no format 'onx'; did you mean 'onnx'?"),
        (["--task", "3", "--level", "1"], "there is no task '3'; the tasks are 1 'low digits', 2 'odd'"),
        (["--task", "1", "--level", "3"], "there is no level 3; task 'low digits' has levels 1 to 2"),
        (["no.safetensors", "--all"], "there is no checkpoint 'no.safetensors'"),
        (["--task", "1", "--level", "1", "-o", "dvn.safetensors"], "that is the checkpoint itself"),
        (["--all", "-o", "dvn.safetensors"], "cannot write to the folder 'dvn.safetensors': '"),
        (["--all", "-o", "web"], "'web/manifest.json' is no manifest of `dvn slice --all`: 'format' is missing; give "),
        (
            ["--task", "1", "--level", "1", "--data", "a.yaml", "-o", "a.yaml"],
            "--output cannot be 'a.yaml', which",
        ),
        (
            ["--task", "1", "--level", "1", "-o", "trained.safetensors"],
            "is a trained checkpoint (tasks: low digits, odd; 2 epochs, ",
        ),
        (["--task", "1", "--level", "1", "-o", "x.run.json"], "to 'x.run.json': its name does not end with .safe"),
        (["--task", "1", "--level", "1", "-o", "a.yaml"], "to 'a.yaml': its name does not end with .safetensor"),
        (["--task", "1", "--level", "1", "--format", "pt2", "-o", "plain.safetensors"], "name does not end with .pt2"),
        (["--task", "1", "--level", "1", "--format", "pt2", "-o", "new.pt"], "to 'new.pt': its name does not end with"),
    ],
)
def test_command_with_bad_input(file, arguments, message):
    training = {"recipe": {}, "epochs": 2}
    write("trained.safetensors", tensors(), metadata(training=training))
    Path("a.yaml").write_text("source: digits")
    Path("x.run.json").write_text("{}")
    safetensors.numpy.save_file({"weight": np.ones(2)}, "plain.safetensors")
    Path("web").mkdir()
    Path("web/manifest.json").write_text('{"name": "a page"}')
    before = {path: path.read_bytes() for path in file.parent.rglob("*.*")}
    with pytest.raises(InputError) as caught:
        run(*arguments)
    assert message in str(caught.value)
    assert {path: path.read_bytes() for path in file.parent.rglob("*.*")} == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_manifest_has_names_that_are_no_text(file):
    name = os.fsdecode(b"m\xff.safetensors")
    file.rename(name)
    run(name, "--all", "-o", "a", "--json")
    manifest = json.loads(Path("a/manifest.json").read_text(encoding="utf-8"))
    assert manifest["checkpoint"] == name
    written = {each["file"] for cut in manifest["slices"] for each in cut["files"]}
    assert written == set(os.listdir("a")) - {"manifest.json"}


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
        tasks = [{**each, "data": data} for each in content()["tasks"]]
        record = {"recipe": {"name": home}, "epochs": 1}
        write(f"{home}.safetensors", tensors(), metadata(tasks=tasks, training=record))
        run(f"{home}.safetensors", "--task", "2", "--level", "1", "-o", f"{home}-slice.safetensors")
    whole = Path("ann-slice.safetensors").read_bytes()
    assert whole == Path("bob-slice.safetensors").read_bytes()
    assert not any(word in whole for word in (b"ann", b"secret", b"home"))


def test_command_on_a_slice(file):
    run("--task", "2", "--level", "1", "-o", "s.safetensors")
    message = r"^'s.safetensors' is a slice already \(task 'odd', level 1\); give the checkpoint it was cut from$"
    with pytest.raises(InputError, match=message):
        run("s.safetensors", "--all")
    with pytest.raises(InputError, match="does not hold the tensors that its metadata lists"):
        write("less.safetensors", {"conv.weight": f32(2, 5)}, read_header("s.safetensors").metadata)


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
            name: {"axes": [0 if size == width else None for size in shape], "trainable": True}
            for name, shape in shapes.items()
        },
        class_axis=[],
        tasks=[task("all", [1, 2, 3, 4], [1, 2, 3, 4])],
    )
    full = {f"shared/{name}": TensorData("F32", shape, np.ones(shape, np.float32)) for name, shape in shapes.items()}
    write(tmp_path / "dvn.safetensors", full, described)
    assert (tmp_path / "dvn.safetensors").stat().st_size > 100_000_000
    command = [sys.executable, "-c", SLICE_AND_TELL, "--task", "1", "--level", level]
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    peak_kb, *heavy = result.stdout.splitlines()[-1].split()
    assert not heavy
    assert int(peak_kb) < 75_000
