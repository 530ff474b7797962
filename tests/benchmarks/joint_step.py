"""What a joint step costs: all networks as slices of one store, against the same networks each on its own.

    python tests/benchmarks/joint_step.py [BACKBONE] [--units K] [--batch-size B] [--rounds R]

Forward and backward of every task and level, without the optimizer, on one CPU thread; the two take turns, and the
figure is the median of the ratios of each round. 1.0 is the limit: slicing is free.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from dvn_cli.backbones import resolve
from dvn_cli.dividing import partition_backbone
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.tasks import default_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", nargs="?", default="wrn_16_2")
    parser.add_argument("--units", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = resolve(options.backbone)
    module = spec.build()
    channels = spec.in_chans
    tasks = default_tasks(options.units, spec.num_classes, spec.input_size, (0.5,) * channels, (0.25,) * channels)[:2]
    dvn = DeepVirtualNetwork.from_backbone(partition_backbone(spec, options.units, module=module), module, tasks)
    dvn.make_private()
    dvn.train()
    alone = {network: dvn.virtual_network(*network) for network in dvn}
    images = torch.randn(options.batch_size, channels, *spec.input_size)
    labels = torch.randint(0, spec.num_classes, (options.batch_size,))

    def jointly() -> None:
        for task, level in dvn:
            F.cross_entropy(dvn(images, task, level), labels).backward()
        dvn.zero_grad(set_to_none=True)

    def apart() -> None:
        for network in alone.values():
            F.cross_entropy(network(images), labels).backward()
        for network in alone.values():
            network.zero_grad(set_to_none=True)

    seconds(jointly), seconds(apart)
    rounds = [(seconds(jointly), seconds(apart)) for _ in range(options.rounds)]
    ratio = statistics.median(joint / apart for joint, apart in rounds)
    print(f"{spec.name}, {len(alone)} networks, batch {options.batch_size}, torch {torch.__version__}:", end=" ")
    print(f"jointly {statistics.median(j for j, _ in rounds):.3f} s, {ratio:.3f} of what they take apart")


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
