"""ONNX: `onnxruntime.InferenceSession(file).run(None, {"images": images})`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from dvn_cli.formats.program import description, program
from dvn_cli.network import VirtualNetwork


def write(network: VirtualNetwork, path: Path, fold_norms: bool) -> None:
    """Writes a network for batches of any size; classes and preprocessing are in the model's `metadata_props`.

    All is in one file, which protobuf limits to 2 GB.
    """
    exported = torch.onnx.export(
        program(network, fold_norms),
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    exported.model.metadata_props.update(description(network))
    exported.save(path)
    onnx.checker.check_model(path, full_check=True)


class _Images(CalibrationDataReader):
    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.rest = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch."""
        return next(({"images": batch.numpy()} for batch in self.rest), None)


def write_int8(network: VirtualNetwork, path: Path, images: Sequence[Tensor]) -> None:
    """Writes a network by ONNX Runtime's static quantisation (QDQ), its weights by channel, activations by tensor."""
    whole, folded = path.with_suffix(".fp32.onnx"), path.with_suffix(".folded.onnx")
    write(network, whole, fold_norms=True)
    quant_pre_process(whole, folded, skip_symbolic_shape=True)
    quantize_static(folded, path, _Images(images), per_channel=True)
    onnx.checker.check_model(path, full_check=True)


def read(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Opens a file on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
