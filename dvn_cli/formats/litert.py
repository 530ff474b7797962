"""LiteRT, formerly TensorFlow Lite: `ai_edge_litert.interpreter.Interpreter(file)`."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import litert_torch
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor

from dvn_cli.formats.program import description, one_by_one, program
from dvn_cli.network import VirtualNetwork


def write(network: VirtualNetwork, path: Path, fold_norms: bool) -> None:
    """Writes a network for one image at a time, channels first.

    Classes and preprocessing are JSON files at its end, appended as the associated files of TensorFlow Lite are.
    """
    exported = program(network, fold_norms, batch=1)
    litert_torch.convert(exported.module(), exported.example_inputs[0]).export(str(path))
    with zipfile.ZipFile(path, "a") as appended:
        for key, text in description(network).items():
            appended.writestr(zipfile.ZipInfo(f"{key}.json"), text)


def read(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Opens a file with LiteRT's interpreter."""
    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(image: Tensor) -> Tensor:
        interpreter.set_tensor(given["index"], image.numpy())
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(result["index"]))

    return one_by_one(run)
