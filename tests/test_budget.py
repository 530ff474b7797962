"""Levels chosen by a budget: from counts, and from what was recorded."""

import gzip
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dvn_cli import budget
from dvn_cli.budget import KnownLevel, amount, choose, known_levels
from dvn_cli.cli import app
from dvn_cli.errors import DvnError, InputError
from dvn_cli.evaluation import costs, rendering
from dvn_cli.export import slice as slice_network
from dvn_cli.export import slice_all
from dvn_cli.store.file import read_checkpoint
from dvn_cli.training.session import Files

TRAINED = Path(__file__).parent / "pins/files/0.1.0/trained.safetensors.gz"


@pytest.fixture(autouse=True)
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trained checkpoint in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("dvn.safetensors")
    path.write_bytes(gzip.decompress(TRAINED.read_bytes()))
    return path


def run(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["slice", "--task", "1", *words, "--json"])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def recorded(path: str, **figures: list[Any]) -> Path:
    """Writes results of the first task, level after level."""
    header = read_checkpoint("dvn.safetensors")
    name, levels = header.metadata.tasks[0].name, known_levels(header, 1)
    rows = [
        {"task": 1, "name": name, "level": level.level, "params": level.params}
        | {key: values[level.level - 1] for key, values in figures.items()}
        for level in levels
    ]
    Path(path).write_text(json.dumps({"results": rows}))
    return Path(path)


def write_record(path: str | Path, test: list[dict[str, Any]], **keys: Any) -> None:
    """Writes the record of the run of the checkpoint, with other keys in its recipe."""
    training = read_checkpoint("dvn.safetensors").metadata.training
    assert training is not None
    Path(path).write_text(json.dumps({"recipe": {**training.recipe, **keys}, "test": test}))


def test_counts_are_those_of_the_files() -> None:
    header = read_checkpoint("dvn.safetensors")
    for task, entry in enumerate(header.metadata.tasks, 1):
        for level in known_levels(header, task, counted=["bytes"]):
            cut = slice_network("dvn.safetensors", task, level.level, "cut.safetensors")
            assert (level.bytes, level.params) == (cut.bytes, cut.params)
        assert level.level == len(entry.levels)


def test_the_largest_level_within_a_limit_is_cut() -> None:
    one, two = known_levels(read_checkpoint("dvn.safetensors"), 1, counted=["bytes"])
    for words, level in (
        (["--max-bytes", str(one.bytes)], 1),
        (["--max-bytes", str(two.bytes - 1)], 1),
        (["--max-bytes", str(two.bytes)], 2),
        (["--max-params", f"{two.params / 1000}K"], 2),
        (["--max-params", f"{two.params}", "--max-bytes", f"{one.bytes}B"], 1),
    ):
        document = run(*words)
        assert [cut["level"] for cut in document["slices"]] == [level]
        assert Path(document["slices"][0]["file"]).is_file()
    assert [each["params"] for each in document["choice"]["levels"]] == [one.params, two.params]
    shown = CliRunner().invoke(app, ["slice", "--task", "1", "--max-bytes", str(one.bytes)]).stdout
    assert shown.startswith("level 1: the largest with at most ")


def test_bytes_are_those_of_the_file_that_is_written() -> None:
    levels = known_levels(read_checkpoint("dvn.safetensors"), 1, counted=["bytes"])
    found = run("--max-bytes", str(levels[1].bytes - 1), "--dtype", "fp16")
    assert [cut["level"] for cut in found["slices"]] == [2]
    assert found["choice"]["levels"][1]["bytes"] == found["slices"][0]["bytes"] < levels[1].bytes
    assert [
        cut["level"] for cut in run("--max-bytes", str(found["slices"][0]["bytes"] - 1), "--dtype", "fp16")["slices"]
    ] == [1]


def test_a_format_that_can_express_no_level_says_why() -> None:
    with pytest.raises(
        InputError, match=r"timm cannot express level 1 of task '.*': wrn_10_1 is not one of its models"
    ):
        run("--max-bytes", "1GB", "--format", "timm")


