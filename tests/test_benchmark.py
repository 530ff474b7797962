"""`dvn bench` as it is typed: what it reports, in JSON and in a table. No test asserts how fast a thing is."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import schema
import torch

import dvn_cli
from dvn_cli import benchmark, worker
from dvn_cli.backbones import resolve
from dvn_cli.cli import main
from dvn_cli.dividing import partition_backbone
from dvn_cli.errors import DvnError, InputError
from dvn_cli.export import Form
from dvn_cli.loading import read_tensors
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.file import read_checkpoint, read_header
from dvn_cli.store.metadata import Task
from dvn_cli.store.slicing import count, slice_file, slice_size
from dvn_cli.tasks import default_tasks

KEYS = {"file", "task", "name", "level", "params", "density", "compression", "macs", "latency_ms", "images_per_s"}
KEYS |= {"bytes", "peak_memory_bytes", "speedup", "format", "difference"}


class Forked:
    """A process as `subprocess.Popen` gives one, forked of this one: a new one imports torch, which takes seconds."""

    def __init__(self, words: list[str], **_: object) -> None:
        (told, tells), (heard, answers) = os.pipe(), os.pipe()
        self.number = os.fork()
        if not self.number:
            try:
                os.dup2(told, 0)
                os.dup2(answers, 1)
                sys.stdin = os.fdopen(0, closefd=False)
                exec(words[-1], {})
            finally:
                os._exit(0)
        os.close(told)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(tells, "wb"), os.fdopen(heard, "rb")

    def kill(self) -> None:
        os.kill(self.number, signal.SIGKILL)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dvn.safetensors`, of two units, and three of its slices."""
    folder = tmp_path_factory.mktemp("bench")
    spec = resolve("wrn_10_1", 10)
    module = spec.build()
    tasks = default_tasks(2, 10, (32, 32), (0.5,) * 3, (0.25,) * 3)
    DeepVirtualNetwork.from_backbone(partition_backbone(spec, 2, module=module), module, tasks).save(
        folder / "dvn.safetensors"
    )
    header = read_checkpoint(folder / "dvn.safetensors")
    for task, level in ((1, 2), (2, 1), (2, 2)):
        slice_file(header, task, level, folder / f"task{task}-level{level}.safetensors")
    return folder


