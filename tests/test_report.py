"""What is printed: in whatever width, no figure is cut, and what matters is there."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dvn_cli import report

figures = st.text("0123456789.", min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_figure_is_cut(data: st.DataObject) -> None:
    """Columns that may go do so in their order; names fold; all the rest is there in full, whatever the width."""
    headers = [f"h{number}" for number in range(data.draw(st.integers(1, 6)))]
    optional = data.draw(st.lists(st.sampled_from(headers), unique=True))
    rows = data.draw(st.lists(st.tuples(*[figures] * len(headers)), min_size=1, max_size=4))
    table = report.table("name", *headers, text=1, optional=optional)
    for row in rows:
        table.add_row("a name of several words", *row)
    width = data.draw(st.integers(1, 100))
    out = io.StringIO()
    report.show(Console(file=out, width=width), table)
    shown = out.getvalue().splitlines()
    assert "…" not in out.getvalue()
    left = [header for header in headers if header in shown[0].split()]
    gone = [header for header in headers if header not in left]
    assert sorted(gone) == sorted(optional[: len(gone)])
    cells = [line.split() for line in shown[2:]]
    for row in rows:
        kept = [row[headers.index(header)] for header in left]
        assert not kept or any(cell[len(cell) - len(kept) :] == kept for cell in cells)
    if not gone:
        return
    report.show(Console(file=(whole := io.StringIO()), width=1000), table)
    assert max(map(len, whole.getvalue().splitlines())) > min(width, 24), "a column has gone for nothing"


@pytest.mark.parametrize(("columns", "width"), [("0", 80), ("1", 24), ("23", 24), ("25", 25), ("120", 120)])
def test_width_of_a_console(monkeypatch: pytest.MonkeyPatch, columns: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert report.console().width == width


def test_no_control_codes_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stderr", log := io.StringIO())
    with report.console(stderr=True).status("working"):
        pass
    assert "\x1b" not in log.getvalue()
