"""What the formats have in common: a network as a program of plain operators, and what a file says besides."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dvn_cli.graph.trace import EXAMPLE_BATCH, without_stack_traces
from dvn_cli.network import VirtualNetwork, device_and_dtype


def program(
    network: VirtualNetwork, fold_norms: bool = False, batch: int | None = None
) -> torch.export.ExportedProgram:
    """Exports a network in eval mode: images to logits, both float32 whatever the type of its weights.

    Args:
        network: it stays as it is.
        fold_norms: see `VirtualNetwork.standalone`.
        batch: the only number of images that it takes; any by default.
    """
    module = network.standalone(fold_norms)
    dtype = device_and_dtype(network)[1]
    if dtype is not torch.float32:
        (images,), (output,) = (module.graph.find_nodes(op=op) for op in ("placeholder", "output"))
        with module.graph.inserting_after(images):
            cast = module.graph.call_function(torch.ops.aten.to.dtype, (images, dtype))
        images.replace_all_uses_with(cast, lambda user: user is not cast)
        with module.graph.inserting_before(output):
            output.args = (module.graph.call_function(torch.ops.aten.to.dtype, (output.args[0], torch.float32)),)
        module.recompile()
    shape = (network.metadata.backbone.in_chans, *network.task.input_size)
    example = torch.zeros(EXAMPLE_BATCH if batch is None else batch, *shape)
    dynamic = ({0: torch.export.Dim.DYNAMIC if batch is None else torch.export.Dim.STATIC},)
    with without_stack_traces(), torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=dynamic, strict=False)


def description(network: VirtualNetwork) -> dict[str, str]:
    """What a file says of its network, as JSON by key: its classes, and how images are prepared."""
    task = network.task
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    parts: dict[str, Any] = {
        "classes": task.classes,
        "preprocessing": {key: getattr(task, key) for key in keys},
        "network": {"task": task.name, "level": network.level, "levels": len(task.levels)},
    }
    return {key: json.dumps(value, ensure_ascii=False) for key, value in parts.items()}


def one_by_one(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Makes what takes one image take batches."""
    return lambda images: torch.cat([run(image) for image in images.split(1)])