def test_macs_are_counted() -> None:
    levels = run("--max-macs", "1G")["choice"]["levels"]
    assert 0 < levels[0]["macs"] < levels[1]["macs"]
    assert run("--max-macs", str(levels[1]["macs"] - 1))["slices"][0]["level"] == 1


def test_recorded_figures_choose() -> None:
    speeds = recorded("bench.json", latency_ms=[{"p50": 1.0}, {"p50": 3.0}])
    accuracies = recorded("eval.json", top1=[80.0, 90.0])
    assert run("--max-latency", "2.5ms", "--results", str(speeds))["slices"][0]["level"] == 1
    assert run("--min-accuracy", "80", "--results", str(accuracies))["slices"][0]["level"] == 1
    assert run("--min-accuracy", "81", "--results", str(accuracies))["slices"][0]["level"] == 2
    both = ("--results", str(accuracies), "--results", str(speeds))
    assert run("--min-accuracy", "70", "--max-latency", "3ms", *both)["slices"][0]["level"] == 2
    with pytest.raises(
        DvnError, match=r"no level of task '.*' has at most 2.00 ms and at least 85.0 %: the nearest is level 1, which"
    ) as error:
        run("--min-accuracy", "85", "--max-latency", "2ms", *both)
    assert error.value.exit_code == 1


def test_latencies_of_several_images_are_not_those_of_one() -> None:
    document = json.loads(recorded("b64.json", latency_ms=[{"p50": 1.0}, {"p50": 3.0}]).read_text())
    Path("b64.json").write_text(json.dumps(document | {"batch_size": 64}))
    with pytest.raises(
        InputError, match=r"no latency of task '.*' is recorded: .*FILE`, without -b: it is that of one image$"
    ):
        run("--max-latency", "5ms", "--results", "b64.json")
    Path("b1.json").write_text(json.dumps(document | {"batch_size": 1}))
    assert run("--max-latency", "2ms", "--results", "b1.json", "--results", "b64.json")["slices"][0]["level"] == 1


def test_latencies_are_those_of_the_format() -> None:
    rows = [
        row | {"format": form}
        for form, (low, top) in {"safetensors": (2.0, 4.0), "pt2": (1.0, 2.0), "onnx": (0.1, 0.2)}.items()
        for row in json.loads(recorded("one.json", latency_ms=[{"p50": low}, {"p50": top}]).read_text())["results"]
    ]
    Path("bench.json").write_text(json.dumps({"results": rows}))
    limit = ("--max-latency", "2ms", "--results", "bench.json")
    assert run(*limit)["slices"][0]["level"] == 1
    found = run(*limit, "--format", "pt2")
    assert found["slices"][0]["level"] == 2
    assert [(level["latency"], level["bytes"]) for level in found["choice"]["levels"]] == [(1, None), (2, None)]
    with pytest.raises(
        InputError, match=r"as timm is recorded: .* `dvn bench CHECKPOINT --all --formats timm --results-file"
    ):
        run(*limit, "--format", "timm")
    result = CliRunner().invoke(app, ["slice", "--task", "1", *limit, "--dtype", "fp16", "--json"])
    assert (result.exit_code, json.loads(result.stdout)["slices"][0]["level"]) == (0, 1)
    assert result.stderr == "latencies are recorded of files in fp32: one in fp16 may have another\n"


def test_results_of_a_newer_dvn_are_refused() -> None:
    document = json.loads(recorded("eval.json", top1=[70.0, 95.0]).read_text())
    newest = {costs.SCHEMA_VERSION, rendering.SCHEMA_VERSION}
    for version in newest:
        Path("eval.json").write_text(json.dumps(document | {"schema_version": version}))
        assert known_levels(read_checkpoint("dvn.safetensors"), 1, ["eval.json"])[0].accuracy == 70
    Path("eval.json").write_text(json.dumps(document | {"schema_version": max(newest) + 1}))
    with pytest.raises(InputError, match=r"'eval\.json' has schema_version 2, this dvn reads up to 1: update dvn"):
        run("--min-accuracy", "70", "--results", "eval.json")


