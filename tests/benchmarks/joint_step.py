"""What a joint step costs: all networks as slices of one store, against the same networks each on its own.

    python tests/benchmarks/joint_step.py [BACKBONE] [--units K] [--batch-size B] [--rounds R]

Forward and backward of every task and level, without the optimizer, on one CPU thread, by the time of the processor;
they take turns, and a figure is the median of the ratios of each round. 1.0 is the limit: slicing is free. Then the
same joint step with images channels last in memory, in bfloat16 (torch.autocast), and both.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
    contiguous = torch.randn(options.batch_size, channels, *spec.input_size)
    labels = torch.randint(0, spec.num_classes, (options.batch_size,))

    def jointly(images: Tensor = contiguous, bf16: bool = False) -> None:
        for task, level in dvn:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                logits = dvn(images, task, level).float()
            F.cross_entropy(logits, labels).backward()
        dvn.zero_grad(set_to_none=True)

    def apart() -> None:
        for network in alone.values():
            F.cross_entropy(network(contiguous), labels).backward()
        for network in alone.values():
            network.zero_grad(set_to_none=True)

    last = contiguous.contiguous(memory_format=torch.channels_last)
    steps: dict[str, Callable[[], None]] = {
        "jointly": jointly,
        "apart": apart,
        "channels last": lambda: jointly(last),
        "bf16": lambda: jointly(bf16=True),
        "both": lambda: jointly(last, bf16=True),
    }
    for step in steps.values():
        seconds(step)
    rounds = [{name: seconds(step) for name, step in steps.items()} for _ in range(options.rounds)]
    print(f"{spec.name}, {len(alone)} networks, batch {options.batch_size}, torch {torch.__version__}:")
    for name in steps:
        taken, ratio = (statistics.median(r[name] / r[of] if of else r[name] for r in rounds) for of in ("", "jointly"))
        print(f"{name:14}{taken:7.3f} s {ratio:6.3f}")


def seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


if __name__ == "__main__":
    main()
