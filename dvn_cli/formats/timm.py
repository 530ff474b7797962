"""A folder that plain timm loads: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import timm
from timm.models import is_model, model_entrypoint
from torch import Tensor

from dvn_cli.backbones import BackboneSpec
from dvn_cli.backbones.registry import timm_cfg, timm_options
from dvn_cli.formats import NotExpressible
from dvn_cli.graph.stem import dims
from dvn_cli.network import VirtualNetwork
from dvn_cli.partition import Partition


def write(network: VirtualNetwork, path: Path, fold_norms: bool) -> None:
    """Writes weights and configuration.

    Raises:
        NotExpressible: no arguments of timm's constructor give a network of these widths.
    """
    task, backbone = network.task, network.metadata.backbone
    refused = f"timm cannot express level {network.level} of task '{task.name}': "
    known = backbone.source == "timm" and is_model(backbone.name)  # dvn's own are registered once they are built
    if not known or not model_entrypoint(backbone.name).__module__.startswith("timm."):
        raise NotExpressible(f"{refused}{backbone.name} is not one of its models")
    if backbone.hidden_layers:
        raise NotExpressible(f"{refused}its classifiers have no hidden layers")
    spec = BackboneSpec(**vars(backbone) | {"num_classes": len(task.classes), "input_size": task.input_size})
    state, whole = network.state_dict(), spec.build("meta").state_dict()
    for name, tensor in state.items():
        if name not in whole or tensor.shape != whole[name].shape:
            there = f"it has {list(whole[name].shape)}" if name in whole else "it has no such tensor"
            raise NotExpressible(f"{refused}{name} is {list(tensor.shape)}, in its {spec.name} {there}")
    if task.input_size != backbone.input_size:
        stem = Partition.restore(network.metadata).stem
        strides = stem.strides(task.input_size)
        for layer in stem.layers:
            if strides.get(layer.weight, layer.stride) != layer.stride:
                has = f"a stride of {dims(strides[layer.weight])} for images of {dims(task.input_size)}"
                raise NotExpressible(f"{refused}{layer.weight} has {has}, in its {spec.name} {dims(layer.stride)}")
    cfg = timm_cfg(spec.name)
    config = {
        "architecture": spec.name.partition(".")[0],
        "num_classes": spec.num_classes,
        "label_names": task.classes,
        "model_args": timm_options(spec),
        "pretrained_cfg": {
            **{key: getattr(task, key) for key in ("mean", "std", "interpolation")},
            "crop_pct": task.crop_pct or 1.0,
            "crop_mode": "squash" if task.crop_pct is None else task.crop_mode,
            "input_size": (spec.in_chans, *task.input_size),
            "num_classes": spec.num_classes,
            "first_conv": cfg.first_conv,
            "classifier": cfg.classifier,
            "fixed_input_size": cfg.fixed_input_size,
        },
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    copies = {name: tensor.contiguous().clone() for name, tensor in state.items()}  # what is tied is one in memory
    safetensors.torch.save_file(copies, path / "model.safetensors", {"format": "pt"})


def read(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Opens a folder with timm; torch's number of threads is the process's."""
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()
