"""ExecuTorch's program for XNNPACK, that is for ARM and x86 CPUs: `Module("x.pte").forward(image)` on a device."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, fx
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from dvn_cli.formats.program import description, one_by_one, program
from dvn_cli.network import VirtualNetwork


def write(network: VirtualNetwork, path: Path, fold_norms: bool) -> None:
    """Writes a network for one image at a time; classes and preprocessing are methods that return text."""
    _write(network, program(network, fold_norms, batch=1), path)


class _Quantizer(XNNPACKQuantizer):
    """XNNPACK's, with a convolution and its ReLU6 as one operator, as a convolution and its ReLU are.

    Else the steps of what ReLU6 leaves are those of the convolution's whole range.
    """

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Says between which operators of a model values are quantised."""
        model = super().annotate(model)
        for node in model.graph.nodes:
            if node.target in (torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default):
                [before] = node.all_input_nodes
                told = before.meta.get(Q_ANNOTATION_KEY, QuantizationAnnotation())
                if before.target is torch.ops.aten.conv2d.default and len(before.users) == 1 and told.output_qspec:
                    annotation = QuantizationAnnotation(output_qspec=told.output_qspec, _annotated=True)
                    node.meta[Q_ANNOTATION_KEY], told.output_qspec = annotation, None
        return model


def write_int8(network: VirtualNetwork, path: Path, images: Sequence[Tensor]) -> None:
    """Writes a network quantised by torchao's PT2E for XNNPACK, its weights by channel, activations by tensor."""
    exported = program(network, fold_norms=True, batch=1)
    quantizer = _Quantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    observed = prepare_pt2e(exported.module(), quantizer)
    for image in torch.cat(list(images)).split(1):
        observed(image)
    converted = convert_pt2e(observed)
    used = fx.GraphModule(converted, converted.graph)  # without the weights in float32, which it keeps
    _write(network, torch.export.export(used, exported.example_inputs[0], strict=False), path)


def _write(network: VirtualNetwork, exported: torch.export.ExportedProgram, path: Path) -> None:
    texts = description(network)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()], constant_methods=texts)
    path.write_bytes(lowered.to_executorch().buffer)


def read(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Opens a file with ExecuTorch's Python runtime, which sets its threads itself."""
    method = Runtime.get().load_program(path).load_method("forward")
    return one_by_one(lambda image: method.execute([image])[0].clone())
