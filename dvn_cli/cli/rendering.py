"""How `dvn partition` and `dvn train` show on the terminal what they work on."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dvn_cli.dividing import and_more
from dvn_cli.report import percent, short, show, table

if TYPE_CHECKING:
    from rich.console import Console

    from dvn_cli.dividing import Summary
    from dvn_cli.network import DeepVirtualNetwork
    from dvn_cli.units.assign import CoupledGroup

ROWS = 24
"""Of the table of what was divided; `--json` has all."""


def show_division(
    console: "Console", backbone: str, network: "DeepVirtualNetwork", summary: "Summary", notes: Sequence[str]
) -> None:
    """Prints what a backbone, given by this name, was divided into.

    Args:
        notes: what was done on the way, a line each.
    """
    spec = network.partition.spec
    arrow = f"{backbone} -> " if spec.name != backbone else ""
    size = "x".join(map(str, spec.input_size))
    console.print(
        f"{arrow}{spec.name} ({spec.source}): images {spec.in_chans}x{size}, {spec.num_classes} classes, "
        f"{network.partition.units} units"
    )
    lines = list(notes)
    if network.preprocessing is not None:
        lines.append(f"Images are prepared as for the weights: {network.preprocessing.describe()}.")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    _show_groups(console, summary)
    _show_whole(console, summary)
    _show_private(console, summary)
    _show_levels(console, summary)


def _sum(sizes: Sequence[int]) -> str:
    """How channels are divided: `4 x 16`, uneven `15+14+15+14`, of many units the least and the most."""
    least, most = min(sizes), max(sizes)
    if least == most:
        return f"{len(sizes)} x {least}"
    return "+".join(map(str, sizes)) if len(sizes) <= 4 else f"{len(sizes)} x {least} to {most}"


def _show_groups(console: "Console", summary: "Summary") -> None:
    alike: dict[Any, list[CoupledGroup]] = {}
    divided = [group for group in summary.partition.groups if group.sizes]
    for group in divided:
        alike.setdefault((group.channels, group.sizes, len({name for name, _ in group.places})), []).append(group)
    rows = table("group, by its first tensor", "channels", "units", "such groups", "tensors each", text=1)
    uneven_first = sorted(alike, key=lambda kind: min(kind[1]) == max(kind[1]))[:ROWS]
    for (channels, sizes, tensors), groups in alike.items():
        if (channels, sizes, tensors) in uneven_first:
            rows.add_row(groups[0].places[0][0], str(channels), _sum(sizes), str(len(groups)), str(tensors))
    rule = summary.partition.rule
    how = {"even": "", "importance": ", equally strong", "sorted": ", the best first"}[rule.assign]
    how += {"even": "", "macs": ", for equal MACs", "params": ", for equal parameters"}[rule.widths]
    how += f", in multiples of {rule.round_to}" if rule.round_to > 1 else ""
    console.print(f"\n[bold]Coupled, and divided among the units{how}:[/] {len(divided)} groups of channels")
    show(console, rows)
    if len(alike) > ROWS:
        console.print(f"and {len(alike) - ROWS} kinds of groups more (--json has all)")


def _show_whole(console: "Console", summary: "Summary") -> None:
    share = math.floor(1000 * summary.levels[-1].divided) / 10  # what is not all is not shown as 100.0
    console.print(f"\n[bold]Shared by all units:[/] {share:.1f} % of the parameters are divided, the rest is whole")
    if summary.stream:
        shown = [f"{group.channels} ({group.places[0][0]})" for group in summary.stream]
        console.print(f"  the residual stream, channels that sums couple: {and_more(shown, 4)}")
    for channels, names in summary.too_few.items():
        console.print(f"  groups of {channels}, fewer than {summary.partition.units} units: {and_more(names, 2)}")
    for one in summary.whole:
        console.print(f"  {short(one.params)} parameters of {and_more(one.places, 2)}: {one.why}")
    rest = [f"{name} ({' x '.join(map(str, sizes))})" for name, sizes in summary.no_channels.items()]
    if rest:
        console.print(f"  image channels, kernels and positions are not channels: {and_more(rest, 2)}")
    if summary.warning:
        console.print(f"[bold yellow]Warning:[/] {summary.warning}")


def _show_private(console: "Console", summary: "Summary") -> None:
    classes = {name for name, _ in summary.partition.assignment.classes}
    norms = {name.rpartition(".")[0] for name in summary.private["network"] if name not in classes}
    console.print("\n[bold]Private once training starts[/]")
    console.print(f"  to each task: the stem, {', '.join(summary.private['task']) or 'none'}")
    kinds = [f"the classifier, {', '.join(sorted(classes))}"]
    if norms:
        kinds.append(f"{len(norms)} normalisations with running statistics ({and_more(sorted(norms), 1)})")
    console.print(f"  to each task and level: {'; '.join(kinds)}")


def _show_levels(console: "Console", summary: "Summary") -> None:
    rows = table("level", "units", "parameters", "exactly", "density", "MACs", "file", optional=("exactly", "file"))
    for row in summary.levels:
        rows.add_row(
            str(row.level),
            str(row.units),
            short(row.params),
            f"{row.params:,}",
            percent(row.density),
            short(row.macs),
            f"{row.bytes / 1e6:,.1f} MB",
        )
    console.print("\n[bold]Levels of task 1[/]")
    show(console, rows)
    least, most = min(summary.lowest), max(summary.lowest)
    if least != most:
        console.print(f"Units are not all alike: level 1 of the tasks has {least:,} to {most:,} parameters.")
