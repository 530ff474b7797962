"""What a joint step costs: all networks as slices of one store, against the same networks each on its own.

    python tests/benchmarks/joint_step.py [BACKBONE] [--units K] [--batch-size B] [--input-size S] [--rounds R]

Forward and backward of every task and level, without the optimizer, on one CPU thread, by the time of the processor;
they take turns, and a figure is the median of the ratios of each round. 1.0 is the limit: slicing is free. Then the
same joint step with images channels last in memory, in bfloat16 (torch.autocast), and both. Last the memory that
torch's allocator gives out at the peak of a joint step and of a step of the top network alone: weights, gradients
(which are there from the step before) and all else.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dvn_cli.backbones import resolve
from dvn_cli.dividing import partition_backbone
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.metadata import TaskLevel
from dvn_cli.tasks import default_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", nargs="?", default="wrn_16_2")
    parser.add_argument("--units", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--input-size", type=int, help="height and width; by default the backbone's own")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = None if options.input_size is None else (options.input_size, options.input_size)
    spec = resolve(options.backbone, input_size=size)
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

    def top() -> None:
        F.cross_entropy(alone[TaskLevel(1, options.units)](contiguous), labels).backward()

    def all_levels() -> None:
        for task, level in dvn:
            F.cross_entropy(dvn(contiguous, task, level), labels).backward()

    held = [peak_memory(all_levels, dvn), peak_memory(top, alone[TaskLevel(1, options.units)])]
    print(f"peak memory    jointly {held[0] / 1e6:.0f} MB, {held[0] / held[1]:.3f} of what the top network takes alone")


def peak_memory(step: Callable[[], None], module: nn.Module) -> int:
    """Returns the bytes at the peak of the second of two steps, after which gradients are left as they are."""
    step()
    now = sum(t.nbytes + (0 if t.grad is None else t.grad.nbytes) for t in [*module.parameters(), *module.buffers()])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=now))


def seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


if __name__ == "__main__":
    main()
