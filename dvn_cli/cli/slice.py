"""`dvn slice`: standalone files of single networks, cut without torch."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dvn_cli import export
from dvn_cli.errors import InputError
from dvn_cli.export import FORMATS


def slice_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of `dvn partition` or `dvn train`.")] = Path(
        "dvn.safetensors"
    ),
    task: Annotated[str | None, typer.Option(help="A task, by name or by number from 1 (or name:T, number:T).")] = None,
    level: Annotated[int | None, typer.Option(help="A level of the task, from 1.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every task and level, each in a file of its own.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File or existing folder, with --all a folder. Default: STEM-taskT-levelL.safetensors, or the folder "
            "STEM-slices, in the working directory, STEM being the checkpoint's name.",
        ),
    ] = None,
    file_format: Annotated[str, typer.Option("--format", help=f"Of the files: {', '.join(FORMATS)}.")] = FORMATS[0],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Cut the network of a task and level out of a checkpoint, into a file that needs nothing else."""
    if file_format not in FORMATS:
        raise InputError(f"there is no format '{file_format}'; --format takes {', '.join(FORMATS)}")
    if every and task is None and level is None:
        files = export.slice_all(checkpoint, output)
    elif not every and task is not None and level is not None:
        files = iter([export.slice(checkpoint, task, level, output)])
    else:
        raise InputError("which network? Give `--task T --level L` for one of them, or `--all` for every one")
    results = []
    for cut in files:
        results.append(cut.to_dict())
        if not as_json:
            units = ", ".join(map(str, cut.units))
            typer.echo(
                f"{cut.file}  {cut.name}  level {cut.level} of {cut.levels}  units {units}  "
                f"{cut.params:,} parameters  {cut.bytes / 1e6:,.2f} MB"
            )
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(checkpoint), "slices": results}, indent=2))
