"""How `dvn train` shows a run that goes on: lines and a bar on stderr, the results on stdout."""

import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dvn_cli import processes, report
from dvn_cli.data.classes import few
from dvn_cli.evaluation.intervals import top1_interval
from dvn_cli.store.metadata import Task
from dvn_cli.training import loop, state
from dvn_cli.training.experiment import Observer, Trained
from dvn_cli.training.loop import Run
from dvn_cli.training.methods import used_units
from dvn_cli.training.outlook import outlook
from dvn_cli.training.rehearsal import images_of_step
from dvn_cli.training.session import Session


class Bars(Progress):
    """A bar, and above it a table, once there is one."""

    table: report.FittedTable | None = None

    def get_renderables(self) -> Iterator[RenderableType]:
        if self.table is not None:
            yield self.table
        yield from super().get_renderables()


class Terminal(Observer):
    """A bar on a terminal, a line per epoch elsewhere; a context, that says how to go on where a signal ends it."""

    def __init__(self, console: Console, show: Callable[[Trained], None]) -> None:
        """`show` prints the results."""
        self.console, self.show = console, show
        self.session: Session | None = None
        self.status = console.status("reading data and dividing the backbone ...")
        self.since, self.steps = 0.0, 0  # of what is timed: the steps of this epoch
        self.bars = Bars(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Terminal":
        self.status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.status.stop()
        self.bars.stop()
        if self.session is not None and kind in (KeyboardInterrupt, SystemExit):
            self.note(how_to_go_on(self.session))

    def note(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def begins(self, session: Session) -> None:
        self.session, run = session, session.run
        self.status.stop()
        count, units = len(list(run.network)), run.network.partition.units
        where = f"{run.device}" if processes.count() == 1 else f"{processes.count()} processes, each on {run.device}"
        free = units - len(used_units(run.network.tasks, run.network))
        self.note(
            f"{run.network.partition.spec.name}, {units} units ({free or 'none'} free), "
            f"{'1 network' if count == 1 else f'{count} networks'}, on {where}: "
            f"{run.total_epochs} epochs of {run.steps} steps"
        )
        report.show(self.console, task_table(run), *affinity_tables(run.network.tasks))
        for line in class_lines(run, self.console.width):
            self.note(line)
        with self.console.status("counting levels ..."):
            report.show(self.console, level_table(run))
        self.bar = self.bars.add_task("", total=run.total_epochs, completed=run.epochs_done)
        self.bars.start()
        self.since = time.perf_counter()

    def step(self, run: Run, step: int) -> None:
        self.steps += 1
        text = f"step {step}/{run.steps}, {self._images_per_s(run):,.0f} images/s"
        self.bars.update(self.bar, completed=run.epochs_done + step / run.steps, description=text)

    def _images_per_s(self, run: Run) -> float:
        return self.steps * images_of_step(run) / (time.perf_counter() - self.since)

    def epoch(self, run: Run) -> None:
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
        self.bars.update(self.bar, completed=run.epochs_done)
        self.bars.table = epoch_table(run)
        if self.bars.disable:
            speed = f"{last['seconds']:.1f} s, {self._images_per_s(run):,.0f} images/s"
            self.console.print(f"epoch {run.epochs_done}/{run.total_epochs}: {text}, {speed}", soft_wrap=True)
        self.since, self.steps = time.perf_counter(), 0

    def measures(self) -> None:
        self.bars.stop()
        self.status = self.console.status("evaluating on the test images ...")
        self.status.start()

    def ends(self, trained: Trained) -> None:
        self.status.stop()
        self.show(trained)


def epoch_table(run: Run) -> report.FittedTable:
    """What the last epoch gave: the loss of each network and, in per cent, its accuracy on the validation images.

    Below an accuracy stands its 95 % interval.
    """
    last, most = run.history[-1], max(len(task.levels) for task in run.network.tasks)
    made = report.table(f"after epoch {last['epoch']}", *(f"level {level}" for level in range(1, most + 1)), text=1)
    blank = [[None] * len(task.levels) for task in run.network.tasks]
    for number, losses in enumerate(last["loss"], 1):
        accuracies = (last["validation"] or blank)[number - 1]
        cells = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
        for place, top1 in enumerate(accuracies):
            if top1 is not None:
                interval = top1_interval(top1, len(run.validation[number]))
                cells[place] += f"  {top1:.1f} %\n{report.limits(interval)}"
        made.add_row(f"{number} {run.network.tasks[number - 1].name}", *cells)
    return made


def task_table(run: Run) -> report.FittedTable:
    """What is about to be trained: a row for each task."""
    made = report.table("task", "classes", "train", "validation", "test", "units, level by level", text=1)
    for number, task in enumerate(run.network.tasks, 1):
        images: tuple[str, ...] = ("-", "-", "-")  # of a task learnt in an earlier run
        if data := run.data.get(number):
            images = tuple(map(str, data.counts.values()))
        bounds = zip((0, *task.levels), task.levels, strict=False)
        units = " | ".join(" ".join(map(str, task.order[start:stop])) for start, stop in bounds)
        made.add_row(f"{number} {task.name}", str(len(task.classes)), *images, units)
    return made


def affinity_tables(tasks: Sequence[Task]) -> list[report.FittedTable]:
    """Which tasks agree, and how well, where orders of units were learned from that; no table elsewhere."""
    made = report.table("task", "gradients agree most with", "least with", text=3)
    for number, task in enumerate(tasks, 1):
        others = sorted((cosine, other) for other, cosine in enumerate(task.affinity, 1) if other != number)
        if others:
            pairs = (others[-1], others[0])
            cells = (f"{other} {tasks[other - 1].name} ({cosine:.2f})" for cosine, other in pairs)
            made.add_row(f"{number} {task.name}", *cells)
    return [made] if made.rows else []


def level_table(run: Run) -> report.FittedTable:
    """How large each network is, and how well it does before it is trained, where it starts from weights."""
    rows = outlook(run)
    before = [] if all(row.top1 is None for row in rows) else ["before training"]
    columns = ("task", "level", "units", "parameters", "density", "of all units", "MACs", *before)
    made = report.table(*columns, text=1, optional=("of all units", "MACs"))
    for row in rows:
        name = f"{row.task} {run.network.tasks[row.task - 1].name}"
        accuracy = ["-"] if before else []
        if row.top1 is not None and row.interval is not None:
            accuracy = [f"{row.top1:.1f} %\n{report.limits(row.interval)}"]
        shares = (report.percent(row.density), report.percent(row.common))
        size = (report.short(row.params), *shares, report.short(row.macs))
        made.add_row(name, str(row.level), str(row.units), *size, *accuracy)
    return made


def class_lines(run: Run, width: int) -> list[str]:
    """Which classes each task has, as many as fit into a line, and which of them a split has no images of."""
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


def how_to_go_on(session: Session) -> str:
    """What someone who has stopped a run wants to know."""
    run = session.run
    if not run.epochs_done and not run.steps_done:
        return "stopped before the first step: nothing has been written"
    if session.files.state.exists():
        place = state.read(session.files.state).metadata.place
        return f"stopped after {place}: the same command with --resume goes on from there"
    return f"stopped after training: {session.files.checkpoint} is written, `dvn eval` measures it"
