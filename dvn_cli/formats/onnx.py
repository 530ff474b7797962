"""ONNX: `onnxruntime.InferenceSession(file).run(None, {"images": images})`."""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import torch
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


def read(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Opens a file on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
