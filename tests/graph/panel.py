"""The panel: how many of timm's and torchvision's architectures can be divided, and whether what comes out is right.

    python tests/graph/panel.py            run it and write panel.csv beside this file
    python tests/graph/panel.py --choose   choose the models again and write them to panel.txt

One model (the smallest) for every distinct combination of timm module file, model class and block classes, and for each
module file of torchvision's classifiers. Every model has a process and a time limit of its own.
"""

import argparse
import csv
import multiprocessing
import statistics
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from reference import Comparison, networks

from dvn_cli.backbones import BackboneSpec, resolve
from dvn_cli.errors import InputError

HERE = Path(__file__).parent
NAMES = HERE / "panel.txt"
LARGE = 30_000_000  # parameters; of a combination whose models are all larger the smallest is taken all the same
HUGE = 500_000_000  # parameters: in double precision, three times over
SMALL_SIZE = 128  # pixels, where a model takes images of any size
TOLERANCE = 1e-5  # some models compute in fp32 whatever they are given


@dataclass
class Row:
    name: str
    params: int = 0
    size: int = 0
    outcome: str = "failed"  # passed, refused, wrong, failed
    reason: str = ""
    trace_s: float = 0.0
    label_s: float = 0.0
    narrow_s: float = 0.0
    error: float = 0.0
    divided: float = 0.0  # share of the parameters, in the worst case of k


def choose() -> list[str]:
    """The models of the panel, by building every model of the registries without data."""
    import timm
    import torchvision
    from timm.models import get_arch_name, model_entrypoint

    best: dict[tuple[str, ...], tuple[bool, int, str]] = {}
    names = [("timm", n) for n in timm.list_models()]
    names += [("torchvision", n) for n in torchvision.models.list_models(module=torchvision.models)]
    for source, name in names:
        try:
            module = resolve(f"{source}/{name}", num_classes=10).build("meta")
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
        best[key] = min(best.get(key, entry), entry)
    return sorted(name for _, _, name in best.values())


def spec_of(name: str) -> BackboneSpec:
    try:
        return resolve(name, num_classes=10, input_size=(SMALL_SIZE, SMALL_SIZE))
    except InputError:
        return resolve(name, num_classes=10)


def examine(name: str, quick: bool) -> Row:
    """Divides a model among 2 and 4 units and compares its networks with the masked ones, in eval and train graphs."""
    row = Row(name)
    spec = spec_of(name)
    module = spec.build("meta")
    row.params, row.size = sum(p.numel() for p in module.parameters()), spec.input_size[0]
    if row.params > HUGE:
        row.reason = "more than this machine holds"
        return row
    module = spec.build()
    start = time.perf_counter()
    try:
        modes = (False,) if quick else (False, True)
        comparison = Comparison(module, (spec.in_chans, *spec.input_size), modes, batch=2)
        row.trace_s = round((time.perf_counter() - start) / len(modes), 2)
        row.divided = 1.0
        for units in (2, 4):
            start = time.perf_counter()
            assignment = comparison.divide(units)
            row.label_s = round(max(row.label_s, time.perf_counter() - start), 2)
            row.divided = round(min(row.divided, share_divided(comparison.module, assignment.tensors)), 4)
            for kept in [(2,)] if quick else networks(units):
                for train in modes:
                    row.error = max(row.error, comparison.error(kept, train))
                    row.narrow_s = round(max(row.narrow_s, comparison.seconds), 2)
        idle = [] if quick else comparison.without_gradient((1,))
        row.reason = f"no gradient for {', '.join(idle[:3])}" if idle else ""
        row.outcome = "passed" if row.error < TOLERANCE and not idle else "wrong"
    except InputError as error:
        row.outcome, row.reason = "refused", str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        row.reason = f"{type(error).__name__}: {str(error)[:150]} ({Path(last.filename).name}:{last.lineno})"
    return row


def share_divided(module: torch.nn.Module, axes: dict[str, list[int | None]]) -> float:
    """The share of parameters that belong to a unit or a pair of units, the classifier aside counts as divided."""
    state = dict(module.named_parameters())
    total = sum(p.numel() for p in state.values())
    return sum(p.numel() for n, p in state.items() if any(a is not None for a in axes.get(n, []))) / total


def _child(name: str, quick: bool, pipe: Connection) -> None:
    torch.set_num_threads(1)
    pipe.send(examine(name, quick))


def run(name: str, quick: bool, limit: float) -> Row:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, quick, theirs))
    process.start()
    theirs.close()
    row = Row(name, reason=f"took longer than {limit:.0f} s")
    try:
        if ours.poll(limit):
            row = ours.recv()
    except EOFError:
        row.reason = "its process died"
    process.kill()
    process.join()
    return row


def summary(rows: list[Row]) -> str:
    counts = Counter(row.outcome for row in rows)
    lines = [f"{len(rows)} models: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())]
    done = [row for row in rows if row.outcome == "passed"]
    for label, values in (
        ("trace", [r.trace_s for r in done]),
        ("label", [r.label_s for r in done]),
        ("narrow", [r.narrow_s for r in done]),
        ("trace + label", [r.trace_s + r.label_s for r in done]),
    ):
        if len(values) > 1:
            p90 = statistics.quantiles(values, n=10)[-1]
            lines.append(
                f"{label}: median {statistics.median(values):.2f} s, p90 {p90:.2f} s, worst {max(values):.2f} s"
            )
    lines += [f"{row.outcome} {row.name}: {row.reason or row.error}" for row in rows if row.outcome != "passed"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models; by default all of panel.txt")
    parser.add_argument("--choose", action="store_true", help="choose the models again")
    parser.add_argument("--quick", action="store_true", help="one network for each number of units, eval graphs only")
    parser.add_argument("--limit", type=float, default=60, help="seconds for one model")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "panel.csv")
    args = parser.parse_args()
    if args.choose:
        NAMES.write_text("\n".join(choose()) + "\n")
        return
    rows = []
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        for name in args.names or NAMES.read_text().split():
            rows.append(run(name, args.quick, args.limit))
            writer.writerow(asdict(rows[-1]))
            file.flush()
            print(rows[-1].outcome, name, rows[-1].reason, f"{rows[-1].error:.0e}", file=sys.stderr, flush=True)
    print(summary(rows))


if __name__ == "__main__":
    main()
