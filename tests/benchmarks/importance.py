"""What the assignment of channels to units is worth: consecutive runs against dealing by importance.

    python tests/benchmarks/importance.py --data ../shared/data/cifar10 [--out build/importance] [--small]

For each seed a plain classifier is trained on CIFAR-10 (a folder of Hugging Face's parquet files), then divided by each
assignment. Top-1 accuracy in per cent on all test images: right after partition, where every level has the slices of
the backbone's norms and running statistics that came out, of the levels and of each unit alone; with every level's own
running statistics, estimated anew in one pass over the training images without a step; and after one epoch of all
levels of one task jointly (eq. 4). Nothing is chosen by these figures. Finished runs are kept under --out, and skipped
when it is started again; --small is two minutes on a CPU, and says nothing about accuracy.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dvn_cli.backbones import BackboneSpec, resolve
from dvn_cli.data import DataSpec, TaskData, load_task
from dvn_cli.dividing import partition_backbone
from dvn_cli.evaluation import measure as measuring
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.metadata import Task
from dvn_cli.units.assign import Rule
from dvn_cli.units.order import paper_order

Forward = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10's parquet files")
    parser.add_argument("--out", type=Path, default=Path("build/importance"), help="folder of the results")
    parser.add_argument("--backbone", default="wrn_16_2")
    parser.add_argument("--units", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15, help="of the backbone")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="few images, a narrow backbone, two epochs")
    options = parser.parse_args()
    images = None
    if options.small:
        options.backbone, options.epochs, options.batch_size, images = "wrn_10_1", 2, 64, 2000
    if options.device == "cpu":
        torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)

    data = load_task(
        DataSpec(
            source="hf",
            path=str(options.data.resolve()),
            label="label",
            train_images=images,
            test_images=images,
            validation=0,
            augment="crop-flip",
        )
    )
    data = TaskData(**{**vars(data), "train": data.train.to(options.device), "test": data.test.to(options.device)})
    spec = resolve(options.backbone, num_classes=len(data.classes), input_size=data.input_size)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, 1 thread"
    setting = {"backbone": spec.name, "images": len(data.train), "epochs": options.epochs, "batch": options.batch_size}

    results = options.out / "runs.jsonl"
    kept = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    rows = [row for row in kept if row["setting"] == setting]
    for seed in options.seeds:
        asked = [(seed, units, assign) for units in options.units for assign in ("even", "importance")]
        missing = [key for key in asked if key not in [(r["seed"], r["units"], r["assign"]) for r in rows]]
        module = backbone(spec, data, seed, options) if missing else None
        for _, units, assign in missing:
            assert module is not None
            start = time.perf_counter()
            row = {"seed": seed, "units": units, "assign": assign}
            row |= measure(spec, module, data, units, assign, seed, options)
            row |= {"setting": setting, "machine": machine, "torch": torch.__version__}
            row["seconds"] = round(time.perf_counter() - start, 1)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(json.dumps(row), flush=True)
    summary = [row for units in options.units for row in summarised(rows, units)]
    (options.out / "summary.json").write_text(json.dumps({"setting": setting, "rows": summary}, indent=1) + "\n")
    show(summary, f"{spec.name}, {len(data.train)} images, {machine}, torch {torch.__version__}")


def backbone(spec: BackboneSpec, data: TaskData, seed: int, options: argparse.Namespace) -> nn.Module:
    """The classifier of a seed, trained or as it was saved."""
    torch.manual_seed(seed)
    module = spec.build()
    file = options.out / f"{spec.name}-{len(data.train)}-{options.epochs}-{options.batch_size}-{seed}.safetensors"
    if file.exists():
        module.load_state_dict(load_file(file))
        return module
    start = time.perf_counter()
    module.to(options.device).train()
    train([module], module, data, options.epochs, 0.1, seed, options)
    save_file({name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}, file)
    accuracy = top1(module.eval(), data)
    print(f"backbone {seed}: {accuracy:.2f} % after {time.perf_counter() - start:.0f} s", flush=True)
    return module.cpu()


def measure(
    spec: BackboneSpec,
    module: nn.Module,
    data: TaskData,
    units: int,
    assign: str,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Accuracies by level at the times that the module tells of, and those of each unit alone right after partition."""
    partition = partition_backbone(spec, units, module=module, rule=Rule(assign))

    def task(number: int, levels: Sequence[int]) -> Task:
        order = tuple(paper_order(number, units))
        return Task(f"from unit {number}", data.classes, data.input_size, data.mean, data.std, order, tuple(levels))

    whole, alone = task(1, range(1, units + 1)), [task(number, [1]) for number in range(2, units + 1)]
    fresh = DeepVirtualNetwork.from_backbone(partition, module, [whole, *alone]).to(options.device).eval()
    before = [top1(forward, data) for forward in forwards(fresh)]

    network = DeepVirtualNetwork.from_backbone(partition, module, [whole])
    network.make_private()
    network.to(options.device).train()
    with torch.no_grad():
        for images, _ in data.train_batches(options.batch_size, torch.Generator().manual_seed(seed), options.device):
            for forward in forwards(network):
                forward(images)
    own = [top1(forward, data) for forward in forwards(network.eval())]

    network = DeepVirtualNetwork.from_backbone(partition, module, [whole])
    network.make_private()
    network.to(options.device).train()
    train(list(forwards(network)), network, data, 1, 0.05, seed, options)
    after = [top1(forward, data) for forward in forwards(network.eval())]
    return {"partition": before[:units], "units_alone": [before[0], *before[units:]], "statistics": own, "epoch": after}


