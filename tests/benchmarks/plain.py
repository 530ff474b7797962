"""What plain timm makes of the tasks of a recipe: a whole network for each, fine-tuned by itself.

    python tests/benchmarks/plain.py RECIPE [KEY=VALUE ...] [--seeds 0 1 2]

The images, their order and augmentation, the number of steps, SGD, its schedule and decay by layers are those of the
recipe, so the figures stand beside those of `dvn train RECIPE`'s top level. The classifier is the one that timm makes
for so many classes (`reset_classifier`). Top-1 accuracy in per cent on the test images after the last epoch, mean ±
standard deviation over the seeds; nothing is chosen by them.
"""

import argparse
import statistics
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import nn

from dvn_cli.backbones import resolve
from dvn_cli.backbones.weights import load_weights
from dvn_cli.data import TaskData, batch_count, batches
from dvn_cli.data.spec import locate
from dvn_cli.training import experiment, recipes
from dvn_cli.training.recipe import Recipe
from dvn_cli.training.schedule import factor


def words(description: str | None) -> tuple[Path, list[str], list[int]]:
    """Reads the command line: which recipe, its overrides, and the seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="+", metavar="RECIPE [KEY=VALUE ...]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    file, *overrides = options.recipe
    return recipes.find(file), overrides, options.seeds


def main() -> None:
    path, overrides, seeds = words(__doc__)
    recipe, base = recipes.read(path, overrides), recipes.folder(path)
    torch.set_num_threads(recipe.threads or 1)
    data = experiment.load_data(recipe, base)
    steps = recipe.epochs * max(batch_count(each.train, recipe.batch_size, training=True) for each in data)
    for number, (task, images) in enumerate(zip(recipe.tasks, data, strict=True)):
        results = []
        for seed in seeds:
            torch.manual_seed(seed)
            model = pretrained(recipe, base, images)
            fine_tune(model, images, recipe, steps, torch.Generator().manual_seed(1000 * seed + number))
            results.append(accuracy(model, images))
            print(f"{task.name}, seed {seed}: {results[-1]:.1f}", flush=True)
        deviation = f" ± {statistics.stdev(results):.1f}" if len(results) > 1 else ""
        print(f"{task.name}: {statistics.mean(results):.1f}{deviation}")


def pretrained(recipe: Recipe, base: Path, images: TaskData) -> nn.Module:
    assert recipe.backbone is not None
    assert recipe.backbone.weights is not None
    model = timm.create_model(recipe.backbone.name)
    load_weights(model, resolve(recipe.backbone.name), locate(recipe.backbone.weights, base))
    model.reset_classifier(len(images.classes))
    return model


def fine_tune(model: nn.Module, images: TaskData, recipe: Recipe, steps: int, generator: torch.Generator) -> None:
    keys, done = recipe.optimizer, 0
    layers = param_groups_layer_decay(
        model, keys.weight_decay, layer_decay=keys.layer_decay or 1.0, weight_decay_exclude_1d=False
    )
    optimizer = torch.optim.SGD(layers, keys.lr, keys.momentum, nesterov=keys.nesterov)
    model.train()
    while done < steps:
        for inputs, labels in images.train_batches(recipe.batch_size, generator):
            if done == steps:
                return
            for group in optimizer.param_groups:
                group["lr"] = keys.lr * group["lr_scale"] * factor(recipe.schedule, done / steps)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            done += 1


@torch.no_grad()
def accuracy(model: nn.Module, images: TaskData) -> float:
    model.eval()
    right = sum(
        int((model(inputs).argmax(1) == labels).sum())
        for inputs, labels in batches(images.test, 50, mean=images.mean, std=images.std)
    )
    return 100 * right / len(images.test)


if __name__ == "__main__":
    main()