@pytest.mark.parametrize("name", ["dvn.safetensors", "m.v1", "m.v1.safetensors"])
def test_the_record_of_the_run_gives_accuracies(checkpoint: Path, name: str) -> None:
    record = Files.of(Path(name)).record
    write_record(record, json.loads(recorded("eval.json", top1=[70.0, 95.0]).read_text())["results"])
    checkpoint.rename(name)
    [cut] = run(name, "--min-accuracy", "71")["slices"]
    assert cut["level"] == 2
    assert cut["file"] == record.name.replace(".run.json", "-task1-level2.safetensors")


def test_the_record_of_another_run_gives_none(checkpoint: Path) -> None:
    """A checkpoint is copied over another one, whose record stays."""
    write_record("dvn.run.json", json.loads(recorded("eval.json", top1=[70.0, 95.0]).read_text())["results"], seed=-1)
    other = "'dvn.run.json' is the record of another run than that of 'dvn.safetensors'"
    with pytest.raises(InputError, match=f"no accuracy of task '.*' is recorded, and {other}: give --results FILE of"):
        run("--min-accuracy", "71")
    assert run("--min-accuracy", "71", "--results", "eval.json")["slices"][0]["level"] == 2
    pytest.importorskip("scipy")
    with pytest.raises(InputError, match=other):
        CliRunner().invoke(app, ["slice", "--plan", "--budget", "1MB"], catch_exceptions=False)


def test_names_with_dots_are_told_apart(checkpoint: Path) -> None:
    names = ["m.v1", "m.v2"]
    for name in names:
        Path(name).write_bytes(checkpoint.read_bytes())
    assert [run(name, "--level", "1")["slices"][0]["file"].partition("-")[0] for name in names] == names
    assert [next(slice_all(name)).file.parent.name for name in names] == ["m.v1-slices", "m.v2-slices"]


def test_the_manifest_has_recorded_accuracies() -> None:
    list(slice_all(results=[recorded("eval.json", top1=[70.0, 95.0])]))
    found = json.loads(Path("dvn-slices/manifest.json").read_text())["slices"]
    assert [cut["top1"] for cut in found] == [70, 95, None, None]
    Path("dvn.run.json").write_text("{}")  # of a run that has not ended
    list(slice_all())
    assert json.loads(Path("dvn-slices/manifest.json").read_text())["slices"] == [cut | {"top1": None} for cut in found]


