"""`dvn slice`: standalone files of single networks; safetensors as they are take no torch."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dvn_cli import budget, export, planning
from dvn_cli.cli.outputs import check_is_no_input
from dvn_cli.errors import InputError
from dvn_cli.formats import FORMATS, NotExpressible
from dvn_cli.store.file import read_checkpoint
from dvn_cli.store.lookup import find_task


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
            help="File or existing folder, with --all a folder. Default: STEM-taskT-levelL with the format's ending, "
            "or the folder STEM-slices, in the working directory, STEM being the checkpoint's name.",
        ),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="Fit layers to what they give in the task's top level, on these images, whose labels are not needed; "
            "with labels, accuracy before and after is shown. A folder, or as --data of `dvn eval`. Can be given again."
        ),
    ] = None,
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help=f"Of the files: {', '.join(FORMATS)}. All but the first are run and compared before they are written.",
        ),
    ] = "safetensors",
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, fp16 or bf16; or int8.")] = "fp32",
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Compute in 8-bit integers (onnx, executorch), with ranges from the images of --calibrate, which then "
            "fits no layers. The accuracy is shown; without labels, on how many images the class is the same.",
        ),
    ] = False,
    fold_norms: Annotated[
        bool, typer.Option("--fold-norms", help="Put running statistics into the weights of the layers before them.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Compare on these images too; a folder, or as --data of `dvn eval`. Can be given again."),
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Take the largest level whose file has at most so much, such as 2MB.")
    ] = None,
    max_params: Annotated[str | None, typer.Option(help="The same by parameters, such as 1.5M.")] = None,
    max_macs: Annotated[str | None, typer.Option(help="The same by multiply-accumulates, such as 300M.")] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="The same by the median latency in --results of `dvn bench`, such as 5ms.")
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(
            help="Top-1 in per cent, as in --results or recorded by training; alone: the smallest such level."
        ),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="JSON of `dvn eval` or `dvn bench` on this checkpoint. Can be given again."),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="A level for each task: the highest mean of the recorded accuracies within --budget. With --output "
            "FOLDER their files are written, otherwise the plan is printed alone.",
        ),
    ] = False,
    budget_bytes: Annotated[
        str | None,
        typer.Option(
            "--budget", help="With --plan: bytes of the networks together, what they share counted once, such as 20MB."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=WEIGHT", help="With --plan: of a task in the mean; 1 by default. Can be given again."
        ),
    ] = None,
    list_formats: Annotated[
        bool, typer.Option("--list-formats", help="Say which formats this machine can write, and what the others need.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Cut the network of a task and level out of a checkpoint, into a file that needs nothing else."""

    def note(line: str) -> None:
        typer.echo(line, err=True)

    if list_formats:
        _show_formats(as_json)
        return
    if int8 and dtype not in ("fp32", "int8"):
        raise InputError("--int8 or --dtype, not both")
    if output is not None and output.is_file():
        check_is_no_input("--output", output, [*(results or []), *(data or []), *(calibrate or [])])
    int8 = int8 or dtype == "int8"
    ranges, calibrate = (calibrate, None) if int8 else (None, calibrate)
    form = export.Form(file_format, "int8" if int8 else dtype, fold_norms, data or None, ranges or None)
    if (calibrate or ranges) and (plan or min_accuracy is not None):
        raise InputError(
            "--min-accuracy and --plan go by recorded accuracies, and --calibrate and --int8 give other networks, of "
            "which none is recorded: choose by --level or another budget"
        )
    given = {"bytes": max_bytes, "params": max_params, "macs": max_macs, "latency": max_latency}
    limits = {what: budget.amount(what, text, f"--max-{what}") for what, text in given.items() if text is not None}
    if min_accuracy is not None:
        from dvn_cli.evaluation.gates import accuracy_in_percent

        accuracy_in_percent("--min-accuracy", min_accuracy)
    if results and not (plan or every or limits or min_accuracy is not None):
        raise InputError("--results is for choosing a level, or for a manifest: give a budget, --plan or --all too")
    choice, planned, networks = None, None, None
    if plan:
        if task is not None or level is not None or every or limits or min_accuracy is not None:
            raise InputError("a plan chooses a level for each task: leave out --task, --level, --all and their budgets")
        if budget_bytes is None:
            raise InputError("--plan needs --budget, such as 20MB")
        most = budget.amount("bytes", budget_bytes, "--budget")
        if form.dtype != "fp32":
            note(f"the plan counts what networks weigh in fp32: files in {form.dtype} are smaller")
        planned = planning.plan(read_checkpoint(checkpoint), most, _weights(weights or []), results or [])
        if not as_json:
            _show_plan(checkpoint, planned, most, written=output is not None)
        networks = planned.networks
    elif budget_bytes is not None or weights:
        raise InputError("--budget and --weights are of a plan: give --plan too")
    elif limits or min_accuracy is not None:
        if task is None or level is not None or every:
            raise InputError("a budget chooses the level of a task: give --task T, without --level and --all")
        choice = _choose(checkpoint, task, limits, min_accuracy, results or [], form, calibrate or None)
        level = choice.level.level
        if "latency" in limits and form.dtype != "fp32":
            note(f"latencies are recorded of files in fp32: one in {form.dtype} may have another")
        if not as_json:
            _show_choice(choice)
    files: Iterable[export.SliceFile]
    if plan and output is None:
        files = []
    elif plan or (every and task is None and level is None):
        files = export.slice_all(checkpoint, output, calibrate or None, note, form, results or [], networks)
    elif not every and task is not None and level is not None:
        files = [export.slice(checkpoint, task, level, output, calibrate or None, note, form)]
    else:
        raise InputError("which network? Give `--task T --level L` for one of them, or `--all` for every one")
    accuracies: dict[tuple[int, int], tuple[float, float]] = {}
    if fitted := calibrate or ranges:  # images are read once for all networks of a task
        files = list(files)
        changed = [cut for cut in files if ranges or cut.calibration is not None]
        from dvn_cli.evaluation.slices import top1_before_and_after

        accuracies = top1_before_and_after(checkpoint, changed, file_format, fitted, note)
    rows = []
    for cut in files:
        result = cut.to_dict()
        if cut.calibration is not None:
            before, after = accuracies.get((cut.task, cut.level), (None, None))
            result["calibration"] = {**result["calibration"], "top1_before": before, "top1_after": after}
        if ranges:
            before, after = accuracies.get((cut.task, cut.level), (None, None))
            result["int8"] = {"top1_before": before, "top1_after": after}
        rows.append(result)
        if not as_json:
            units = ", ".join(map(str, cut.units))
            typer.echo(
                f"{cut.file}  {cut.name}  level {cut.level} of {cut.levels}  units {units}  "
                f"{cut.params:,} parameters  {cut.bytes / 1e6:,.2f} MB{_check(result['check'])}"
                f"{_calibration(result['calibration'])}{_int8(result.get('int8'))}"
            )
    if as_json:
        chosen: dict[str, Any] = {}
        if choice is not None:
            chosen = {"choice": {"why": choice.why, "levels": list(map(vars, choice.levels))}}
        if planned is not None:
            levels = [{"task": task, **vars(each)} for task, each in enumerate(planned.levels, 1)]
            chosen = {"plan": {"budget_bytes": most, **vars(planned), "levels": levels}}
        typer.echo(json.dumps({"checkpoint": str(checkpoint), **chosen, "slices": rows}, indent=2))


