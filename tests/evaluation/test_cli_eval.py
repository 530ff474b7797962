"""What `dvn eval` cannot run as asked."""

import pytest
import torch
from pictures import MEAN, STD
from safetensors.torch import save_file

from dvn_cli.errors import InputError
from dvn_cli.store.metadata import DataSource, Task


@pytest.mark.parametrize(("arguments", "message"), [
    (["--min-accuracy", "0.95"], "--min-accuracy is in per cent: give 95 for 0.95"),
    (["--min-accuracy", "101"], "--min-accuracy is in per cent, 0 to 100, not 101"),
    (["--min-accuracy", "nan"], "--min-accuracy is in per cent, 0 to 100, not nan"),
    (["--batch-size", "0"], "batch_size is at least 1, not 0"),
    (["--results-file", "r.txt"], "--results-file ends with .csv or .json, not 'r.txt'"),
    (["--device", "gpu"], "unknown device 'gpu': give auto, cpu, cuda or mps"),
    (["--task", "colour"], "there is no task 'colour'; did you mean 'colours'?"),
    (["--task", "", "--min-accuracy", "task=nosuch:99"], "there is no task ''; the tasks are 1 'colours', 2 'digits'"),
    (["--level", "3"], "there is no level 3; task 'colours' has levels 1 to 2"),
    (["--level", "2", "s11.safetensors"], "none of the slices is of level 2: 's11.safetensors' (task 'colo"),
    (["dvm.safetensors"], "there is no checkpoint 'dvm.safetensors'; did you mean 'dvn.safetensors'?"),
    (["fresh.safetensors"], "task 'task1': the file does not say where its images are; give them with --data, "),
    (["s11.safetensors"], "task 'colours': the file does not say where its images are; give them with --data, "),
    (["--results-file", "no/r.json"], "cannot write 'no/r.json': there is no folder '"),
    (["--results-file", "taken/d.csv"], "cannot write 'taken/d.csv': it is a folder"),
    (["--data", "nowhere"], "--data nowhere: there is no such folder; give a folder, a YAML file or KEY=VALUE"),
    (["--data", "empty"], "--data empty: there are neither parquet files in it nor folders of classes"),
    (["--data", "source=folder"], "--data: source folder needs path"),
    (["--data", "source=digits", "--data", "clases=0-2"], "--data: unknown key 'clases'; did you mean 'classes'?"),
    (["--data", "mean=[0.5]"], "--data mean=[0.5]: 'mean' is for training; images are prepared as the task's were"),
])  # fmt: skip
def test_bad_input_in_one_line(dvn, made, monkeypatch, arguments, message):
    (made / "empty").mkdir(exist_ok=True)
    (made / "taken" / "d.csv").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr("dvn_cli.evaluation.measure.measure", lambda *_, **__: pytest.fail("computed"))
    code, out, err = dvn(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"dvn: {message}")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--results-file", "slice.json"], "--results-file cannot be 'slice.json', which holds weights"),
    (["--report", "s11.safetensors"], "--report cannot be 's11.safetensors', which holds weights"),
    (["--summary", "fresh.safetensors"], "--summary cannot be 'fresh.safetensors', which holds weights"),
    (["s11.safetensors", "--junit", "s11.safetensors"], "--junit cannot be 's11.safetensors', which holds weights"),
    (["--save-baseline", "plain.safetensors"], "--save-baseline cannot be 'plain.safetensors', which holds weights"),
    (["--results-file", "old.run.json"], "--results-file cannot be 'old.run.json', which is the record of a run"),
    (["--baseline", "in.json", "--save-baseline", "./in.json"], "--save-baseline cannot be 'in.json', which this com"),
    (["--gates", "gates.yaml", "--junit", "link.xml"], "--junit cannot be 'link.xml', which this command reads"),
    (["--data", "gates.yaml", "--summary", "gates.yaml"], "--summary cannot be 'gates.yaml', which this command reads"),
    (["--slices", "in", "--report", "in/manifest.json"], "--report cannot be 'in/manifest.json', which this command r"),
    (["--results-file", "a.json", "--save-baseline", "a.json"], "--results-file and --save-baseline are both 'a.json'"),
])  # fmt: skip
def test_no_output_takes_the_place_of_what_is_worth_more(dvn, made, monkeypatch, arguments, message):
    (made / "slice.json").write_bytes((made / "s11.safetensors").read_bytes())
    (made / "old.run.json").write_text("{}")
    (made / "in.json").write_text("{}")
    (made / "gates.yaml").write_text("all: 0")
    (made / "in").mkdir(exist_ok=True)
    (made / "in" / "manifest.json").write_text("{}")
    if not (made / "link.xml").exists():
        (made / "link.xml").symlink_to("gates.yaml")
    save_file({"weight": torch.ones(2)}, made / "plain.safetensors")
    monkeypatch.setattr("dvn_cli.evaluation.measure.measure", lambda *_, **__: pytest.fail("computed"))
    before = {path: path.read_bytes() for path in made.iterdir() if path.is_file()}
    code, out, err = dvn(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"dvn: {message}")
    assert {path: path.read_bytes() for path in made.iterdir() if path.is_file()} == before


def test_an_older_output_is_replaced_and_a_summary_added_to(dvn, made):
    for _ in range(2):
        code, _, err = dvn("--results-file", "again.json", "--save-baseline", "again-base.json", "--summary", "s.md")
        assert code == 0, err
    assert (made / "s.md").read_text().count("### dvn eval: passed") == 2


def test_images_that_have_gone(dvn, made):
    (made / "recipes").rename(made / "moved")
    try:
        code, _, err = dvn()
    finally:
        (made / "moved").rename(made / "recipes")
    assert code == 2
    assert err.startswith("dvn: task 'colours': no folder ")
    assert err.endswith("pictures; --data gives other images\n")


def test_a_broken_file_is_found_before_anything_is_computed(dvn, made, monkeypatch):
    content = (made / "s22.safetensors").read_bytes()
    (made / "broken.safetensors").write_bytes(content[:-8])
    monkeypatch.setattr("dvn_cli.evaluation.measure.measure", lambda *_, **__: pytest.fail("computed"))
    code, out, err = dvn("dvn.safetensors", "broken.safetensors")
    assert (code, out) == (2, "")
    assert err.startswith("dvn: 'broken.safetensors' is truncated")


def test_metadata_of_images_that_cannot_be_read(made):
    from dvn_cli.data import Reader
    from dvn_cli.evaluation.images import choose_images

    task = Task("t", ("a", "b"), (8, 8), MEAN, STD, (1,), (1,), DataSource({"source": "film"}, "."))
    with pytest.raises(InputError, match="task 't': what it says of its images cannot be read; give them with --data"):
        choose_images(Reader(), task, 1)
