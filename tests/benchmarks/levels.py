"""What levels are worth right after a backbone with weights is partitioned, before any training.

    python tests/benchmarks/levels.py tf_efficientnet_lite0 --weights FILE --data ../shared/data/imagenette96-mini
    python tests/benchmarks/levels.py test_convnext --weights FILE --size 32 --own-classes \
        --data source=hf path=../shared/data/cifar100 label=fine_label

Top-1 accuracy in per cent on all test images, of all classes that the weights tell apart, for every level of a task
that adds units in the order 1, 2, 3 and so on. Channels are assigned evenly, sorted by weights, or sorted by images;
then running statistics and biases make up for what a level lacks (`dvn partition --data`), or its layers are fitted to
the whole (`dvn slice --calibrate`). The images to sort by and to fit to are training images, drawn by the seed, whose
labels are not read. The classes of the data must be called as those of the weights are (`n01440764` or `tench`), or be
those, in their order.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dvn_cli import calibration, compensation, report
from dvn_cli.backbones import BackboneSpec, preprocessing, resolve
from dvn_cli.backbones.class_names import class_numbers, folded
from dvn_cli.data import DataSpec, Split, drawn, load_test, sample
from dvn_cli.data.words import parse_data
from dvn_cli.dividing import build, partition_backbone
from dvn_cli.evaluation.measure import measure
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.metadata import Rule, Task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True, help="as of dvn eval")
    parser.add_argument("--units", type=int, default=4)
    parser.add_argument("--divide", choices=["all", "inner"], default="inner")
    parser.add_argument("--widths", choices=["even", "macs", "params"], default="even", help="where images sort")
    parser.add_argument("--size", type=int, help="of the images; by default that of the backbone")
    parser.add_argument("--own-classes", action="store_true", help="the classes of the weights are those of the data")
    parser.add_argument("--crop-pct", type=float, default=1.0)
    parser.add_argument("--mean", type=float, nargs="+", help="of pixels in 0..1; by default that of the backbone")
    parser.add_argument("--std", type=float, nargs="+", help="likewise")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the training images")
    options = parser.parse_args()

    spec = resolve(options.backbone, input_size=options.size and (options.size, options.size))
    own = preprocessing(spec)
    assert own is not None
    mean, std = (
        tuple(values) * (spec.in_chans // len(values))
        for values in (options.mean or own.mean or (0.5,), options.std or own.std or (0.25,))
    )
    given, base = parse_data(options.data)
    resize = {"size": spec.input_size, "interpolation": own.interpolation, "crop_pct": options.crop_pct}
    data = DataSpec.model_validate(given.model_dump() | resize)
    test, names = load_test(data, base=base)
    if options.own_classes:
        spec = replace(spec, num_classes=len(names))
    else:
        numbers = torch.tensor([class_numbers(spec)[folded(name)] for name in names])
        test = Split(test.pool, numbers[test.labels], test.indices)
    levels = tuple(range(1, options.units + 1))
    classes = tuple(map(str, range(spec.num_classes)))
    task = Task("all", classes, spec.input_size, mean, std, levels, levels)

    rows: dict[str, list[list[float]]] = {}
    for seed in options.seeds:
        images = drawn(sample(data, seed=seed, base=base), mean, std, seed=seed)
        for name, accuracies in measured(options, spec, task, test, images):
            print(seed, name, *accuracies, flush=True)
            rows.setdefault(name, []).append(accuracies)
    shown = report.table("top-1 in %", *(f"level {level}" for level in levels), text=1)
    for name, of_seeds in rows.items():
        shown.add_row(name, *map(_mean_and_deviation, zip(*of_seeds, strict=True)))
    report.show(report.console(), shown)


def measured(
    options: argparse.Namespace, spec: BackboneSpec, task: Task, test: Split, images: Sequence[Tensor]
) -> Iterator[tuple[str, list[float]]]:
    """Yields what is measured and its value for each level."""
    module, _ = build(spec, seed=0, weights=options.weights)
    for assign, given in (("even", []), ("sorted", []), ("sorted", images)):
        rule = Rule(assign, divide=options.divide, widths=options.widths if given else "even")
        partition = partition_backbone(spec, options.units, rule, module, given)
        network = DeepVirtualNetwork.from_backbone(partition, module, [task]).eval()
        if not given:
            yield f"{assign} by weights" if assign == "sorted" else assign, accuracy(network, test)
    macs = [network.macs(1, level) for level in task.levels]
    yield "MACs, % of the whole", [100 * each / macs[-1] for each in macs]
    yield "sorted by images", accuracy(network, test)
    fitted = [calibration.calibrated(network, 1, level, images) for level in range(1, options.units)]
    own = [*compensation.statistics(partition), *compensation.biases(partition)]
    network.make_private(dict.fromkeys(own, "network"), keep_shared=True)
    compensation.compensate(network, {1: images})
    yield "and compensated", accuracy(network, test)
    yield "and calibrated", accuracy(network, test, fitted)


def accuracy(network: DeepVirtualNetwork, test: Split, changed: Sequence[dict[str, Tensor]] = ()) -> list[float]:
    result = []
    for level in range(1, len(network.tasks[0].levels) + 1):
        alone = network.virtual_network(1, level)
        if level <= len(changed):
            alone.load_state_dict(changed[level - 1], strict=False)
        result.append(measure(alone, test, network.tasks[0], batch_size=50).top1)
    return result


def _mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