def test_a_checkpoint_as_typed(folder: Path) -> None:
    command = [sys.executable, "-c", "from dvn_cli.cli import main; main()", "bench", "--results-file", "results.json"]
    options = ["--batch-size", "3", "--num-warm-iter", "1", "--num-bench-iter", "5", "--threads", "1", "--json"]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert json.loads((folder / "results.json").read_text()) == document
    assert document["torch"] == torch.__version__
    assert (document["batch_size"], document["threads"], document["num_bench_iter"]) == (3, 1, 5)
    low, top = document["results"]
    header = read_checkpoint(folder / "dvn.safetensors")
    for level, row in ((1, low), (2, top)):
        assert set(row) == KEYS
        assert (row["task"], row["name"], row["level"]) == (1, "task1", level)
        assert row["params"] == count(header, 1, level).params
        assert row["bytes"] == count(header, 1, level).bytes
        assert row["density"] == row["params"] / top["params"]
        assert row["compression"] == pytest.approx(top["params"] / row["params"])
        latency = row["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
        assert row["images_per_s"] == pytest.approx(3 / (latency["p50"] / 1000))
        if sys.platform == "linux" and document["device"] == "cpu":
            assert count(header, 1, level).bytes < row["peak_memory_bytes"] < 1e9
    assert low["macs"] < top["macs"]
    assert low["speedup"] > 0
    assert top["speedup"] == 1


@pytest.fixture
def typed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `dvn bench` in this process: its exit code and what it prints."""
    monkeypatch.setattr(worker.subprocess, "Popen", Forked)
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dvn", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


def test_slices_in_a_table_of_80_columns(
    typed: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = ("--num-warm-iter", 0, "--num-bench-iter", 1, "--device", "cpu", "--channels-last")
    code, out, err = typed("task2-level1.safetensors", "task1-level2.safetensors", *options)
    assert code == 0, err
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("cpu")
    rows = [line.split() for line in lines if line.startswith("task")]
    assert [row[:2] for row in rows] == [["task", "level"], ["task2-level1", "1"], ["task1-level2", "2"]] * 2
    assert [row[-1] for row in rows] == ["memory", "MB", "MB", "speed-up", "-", "-"]
    for title in ("params", "density", "compression", "MACs", "peak memory", "p50 ms", "p99 ms", "speed-up"):
        assert title in out


def test_a_slice_of_another_type(folder: Path, typed: Callable[..., tuple[int, str, str]]) -> None:
    dvn_cli.slice(folder / "dvn.safetensors", 2, 1, folder / "half.safetensors", form=Form(dtype="bf16"))
    code, out, err = typed("half.safetensors", "--num-warm-iter", 0, "--num-bench-iter", 1, "--device", "cpu", "--json")
    assert code == 0, err
    [row] = json.loads(out)["results"]
    assert row["bytes"] < 3 * row["params"]
    assert row["latency_ms"]["p50"] > 0


def test_formats_in_one_table(
    folder: Path, typed: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    options = ("--num-warm-iter", 0, "--num-bench-iter", 2, "--results-file", "formats.json")
    code, out, err = typed("--level", 1, "--formats", "safetensors,pt2,timm, pt2", *options)
    assert code == 0, err
    assert err == "timm cannot express level 1 of task 'task1': wrn_10_1 is not one of its models\n"
    rows = [line.split()[:3] for line in out.splitlines() if line.startswith("task1")]
    assert rows == [["task1", "1", "safetensors"], ["task1", "1", "pt2"]]
    plain, pt2 = json.loads((folder / "formats.json").read_text())["results"]
    assert plain["bytes"] == slice_size(read_checkpoint(folder / "dvn.safetensors"), 1, 1)
    assert (plain["difference"], pt2["difference"], pt2["params"]) == (0, 0, plain["params"])
    assert 4 * pt2["params"] < pt2["bytes"]
    assert pt2["latency_ms"]["p50"] > 0
    if sys.platform == "linux":
        assert 4 * pt2["params"] < pt2["peak_memory_bytes"] < 1e9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.safetensors"], "there is no checkpoint 'none.safetensors'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--task", "3"], "3"),
        (["--task", ""], "there is no task ''; the tasks are 1 'task1', 2 'task2'"),
        (["--level", "3"], "3"),
        (["--task", "1", "--all"], "not both"),
        (["task2-level1.safetensors", "--task", "2"], "is a slice"),
        (["--batch-size", "0"], "batch-size"),
        (["--formats", "pt"], "there is no format 'pt'; did you mean 'pt2'?"),
        (["--formats", "pt2", "--channels-last"], "formats are compared on the CPU"),
        (["--results-file", "none/r.json"], "cannot write 'none/r.json': there is no folder"),
        (["--results-file", "dvn.safetensors"], "--results-file cannot be 'dvn.safetensors', which holds weights"),
        (["--baseline", "b.json", "--results-file", "b.json"], "--results-file cannot be 'b.json', which this command"),
        (["--training", "r.yaml", "--results-file", "r.yaml"], "--results-file cannot be 'r.yaml', which this command"),
        (["--scenario", "j1", "--plots", "dvn.safetensors"], "cannot write to the folder 'dvn.safetensors': '"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(
    typed: Callable[..., tuple[int, str, str]], arguments: list[str], message: str
) -> None:
    code, out, err = typed(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_network_that_fails_to_run_is_told_in_one_line(typed: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = typed("--batch-size", 10**12, "--device", "cpu", "--level", 1)
    assert (code, out) == (1, "")
    assert err.startswith("dvn: task 1, level 1 of 'dvn.safetensors' cannot run on cpu: too little memory: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed, most likely for want of memory"),
        ("import sys; sys.stdout.buffer.write(b'\\x80'); sys.exit(3)", "ended with exit code 3"),
    ],
)
def test_a_process_that_dies_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, why: str
) -> None:
    target = benchmark.Target(read_checkpoint(folder / "dvn.safetensors"), 2, 1)
    job, _ = benchmark._prepare(target, tmp_path / "cut.safetensors", benchmark.Settings(torch.device("cpu")))
    monkeypatch.setattr(worker, "_START", code)
    with pytest.raises(DvnError, match=f"level 1 of '.*': its process {why}"), worker.Worker(job, "time") as dying:
        dying.answer()


def test_speed_ups_are_ratios_within_a_round(folder: Path) -> None:
    """The machine slows down tenfold between the rounds, and the ratio stays."""
    header = read_checkpoint(folder / "dvn.safetensors")
    targets = [benchmark.Target(header, 1, level) for level in (1, 2)]
    costs = [benchmark.Cost(params, 1, 1.0, 1) for params in (10, 20)]
    times = [[[1.0, 1.0, 9.0], [10.0]], [[3.0, 3.0, 3.0], [30.0]]]
    assert [benchmark._speedup(number, targets, costs, times) for number in (0, 1)] == [3, 1]


def test_networks_are_compared_within_their_task(folder: Path) -> None:
    def file(name: str) -> list[benchmark.Target]:
        return benchmark.targets_of(read_header(folder / f"{name}.safetensors"), every=True)

    targets = [*file("dvn"), *file("task2-level1"), *file("task1-level2"), *file("task2-level2")]
    numbers = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 1), (1, 2), (2, 2)]
    assert [(target.task, target.level) for target in targets] == numbers
    groups: dict[object, list[int]] = {}
    for number, target in enumerate(targets):
        groups.setdefault(target.family, []).append(number)
    assert sorted(groups.values()) == [[0, 1], [2, 3], [4, 6], [5]]
    costs = [benchmark.Cost(level, 1, 1.0, 1) for _, level in numbers]
    speedups = [benchmark._speedup(n, targets, costs, [[[1.0 * level]] for _, level in numbers]) for n in range(7)]
    assert speedups == [2, 1, 2, 1, 2, None, 1]


def test_percentiles_are_of_all_iterations() -> None:
    latencies = tuple(float(n) for n in range(101))
    result = benchmark.Measurement("file", 1, "name", 1, (1,), 1, 4, 0.5, 1, latencies, None, None, batch_size=4)
    assert [result.percentile(p) for p in (50, 90, 99)] == [50, 90, 99]
    assert result.to_dict()["latency_ms"] == {"p50": 50000, "p90": 90000, "p99": 99000}
    assert result.to_dict()["images_per_s"] == 4 / 50


def test_tensors_are_read_as_they_were_written(folder: Path) -> None:
    from safetensors.torch import load_file

    file = folder / "task2-level1.safetensors"
    expected, read = load_file(file), read_tensors(read_header(file))
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_tasks_that_have_fewer_levels_are_passed_over(folder: Path) -> None:
    header = read_checkpoint(folder / "dvn.safetensors")
    few = replace(header.metadata.tasks[0], levels=header.metadata.tasks[0].levels[:1])
    metadata = replace(header.metadata, tasks=(few, *header.metadata.tasks[1:]))
    found = benchmark.targets_of(replace(header, metadata=metadata), every=True, level=2)
    assert [(target.task, target.level) for target in found] == [
        (task, 2) for task in range(2, len(metadata.tasks) + 1)
    ]
    with pytest.raises(InputError, match="there is no level 3; task"):
        benchmark.targets_of(replace(header, metadata=metadata), every=True, level=3)


def test_a_task_of_its_own_size_is_measured_at_it(folder: Path, tmp_path: Path) -> None:
    spec = resolve("wrn_10_1", 10)
    module = spec.build()
    partition = partition_backbone(spec, 2, module=module)
    common = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "levels": (2,)}
    tasks = [
        Task("large", tuple("abc"), (64, 64), order=(1, 2), **common),  # type: ignore[arg-type]
        Task("small", tuple("ab"), (32, 32), order=(2, 1), **common),  # type: ignore[arg-type]
    ]
    DeepVirtualNetwork.from_backbone(partition, module, tasks).save(tmp_path / "two.safetensors")
    header = read_checkpoint(tmp_path / "two.safetensors")
    settings = benchmark.Settings(torch.device("cpu"))
    jobs = [benchmark._prepare(benchmark.Target(header, t, 1), tmp_path / f"{t}", settings)[0] for t in (1, 2)]
    shapes = []
    for job in jobs:
        network, images = worker.load(job)
        with torch.inference_mode():
            shapes.append((tuple(images.shape), tuple(network(images).shape)))
            assert len(worker.seconds(network, images, 2)) == 2
    assert shapes == [((1, 3, 64, 64), (1, 3)), ((1, 3, 32, 32), (1, 2))]


def test_against_a_baseline(
    folder: Path, typed: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is typed, with measurements that are at hand."""
    rows = [
        benchmark.Measurement("dvn.safetensors", 1, "a", level, (1,), 10 * level, 40, 1.0, 7, (0.5,), None, None)
        for level in (1, 2)
    ]
    monkeypatch.setattr(benchmark, "bench", lambda *_, **__: rows)
    assert typed("--results-file", "before.json")[0] == 0
    code, out, err = typed("--baseline", "before.json", "--json")
    assert (code, err) == (0, "")
    validator = schema.validator("bench")
    for document in (json.loads(out), json.loads((folder / "before.json").read_text())):
        validator.validate(document)
        assert not any(map(validator.is_valid, (document | {"results": []}, document | {"schema_version": 2})))
    same = {"file": "dvn.safetensors", "name": "a", "format": None, "differences": {}, "latency_ratio": 1.0}
    assert json.loads(out)["baseline"] == [{"level": level, **same} for level in (1, 2)]

    before = json.loads((folder / "before.json").read_text())
    before["results"][0] |= {"params": 11, "macs": 6}
    before["results"][1]["level"] = 3
    before["results"].append(before["results"][0] | {"format": "pt2"})
    before["host"] = "another"
    (folder / "before.json").write_text(json.dumps(before))
    code, out, err = typed("--baseline", "before.json")
    assert code == 1
    assert err.splitlines() == [
        "task 'a', level 2 is not in the baseline",
        "format pt2 was not asked for: what the baseline has of it is not compared",
        "dvn: task 'a', level 1: params 11 -> 10, macs 6 -> 7 (2 of 2 networks are not the baseline's)",
    ]
    assert [line.split() for line in out.splitlines()[-2:]] == [
        ["a", "1", "-1", "same", "+1", "-"],
        ["a", "3", "gone", "gone", "gone", "-"],
    ]
    del before["host"]
    (folder / "before.json").write_text(json.dumps(before))
    message = "dvn: 'before.json' is no document of `dvn bench --json` of this version: 'host' is missing\n"
    assert typed("--baseline", "before.json") == (2, "", message)


def test_what_is_asked_for_is_compared_with_a_baseline_of_all(
    folder: Path, typed: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        benchmark.Measurement("dvn.safetensors", task, name, level, (1,), 9, 40, 1.0, 7, (0.5,), None, None)
        for task, name in ((1, "a"), (2, "b"))
        for level in (1, 2)
    ]

    def bench(_files: object, task: str | None, level: int | None, **more: object) -> list[benchmark.Measurement]:
        tasks = ("1", "2", "a", "b") if more["every"] else (task or "1",)
        return [row for row in rows if {row.name, str(row.task)} & {*tasks} and level in (None, row.level)]

    def compared(*arguments: object) -> list[tuple[str, int]]:
        code, out, err = typed(*arguments, "--baseline", "all.json", "--json")
        assert code == 0, err
        assert err == ("" if "--all" in arguments else unasked.format("a" if "b" in arguments else "b"))
        return [(row["name"], row["level"]) for row in json.loads(out)["baseline"]]

    unasked = "task '{}' was not asked for: what the baseline has of it is not compared\n"
    monkeypatch.setattr(benchmark, "bench", bench)
    assert typed("--all", "--results-file", "all.json")[0] == 0
    assert compared("--all") == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert compared("--task", "b") == [("b", 1), ("b", 2)]
    assert compared() == [("a", 1), ("a", 2)]
    assert compared("--level", 1) == [("a", 1)]
    assert compared("--level", 2, "--all") == [("a", 2), ("b", 2)]

    document = json.loads((folder / "all.json").read_text())
    (folder / "newer.json").write_text(json.dumps(document | {"schema_version": 2}))
    message = "dvn: 'newer.json' has schema_version 2, this dvn reads up to 1: update dvn\n"
    assert typed("--all", "--baseline", "newer.json") == (2, "", message)
    lacking = document | {"results": [row for row in document["results"] if (row["name"], row["level"]) != ("b", 2)]}
    (folder / "lacking.json").write_text(json.dumps(lacking))
    code, _, err = typed("--all", "--baseline", "lacking.json")
    assert (code, err) == (0, "task 'b', level 2 is not in the baseline\n")
    assert typed("--task", "b", "--level", 2, "--baseline", "lacking.json")[0] == 2
    (folder / "empty.json").write_text(json.dumps(document | {"results": []}))
    message = "dvn: 'empty.json' is of no network: nothing would be compared\n"
    assert typed("--all", "--baseline", "empty.json") == (2, "", message)
    for row in document["results"]:
        row["name"] += "2"
    (folder / "others.json").write_text(json.dumps(document))
    code, out, err = typed("--all", "--baseline", "others.json")
    assert code == 2
    assert "p50" in out
    assert err.splitlines()[-1] == "dvn: none of the networks that were measured is in the baseline"


def test_files_tell_networks_apart_that_are_of_one_task_and_level(
    typed: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (
        benchmark.Measurement(f"{file}.safetensors", 1, "a", 1, (1,), params, 40, 1.0, 7, (0.5,), None, None)
        for file, params in (("m1", 20), ("m2", 10))
    )
    monkeypatch.setattr(benchmark, "bench", lambda files, *_, **__: [m for m in (one, two) if Path(m.file) in files])
    assert typed("m1.safetensors", "m2.safetensors", "--results-file", "two.json")[0] == 0
    code, out, err = typed("m2.safetensors", "m1.safetensors", "--baseline", "two.json")
    assert (code, err) == (0, "")
    assert [line.split()[:3] for line in out.splitlines()[-2:]] == [["m1", "a", "1"], ["m2", "a", "1"]]
    gone = "dvn: task 'a', level 1 of 'm1.safetensors': it is gone (1 of 2 networks are not the baseline's)\n"
    assert typed("m2.safetensors", "--baseline", "two.json")[::2] == (1, gone)
    assert typed("m2.safetensors", "--results-file", "one.json")[0] == 0
    assert typed("m1.safetensors", "--baseline", "one.json")[0] == 1  # one network each is compared whatever its file
