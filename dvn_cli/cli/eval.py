"""`dvn eval`: accuracy and loss of networks on test images, and whether they are good enough."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dvn_cli.cli.outputs import check_outputs
from dvn_cli.errors import InputError
from dvn_cli.export import MANIFEST, read_manifest, without_manifests
from dvn_cli.files import append, encoded

if TYPE_CHECKING:
    from dvn_cli.evaluation.measure import Loaded


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
        list[str] | None,
        typer.Option(
            metavar="[NETWORKS:]A",
            help="Top-1 in per cent; exit with 1 if a network is below it. Of all networks, or of those of task=T, "
            "level=L or task=T,level=L. Can be given again; what is said of fewer networks goes before.",
        ),
    ] = None,
    gates: Annotated[
        Path | None, typer.Option(help="A YAML file of such floors, `task=T,level=L: A` in each line, `all: A` in one.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Compare, image by image, with what --save-baseline wrote; exit with 1 if one is worse."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="With --baseline: points of accuracy that may be lost. Default: 0.5.")
    ] = None,
    undecided: Annotated[
        str | None,
        typer.Option(help="With --baseline: what too few images to tell count as, pass or fail. Default: exit with 3."),
    ] = None,
    save_baseline: Annotated[
        Path | None, typer.Option(help="Write which images were told right, if all gates are passed.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML, a test case for each network.")] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Add a summary in Markdown to this file, such as $GITHUB_STEP_SUMMARY.")
    ] = None,
    report_file: Annotated[
        Path | None,
        typer.Option("--report", help="Write an HTML page about the checkpoint that needs nothing else to be read."),
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="With --report: what `dvn bench --json` printed, for accuracy over latency.")
    ] = None,
    slices: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --report: a folder that `dvn slice --all` wrote, or its manifest.json, for what files weigh. "
            "Can be given again, for another format."
        ),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Say the accuracy of each class too.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images at a time; the result does not depend on it.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    results_file: Annotated[
        Path | None, typer.Option(help="Write the results to this file too, as .csv or .json.")
    ] = None,
) -> None:
    """Evaluate networks on test images: top-1, top-5, loss, and 95 % intervals of top-1.

    Exits with 1 where a gate is missed or a loss is not a number, and with 3 where too few images leave it undecided.
    """
    from dvn_cli.evaluation.gates import Verdict, parse_floor, read_floors

    if results_file is not None and results_file.suffix not in (".csv", ".json"):
        raise InputError(f"--results-file ends with .csv or .json, not '{results_file.name}'")
    if baseline is None and (tolerance is not None or undecided is not None):
        raise InputError("--tolerance and --undecided are of a comparison: give --baseline too")
    if undecided not in (None, "pass", "fail"):
        raise InputError(f"--undecided is pass or fail, not '{undecided}'")
    if tolerance is not None and not 0 <= tolerance <= 100:
        raise InputError(f"--tolerance is in points of accuracy, 0 to 100, not {tolerance:g}")
    floors = [] if gates is None else read_floors(gates)
    floors += [parse_floor(text) for text in min_accuracy or []]
    for option, given in (("--costs", costs), ("--slices", slices)):
        if given and report_file is None:
            raise InputError(f"{option} is of a report: give --report too")
    files = files or [Path("dvn.safetensors")]
    written = {
        "--results-file": results_file,
        "--save-baseline": save_baseline,
        "--junit": junit,
        "--summary": summary,
        "--report": report_file,
    }
    manifests_of = [each / MANIFEST for each in slices or []]
    check_outputs(written, [*files, *(data or []), baseline, gates, costs, *(slices or []), *manifests_of])
    if summary is not None and summary.exists():
        append(summary, b"")

    import contextlib
    import json
    import os

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dvn_cli import report

    err = report.console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    def note(line: str) -> None:
        err.print(line, soft_wrap=True)

    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("reading", total=None)

        from dvn_cli import processes
        from dvn_cli.evaluation import ci, page, rendering
        from dvn_cli.evaluation.costs import read
        from dvn_cli.evaluation.judge import Judge
        from dvn_cli.evaluation.measure import evaluate

        counts_as: Verdict = "undecided" if undecided is None else "passed" if undecided == "pass" else "failed"
        judge = Judge(floors, baseline, tolerance, counts_as, save_baseline, task, level, note)
        measured, manifests = None if costs is None else read(costs), list(map(read_manifest, slices or []))

        def opened(loaded: "Sequence[Loaded]") -> None:
            judge.opens(loaded)
            if report_file is not None:
                page.check(loaded, measured, manifests)

        rows = evaluate(
            without_manifests(files, note),
            task,
            level,
            data=data,
            batch_size=batch_size,
            device=device,
            note=note,
            progress=lambda done, total: progress.update(bar, description="images", completed=done, total=total),
            opened=opened,
        )
    if processes.rank():  # of several, the first has all results, judges and writes
        return
    gate = judge.judge(rows)
    results = rendering.as_document(rows, gate, per_class)
    with contextlib.ExitStack() as outputs:  # whichever of them fails, the others have the results
        if results_file is not None:
            outputs.callback(rendering.write, results_file, results)
        if summary is not None:
            outputs.callback(append, summary, encoded(ci.markdown(rows, gate)))
        if report_file is not None:
            outputs.callback(page.write, report_file, judge.loaded, rows, measured, manifests)
        if junit is not None:
            outputs.callback(ci.write_junit, junit, rows, gate)
        if os.environ.get("GITHUB_ACTIONS") == "true" and (annotations := ci.annotations(gate)):
            outputs.callback(typer.echo, "\n".join(annotations), err=True)
        if as_json:
            typer.echo(json.dumps(results, indent=2))
        else:
            classes = rendering.class_tables(rows) if per_class else []
            checks = rendering.check_tables(rows, gate)
            report.show(report.console(), *rendering.result_tables(rows), *classes, *checks)
    gate.raise_for_verdict()
    judge.save(rows)