def _int8(int8: dict[str, float | None] | None) -> str:
    if int8 is None or int8["top1_before"] is None:
        return ""
    return f"  in int8 {int8['top1_before']:.1f} -> {int8['top1_after']:.1f} %"


def _calibration(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return ""
    before, after = calibration["top1_before"], calibration["top1_after"]
    accuracy = "" if before is None else f": {before:.1f} -> {after:.1f} %"
    return f"  calibrated on {calibration['images']} images{accuracy}"


def _check(check: dict[str, Any] | None) -> str:
    if check is None:
        return ""
    same = f"{check['same']} of {check['images']}" if check["same"] < check["images"] else f"all {check['images']}"
    return f"  logits within {check['difference']:.0e}, the same class on {same} images"


def _choose(
    checkpoint: Path,
    task: str,
    limits: dict[str, float],
    least: float | None,
    results: Sequence[Path],
    form: export.Form,
    calibrate: list[str] | None,
) -> budget.Choice:
    header = read_checkpoint(checkpoint)
    number = find_task(header.metadata.tasks, task)
    is_cut = form.is_cut and calibrate is None
    counted = {*limits} - {"bytes"} | ({"bytes"} if is_cut else set())
    levels = budget.known_levels(header, number, results, counted, form.format)
    if "bytes" in limits and not is_cut:  # what other files weigh is known once they are written
        levels = _with_bytes(checkpoint, number, levels, form, calibrate)
    name = header.metadata.tasks[number - 1].name
    return budget.choose(levels, limits, least, name, form.format, lambda: budget.unread_record(header))


def _with_bytes(
    checkpoint: Path, task: int, levels: Sequence[budget.KnownLevel], form: export.Form, calibrate: list[str] | None
) -> list[budget.KnownLevel]:
    """Levels with the bytes of their files in a form, None of those that the format cannot express, if not all."""
    refused, form = list[NotExpressible](), replace(form, data=None)

    def size(level: int) -> int | None:
        with tempfile.TemporaryDirectory(prefix="dvn-slice-") as folder:
            try:
                return export.slice(checkpoint, f"number:{task}", level, folder, calibrate, form=form).bytes
            except NotExpressible as error:
                refused.append(error)
                return None

    found = [replace(each, bytes=size(each.level)) for each in levels]
    if len(refused) == len(levels):
        raise refused[0]
    return found


def _show_choice(choice: budget.Choice) -> None:
    from dvn_cli.report import console, show, table

    typer.echo(f"level {choice.level.level}: {choice.why}")
    whats = [
        what
        for what in ("bytes", "params", "macs", "latency", "accuracy")
        if any(getattr(level, what) is not None for level in choice.levels)
    ]
    rows = table("level", *whats)
    for level in choice.neighbours:
        rows.add_row(str(level.level), *map(level.describe, whats))
    show(console(), rows)


def _weights(words: Sequence[str]) -> dict[str, float]:
    found = {}
    for word in words:
        task, equals, weight = word.rpartition("=")
        try:
            found[task] = float(weight if equals else "")
        except ValueError:
            raise InputError(f"--weights is TASK=WEIGHT, such as 1=2, not '{word}'") from None
    return found


def _show_plan(checkpoint: Path, plan: planning.Plan, most: float, written: bool) -> None:
    from dvn_cli.report import console, show, table

    tasks = read_checkpoint(checkpoint).metadata.tasks
    total, files = (
        budget.in_words("bytes", size) for size in (plan.bytes, sum(each.bytes or 0 for each in plan.levels))
    )
    typer.echo(
        f"{budget.in_words('accuracy', plan.accuracy)} on average, {total} of {budget.in_words('bytes', most)} "
        f"together, what they share counted once (as files of their own {files})"
    )
    rows = table("task", "level", "of", "params", "accuracy", "file", text=1, optional=("file", "params", "of"))
    for task, each in zip(tasks, plan.levels, strict=True):
        figures = each.describe("params").removesuffix(" params"), each.describe("accuracy"), each.describe("bytes")
        rows.add_row(task.name, str(each.level), str(len(task.levels)), *figures)
    show(console(), rows)
    if not written:
        typer.echo("nothing is written: -o FOLDER writes their files")


def _show_formats(as_json: bool) -> None:
    installs = {each: f"pip install 'dvn[{each.name}]'" if each.missing else None for each in FORMATS.values()}
    if as_json:
        rows = [
            {"format": each.name, "runs_with": each.runs_with, "missing": list(each.missing), "install": install}
            for each, install in installs.items()
        ]
        typer.echo(json.dumps({"formats": rows}, indent=2))
        return
    from dvn_cli.report import console, show, table

    formats = table("format", "runs with", "here", text=3)
    for each, install in installs.items():
        formats.add_row(each.name, each.runs_with, install or "yes")
    show(console(), formats)
