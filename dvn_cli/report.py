"""How figures look on the terminal: what the tables of the commands have in common."""

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

NARROWEST = 24
"""Characters of a line that are always used: a narrower terminal breaks the lines itself, and so hides nothing."""

UNKNOWN = 80
"""Characters of a line where the terminal says that it has none."""


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


def limits(interval: tuple[float, float]) -> str:
    """An interval of accuracies in per cent: 94.4-98.6."""
    return "{:.1f}-{:.1f}".format(*interval)


def console(stderr: bool = False, markup: bool = False) -> Console:
    """Returns the console of a command: on stderr without control codes where that is a log, whatever is forced."""
    is_log = stderr and not (sys.stderr is not None and sys.stderr.isatty())
    made = Console(stderr=stderr, markup=markup, highlight=False, force_terminal=False if is_log else None)
    made.width = max(made.width or UNKNOWN, NARROWEST)
    return made


class FittedTable(Table):
    """A table whose figures are never cut: a terminal that is too narrow for all its columns gets fewer.

    Attributes:
        optional: headers of the columns that may be left out, the first one first.
    """

    optional: Sequence[str] = ()

    def without(self, header: str) -> "FittedTable":
        """Returns the table without a column."""
        left = [column for column in self.columns if column.header != header]
        made = table(title=self.title)
        made.optional = self.optional
        for column in left:
            made.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap, overflow=column.overflow)
        for row, *cells in zip(self.rows, *(column.cells for column in left), strict=True):
            made.add_row(*cells, style=row.style)
        return made

    def least_width(self, words: int = NARROWEST // 3) -> int:
        """The width with every figure in full, and with so many characters for words, which fold."""
        wide = Console(width=10_000)
        least = Measurement.get(wide, wide.options, self).maximum
        for column in self.columns:
            if not column.no_wrap:
                cells = (Measurement.get(wide, wide.options, cell).maximum for cell in (column.header, *column.cells))
                least -= max(0, max(cells) - words)
        return least


def show(on: Console, *tables: FittedTable) -> None:
    """Prints tables, each as wide as its figures at least: the terminal breaks the lines that it has no room for."""
    width = on.width
    for each in tables:
        for header in each.optional:
            if each.least_width(max(NARROWEST // 3, width // 6)) > width:
                each = each.without(header)
        on.width = max(width, each.least_width())
        on.print(each, crop=False)
    on.width = width


def table(*columns: str, title: Any = None, text: int = 0, optional: Sequence[str] = ()) -> FittedTable:
    """An empty table, its first `text` columns aligned left as words are, the others right as numbers are."""
    made = FittedTable(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False
    )
    made.optional = optional
    for number, column in enumerate(columns):
        words: dict[str, Any] = {"overflow": "fold"} if number < text else {"justify": "right", "no_wrap": True}
        made.add_column(column, **words)
    return made
