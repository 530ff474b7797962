"""The panel: how many of timm's and torchvision's architectures can be divided, and whether what comes out is right.

    python tests/graph/panel.py --jobs 8   run what panel.csv beside this file lacks, 8 models at a time, and add it
    python tests/graph/panel.py --choose   choose the models again and write them to panel.txt

One model (the smallest) for every distinct combination of timm module file, model class and block classes, and for each
module file of torchvision's classifiers. What has no classifier, whatever number of classes is asked for, is left out.
Every model has a process, of one thread, and a time limit of its own; the largest come first. Processes are forked of
one that has divided a model already, so that no figure counts the import of libraries. Rows are appended as they are
done, and models that the table has already are not run again.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import table
import torch

from dvn_cli.backbones import BackboneSpec, resolve
from dvn_cli.backbones.registry import classifier_tensors
from dvn_cli.check import GAINS, TOLERANCE, Comparison, networks
from dvn_cli.dividing import ENOUGH, partition_backbone, share_divided
from dvn_cli.errors import InputError
from dvn_cli.graph.empty_init import empty_init
from dvn_cli.partition import Partition
from dvn_cli.store.metadata import DIVIDE, Rule
from dvn_cli.store.ownership import Assignment
from dvn_cli.units.assign import EVEN

HERE = Path(__file__).parent
NAMES = HERE / "panel.txt"
TABLE = HERE / "panel.csv"
LARGE = 30_000_000  # parameters; of a combination whose models are all larger the smallest is taken all the same
LARGEST = 5e8  # parameters, compared in double precision, four times over
SMALL_SIZES = (128, 144, 192)  # pixels, of which a model gets the first that it takes, else its own


@dataclass
class Row:
    """One model.

    Attributes:
        partition_s: time of `partition_backbone` for 4 units, in seconds of one core.
        partition_mb: the memory it took at its peak, in MB beyond that of the imported libraries.
        divided: share of the parameters that units own, for the number of units for which it is least.
        networks: how many narrow networks were compared with masked ones.
        error: the worst relative difference.
        peak_mb: memory of the whole comparison, in MB.
    """

    name: str
    params: int = 0
    size: int = 0
    outcome: str = "failed"  # passed, refused, wrong, failed
    reason: str = ""
    divided: float = 0.0
    networks: int = 0
    error: float = 0.0
    partition_s: float = 0.0
    partition_mb: int = 0
    narrow_s: float = 0.0
    total_s: float = 0.0
    peak_mb: int = 0


def choose() -> dict[str, int]:
    """The models of the panel and their parameters, by building every model of the registries without data."""
    import timm
    import torchvision
    from timm.models import get_arch_name, model_entrypoint

    best: dict[tuple[str, ...], tuple[bool, int, str]] = {}
    names = [("timm", n) for n in timm.list_models()]
    names += [("torchvision", n) for n in torchvision.models.list_models(module=torchvision.models)]
    for source, name in names:
        try:
            spec = resolve(f"{source}/{name}", num_classes=10)
            module = spec.build("meta")
        except (InputError, RuntimeError, NotImplementedError):
            continue
        library = f"{source}.models"
        if source == "timm":
            file = model_entrypoint(get_arch_name(name)).__module__
            blocks = {type(m).__name__ for m in module.modules() if type(m).__module__.startswith(library)}
            key = (file, type(module).__name__, *sorted(blocks))
        else:
            key = (torchvision.models.get_model_builder(name).__module__,)
        count = sum(p.numel() for p in module.parameters())
        entry = (count > LARGE, count, f"{source}/{name}")
        if (key not in best or entry < best[key]) and classifier_tensors(spec):
            best[key] = entry
    return dict(sorted((name, count) for _, count, name in best.values()))


def chosen() -> dict[str, int]:
    """The models of panel.txt and their parameters."""
    return {name: int(count) for name, count in (line.split() for line in NAMES.read_text().splitlines())}


def spec_of(name: str) -> BackboneSpec:
    for size in SMALL_SIZES:
        with contextlib.suppress(InputError):
            return resolve(name, num_classes=10, input_size=(size, size))
    return resolve(name, num_classes=10)


def examine(name: str, quick: bool, device: str, largest: float, rule: Rule = EVEN) -> Row:
    """Divides a model among 2 and 4 units and compares its networks with the masked ones, in eval and train graphs."""
    row = Row(name)
    start = time.perf_counter()
    try:
        _examine(row, spec_of(name), quick, device, largest, rule)
    except InputError as error:
        row.outcome, row.reason = "refused", str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        row.outcome = "failed"
        row.reason = f"{type(error).__name__}: {str(error)[:150]} ({Path(last.filename).name}:{last.lineno})"
    row.total_s, row.peak_mb = round(time.perf_counter() - start, 2), peak()
    return row


def _examine(row: Row, spec: BackboneSpec, quick: bool, device: str, largest: float, rule: Rule) -> None:
    row.params, row.size = sum(p.numel() for p in spec.build("meta").parameters()), spec.input_size[0]
    before, start = peak(), time.process_time()
    partition = partition_backbone(spec, 4, rule)
    row.partition_s, row.partition_mb = round(time.process_time() - start, 2), peak() - before
    row.divided = divided(partition, partition.assignment)
    if row.params > largest:
        row.reason = "divided, but larger than what is compared"
        return
    for gain in GAINS:
        row.outcome, row.reason, row.networks, row.error = "failed", "", 0, 0.0
        if not _is_rounding(row, partition, quick, device, gain):
            return


def _is_rounding(row: Row, partition: Partition, quick: bool, device: str, gain: float) -> bool:
    """Compares all networks, up to the first that is wrong. Returns whether that may be for rounding errors alone."""
    spec, modes = partition.spec, (False,) if quick else (False, True)
    comparison = Comparison(empty_init(spec.build), (spec.in_chans, *spec.input_size), modes, device=device, gain=gain)
    for units in (4, 2):
        assignment = comparison.divide(units, partition.rule)
        if not quick and units == 4 and assignment != partition.assignment:
            raise AssertionError("in double precision it is divided in another way")
        row.divided = min(row.divided, divided(partition, assignment))
        for kept in [(2,)] if quick else networks(units):
            for train in modes:
                error = comparison.error(kept, train)
                row.narrow_s = round(max(row.narrow_s, comparison.seconds), 2)
                row.networks, row.error = row.networks + 1, max(row.error, error)
                if not error < TOLERANCE:
                    row.outcome = "wrong"
                    row.reason = f"{error:.0e} off for units {kept} of {units} in {'train' if train else 'eval'} mode"
                    return comparison.is_unstable(kept, train)
            idle = [] if quick else comparison.without_gradient(kept)
            if idle:
                row.outcome, row.reason = "wrong", f"no gradient for {', '.join(idle[:3])} with units {kept} of {units}"
                return False
    row.outcome = "passed"
    return False


def divided(partition: Partition, assignment: Assignment) -> float:
    shapes = {name: partition.shapes[name] for name in partition.parameters}
    return round(share_divided(assignment, shapes), 4)


def peak() -> int:
    """The most memory that this process has held so far, in MB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform != "darwin" else 1024**2)


