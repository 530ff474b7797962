"""OpenVINO's intermediate representation: `openvino.Core().compile_model(FOLDER / "model.xml", "CPU")(images)[0]`."""

from collections.abc import Callable
from pathlib import Path

import openvino
import torch
from torch import Tensor

from dvn_cli.formats.program import description, program
from dvn_cli.network import VirtualNetwork


def write(network: VirtualNetwork, path: Path, fold_norms: bool) -> None:
    """Writes a network for batches of any size; classes and preprocessing are in its `rt_info`, under `dvn`."""
    model = openvino.convert_model(program(network, fold_norms))
    for key, text in description(network).items():
        model.set_rt_info(text, ["dvn", key])
    path.mkdir()
    openvino.save_model(model, path / "model.xml", compress_to_fp16=False)


def read(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Opens a folder on the CPU, to be calculated in the types that it says."""
    settings = {"EXECUTION_MODE_HINT": "ACCURACY"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    network = openvino.Core().compile_model(path / "model.xml", "CPU", settings)
    return lambda images: torch.from_numpy(network(images.numpy())[0])