def test_a_manifest_among_files_is_passed_over() -> None:
    list(slice_all())
    files = ["dvn-slices/manifest.json", "dvn-slices/dvn-task1-level1.safetensors"]
    result = CliRunner().invoke(app, ["eval", *files, "--data", "source=digits", "--data", "classes=0-4", "--json"])
    assert result.exception is None
    assert [row["file"] for row in json.loads(result.stdout)["results"]] == files[1:]
    assert result.stderr == "'dvn-slices/manifest.json' lists networks and holds none: it is passed over\n"
    with pytest.raises(InputError, match=r"manifest\.json"):
        CliRunner().invoke(app, ["bench", files[0]], catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-bytes", "2 parsecs"], "--max-bytes is an amount such as 2MB, not '2 parsecs'"),
        (["--max-bytes", "0"], "--max-bytes is an amount"),
        (["--max-params", "1", "--level", "1"], "a budget chooses the level of a task"),
        (["--max-latency", "1ms"], "no latency of task '.*' is recorded: .* `dvn bench CHECKPOINT --all --res"),
        (["--min-accuracy", "1"], "no accuracy of task '.*' is recorded: give --results FILE of `dvn eval"),
        (["--min-accuracy", "1", "--results", "other.json"], "'other.json' is of other networks: level 1"),
        (["--min-accuracy", "1", "--results", "dvn.safetensors"], "holds no results"),
        (["--min-accuracy", "1", "--results", "strange.json"], "holds no results"),
        (["--min-accuracy", "1", "--results", "none.json"], "there is no file 'none.json'"),
        (["--max-params", "1M", "--results", "none.json"], "there is no file 'none.json'"),
        (["--level", "1", "--results", "none.json"], "--results is for choosing a level, or for a manifest: give"),
        (["--min-accuracy", "0.75"], "--min-accuracy is in per cent: give 75 for 0.75"),
        (["--min-accuracy", "150"], "--min-accuracy is in per cent, 0 to 100, not 150"),
        (["--min-accuracy", "nan"], "--min-accuracy is in per cent, 0 to 100, not nan"),
    ],
)
def test_what_cannot_be_done_is_said(words: list[str], message: str) -> None:
    other = json.loads(recorded("other.json", top1=[1.0, 2.0]).read_text())
    other["results"][0]["params"] += 1
    Path("other.json").write_text(json.dumps(other))
    other["results"][0]["top1_interval"] = "wide"
    Path("strange.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=message):
        run(*words)


def test_what_no_level_meets_names_the_nearest() -> None:
    with pytest.raises(DvnError, match=r"has at most 10B: the nearest is level 1, which has \d") as error:
        run("--max-bytes", "10")
    assert error.value.exit_code == 1
    assert [path.name for path in Path().iterdir()] == ["dvn.safetensors"]


def test_a_limit_that_reads_like_the_nearest_is_said_exactly() -> None:
    """85099 is 85.1KB as 85100 is."""
    one, _ = known_levels(read_checkpoint("dvn.safetensors"), 1, counted=["bytes"])
    assert one.bytes is not None
    with pytest.raises(
        DvnError, match=rf" at most {one.bytes - 1:,} bytes: .* level 1, which has {one.bytes:,} bytes$"
    ):
        run("--max-bytes", str(one.bytes - 1))
    levels = [KnownLevel(1, 1_234_567, macs=7_000_001, latency=5.0004, accuracy=97.2112)]
    for limits, least, message in (
        ({"params": 1_234_566}, None, "at most 1,234,566 params: the nearest is level 1, which has 1,234,567 params"),
        ({"macs": 7e6}, None, "at most 7,000,000 macs: the nearest is level 1, which has 7,000,001 macs"),
        ({"latency": 5.0}, None, "at most 5 ms: the nearest is level 1, which has 5.0004 ms"),
        ({}, 97.22, "at least 97.22 %: the nearest is level 1, which has 97.2112 %"),
        ({"params": 2e6}, 98.0, "at most 2.0M params and at least 98.0 %: the nearest is level 1, which has 1.2M par"),
    ):
        with pytest.raises(DvnError) as caught:
            choose(levels, limits, least, "low")
        assert message in str(caught.value)


@pytest.mark.slow
def test_the_commands_of_the_readme() -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").partition("### Ship it")[2]
    pytest.importorskip("scipy")
    header = read_checkpoint("dvn.safetensors")
    rows = [
        {"task": task, "name": entry.name, "level": level.level, "params": level.params, "top1": 60 + 10 * level.level}
        for task, entry in header.metadata.numbered_tasks.items()
        for level in known_levels(header, task)
    ]
    write_record("dvn.run.json", rows)
    for line in "".join(re.findall("```sh\n(.*?)```", page.partition("\n### ")[0], re.DOTALL)).splitlines():
        result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, (line, result.exception)


def test_amounts() -> None:
    assert [amount("bytes", text, "--budget") for text in ("2MB", "2 kB", "7", "1.5GB", "1MiB")] == [
        2e6,
        2e3,
        7,
        1.5e9,
        2**20,
    ]
    assert [amount("latency", text, "--max-latency") for text in ("5ms", "0.5 s", "20us")] == [5, 500, 0.02]


def test_a_larger_level_that_is_no_more_accurate_is_not_taken_for_accuracy() -> None:
    levels = [KnownLevel(n, n, n, accuracy=accuracy) for n, accuracy in enumerate([80.0, 90.0, 85.0], 1)]
    assert choose(levels, {}, 85.0).level.level == 2
    assert choose(levels, {"bytes": 3}, 90.0).level.level == 2
    assert [level.level for level in choose(levels, {"bytes": 1}).neighbours] == [1, 2]
    assert budget.in_words("macs", None) == "-"


def two_runs(*files: str | None, top1: Sequence[float] = (20.0, 97.0)) -> list[dict[str, Any]]:
    """Rows of both levels of the first task of two files, as one document of `dvn eval` has them."""
    rows = json.loads(recorded("one.json", top1=[0.0, 0.0]).read_text())["results"]
    return [row | {"top1": accuracy, "file": file} for file, accuracy in zip(files, top1, strict=True) for row in rows]


@pytest.mark.parametrize(
    ("files", "top1"),
    [
        (("dvn.safetensors", "other.safetensors"), 20.0),
        (("other.safetensors", "dvn.safetensors"), 97.0),
        (("/ci/runs/dvn.safetensors", "/ci/runs/other.safetensors"), 20.0),
        (("./dvn.safetensors", "runs/dvn.safetensors"), 20.0),
        (("dvn.safetensors", None), 20.0),
        (("dvn.safetensors", "dvn.safetensors"), 97.0),  # it was measured twice
        (("renamed.safetensors", "renamed.safetensors"), 97.0),
    ],
)
def test_of_results_of_several_files_those_of_the_checkpoint_count(files: tuple[str, str], top1: float) -> None:
    Path("both.json").write_text(json.dumps({"results": two_runs(*files)}))
    levels = known_levels(read_checkpoint("dvn.safetensors"), 1, ["both.json"])
    assert [level.accuracy for level in levels] == [top1, top1]


def test_results_of_nothing_that_is_asked_for_are_refused() -> None:
    recorded("first.json", top1=[70.0, 95.0])
    Path("empty.json").write_text(json.dumps({"results": []}))
    second = read_checkpoint("dvn.safetensors").metadata.tasks[1].name
    write_record("dvn.run.json", json.loads(Path("first.json").read_text())["results"])  # which stands in for none
    for words, file in (
        (["--task", "1", "--min-accuracy", "60", "--results", "first.json"], "empty.json"),
        (["--task", "2", "--max-params", "1G"], "first.json"),
        (["--all", "--results", "first.json"], "empty.json"),
    ):
        with pytest.raises(InputError) as caught:
            CliRunner().invoke(app, ["slice", *words, "--results", file], catch_exceptions=False)
        whose = f"task '{second}'" if file == "first.json" else "any task" if "--all" in words else "task '"
        assert str(caught.value).startswith(f"'{file}' holds no results of {whose}")
        assert not list(Path().glob("*-task*"))
        assert not Path("dvn-slices").exists()
    list(slice_all(results=["first.json"]))  # of one task, which is enough for all


@pytest.mark.parametrize("files", [("a.safetensors", "b.safetensors"), ("a/dvn.safetensors", "b/dvn.safetensors")])
def test_results_of_which_none_or_two_may_be_the_checkpoint_are_refused(files: tuple[str, str]) -> None:
    Path("both.json").write_text(json.dumps({"results": two_runs(*files)}))
    with pytest.raises(InputError, match=rf"'both.json' .*: '{files[0]}', '{files[1]}'; .* 'dvn.safetensors' alone"):
        run("--min-accuracy", "1", "--results", "both.json")


def test_levels_that_another_file_alone_has_are_not_the_checkpoint_s() -> None:
    rows = two_runs("dvn.safetensors", "other.safetensors")
    Path("both.json").write_text(
        json.dumps({"results": [row for row in rows if row["top1"] > 50 or row["level"] == 1]})
    )
    levels = known_levels(read_checkpoint("dvn.safetensors"), 1, ["both.json"])
    assert [level.accuracy for level in levels] == [20, None]