def _child(pipe: Connection, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.setsid()  # a group of its own, with whatever processes it starts
    warnings.simplefilter("ignore")
    torch.backends.cudnn.allow_tf32 = False  # some models compute in fp32 whatever they are given
    torch.set_num_threads(1)
    pipe.send(work(*arguments))


@dataclass
class Job:
    name: str
    process: multiprocessing.Process
    pipe: Connection
    deadline: float


def run(
    names: Sequence[str], quick: bool, device: str, jobs: int, limit: float, largest: float = LARGEST, rule: Rule = EVEN
) -> Iterator[Row]:
    """Yields a row for each model, as they are done; for the arguments see `main`."""
    for name, row in in_processes(names, examine, (quick, device, largest, rule), jobs, limit):
        yield Row(name, reason=row) if isinstance(row, str) else row


def in_processes(
    names: Sequence[str], work: Callable[..., Any], arguments: Sequence[Any], jobs: int, limit: float
) -> Iterator[tuple[str, Any]]:
    """Yields each name with what `work(name, *arguments)` returned in a process of its own, or why it returned nothing.

    Args:
        jobs: processes at a time.
        limit: seconds for one.
    """
    partition_backbone(resolve("timm/resnet18", num_classes=10), 2)
    context = multiprocessing.get_context("fork")
    waiting, running = list(names)[::-1], dict[Connection, Job]()
    while waiting or running:
        while waiting and len(running) < jobs:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, work, (name := waiting.pop(), *arguments)))
            process.start()
            theirs.close()
            running[ours] = Job(name, process, ours, time.monotonic() + limit)
        first = min(job.deadline for job in running.values())
        ready = wait(list(running), timeout=max(first - time.monotonic(), 0))
        for pipe, job in list(running.items()):
            result: Any = f"took longer than {limit:.0f} s"
            if pipe in ready:
                try:
                    result = pipe.recv()
                except EOFError:
                    result = "its process died"
            elif time.monotonic() < job.deadline:
                continue
            with contextlib.suppress(ProcessLookupError):  # of the whole group
                os.killpg(job.process.pid or 0, signal.SIGKILL)
            job.process.join()
            pipe.close()
            del running[pipe]
            yield job.name, result


