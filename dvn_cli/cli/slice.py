"""`dvn slice`: standalone files of single networks, cut without torch unless they are fitted to images."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

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
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="Fit layers to what they give in the task's top level, on these images, whose labels are not needed; "
            "with labels, accuracy before and after is shown. A folder, or as --data of `dvn eval`. Can be given again."
        ),
    ] = None,
    file_format: Annotated[str, typer.Option("--format", help=f"Of the files: {', '.join(FORMATS)}.")] = FORMATS[0],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Cut the network of a task and level out of a checkpoint, into a file that needs nothing else."""

    def note(line: str) -> None:
        typer.echo(line, err=True)

    if file_format not in FORMATS:
        raise InputError(f"there is no format '{file_format}'; --format takes {', '.join(FORMATS)}")
    files: Iterable[export.SliceFile]
    if every and task is None and level is None:
        files = export.slice_all(checkpoint, output, calibrate or None, note)
    elif not every and task is not None and level is not None:
        files = [export.slice(checkpoint, task, level, output, calibrate or None, note)]
    else:
        raise InputError("which network? Give `--task T --level L` for one of them, or `--all` for every one")
    accuracies: dict[tuple[int, int], tuple[float, float]] = {}
    if calibrate:  # images are read once for all networks of a task
        files = list(files)
        accuracies = _accuracies(checkpoint, [cut for cut in files if cut.calibration is not None], calibrate, note)
    results = []
    for cut in files:
        result = cut.to_dict()
        if cut.calibration is not None:
            before, after = accuracies.get((cut.task, cut.level), (None, None))
            result["calibration"] = {**result["calibration"], "top1_before": before, "top1_after": after}
        results.append(result)
        if not as_json:
            units = ", ".join(map(str, cut.units))
            typer.echo(
                f"{cut.file}  {cut.name}  level {cut.level} of {cut.levels}  units {units}  "
                f"{cut.params:,} parameters  {cut.bytes / 1e6:,.2f} MB{_calibration(result['calibration'])}"
            )
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(checkpoint), "slices": results}, indent=2))


def _accuracies(
    checkpoint: Path, cuts: Sequence[export.SliceFile], data: list[str], note: Callable[[str], None]
) -> dict[tuple[int, int], tuple[float, float]]:
    """Top-1 in per cent on the test images, before and after, by task and level; not of tasks of other classes."""
    from dvn_cli.evaluation.measure import evaluate

    found = {}
    for task in dict.fromkeys(cut.task for cut in cuts):
        own = [cut for cut in cuts if cut.task == task]
        level = own[0].level if len(own) == 1 else None
        try:
            rows = evaluate([checkpoint, *(cut.file for cut in own)], f"number:{task}", level, data=data)
        except InputError as error:
            note(f"accuracy is not measured: {error}")
            continue
        top1 = {(row.file, row.level): row.top1 for row in rows}
        for cut in own:
            found[task, cut.level] = top1[str(checkpoint), cut.level], top1[str(cut.file), cut.level]
    return found


def _calibration(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return ""
    before, after = calibration["top1_before"], calibration["top1_after"]
    accuracy = "" if before is None else f": {before:.1f} -> {after:.1f} %"
    return f"  calibrated on {calibration['images']} images{accuracy}"
