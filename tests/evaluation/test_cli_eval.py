"""What `dvn eval` cannot run as asked."""

import pytest
from pictures import MEAN, STD

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