def summary(rows: Sequence[Row]) -> str:
    counts = Counter(row.outcome for row in rows)
    passed = [row for row in rows if row.outcome == "passed"]
    lines = [
        f"{len(rows)} models: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common()),
        f"{len(passed) / len(rows):.1%} passed, {sum(row.networks for row in passed)} networks compared",
    ]
    for label, values, unit in (
        ("time of partition", [r.partition_s for r in passed], "s"),
        ("memory of partition", [r.partition_mb for r in passed], "MB"),
        ("time to narrow", [r.narrow_s for r in passed], "s"),
        ("time in all", [r.total_s for r in passed], "s"),
    ):
        if len(values) > 1:
            p90 = statistics.quantiles(values, n=10, method="inclusive")[-1]
            lines.append(
                f"{label}: median {statistics.median(values):.4g} {unit}, p90 {p90:.4g}, worst {max(values):.4g}"
            )
    few = sorted((row.divided, row.name) for row in passed if row.divided < ENOUGH)
    lines.append(f"less than {ENOUGH:.0%} divided: {', '.join(f'{name} {share:.0%}' for share, name in few) or 'none'}")
    lines += [f"{row.outcome} {row.name}: {row.reason}" for row in rows if row.outcome != "passed"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models; by default all of panel.txt")
    parser.add_argument("--choose", action="store_true", help="choose the models again")
    parser.add_argument("--quick", action="store_true", help="one network for each number of units, eval graphs only")
    parser.add_argument("--device", default="cpu", help="where networks are compared")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one model")
    parser.add_argument(
        "--largest", type=float, default=LARGEST, help="parameters of the largest model to compare, 32 bytes for each"
    )
    parser.add_argument("--divide", choices=DIVIDE, default="all", help="all coupled groups, or inner ones alone")
    parser.add_argument("-o", "--output", type=Path, default=TABLE)
    args = parser.parse_args()
    if args.choose:
        NAMES.write_text("".join(f"{name} {count}\n" for name, count in choose().items()))
        return
    torch.set_num_threads(1)
    sizes = chosen()
    done = {row.name for row in table.read(args.output, Row)}
    names = sorted(args.names or sizes, key=lambda name: -sizes.get(name, 0))
    names = [name for name in names if name not in done]
    for row in run(names, args.quick, args.device, args.jobs, args.limit, args.largest, Rule(divide=args.divide)):
        table.append(args.output, [row])
        print(row.outcome, row.name, row.reason, f"{row.error:.0e} {row.total_s:.0f} s", file=sys.stderr, flush=True)
    rows = sorted(table.read(args.output, Row), key=lambda row: row.name)
    table.write(args.output, rows)
    print(summary(rows))


if __name__ == "__main__":
    main()
