"""`dvn partition`: a backbone divided into units, and what came of it in terms that a person can check."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dvn_cli.errors import DvnError, InputError
from dvn_cli.files import check_writable
from dvn_cli.store import schema
from dvn_cli.store.file import lost_with

if TYPE_CHECKING:
    from dvn_cli.check import Check
    from dvn_cli.network import DeepVirtualNetwork


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
    divide: Annotated[
        str,
        typer.Option(
            metavar="all|inner",
            help="Divide all coupled groups, or only those inside of blocks: all units share the residual stream.",
        ),
    ] = "all",
    assign: Annotated[
        str,
        typer.Option(
            metavar="even|importance|sorted",
            help="Give each unit a run of channels, or equally strong ones; or the best to unit 1, the next to 2 ...",
        ),
    ] = "even",
    widths: Annotated[
        str,
        typer.Option(
            metavar="even|macs|params",
            help="Give units as many channels of each group; or more of those that are worth most for what they cost.",
        ),
    ] = "even",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Images to tell by which channels matter, and to make up for what levels lack; labels are not read: a "
            "folder, a YAML file with the keys of a recipe's `data`, or KEY=VALUE of those. Can be given again."
        ),
    ] = None,
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
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Of the random weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no fresh partition.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare its networks with the backbone in which all else is zero.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Divide a backbone into units: every task and level is then a network of its own in one set of weights."""
    if not force and (lost := lost_with(output)):
        raise InputError(f"{lost}; --force replaces it, -o writes elsewhere")
    check_writable(output)
    size, means, stds = _size(input_size), _numbers("mean", mean), _numbers("std", std)

    from dvn_cli import report

    notes = report.console(stderr=True)
    said: list[str] = []
    with notes.status("importing torch and timm") as status:
        from dvn_cli import dividing

        network = dividing.divide(
            backbone,
            units,
            num_classes=num_classes,
            in_chans=in_chans,
            input_size=size,
            pretrained=pretrained,
            weights=weights,
            mean=means,
            std=stds,
            interpolation=interpolation,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            divide=divide,
            assign=assign,
            widths=widths,
            round_to=round_to,
            data=data or None,
            seed=seed,
            note=said.append,
            progress=status.update,
        )
        summary = dividing.summarise(network, status.update)
        checked = None
        if check:
            from dvn_cli.check import check as check_partition

            checked = check_partition(network.partition, status.update)
    differs = None if checked is None or not checked.differing else _difference(checked)
    if network.partition.rule.scores_channels and not pretrained and weights is None:
        notes.print(
            "The weights are random, and so is their importance: --weights or --pretrained gives it a meaning.",
            soft_wrap=True,
        )
    if as_json:
        document = {
            "checkpoint": None if differs else str(output),
            "backbone": schema.checked(network.partition.spec),
            "units": units,
            "divide": divide,
            "assign": assign,
            "widths": widths,
            "round_to": round_to,
            "mean": network.tasks[0].mean,
            "std": network.tasks[0].std,
            "preprocessing": network.preprocessing and asdict(network.preprocessing),
            "notes": said,
            "random": list(network.random or ()),
            "check": None if checked is None else checked.to_dict(),
            **summary.to_dict(),
        }
        _print_and_save(json.dumps(document, indent=2) + "\n", network, output, differs)
        return

    from dvn_cli.cli import rendering

    console = report.console(markup=True)
    console.begin_capture()
    rendering.show_division(console, backbone, network, summary, said)
    if checked is not None and not differs:
        console.print(
            f"Checked in {checked.seconds:.1f} s: {checked.networks} networks, in eval and train mode, equal the "
            f"backbone in which all else is zero, up to {checked.difference:.0e} of the largest output."
        )
    _print_and_save(console.end_capture(), network, output, differs)
    console.print(f"{output} written.", soft_wrap=True)


def _difference(checked: "Check") -> str:
    """Which networks differ from the masked backbone, and by how much."""
    from dvn_cli.dividing import and_more

    shown = [
        f"units {', '.join(map(str, units))} in {mode} mode by {difference:.0e}"
        for units, mode, difference in checked.differing
    ]
    return (
        f"networks differ from the backbone in which all else is zero, relative to the largest output: "
        f"{and_more(shown, 4)}; this is a fault of dvn, and nothing is written"
    )


def _print_and_save(text: str, network: "DeepVirtualNetwork", output: Path, differs: str | None) -> None:
    """Prints what came of it, then writes the file: a command that fails leaves what was there before.

    Raises:
        DvnError: networks differ from what they should be, as `differs` says.
    """
    typer.echo(text, nl=False)
    if differs:
        raise DvnError(differs)
    network.save(output)


def _numbers(what: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in re.split(r"[,\s]+", text.strip())]
    except ValueError:
        raise InputError(f"--{what} takes numbers such as 0.5 or 0.485,0.456,0.406, not '{text}'") from None


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise InputError(f"--input-size takes pixels such as 224 or 192x256 (height x width), not '{text}'")
    return int(match[1]), int(match[2] or match[1])
