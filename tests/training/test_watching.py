"""What a person sees of a run that goes on, on a terminal and in a log."""

import io
from pathlib import Path

import pytest
import small
from rich.console import Console

import dvn_cli
from dvn_cli import report
from dvn_cli.cli.watching import Terminal
from dvn_cli.evaluation.intervals import top1_interval


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress(tmp_path: Path, is_terminal: bool) -> None:
    """Steps, images a second, and the loss and validation accuracy of every task and level; lines in a log."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=is_terminal, width=100, color_system=None, _environ={"TERM": "xterm"})
    with Terminal(console, lambda _: None) as terminal:
        output = tmp_path / "dvn.safetensors"
        overrides = ["tasks.1.data.validation=0"]
        trained = dvn_cli.train(small.content(), output, overrides=overrides, observer=terminal, device="cpu")
    last = trained.history[-1]
    lines = [line.split() for line in text.getvalue().replace("\r", "\n").splitlines()]
    pairs = zip(last["loss"][0], last["validation"][0], strict=True)
    of_low = [word for loss, accuracy in pairs for word in (f"{loss:.3f}", f"{accuracy:.1f}", "%")]
    limits = [report.limits(top1_interval(accuracy, 8)) for accuracy in last["validation"][0]]
    shown = [["1", "low", *of_low], limits, ["2", "all", *(f"{loss:.3f}" for loss in last["loss"][1])]]
    if is_terminal:
        assert all(line in lines for line in shown)
        assert "after epoch 2" in text.getvalue()
        assert "step 2/2, " in text.getvalue()  # whatever was too quick to be seen, the last step is
    else:
        assert [line[:2] for line in lines if line[:1] == ["epoch"]] == [["epoch", "1/2:"], ["epoch", "2/2:"]]
        assert "after epoch" not in text.getvalue()
    assert " images/s" in text.getvalue()
