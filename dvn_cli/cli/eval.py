"""`dvn eval`: accuracy and loss of networks on test images."""

from pathlib import Path
from typing import Annotated

import typer

from dvn_cli.errors import DvnError, InputError
from dvn_cli.files import check_writable


def eval_command(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[CHECKPOINT-or-SLICE]...", help="Default: dvn.safetensors.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Only this task, by name or by number from 1 (or name:T, number:T).")
    ] = None,
    level: Annotated[int | None, typer.Option(help="Only this level, from 1.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Other images than the task's own test images: a folder (of images by class, or of parquet files), a "
            "YAML file with the keys of a recipe's `data`, or KEY=VALUE of those. Can be given again."
        ),
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Top-1 in per cent; exit with 1 if a network is below it.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time; the result does not depend on it.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    results_file: Annotated[
        Path | None, typer.Option(help="Write the results to this file too, as .csv or .json.")
    ] = None,
) -> None:
    """Evaluate networks on test images: top-1, top-5, loss. Exits with 1 below --min-accuracy, and at NaN."""
    if min_accuracy is not None and not 0 <= min_accuracy <= 100:
        raise InputError(f"--min-accuracy is in per cent, 0 to 100, not {min_accuracy:g}")
    if min_accuracy is not None and 0 < min_accuracy < 1:
        raise InputError(f"--min-accuracy is in per cent: give {100 * min_accuracy:g} for {min_accuracy:g}")
    if results_file is not None and results_file.suffix not in (".csv", ".json"):
        raise InputError(f"--results-file ends with .csv or .json, not '{results_file.name}'")

    import json

    if results_file is not None:
        check_writable(results_file)

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dvn_cli import report

    err = report.console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("reading", total=None)

        from dvn_cli.evaluation import gates, rendering
        from dvn_cli.evaluation.measure import evaluate

        rows = evaluate(
            files or [Path("dvn.safetensors")],
            task,
            level,
            data=data,
            batch_size=batch_size,
            device=device,
            note=lambda line: err.print(line, soft_wrap=True),
            progress=lambda done, total: progress.update(bar, description="images", completed=done, total=total),
        )
    judged = None if min_accuracy is None else gates.gate(rows, min_accuracy)
    results = rendering.as_document(rows, judged)
    try:
        if as_json:
            typer.echo(json.dumps(results, indent=2))
        else:
            report.show(report.console(), *rendering.result_tables(rows))
    finally:  # whichever of the two fails, the other one has the results
        if results_file is not None:
            rendering.write(results_file, results)
    problem = gates.failure(rows, judged)
    if problem is not None:
        raise DvnError(problem)
