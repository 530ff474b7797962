"""What Torch-Pruning makes of the task of a recipe: a whole network, pruned half-way to the size of level 1.

    pip install torch-pruning==1.6.1   # dvn does not need it
    python tests/benchmarks/pruned.py RECIPE [KEY=VALUE ...] [--seeds 0 1 2]

The whole network starts from the tensors that `dvn train RECIPE` starts from, and is trained for half of the recipe's
steps. Then it is pruned by the norms of groups (`GroupMagnitudeImportance`) in two ways: uniform, each layer to the
width that it has in level 1; isomorphic, layers of one kind ranked together, until it has no more multiply-accumulates
than level 1. Each is trained for the other half. Both halves have the whole schedule of the recipe, with its warm-up.
Images, their order and augmentation are the recipe's. Top-1 accuracy in per cent on the test images; nothing is chosen
by them.
"""

import copy
from functools import partial

import torch
import torch_pruning as tp
from plain import accuracy, fine_tune, words
from torch import Tensor, nn

from dvn_cli.backbones import resolve
from dvn_cli.data import batch_count
from dvn_cli.dividing import build
from dvn_cli.training import experiment, recipes


def main() -> None:
    path, overrides, seeds = words(__doc__)
    for seed in seeds:
        recipe = recipes.read(path, [*overrides, f"seed={seed}"])
        assert recipe.backbone is not None
        assert recipe.units is not None
        torch.set_num_threads(recipe.threads or 1)
        (images,) = experiment.load_data(recipe, recipes.folder(path))
        half = recipe.epochs * batch_count(images.train, recipe.batch_size, training=True) // 2
        spec = resolve(recipe.backbone.name, num_classes=len(images.classes), input_size=images.input_size)
        whole, _ = build(spec, seed=seed, zero_init_last=recipe.backbone.zero_init_last)
        train = partial(fine_tune, images=images, recipe=recipe, steps=half)
        generator = torch.Generator().manual_seed(1000 * seed)
        train(whole, generator=generator)
        example = torch.zeros(1, spec.in_chans, *images.input_size)
        show(seed, "whole, half of the steps", whole, example, accuracy(whole, images))
        narrow = pruned(whole, example, 1 - 1 / recipe.units)
        macs, _ = tp.utils.count_ops_and_params(narrow, example)
        drawn = generator.get_state()
        for name, model in (
            ("uniform", narrow),
            ("isomorphic", pruned(whole, example, 0.9, macs, global_pruning=True, isomorphic=True)),
        ):
            show(seed, f"{name}, right after", model, example, accuracy(model, images))
            train(model, generator=generator.set_state(drawn))
            show(seed, f"{name}, trained on", model, example, accuracy(model, images))


def pruned(whole: nn.Module, example: Tensor, ratio: float, macs: float | None = None, **how: bool) -> nn.Module:
    """A copy without that share of its channels, or, where `macs` are given, as soon as it has no more than those."""
    model = copy.deepcopy(whole).eval()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        iterative_steps=1 if macs is None else 400,
        ignored_layers=[model.get_submodule("fc")],
        **how,
    )
    pruner.step()
    while macs is not None and tp.utils.count_ops_and_params(model, example)[0] > macs:
        pruner.step()
    return model


def show(seed: int, name: str, model: nn.Module, example: Tensor, top1: float) -> None:
    macs, params = tp.utils.count_ops_and_params(model, example)
    print(f"seed {seed}, {name}: {top1:.1f} %, {params / 1e6:.2f}M parameters, {macs / 1e6:.1f}M MACs", flush=True)


if __name__ == "__main__":
    main()
