"""`dvn train`: all networks of a recipe, trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dvn_cli.training.loop import Run


def train_command(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of one that comes with dvn: digits.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to override.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.")] = Path("dvn.safetensors"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was interrupted.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train the networks of all tasks and levels, as a recipe says."""
    import json

    from dvn_cli import device as devices
    from dvn_cli.training import recipe as recipes

    file = recipes.find(recipe)
    keys = recipes.read(file, overrides or [])
    chosen = devices.choose(device)

    from rich.console import Console

    from dvn_cli import evaluation
    from dvn_cli.training.session import Session

    err = Console(stderr=True)
    with err.status("reading data and dividing the backbone ..."):
        session = Session(keys, file.parent, output, chosen, resume)
    run = session.run
    for line in describe(run):
        err.print(line)
    if session.left_over:
        err.print("an interrupted run was here: [bold]--resume[/bold] would have continued it")
    with Progress(run, err) as progress:
        try:
            session.train(progress.epoch, progress.step)
        except KeyboardInterrupt:
            progress.stop()
            if run.epochs_done:
                err.print(f"stopped after epoch {run.epochs_done}: the same command with --resume goes on from there")
            raise
    splits = {number: data.test for number, data in enumerate(run.data, 1)}
    with err.status("evaluating on the test images ..."):
        rows = evaluation.evaluate_all(run.network, splits, device=chosen)
    session.finish([evaluation.as_json(row) for row in rows])
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(output), "results": [evaluation.as_json(row) for row in rows]}))
    else:
        Console().print(evaluation.accuracy_table(run.network.tasks, rows))
        err.print(f"[bold]{output}[/bold] written; how it went is in {session.files.record}")


def describe(run: "Run") -> list[str]:
    """What is about to be trained, in a few lines."""
    network, partition = run.network, run.network.partition
    lines = [
        f"{partition.spec.name}, {partition.units} units, {len(list(network))} networks on {run.device}; "
        f"{run.recipe.epochs} epochs of {run.steps} steps"
    ]
    for number, (task, data) in enumerate(zip(network.tasks, run.data, strict=True), 1):
        held = 0 if data.validation is None else len(data.validation)
        units = ", ".join(f"{level}: {'+'.join(map(str, task.kept(level)))}" for level in range(1, len(task.levels) + 1))
        lines.append(
            f"  task {number} {task.name}: {len(task.classes)} classes, {len(data.train)} images to learn from, {held} "
            f"to choose by, {len(data.test)} to report on; units by level {units}"
        )
    return lines


class Progress:
    """A bar on a terminal, a line per epoch elsewhere, on stderr."""

    def __init__(self, run: "Run", console: "object") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        assert isinstance(console, Console)
        self.console = console
        self.bars = Bars(
            TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.steps = run.steps
        self.bar = self.bars.add_task("", total=run.recipe.epochs, completed=run.epochs_done)

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.bars.stop()

    def step(self, run: "Run", step: int) -> None:
        self.bars.update(self.bar, completed=run.epochs_done + step / self.steps)

    def epoch(self, run: "Run") -> None:
        last = run.history[-1]
        losses = [loss for levels in last["loss"] for loss in levels]
        text = f"loss {sum(losses) / len(losses):.3f}"
        if last["validation"] is not None:
            values = [value for levels in last["validation"] for value in levels]
            text += f", validation {min(values):.1f} to {max(values):.1f} %"
        self.bars.update(self.bar, completed=run.epochs_done, description=text)
        if self.bars.disable:
            self.console.print(f"epoch {run.epochs_done}/{run.recipe.epochs}: {text}, {last['seconds']:.1f} s")
