"""Formats of files that hold one network, a small module for each; torch comes when one of them is written or read.

A module has two functions: `write(network, path, fold_norms)` makes the file or folder of a network, in the type of its
weights, and `read(path, threads)` opens one with its runtime and returns a function from normalised images, float32
(batch, channels, height, width), to logits (batch, classes). Where a format has them, `write_int8(network, path,
images)` makes one that computes in 8-bit integers, whose ranges are those that these batches of images give.
"""

import importlib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from dvn_cli.errors import InputError, did_you_mean


class NotExpressible(InputError):
    """A format has no way to say what a network is like, where others of the same checkpoint may be."""


@dataclass(frozen=True)
class Format:
    """A format, by what is known of it without its libraries.

    Attributes:
        name: of the format, of its module here, and of the extra that installs its libraries.
        ending: of a file's name, with its dot; of a folder's, with its dash.
        runs_with: what a device needs to run it.
        needs: modules that write it and read it back, beyond those that dvn always has.
        has_weights: it holds weights alone, whose runtime has the norms, so they cannot be folded.
        has_int8: its module has `write_int8`.
        files: names of those in its folder; none where it is a file.
    """

    name: str
    ending: str
    runs_with: str
    needs: tuple[str, ...] = ()
    has_weights: bool = False
    has_int8: bool = False
    files: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of several files."""
        return bool(self.files)

    def is_written_to(self, path: Path) -> bool:
        """Returns whether a path is a folder of this format, with nothing else in it."""
        return self.is_folder and path.is_dir() and set(os.listdir(path)) == set(self.files)

    @property
    def missing(self) -> tuple[str, ...]:
        """The modules that it needs and that are not installed."""
        return tuple(name for name in self.needs if find_spec(name) is None)

    @property
    def module(self) -> ModuleType:
        """The module here that writes and reads it."""
        return importlib.import_module(f"dvn_cli.formats.{self.name}")


FORMATS = {
    each.name: each
    for each in (
        Format("safetensors", ".safetensors", "dvn", has_weights=True),
        Format("timm", "-timm", "timm alone", has_weights=True, files=("config.json", "model.safetensors")),
        Format("pt2", ".pt2", "torch alone"),
        Format("onnx", ".onnx", "ONNX Runtime", ("onnx", "onnxscript", "onnxruntime"), has_int8=True),
        Format("executorch", ".pte", "ExecuTorch with XNNPACK", ("executorch",), has_int8=True),
        Format("openvino", "-openvino", "OpenVINO", ("openvino",), files=("model.bin", "model.xml")),
        Format("litert", ".tflite", "LiteRT", ("litert_torch", "ai_edge_litert")),
    )
}


DTYPES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 0.5}
"""Types of weights, and how much logits may differ from those of the network as it is, in parts of the largest.

In int8 activations are of that type too, and the images that are compared those that gave their ranges.
"""


def find_format(name: str) -> Format:
    """Returns a format that this machine can write.

    Raises:
        InputError: there is no such format, or its libraries are not installed.
    """
    if name not in FORMATS:
        raise InputError(f"there is no format '{name}'{did_you_mean(name, FORMATS)}; there are {', '.join(FORMATS)}")
    found = FORMATS[name]
    if found.missing:
        missing = ", ".join(found.missing)
        raise InputError(f"the format {name} needs {missing}, not installed here: pip install 'dvn[{name}]'")
    return found
