"""`dvn train`: all networks of a recipe, trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dvn_cli.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from dvn_cli.report import FittedTable
    from dvn_cli.training.loop import Run
    from dvn_cli.training.session import Session


def train_command(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A recipe's file, - for stdin, or the name of one that comes with dvn: digits."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to override.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.")] = Path("dvn.safetensors"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run whose files are there: interrupted, or finished with fewer epochs. Where there is "
            "none, start; where nothing is left to do, end.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a trained checkpoint or the state of an interrupted run.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    keys: Annotated[
        bool, typer.Option("--keys", help="Show every key of a recipe: type, default and meaning; train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train the networks of all tasks and levels, as a recipe says."""
    if keys:
        if recipe is not None:
            raise InputError("--keys shows the keys of all recipes: leave out the recipe")
        return show_keys(as_json)
    if recipe is None:
        raise InputError("Missing argument 'RECIPE': give a recipe's file, or the name of one that comes with dvn")
    if resume and force:
        raise InputError("--resume or --force, not both: the one goes on with what the other replaces")

    import json

    from dvn_cli import device as devices
    from dvn_cli.training import recipe as recipes

    file = recipes.find(recipe)
    content = recipes.read(file, overrides or [])
    chosen = devices.choose(device)

    from dvn_cli import report
    from dvn_cli.evaluation import measure, rendering
    from dvn_cli.training import session as sessions

    err = report.console(stderr=True)

    def note(text: str) -> None:
        err.print(text, soft_wrap=True)

    if resume and (finished := sessions.complete_run(content, output)) is not None:
        note(f"{output} has all of its {finished.epochs} epochs: there is nothing left to do")
        if as_json:
            typer.echo(json.dumps({"checkpoint": str(output), "results": finished.results}, indent=2))
        return
    with err.status("reading data and dividing the backbone ..."):
        session = sessions.Session(content, recipes.folder(file), output, chosen, resume, force=force, note=note)
    run, partition = session.run, session.run.network.partition
    count = len(list(run.network))
    networks = "1 network" if count == 1 else f"{count} networks"
    note(
        f"{partition.spec.name}, {partition.units} units, {networks}, on {run.device}: "
        f"{run.total_epochs} epochs of {run.steps} steps"
    )
    report.show(err, task_table(run))
    for line in class_lines(run, err.width):
        note(line)
    try:
        with Progress(run, err) as progress:
            session.train(progress.epoch, progress.step)
        splits = {number: data.test for number, data in run.data.items()}
        with err.status("evaluating on the test images ..."):
            rows = measure.evaluate_all(run.network, splits, device=chosen)
        results = [rendering.as_json(row) for row in rows]
    except KeyboardInterrupt:
        note(how_to_go_on(session))
        raise
    try:
        if as_json:
            typer.echo(json.dumps({"checkpoint": str(output), "results": results}, indent=2))
        else:
            report.show(report.console(), rendering.accuracy_table(run.network.tasks, rows))
    finally:  # whichever of the two fails, the other one has the results
        session.finish(results)
    note(f"{output} is written; {session.files.record} says how it went")


def show_keys(as_json: bool) -> None:
    """Prints every key of a recipe."""
    import json
    from dataclasses import asdict

    from dvn_cli import report
    from dvn_cli.training.keys import recipe_keys

    found = recipe_keys()
    if as_json:
        typer.echo(json.dumps({"keys": [asdict(key) for key in found]}, indent=2))
        return
    shown = report.table("key", "type and default", "meaning", text=3)
    shown.columns[0].no_wrap = True
    for key in found:
        text = key.default if isinstance(key.default, str) else json.dumps(key.default)
        default = "\nrequired" if key.required else "" if key.default is None else f"\ndefault: {text}"
        shown.add_row(key.key, key.type + default, key.meaning)
    report.show(report.console(), shown)


def task_table(run: "Run") -> "FittedTable":
    """What is about to be trained: a row for each task."""
    from dvn_cli import report

    made = report.table("task", "classes", "train", "validation", "test", "units, level by level", text=1)
    for number, task in enumerate(run.network.tasks, 1):
        images: tuple[str, ...] = ("-", "-", "-")  # of a task learnt in an earlier run
        if data := run.data.get(number):
            images = tuple(map(str, data.counts.values()))
        bounds = zip((0, *task.levels), task.levels, strict=False)
        units = " | ".join(" ".join(map(str, task.order[start:stop])) for start, stop in bounds)
        made.add_row(f"{number} {task.name}", str(len(task.classes)), *images, units)
    return made


def class_lines(run: "Run", width: int) -> list[str]:
    """Which classes each task has, as many as fit into a line, and which of them a split has no images of."""
    from dvn_cli.data.classes import few

    lines = []
    for number, data in run.data.items():
        name = f"task {number} {run.network.tasks[number - 1].name}"
        groups = data.spec.groups or {}
        made_of = {new: list(map(str, old if isinstance(old, list) else [old])) for new, old in groups.items()}
        most = (40, 20, 10, 6, 3)
        shown = [", ".join(f"'{new}' ({few(old, n)})" for new, old in made_of.items()) for n in most if made_of]
        shown = [f"{name}: classes {text}" for text in (*shown, *(few(data.classes, n) for n in most))]
        lines.append(next((line for line in shown if len(line) <= width), shown[-1]))
        for split, labels in (("train", data.train.labels), ("test", data.test.labels)):
            there = set(labels.tolist())
            missing = [of_class for label, of_class in enumerate(data.classes) if label not in there]
            if missing:
                lines.append(f"{name}: no {split} images of {few(missing)}")
    return lines


def how_to_go_on(session: "Session") -> str:
    """What someone who has stopped a run wants to know."""
    run = session.run
    if not run.epochs_done:
        return "stopped within the first epoch: nothing has been written"
    if session.files.state.exists():
        return f"stopped after epoch {run.epochs_done}: the same command with --resume goes on from there"
    return f"stopped after training: {session.files.checkpoint} is written, `dvn eval` measures it"


class Progress:
    """A bar on a terminal, a line per epoch elsewhere, on stderr."""

    def __init__(self, run: "Run", console: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = console
        self.bars = Bars(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.bar = self.bars.add_task("", total=run.total_epochs, completed=run.epochs_done)

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def step(self, run: "Run", step: int) -> None:
        self.bars.update(self.bar, completed=run.epochs_done + step / run.steps)

    def epoch(self, run: "Run") -> None:
        from dvn_cli.training import loop

        last = run.history[-1]
        losses = loop.numbers(last["loss"])
        text = f"loss {sum(losses) / len(losses):.3f}"
        if last["validation"] is not None:
            values = loop.numbers(last["validation"])
            text += f", validation {min(values):.1f} to {max(values):.1f} %"
        if len(run.stages) > 1:
            (task,) = run.stage.tasks
            alone = ", new parts alone" if run.stage.warmup else ""
            text = f"task {task} {run.network.tasks[task - 1].name}{alone}: {text}"
        self.bars.update(self.bar, completed=run.epochs_done, description=text)
        if self.bars.disable:
            line = f"epoch {run.epochs_done}/{run.total_epochs}: {text}, {last['seconds']:.1f} s"
            self.console.print(line, soft_wrap=True)
