"""`dvn slice`: standalone files of single networks, cut without torch."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dvn_cli.errors import DvnError, InputError
from dvn_cli.files import check_folder_writable
from dvn_cli.store.file import read_checkpoint
from dvn_cli.store.metadata import check_level, find_task
from dvn_cli.store.slicing import slice_file

FORMATS = ("safetensors",)


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
    header = read_checkpoint(checkpoint)
    tasks = header.metadata.tasks
    files: dict[tuple[int, int], Path] = {}
    if every and task is None and level is None:
        folder = output or Path(f"{checkpoint.stem}-slices")
        for number, depth in header.metadata.networks:
            files[number, depth] = folder / _name(checkpoint, number, depth)
        check_folder_writable(folder)
    elif not every and task is not None and level is not None:
        number = find_task(tasks, task)
        depth = check_level(tasks[number - 1], level)
        name = _name(checkpoint, number, depth)
        files[number, depth] = Path(name) if output is None else output / name if output.is_dir() else output
    else:
        raise InputError("which network? Give `--task T --level L` for one of them, or `--all` for every one")

    results = []
    for (number, depth), file in files.items():
        with _folder_of(file, every):
            counts = slice_file(header, number, depth, file)
        entry = tasks[number - 1]
        result: dict[str, Any] = {
            "file": str(file),
            "task": number,
            "name": entry.name,
            "level": depth,
            "units": entry.units(depth),
            "params": counts.params,
            "bytes": file.stat().st_size,
        }
        results.append(result)
        if not as_json:
            units = ", ".join(map(str, result["units"]))
            typer.echo(
                f"{file}  {entry.name}  level {depth} of {len(entry.levels)}  units {units}  "
                f"{counts.params:,} parameters  {result['bytes'] / 1e6:,.2f} MB"
            )
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(checkpoint), "slices": results}, indent=2))


@contextlib.contextmanager
def _folder_of(file: Path, made: bool) -> Iterator[None]:
    """Makes the folder that a file is written to, where it is to be made; one that stays empty is removed again."""
    if made:
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except DvnError:
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                file.parent.rmdir()
        raise


def _name(checkpoint: Path, task: int, level: int) -> str:
    return f"{checkpoint.stem}-task{task}-level{level}.safetensors"