def forwards(network: DeepVirtualNetwork) -> Iterator[Forward]:
    for task, level in network:
        yield lambda images, task=task, level=level: network(images, task, level)  # type: ignore[misc]


def train(
    networks: Sequence[Forward],
    module: nn.Module,
    data: TaskData,
    epochs: int,
    lr: float,
    seed: int,
    options: argparse.Namespace,
) -> None:
    """All networks in every step, gradients accumulated, one optimizer step; the learning rate falls by a cosine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(module.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(data.train) // options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for images, labels in data.train_batches(options.batch_size, generator, options.device):
            for network in networks:
                F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()


def top1(network: Forward, data: TaskData) -> float:
    """Per cent of all test images."""
    task = Task("all", data.classes, data.input_size, data.mean, data.std, (1,), (1,))
    return measuring.measure(network, data.test, task, batch_size=1000, device=data.test.labels.device).top1


def summarised(rows: Sequence[dict[str, Any]], units: int) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, for each assignment, time and level; of the units alone together."""
    found = []
    for assign in ("even", "importance"):
        chosen = [row for row in rows if row["units"] == units and row["assign"] == assign]
        for when in ("partition", "statistics", "epoch"):
            for level in range(1, units + 1):
                values = [row[when][level - 1] for row in chosen]
                found.append({"units": units, "assign": assign, "when": when, "level": level, **moments(values)})
        spread = [max(row["units_alone"]) - min(row["units_alone"]) for row in chosen]
        found.append({"units": units, "assign": assign, "when": "spread of units alone", "level": 1, **moments(spread)})
    return found


def moments(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 2), "std": round(deviation, 2), "seeds": len(values)}


def show(summary: Sequence[dict[str, Any]], title: str) -> None:
    print(f"\n{title}\n{'units':>5} {'when':<24}{'level':>5} {'even':>16} {'importance':>16}")
    for even in (row for row in summary if row["assign"] == "even"):
        key = {name: even[name] for name in ("units", "when", "level")}
        other = next(row for row in summary if row["assign"] == "importance" and key.items() <= row.items())
        figures = "".join(f"{row['mean']:>9.2f} ± {row['std']:5.2f}" for row in (even, other))
        print(f"{even['units']:>5} {even['when']:<24}{even['level']:>5} {figures}")


if __name__ == "__main__":
    main()
