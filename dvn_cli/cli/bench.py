"""`dvn bench`: what each network costs when it runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dvn_cli import checkpoint as checkpoints
from dvn_cli.errors import InputError

if TYPE_CHECKING:
    from dvn_cli.benchmark import Target


def bench_command(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="CHECKPOINT-or-SLICE", help="Default: dvn.safetensors.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A task, by name or by number from 1. Default: the first.")] = None,
    level: Annotated[int | None, typer.Option(help="A level, from 1. Default: all levels.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every task, not the first only.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images in a forward pass.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    num_warm_iter: Annotated[int, typer.Option(min=0, help="Forward passes before timing.")] = 10,
    num_bench_iter: Annotated[int, typer.Option(min=1, help="Forward passes timed.")] = 40,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels last in memory.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")] = None,
    results_file: Annotated[Path | None, typer.Option(help="Write the JSON document there too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure parameters, MACs, latency, throughput and peak memory of the networks in checkpoints and slices."""
    if every and task is not None:
        raise InputError("--task or --all, not both")
    headers = [checkpoints.read_header(file) for file in files or [Path("dvn.safetensors")]]

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    notes = Console(stderr=True)
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        shown = bar.add_task("importing torch", total=None)
        import torch

        from dvn_cli import benchmark
        from dvn_cli import device as devices

        targets = [target for header in headers for target in _targets(header, task, level, every)]
        settings = benchmark.Settings(
            devices.choose(device), batch_size, num_warm_iter, num_bench_iter, channels_last, threads
        )
        results = benchmark.measure(
            targets, settings, lambda what, done: bar.update(shown, description=what, completed=done, total=1.0)
        )
    document: dict[str, Any] = {
        "device": str(settings.device),
        "device_name": benchmark.device_name(settings.device),
        "torch": torch.__version__,
        "threads": threads or torch.get_num_threads(),
        "batch_size": batch_size,
        "num_warm_iter": num_warm_iter,
        "num_bench_iter": num_bench_iter,
        "channels_last": channels_last,
        "results": [result.to_dict(batch_size) for result in results],
    }
    text = json.dumps(document, indent=2)
    if results_file is not None:
        with checkpoints.atomic(results_file) as opened:
            opened.write(text.encode() + b"\n")
    if as_json:
        typer.echo(text)
    else:
        _print(document, [_name(target, len(headers)) for target in targets])


def _targets(header: checkpoints.Header, task: str | None, level: int | None, every: bool) -> list["Target"]:
    from dvn_cli.benchmark import Target

    metadata = header.metadata
    if header.kind == "slice":
        if task is not None or level is not None:
            raise InputError(
                f"'{header.path}' is a slice, of one task and level; --task and --level are for checkpoints"
            )
        return [Target(header, metadata["task_number"], metadata["level"])]
    tasks = range(1, len(metadata["tasks"]) + 1) if every else [checkpoints.find_task(metadata, task or 1)]
    return [
        Target(header, number, depth)
        for number in tasks
        for depth in (
            range(1, len(metadata["tasks"][number - 1]["levels"]) + 1)
            if level is None
            else [checkpoints.check_level(metadata, number, level)]
        )
    ]


def _name(target: "Target", files: int) -> str:
    """What tells a network's row from others: its task, of several files a slice's name, or a checkpoint's and task."""
    stem = target.header.path.stem
    return target.entry.name if files == 1 else stem if target.header.kind == "slice" else f"{stem} {target.entry.name}"


def _print(document: dict[str, Any], names: list[str]) -> None:
    from rich.console import Console

    from dvn_cli.report import percent, short, table

    console = Console(highlight=False)
    on = f"{document['device']}, {document['device_name']}"
    threads = f", threads: {document['threads']}" if document["device"] == "cpu" else ""
    console.print(f"{on}{threads}, torch {document['torch']}, batch size {document['batch_size']}\n")
    costs = table("task", "level", "params", "density", "compression", "MACs", "peak memory", text=1)
    speeds = table("task", "level", "p50 ms", "p90 ms", "p99 ms", "images/s", "speed-up", text=1)
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
    console.print(costs)
    console.print()
    console.print(speeds)
