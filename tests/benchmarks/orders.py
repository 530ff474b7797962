"""What orders of units are worth: the paper's rule, one order for all, random ones, and those learned from gradients.

    python tests/benchmarks/orders.py --data ../shared/data --out orders.jsonl [--seeds 0 1 2]

Two settings of four tasks over the four units of a small wide residual network, images of 16x16 pixels: J2, the four
quarters of Tiny-ImageNet's classes, and tasks of two kinds, the two halves of CIFAR-10, the superclasses of CIFAR-100
and handwritten digits. All rules have the same images, steps and settings; the order of random ones is drawn by the
seed. A run is a line of the output, called again with the same file the script goes on after the last one, and prints
the tables at the end: top-1 on test images in per cent, mean over the tasks, mean ± standard deviation over seeds.
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dvn_cli
from dvn_cli import report
from dvn_cli.loading import load
from dvn_cli.network import DeepVirtualNetwork

RULES = ("paper", "shared", "random", "learned")
UNITS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the three data sets")
    parser.add_argument("--out", type=Path, required=True, help="file of the runs, a line each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(row["setting"], row["rule"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for setting, keys in settings(options.data.resolve()).items():
            for rule in RULES:
                if (setting, rule, seed) not in done:
                    rows.append({"setting": setting, "rule": rule, "seed": seed, **run(keys, rule, seed)})
                    with open(options.out, "a") as file:
                        print(json.dumps(rows[-1]), file=file)
    for setting in dict.fromkeys(row["setting"] for row in rows):
        show(setting, [row for row in rows if row["setting"] == setting])


def settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The recipes, but for orders and seed."""
    images = {"validation": 0, "size": 16, "pad": 2}
    photos: dict[str, Any] = {"source": "hf", "augment": "crop-flip", **images}
    tiny = {**photos, "path": str(folder / "tiny-imagenet-mini"), "label": "label"}
    some = {"train_images": 1500, "test_images": 1000}
    cifar10 = {**photos, **some, "path": str(folder / "cifar10"), "label": "label"}
    cifar100 = {**photos, **some, "path": str(folder / "cifar100"), "label": "coarse_label"}
    kinds = {
        "low": {**cifar10, "classes": "0-4"},
        "high": {**cifar10, "classes": "5-9"},
        "coarse": cifar100,
        "digits": {"source": "digits", "augment": "crop", **images},
    }
    quarters = {f"quarter{n + 1}": {**tiny, "classes": f"{50 * n}-{50 * n + 49}"} for n in range(4)}
    common: dict[str, Any] = {
        "backbone": {"name": "wrn_10_1", "in_chans": 3},
        "units": UNITS,
        "batch_size": 32,
        "optimizer": {"lr": 0.02},
        "schedule": {"name": "cosine"},
        "threads": 1,
    }
    return {
        name: {**common, "epochs": epochs, "tasks": [{"name": key, "data": data} for key, data in tasks.items()]}
        for name, epochs, tasks in (("two kinds", 3, kinds), ("J2", 6, quarters))
    }


def run(keys: dict[str, Any], rule: str, seed: int) -> dict[str, Any]:
    """Trains a recipe, and returns what came of it."""
    drawn, tasks = random.Random(seed), keys["tasks"]
    if rule == "random":
        tasks = [{**task, "order": drawn.sample(range(1, UNITS + 1), UNITS)} for task in tasks]
    recipe = {**keys, "tasks": tasks, "orders": "paper" if rule == "random" else rule, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        trained = dvn_cli.train(recipe, Path(folder) / "dvn.safetensors", device="cpu")
        network = load(trained.checkpoint)
    assert isinstance(network, DeepVirtualNetwork)
    return {
        "orders": [task.order for task in network.tasks],
        "affinity": [task.affinity for task in network.tasks],
        "top1": [[r.top1 for r in trained.results if r.task == n] for n in range(1, len(tasks) + 1)],
        "torch": torch.__version__,
    }


def show(setting: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints what the rules gave by level, and how much more than the paper's with the same seed."""
    columns = (*(f"level {level}" for level in range(1, UNITS + 1)), "all", "more than paper", "seeds")
    made = report.table("orders", *columns, text=1, title=setting)
    means = {(row["rule"], row["seed"]): list(map(statistics.mean, zip(*row["top1"], strict=True))) for row in rows}
    for rule in RULES:
        seeds = sorted(seed for name, seed in means if name == rule)
        values = [[*means[rule, seed], statistics.mean(means[rule, seed])] for seed in seeds]
        more = [
            statistics.mean(means[rule, s]) - statistics.mean(means["paper", s]) for s in seeds if ("paper", s) in means
        ]
        if values:
            made.add_row(rule, *map(_spread, zip(*values, strict=True)), _spread(more), str(len(seeds)))
    report.show(report.console(), made)
    for row in rows:
        if row["rule"] == "learned":
            orders = ", ".join(" ".join(map(str, order)) for order in row["orders"])
            print(f"seed {row['seed']}: orders {orders}; agreement {json.dumps(row['affinity'])}")


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
