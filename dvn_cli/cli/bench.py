"""`dvn bench`: what each network costs when it runs."""

import functools
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dvn_cli.cli.outputs import check_outputs
from dvn_cli.errors import InputError
from dvn_cli.export import without_manifests
from dvn_cli.files import atomic, check_folder_writable, stem
from dvn_cli.formats import FORMATS

if TYPE_CHECKING:
    from dvn_cli.benchmark import Measurement
    from dvn_cli.report import FittedTable


def bench_command(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="CHECKPOINT-or-SLICE",
            help="Default: dvn.safetensors. With --scenario: runs, given by their records (NAME.run.json), their "
            "checkpoints or folders. Default: the working directory. With --training: KEY=VALUE of the recipe.",
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="A task, by name or by number from 1 (or name:T, number:T). Default: the first.")
    ] = None,
    level: Annotated[int | None, typer.Option(help="A level, from 1. Default: all levels.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every task, not the first only.")] = False,
    scenario: Annotated[
        str | None,
        typer.Option(
            help="Print the paper's table of j1, j2, j3, h1, s1 or s2 from finished runs. A run of dvn that is given "
            "by its checkpoint is timed as well."
        ),
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Measure the steps of a run instead: a recipe's file, or the name of one with dvn."
        ),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --scenario: write its figure there, as PNG and SVG.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images in a forward pass.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    num_warm_iter: Annotated[int, typer.Option(min=0, help="Forward passes before timing.")] = 10,
    num_bench_iter: Annotated[int, typer.Option(min=1, help="Forward passes timed.")] = 40,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels last in memory.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME...",
            help=f"Write every network in these formats and run it there, on the CPU: {', '.join(FORMATS)}.",
        ),
    ] = None,
    results_file: Annotated[Path | None, typer.Option(help="Write the JSON document there too.")] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Compare with such a document; exit with 1 where parameters, bytes or MACs are not the same. Latency "
            "is shown as a ratio where machine and settings are."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure parameters, MACs, latency, throughput and peak memory of the networks in checkpoints and slices.

    With --scenario: the accuracies of finished runs, as a table of the paper. With --training: time and memory of a
    run's steps, against its networks apart and what the device can do.
    """
    if training is not None:
        others = scenario, task, level, plots, baseline, threads, formats
        if any(value is not None for value in others) or every or channels_last or batch_size != 1:
            raise InputError("--training takes what it measures from the recipe: give its keys, such as batch_size=64")
    if every and task is not None:
        raise InputError("--task or --all, not both")
    if scenario is not None and (every or task is not None or level is not None):
        raise InputError("--scenario is of all tasks and levels: leave out --task, --level and --all")
    if scenario is None and plots is not None:
        raise InputError("--plots is of runs: give --scenario too")

    if scenario is not None and formats is not None:
        raise InputError("--formats is of networks that are written now: leave out --scenario")
    if scenario is not None and baseline is not None:
        raise InputError("--baseline is of networks that are measured now: leave out --scenario")

    check_outputs({"--results-file": results_file}, [*(files or [Path("dvn.safetensors")]), baseline, training])
    if plots is not None:
        check_folder_writable(plots)

    measure = functools.partial(
        _measure,
        device=device,
        batch_size=batch_size,
        num_warm_iter=num_warm_iter,
        num_bench_iter=num_bench_iter,
        channels_last=channels_last,
        threads=threads,
    )
    from dvn_cli.evaluation import costs

    before = None if baseline is None else costs.read(baseline)
    if before is not None and not before.results:
        raise InputError(f"'{baseline}' is of no network: nothing would be compared")
    compared: list[costs.Comparison] = []
    show: Callable[[], None]
    if training is not None:
        document = _training(training, list(map(str, files or [])), device, num_warm_iter, num_bench_iter)
        show = functools.partial(_print_training, document)
    elif scenario is not None:
        document, show = _scenario(scenario.lower(), files or [Path()], plots, measure)
    else:
        given = without_manifests(files or [Path("dvn.safetensors")], lambda line: typer.echo(line, err=True))
        names = [] if formats is None else list(dict.fromkeys(name.strip() for name in formats.split(",")))
        results, document = measure(given, task, level, every=every, formats=names)
        if before is not None:
            # Of a checkpoint one task is measured unless all are asked for; with slices all of the baseline is.
            asked_for_all = every or any(result.kind == "slice" for result in results)
            compared, lines = costs.compare(before, document, asked_for_all, level, names or [None])
            for line in lines:
                typer.echo(line, err=True)
            document["baseline"] = [one.to_dict() for one in compared]
        names = [_name(result, len(given)) for result in results]
        show = functools.partial(
            _print if formats is None else _print_formats, document, names, [costs.table(compared)] if compared else []
        )
    document = {"schema_version": costs.SCHEMA_VERSION, **document}
    text = json.dumps(document, indent=2)
    try:
        if as_json:
            typer.echo(text)
        else:
            show()
    finally:  # whichever of the two fails, the other one has the results
        if results_file is not None:
            with atomic(results_file) as opened:
                opened.write(text.encode() + b"\n")
    if before is not None:
        costs.check(compared)


def _training(recipe: str, overrides: list[str], device: str, warm: int, timed: int) -> dict[str, Any]:
    """Measures the steps of a recipe's run. Returns the document that says it."""
    from dvn_cli import report

    notes = report.console(stderr=True)
    with notes.status("measuring training steps"):
        import torch

        from dvn_cli import device as devices
        from dvn_cli.training.experiment import measure_speed

        speed, run = measure_speed(
            recipe,
            overrides=overrides,
            device=device,
            num_warm_iter=warm,
            num_bench_iter=timed,
            note=lambda line: notes.print(line, soft_wrap=True),
        )
    return {
        "device": str(run.device),
        "device_name": devices.title(run.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backbone": run.network.partition.spec.name,
        "precision": run.recipe.precision,
        "networks": speed.networks,
        "steps": speed.steps,
        "step_ms": {"p50": 1000 * speed.step, "p90": 1000 * speed.step_p90},
        "images_per_s": speed.images_per_s,
        "data_wait_ms": 1000 * speed.wait,
        "peak_memory_bytes": speed.peak_memory_bytes,
        "joint_ms": 1000 * speed.joint,
        "apart_ms": None if speed.apart is None else 1000 * speed.apart,
        "joint_over_apart": speed.ratio,
        "flops_per_step": speed.flops,
        "flops_per_s": speed.achieved,
        "device_flops_per_s": speed.device,
        "share_of_device": speed.share,
    }


def _print_training(document: dict[str, Any]) -> None:
    from dvn_cli.report import console, percent, show, table

    out, step = console(), document["step_ms"]
    out.print(_where(document), soft_wrap=True)
    memory, apart = document["peak_memory_bytes"], document["apart_ms"]
    made = table(document["backbone"], f"{document['networks']} networks, {document['precision']}", text=2)
    for name, value in (
        ("step", f"{step['p50']:,.1f} ms; nine of ten: {step['p90']:,.1f} ms"),
        ("images/s", f"{document['images_per_s']:,.0f}"),
        ("waiting for images", f"{document['data_wait_ms']:,.1f} ms a step"),
        ("peak memory", "-" if memory is None else f"{memory / 1e6:,.0f} MB"),
        ("forward and backward", f"{document['joint_ms']:,.1f} ms"),
        ("networks apart", "-" if apart is None else f"{apart:,.1f} ms; together {document['joint_over_apart']:.2f}"),
        ("operations", f"{document['flops_per_s'] / 1e9:,.1f} GFLOP/s"),
        (
            "of a matrix product's",
            f"{percent(document['share_of_device'])} ({document['device_flops_per_s'] / 1e9:,.0f})",
        ),
    ):
        made.add_row(name, value)
    show(out, made)


def _measure(
    files: Sequence[Path],
    task: str | None = None,
    level: int | None = None,
    *,
    device: str,
    threads: int | None,
    **settings: Any,
) -> tuple[list["Measurement"], dict[str, Any]]:
    """Measures networks of files. Returns what was found, and the document that says it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from dvn_cli import report

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    notes = report.console(stderr=True)
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        shown = bar.add_task("importing torch", total=None)
        import torch

        from dvn_cli import benchmark
        from dvn_cli import device as devices

        chosen = devices.choose("cpu" if device == "auto" and settings.get("formats") else device)
        results = benchmark.bench(
            files,
            task,
            level,
            device=chosen,
            threads=threads,
            progress=lambda what, done: bar.update(shown, description=what, completed=done, total=1.0),
            note=lambda line: notes.print(line, soft_wrap=True),
            **settings,
        )
    return results, {
        "device": str(chosen),
        "device_name": devices.title(chosen),
        "host": platform.node(),
        "torch": torch.__version__,
        "threads": threads or torch.get_num_threads(),
        **{key: value for key, value in settings.items() if key not in ("every", "formats")},
        "results": [result.to_dict() for result in results],
    }


def _scenario(
    name: str,
    files: Sequence[Path],
    plots: Path | None,
    measure: Callable[..., tuple[list["Measurement"], dict[str, Any]]],
) -> tuple[dict[str, Any], Callable[[], None]]:
    """The tables of a scenario: the document, and how to print it."""
    from dvn_cli import report
    from dvn_cli.paper import figures, records, rendering, tables

    scenario = figures.find(name)
    found = tables.tables(scenario, records.read(name, files))
    written = []
    if plots is not None:
        from dvn_cli.paper import plots as drawn

        written = drawn.write(name, found, plots)
    costs, measured = [], []
    for table in found:
        times, document = {}, None
        if (network := tables.timed(table)) is not None:
            file, task = network
            results, document = measure([file], str(task))
            for result in results:
                times[len(result.units)] = 1000 * result.percentile(50) / result.batch_size, result.speedup
        costs.append(tables.costs(table, times))
        measured.append(document)

    def show() -> None:
        console = report.console()
        rendering.show(console, name, found, costs, measured)
        for path in written:
            console.print(f"{path} is written", soft_wrap=True)

    document = rendering.as_json(name, scenario, found, costs, measured)
    return document | {"plots": [str(path) for path in written]}, show


def _name(result: "Measurement", files: int) -> str:
    """What tells a network's row from others: its task, of several files a slice's name, or a checkpoint's and task."""
    file = stem(Path(result.file))
    return result.name if files == 1 else file if result.kind == "slice" else f"{file} {result.name}"


def _print_formats(document: dict[str, Any], names: list[str], more: Sequence["FittedTable"]) -> None:
    from dvn_cli.report import console as new_console
    from dvn_cli.report import short, show, table

    console = new_console()
    console.print(f"{_where(document)}, batch size {document['batch_size']}\n")
    columns = ("bytes", "difference", "p50 ms", "p90 ms", "p99 ms", "images/s", "peak memory")
    made = table("task", "level", "format", *columns, text=3, optional=("p99 ms", "p90 ms", "images/s", "difference"))
    for name, row in zip(names, document["results"], strict=True):
        memory = row["peak_memory_bytes"]
        made.add_row(
            name,
            str(row["level"]),
            row["format"],
            f"{short(row['bytes'])}B",
            f"{row['difference']:.0e}",
            *(f"{row['latency_ms'][key]:.2f}" for key in ("p50", "p90", "p99")),
            f"{row['images_per_s']:,.0f}",
            "-" if memory is None else f"{memory / 1e6:.1f} MB",
        )
    show(console, made, *more)


def _where(document: dict[str, Any]) -> str:
    """On what something was measured."""
    threads = f", threads: {document['threads']}" if document["device"] == "cpu" else ""
    return f"{document['device']}, {document['device_name']}{threads}, torch {document['torch']}"


def _print(document: dict[str, Any], names: list[str], more: Sequence["FittedTable"]) -> None:
    from dvn_cli.report import console as new_console
    from dvn_cli.report import percent, short, show, table

    console = new_console()
    console.print(f"{_where(document)}, batch size {document['batch_size']}\n")
    columns = ("params", "density", "compression", "MACs", "peak memory")
    costs = table("task", "level", *columns, text=1, optional=("compression", "density", "MACs"))
    columns = ("p50 ms", "p90 ms", "p99 ms", "images/s", "speed-up")
    speeds = table("task", "level", *columns, text=1, optional=("p99 ms", "p90 ms", "images/s"))
    for name, row in zip(names, document["results"], strict=True):
        memory, speedup = row["peak_memory_bytes"], row["speedup"]
        costs.add_row(
            name,
            str(row["level"]),
            short(row["params"]),
            percent(row["density"]),
            f"{row['compression']:.1f}x",
            short(row["macs"]),
            "-" if memory is None else f"{memory / 1e6:.1f} MB",
        )
        speeds.add_row(
            name,
            str(row["level"]),
            *(f"{row['latency_ms'][key]:.2f}" for key in ("p50", "p90", "p99")),
            f"{row['images_per_s']:,.0f}",
            "-" if speedup is None else f"{speedup:.2f}x",
        )
    show(console, costs)
    console.print()
    show(console, speeds, *more)
