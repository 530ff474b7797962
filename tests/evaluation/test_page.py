"""The page that `dvn eval --report` writes. How it looks is for eyes; here, what it says and that it needs nothing."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pictures import COLOURS, results

import dvn_cli
from dvn_cli.evaluation import charts
from dvn_cli.export import slice_all
from dvn_cli.store.file import read_checkpoint
from dvn_cli.store.metadata import TrainingRecord
from dvn_cli.store.slicing import count


class Page(HTMLParser):
    """Cells of tables, texts, attributes, and whether every element is closed in its turn."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(file.read_text())
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_a_checkpoint_as_a_page(dvn, made):
    header = read_checkpoint(made / "dvn.safetensors")
    networks = [
        {
            "file": "dvn.safetensors",
            "name": "digits",
            "level": level,
            "latency_ms": {"p50": time},
            "bytes": 1,
            "macs": 1,
        }
        | {"params": count(header, 2, level).params, **form}
        for form, time in (({}, 1), ({"format": "<pt2>"}, 9))
        for level in (1, 2)
    ]
    machine = {"host": "", "device": "cpu", "device_name": "a <CPU>", "torch": "", "threads": 1, "batch_size": 1}
    (made / "costs.json").write_text(json.dumps({**machine, "channels_last": False, "results": networks}))
    (slice_,) = list(slice_all(made / "dvn.safetensors", made / "slices"))[:1]
    manifest = json.loads((made / "slices" / "manifest.json").read_text())
    del manifest["slices"][-1]
    manifest |= {"format": "<onnx>", "dtype": "fp16"}
    (made / "manifest.json").write_text(json.dumps(manifest))
    sizes = ("--slices", "slices", "--slices", "manifest.json")
    code, out, err = dvn("--report", "page.html", "--costs", "costs.json", *sizes, "--json")
    assert (code, err) == (0, "")
    page = Page(made / "page.html")
    rows = json.loads(out)["results"]
    assert [row for row in page.rows if row[0] in ("1 colours", "2 digits")][:2] == [
        ["1 colours", "1", "2"], ["2 digits", "2", "1"]
    ]  # fmt: skip
    assert [row for row in page.rows if "-0.25" in row] == [
        ["1 colours", "1.00", "-0.25"],
        ["2 digits", "-0.25", "1.00"],
    ]
    header, *shown = [row for row in page.rows if len(row) == 13]
    assert header[7:9] == ["safetensors, MB", "<onnx> fp16, MB"]
    assert shown[0][7] == shown[0][8] == f"{slice_.bytes / 1e6:,.2f}"
    assert shown[-1][8] == "-"
    assert [(row[1], row[4].replace(",", ""), row[2]) for row in shown] == [
        (str(row["level"]), str(row["params"]), f"{row['top1']:.2f}") for row in rows
    ]
    figures = [attributes for tag, attributes in page.attributes if tag == "figure" and "role" in attributes]
    labels = [str(figure["aria-label"]).partition(" over ")[2].partition(";")[0] for figure in figures]
    assert labels == ["parameters", "latency", "latency as <pt2>"]
    assert "milliseconds as <pt2>, batch of 1, a <CPU>" in page.text
    assert (
        sum(attributes.get("scope") == "row" for _, attributes in page.attributes) == len(page.rows) - 2
    )  # but for headers
    images = [attributes for tag, attributes in page.attributes if tag == "img"]
    assert images
    assert all(str(image["src"]).startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert "told right" in page.text
    assert len((made / "page.html").read_bytes()) < 3e6
    links = [value for _, attributes in page.attributes for key, value in attributes.items() if key in ("src", "href")]
    assert all(str(link).startswith(("data:", "#")) for link in links)  # nothing is loaded

    before = (made / "page.html").read_bytes()
    assert dvn("--report", "page.html", "--costs", "costs.json", *sizes)[0] == 0
    assert (made / "page.html").read_bytes() == before

    assert dvn("--report", "page.html", "--costs", "costs.json", "--task", "colours", "--level", "1")[0] == 0
    page = Page(made / "page.html")
    assert sum(tag == "figure" and "role" in attributes for tag, attributes in page.attributes) == 1
    for form in ("", " as <pt2>"):
        assert f"The costs hold no latency{form} of these networks." in page.text


def test_the_weakest_classes_are_counted(dvn, made):
    (row,) = results(dvn("--json", "--task", "colours", "--level", "2", "--report", "page.html"))
    text = Page(made / "page.html").text
    told = [name for name in COLOURS if f"{name}: " in text]
    assert len(told) == 3  # of six classes, of which the network tells two or three
    assert row["top1"] < 50


@pytest.mark.parametrize(("arguments", "message"), [
    (["s11.safetensors", "--data", "recipes/pictures", "--report", "p.html"], "--report is of one checkpoint"),
    (["--costs", "costs.json"], "--costs is of a report: give --report too"),
    (["--slices", "slices"], "--slices is of a report: give --report too"),
    (["--slices", "gone", "--report", "p.html"], "there is no file 'gone'"),
    (["--slices", "s11.safetensors", "--report", "p.html"], "'s11.safetensors' is no manifest of `dvn slice --all`"),
    (["fresh.safetensors", "--data", "recipes/pictures", "--slices", "other.json", "--report", "p.html"],
     "--slices is of another checkpoint: its task 'colours', level 1 is not here"),
    (["--costs", "other_costs.json", "--report", "p.html"],
     "--costs is of another checkpoint: its task 'colours', level 1 is not here"),
    (["--costs", "newer_costs.json", "--report", "p.html"],
     "'newer_costs.json' has schema_version 2, this dvn reads up to 1: update dvn"),
    (["--report", "no/p.html"], "cannot write 'no/p.html': there is no folder '"),
])  # fmt: skip
def test_what_is_no_report(dvn, made, monkeypatch, arguments, message):
    monkeypatch.setattr("dvn_cli.evaluation.measure.measure_together", lambda *_, **__: pytest.fail("computed"))
    network = {"name": "colours", "level": 1, "params": 1, "bytes": 1}
    (made / "other.json").write_text(json.dumps({"format": "onnx", "slices": [network]}))
    machine = {"host": "", "device": "cpu", "device_name": "", "torch": "", "threads": 1, "batch_size": 1}
    costs = {
        "channels_last": False,
        "results": [network | {"file": "other.safetensors", "macs": 1, "latency_ms": {"p50": 1}}],
    }
    (made / "other_costs.json").write_text(json.dumps(machine | costs))
    (made / "newer_costs.json").write_text(json.dumps({"schema_version": 2, "networks": []}))
    code, out, err = dvn(*arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"dvn: {message}")
    assert not (made / "p.html").exists()


def test_curves_are_of_the_run_of_the_checkpoint(dvn, made):
    """Not of the one in whose place it was put, whose record stayed."""
    network, recipe = dvn_cli.load(made / "dvn.safetensors"), {"seed": 7}
    network.training_record = TrainingRecord(recipe, epochs=2)
    network.save(made / "trained.safetensors")
    epochs = [{"epoch": number, "loss": [[1.0, 0.5], [2.0, 1.0]], "validation": None} for number in (1, 2)]
    for own, seed in ((True, 7), (False, 8)):
        (made / "trained.run.json").write_text(json.dumps({"recipe": recipe | {"seed": seed}, "epochs": epochs}))
        assert dvn("trained.safetensors", "--task", "2", "--report", "page.html")[0] == 0
        text = Page(made / "page.html").text
        assert ("Training loss over epochs." in text) is own
        assert ("There is no record of this run beside the checkpoint." in text) is not own
        assert "seed: 7" in text


def test_curves_of_training():
    epochs = [{"epoch": number, "validation": [[50.0, 60.0 + number], [None, None]]} for number in (1, 2)]
    svg = charts.over_epochs(epochs, ["a", "b"], "validation", "top-1")
    assert svg is not None
    assert ">a</text>" in svg
    assert ">b</text>" not in svg
    assert "currentColor" in svg
    assert charts.over_epochs([{"epoch": 1, "validation": None}], ["a"], "validation", "top-1") is None
