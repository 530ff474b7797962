"""How figures look on the terminal: what the tables of the commands have in common."""

from typing import Any

from rich import box
from rich.table import Table


def short(count: float) -> str:
    """A count in thousands, millions ...: 7380276 is 7.4M, 950 is 950."""
    for unit in ("", "K", "M", "G", "T"):
        text = f"{count:.1f}{unit}" if unit else f"{count:.0f}"
        if abs(float(text.rstrip("KMGT"))) < 1000 or unit == "T":
            break
        count /= 1000
    return text


def percent(share: float) -> str:
    """A share of 1 in per cent: 0.252 is 25.2 %."""
    return f"{100 * share:.1f} %"


def table(*columns: str, title: str | None = None, text: int = 0) -> Table:
    """An empty table, its first `text` columns aligned left as words are, the others right as numbers are."""
    made = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False
    )
    for number, column in enumerate(columns):
        words: dict[str, Any] = {"overflow": "fold"} if number < text else {"justify": "right", "no_wrap": True}
        made.add_column(column, **words)
    return made
