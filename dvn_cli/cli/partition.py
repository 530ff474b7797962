"""`dvn partition`: a backbone divided into units, and what came of it in terms that a person can check."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dvn_cli.errors import DvnError, InputError
from dvn_cli.files import check_writable
from dvn_cli.store import slicing
from dvn_cli.store.file import lost_with
from dvn_cli.store.metadata import Preprocessing, Rule

if TYPE_CHECKING:
    from rich.console import Console

    from dvn_cli.backbones import BackboneSpec
    from dvn_cli.check import Check
    from dvn_cli.network import DeepVirtualNetwork
    from dvn_cli.partition import Partition
    from dvn_cli.undivided import Whole
    from dvn_cli.units.assign import Bucket

MEAN, STD = 0.5, 0.25
"""Of pixels in 0..1, where a backbone has no normalisation of its own."""

ROWS = 24
"""Of the table of what was divided; `--json` has all."""


def partition_command(
    backbone: Annotated[
        str,
        typer.Argument(
            metavar="BACKBONE",
            help="A model of timm or torchvision, wrn_N_S, resnet_N, a family, or package.module:factory.",
        ),
    ],
    units: Annotated[int, typer.Option(help="How many units.")],
    round_to: Annotated[
        int, typer.Option(help="Make units multiples of so many channels wide, where there are enough.")
    ] = 1,
    assign: Annotated[
        str, typer.Option(metavar="even|importance", help="Give each unit a run of channels, or equally strong ones.")
    ] = "even",
    num_classes: Annotated[
        int | None, typer.Option(help="Outputs of the classifier. Default: the model's own.")
    ] = None,
    input_size: Annotated[
        str | None, typer.Option(metavar="S|HxW", help="Of the images, in pixels. Default: the model's own.")
    ] = None,
    in_chans: Annotated[int | None, typer.Option(help="Channels of the images. Default: the model's own.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the published weights.")] = False,
    weights: Annotated[Path | None, typer.Option(help="Start from this state dict: safetensors, or torch's.")] = None,
    mean: Annotated[
        str | None,
        typer.Option(metavar="M|R,G,B", help="Of pixels in 0..1, that the weights want. Default: the model's own."),
    ] = None,
    std: Annotated[str | None, typer.Option(metavar="S|R,G,B", help="Likewise.")] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="Of the resizing that the weights want: bilinear, bicubic ... Default: likewise.")
    ] = None,
    crop_pct: Annotated[
        float | None, typer.Option(help="The share of each side that is cut out after resizing. Default: likewise.")
    ] = None,
    crop_mode: Annotated[
        str | None, typer.Option(metavar="center|squash|border", help="How that is cut out. Default: likewise.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.")] = Path("dvn.safetensors"),
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no fresh partition.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare its networks with the backbone in which all else is zero.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Divide a backbone into units: every task and level is then a network of its own in one set of weights."""
    if pretrained and weights is not None:
        raise InputError("--pretrained or --weights, not both: each says what the weights are")
    if not force and (lost := lost_with(output)):
        raise InputError(f"{lost}; --force replaces it, -o writes elsewhere")
    check_writable(output)
    asked = {"mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    given = {key: value for key, value in asked.items() if value is not None}
    if given and not pretrained and weights is None:
        flag = f"--{next(iter(given))}".replace("_", "-")
        raise InputError(f"{flag} says how images are prepared for weights: give --weights or --pretrained with it")

    from dvn_cli import report

    notes = report.console(stderr=True)
    with notes.status("importing torch and timm") as status:
        import torch

        from dvn_cli import backbones
        from dvn_cli.network import DeepVirtualNetwork
        from dvn_cli.partition import Partition
        from dvn_cli.tasks import default_tasks
        from dvn_cli.undivided import whole
        from dvn_cli.units import count

        rule = Rule(assign, round_to)
        spec = backbones.resolve(backbone, num_classes, in_chans, _size(input_size))
        status.update(f"building {spec.name}")
        torch.manual_seed(seed)
        module = spec.build()
        left_out: list[str] = []
        said: list[str] = []
        preparation = _preprocessing(spec, given)
        if pretrained:
            left_out = backbones.load_pretrained(module, spec, said.append)
        elif weights is not None:
            left_out = backbones.load_weights(module, spec, weights, said.append)
        status.update(f"dividing {spec.name}")
        partition = Partition.create(spec, units, module, rule=rule)
        with_weights = preparation if pretrained or weights is not None else None
        resize = {} if with_weights is None else with_weights.resize
        own_mean, own_std = (None, None) if preparation is None else (preparation.mean, preparation.std)
        mean_std = (own_mean or (MEAN,) * spec.in_chans, own_std or (STD,) * spec.in_chans)
        tasks = default_tasks(units, spec.num_classes, spec.input_size, *mean_std, **resize)
        network = DeepVirtualNetwork.from_backbone(partition, module, tasks, copy=False, preprocessing=with_weights)
        for number in range(1, units + 1):  # what cannot be narrowed is refused before a file is replaced
            status.update(f"narrowing to {number} of {units} units")
            network.networks(1, number)
            network.networks(number, 1)
        header = network.header(output)
        levels = []
        for level in range(1, units + 1):
            status.update(f"counting level {level} of {units}")
            params, density = count.params_and_density(header, 1, level)
            networks = network.networks(1, level)
            levels.append(
                {
                    "level": level,
                    "units": level,
                    "params": params,
                    "density": density,
                    "macs": count.macs(networks.eval, partition.tensors(networks), (spec.in_chans, *spec.input_size)),
                    "bytes": slicing.count(header, 1, level).bytes,
                    "divided": count.divided_share(header, 1, level),
                }
            )
        lowest = [slicing.count(header, number, 1).params for number in range(1, units + 1)]
        undivided = whole(partition)
        checked = None
        if check:
            from dvn_cli.check import check as check_partition

            checked = check_partition(partition, status.update)
    differs = None if checked is None or not checked.differing else _difference(checked)

    if assign == "importance" and not pretrained and weights is None:
        notes.print(
            "The weights are random, and so is their importance: --weights or --pretrained gives it a meaning.",
            soft_wrap=True,
        )
    if as_json:
        private = {who: [n for n, o in partition.owners.items() if o == who] for who in ("task", "network")}
        document = {
            "checkpoint": None if differs else str(output),
            "backbone": asdict(spec),
            "units": units,
            "assign": rule.assign,
            "round_to": rule.round_to,
            "mean": mean_std[0],
            "std": mean_std[1],
            "preprocessing": with_weights and asdict(with_weights),
            "notes": said,
            "levels": levels,
            "coupled": [
                {"channels": b.channels, "units": list(b.sizes), "places": [list(place) for place in b.places]}
                for b in partition.buckets
            ],
            "whole": [one.to_dict() for one in undivided],
            "warning": _little_divided(undivided, levels[-1]),
            "private": private,
            "random": left_out,
            "check": None if checked is None else checked.to_dict(),
        }
        _report_and_save(json.dumps(document, indent=2) + "\n", network, output, differs)
        return

    console = report.console(markup=True)
    console.begin_capture()
    arrow = f"{backbone} -> " if spec.name != backbone else ""
    size = "x".join(map(str, spec.input_size))
    console.print(
        f"{arrow}{spec.name} ({spec.source}): images {spec.in_chans}x{size}, {spec.num_classes} classes, {units} units"
    )
    for line in said:
        console.print(line, markup=False, soft_wrap=True)
    if with_weights is not None:
        line = f"Images are prepared as for the weights: {with_weights.describe()}."
        console.print(line, markup=False, soft_wrap=True)
    if own_mean is None:
        console.print(
            f"{spec.name} has no mean and standard deviation of its own: {MEAN} and {STD} of pixels in 0..1 are noted."
        )
    _print_buckets(console, partition)
    _print_whole(console, partition, undivided, levels[-1])
    _print_private(console, partition)
    _print_levels(console, levels, lowest)
    if checked is not None and not differs:
        console.print(
            f"Checked in {checked.seconds:.1f} s: {checked.networks} networks, in eval and train mode, equal the "
            f"backbone in which all else is zero, up to {checked.difference:.0e} of the largest output."
        )
    _report_and_save(console.end_capture(), network, output, differs)
    console.print(f"{output} written.", soft_wrap=True)


def _difference(checked: "Check") -> str:
    """Which networks differ from the masked backbone, and by how much."""
    shown = [
        f"units {', '.join(map(str, units))} in {mode} mode by {difference:.0e}"
        for units, mode, difference in checked.differing
    ]
    return (
        f"networks differ from the backbone in which all else is zero, relative to the largest output: "
        f"{_and_more(shown, 4)}; this is a fault of dvn, and nothing is written"
    )


def _report_and_save(text: str, network: "DeepVirtualNetwork", output: Path, differs: str | None) -> None:
    """Prints what came of it, then writes the file: a command that fails leaves what was there before.

    Raises:
        DvnError: networks differ from what they should be, as `differs` says.
    """
    gone = None
    try:
        typer.echo(text, nl=False)
    except BrokenPipeError as error:  # whoever read the report has had enough of it, such as `head`
        gone = error
    if differs:
        raise DvnError(differs)
    network.save(output)
    if gone is not None:
        raise gone


def _preprocessing(spec: "BackboneSpec", given: Mapping[str, Any]) -> Preprocessing | None:
    """How images are prepared for a backbone's weights: its own way, but for what is given."""
    from dvn_cli import backbones

    own = backbones.preprocessing(spec)
    if not given:
        return own
    numbers = {key: _per_channel(key, given[key], spec.in_chans) for key in ("mean", "std") if key in given}
    origin = f"{', '.join(given)} as given" + (f", the rest {own.origin}" if own else "")
    base = own or Preprocessing(origin, None, None, "bilinear", 1.0, "squash")
    made = replace(base, **{**given, **numbers, "origin": origin})
    if (made.mean is None) != (made.std is None):
        raise InputError(f"give both --mean and --std: {spec.name} has none for images of {spec.in_chans} channels")
    return made


def _per_channel(what: str, text: str, channels: int) -> tuple[float, ...]:
    try:
        numbers = [float(number) for number in re.split(r"[,\s]+", text.strip())]
    except ValueError:
        raise InputError(f"--{what} takes numbers such as 0.5 or 0.485,0.456,0.406, not '{text}'") from None
    if len(numbers) not in (1, channels):
        raise InputError(f"--{what} has {len(numbers)} values for images of {channels} channels")
    return tuple(numbers * (channels // len(numbers)))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise InputError(f"--input-size takes pixels such as 224 or 192x256 (height x width), not '{text}'")
    return int(match[1]), int(match[2] or match[1])


def _and_more(names: Sequence[str], shown: int = 1) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _sum(sizes: Sequence[int]) -> str:
    """How channels are divided: `4 x 16`, uneven `15+14+15+14`, of many units the least and the most."""
    least, most = min(sizes), max(sizes)
    if least == most:
        return f"{len(sizes)} x {least}"
    return "+".join(map(str, sizes)) if len(sizes) <= 4 else f"{len(sizes)} x {least} to {most}"


def _print_buckets(console: "Console", partition: "Partition") -> None:
    from dvn_cli.report import show, table

    alike: dict[Any, list[Bucket]] = {}
    divided = [bucket for bucket in partition.buckets if bucket.sizes]
    for bucket in divided:
        alike.setdefault((bucket.channels, bucket.sizes, len({name for name, _ in bucket.places})), []).append(bucket)
    rows = table("group, by its first tensor", "channels", "units", "such groups", "tensors each", text=1)
    uneven_first = sorted(alike, key=lambda kind: min(kind[1]) == max(kind[1]))[:ROWS]
    for (channels, sizes, tensors), buckets in alike.items():
        if (channels, sizes, tensors) in uneven_first:
            rows.add_row(buckets[0].places[0][0], str(channels), _sum(sizes), str(len(buckets)), str(tensors))
    how = ", equally strong" if partition.rule.assign == "importance" else ""
    how += f", in multiples of {partition.rule.round_to}" if partition.rule.round_to > 1 else ""
    console.print(f"\n[bold]Coupled, and divided among the units{how}:[/] {len(divided)} groups of channels")
    show(console, rows)
    if len(alike) > ROWS:
        console.print(f"and {len(alike) - ROWS} kinds of groups more (--json has all)")


def _print_whole(console: "Console", partition: "Partition", undivided: Sequence["Whole"], top: dict[str, Any]) -> None:
    from dvn_cli.report import short

    share = math.floor(1000 * top["divided"]) / 10  # what is not all is not shown as 100.0
    console.print(f"\n[bold]Shared by all units:[/] {share:.1f} % of the parameters are divided, the rest is whole")
    for channels, places in _too_few(partition.buckets):
        console.print(f"  groups of {channels}, fewer than {partition.units} units: {_and_more(places, 2)}")
    for one in undivided:
        console.print(f"  {short(one.params)} parameters of {_and_more(one.places, 2)}: {one.why}")
    inner = [
        f"{name} ({' x '.join(map(str, sizes))})"
        for name, axes in partition.assignment.tensors.items()
        if any(axis is not None for axis in axes)
        and (sizes := [n for dim, n in enumerate(partition.shapes[name]) if _is_inner(partition, name, dim)])
    ]
    if inner:
        console.print(f"  image channels, kernels and positions are not channels: {_and_more(inner, 2)}")
    if warning := _little_divided(undivided, top):
        console.print(f"[bold yellow]Warning:[/] {warning}")


def _little_divided(undivided: Sequence["Whole"], top: dict[str, Any]) -> str | None:
    """Why so few parameters are divided, where they are few."""
    from dvn_cli.partition import ENOUGH

    if top["divided"] >= ENOUGH:
        return None
    most = undivided[0]
    remedy = ". Fewer units divide more." if "than the" in most.why else "."
    return (
        f"less than {100 * ENOUGH:.0f} % of the parameters are divided; of the others most are those of "
        f"{_and_more(most.places)}: {most.why}{remedy}"
    )


def _too_few(buckets: Iterable["Bucket"]) -> list[tuple[int, list[str]]]:
    found: dict[int, list[str]] = {}
    for bucket in buckets:
        if not bucket.sizes:
            found.setdefault(bucket.channels, []).append(bucket.places[0][0])
    return sorted((channels, list(dict.fromkeys(places))) for channels, places in found.items())


def _is_inner(partition: "Partition", name: str, dim: int) -> bool:
    """Whether a dimension is one along which nothing is divided and nothing could be."""
    few = any((name, dim) in bucket.places for bucket in partition.buckets)
    whole = partition.assignment.tensors[name][dim] is None and partition.shapes[name][dim] > 1
    return whole and not few and (name, dim) not in partition.assignment.classes


def _print_private(console: "Console", partition: "Partition") -> None:
    classes = {name for name, _ in partition.assignment.classes}
    stem = [name for name, owner in partition.owners.items() if owner == "task"]
    norms = {name.rpartition(".")[0] for name, o in partition.owners.items() if o == "network" and name not in classes}
    console.print("\n[bold]Private once training starts[/]")
    console.print(f"  to each task: the stem, {', '.join(stem) or 'none'}")
    kinds = [f"the classifier, {', '.join(sorted(classes))}"]
    if norms:
        kinds.append(f"{len(norms)} normalisations with running statistics ({_and_more(sorted(norms), 1)})")
    console.print(f"  to each task and level: {'; '.join(kinds)}")


def _print_levels(console: "Console", levels: Sequence[dict[str, Any]], lowest: Sequence[int]) -> None:
    from dvn_cli.report import percent, short, show, table

    rows = table("level", "units", "parameters", "exactly", "density", "MACs", "file", optional=("exactly", "file"))
    for row in levels:
        rows.add_row(
            str(row["level"]),
            str(row["units"]),
            short(row["params"]),
            f"{row['params']:,}",
            percent(row["density"]),
            short(row["macs"]),
            f"{row['bytes'] / 1e6:,.1f} MB",
        )
    console.print("\n[bold]Levels of task 1[/]")
    show(console, rows)
    if min(lowest) != max(lowest):
        console.print(
            f"Units are not all alike: level 1 of the tasks has {min(lowest):,} to {max(lowest):,} parameters."
        )
