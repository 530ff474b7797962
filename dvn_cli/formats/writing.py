"""Networks written in a format, read back by its runtime, and compared before the file is put in its place."""

import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dvn_cli.errors import DvnError, InputError, is_out_of_memory
from dvn_cli.files import check_writable, put
from dvn_cli.formats import DTYPES, FORMATS, Format
from dvn_cli.network import VirtualNetwork

_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

RANDOM_BATCHES = (1, 4)
"""Numbers of random images that are compared, beside those that are given."""


@dataclass(frozen=True)
class Check:
    """How a file compares with its network.

    Attributes:
        difference: the largest of logits, in parts of the largest logit.
        same: how many images have the same class.
        images: how many were compared.
    """

    difference: float
    same: int
    images: int


@torch.no_grad()
def write(
    network: VirtualNetwork,
    form: Format,
    output: str | os.PathLike[str],
    images: Sequence[Tensor] = (),
    dtype: str = "fp32",
    fold_norms: bool = False,
    ranges: Sequence[Tensor] = (),
) -> Check:
    """Writes a network's file or folder.

    Args:
        network: in float32, on the CPU.
        form: the format.
        output: the path; what is there is replaced once the new one has proved right.
        images: normalised batches to compare on, beside random ones.
        dtype: of the weights, see `formats.DTYPES`.
        fold_norms: whether running statistics go into the layers before them.
        ranges: in int8, normalised batches that give the ranges of activations; compared in place of random ones.

    Raises:
        InputError: the format has no such networks, or `output` cannot be written.
        DvnError: the network cannot be converted, or the file gives other logits or classes.
    """
    if fold_norms and form.has_weights:
        raise InputError(f"--fold-norms: {form.name} holds weights, whose network has the norms")
    if dtype == "int8" and not form.has_int8:
        able = " and ".join(each.name for each in FORMATS.values() if each.has_int8)
        raise InputError(f"{form.name} is not written in int8: {able} are")
    if not form.is_folder:
        check_writable(output)
    limit = DTYPES[dtype]
    title = f"level {network.level} of task '{network.task.name}'"
    sample = torch.Generator().manual_seed(0)
    shape = (network.metadata.backbone.in_chans, *network.task.input_size)
    batches = list(ranges) or [torch.randn(size, *shape, generator=sample) for size in RANDOM_BATCHES]
    network = network.eval()
    with tempfile.TemporaryDirectory(prefix="dvn-slice-") as folder:
        file = Path(folder) / f"network{form.ending}"
        with quiet(), _named(f"{title} cannot be written as {form.name} in {dtype}"):
            if dtype == "int8":
                form.module.write_int8(network, file, ranges)
            else:
                given = network if dtype == "fp32" else copy.deepcopy(network).to(_TORCH[dtype])
                form.module.write(given, file, fold_norms)
            run = form.module.read(file)
            pairs = [(network(batch), run(batch)) for batch in (*batches, *images)]
        expected, found = (torch.cat(part) for part in zip(*pairs, strict=True))
        check = compare(expected, found)
        if not check.difference <= limit or (dtype == "fp32" and check.same < check.images):
            differs = (expected - found).abs().amax(1)
            raise DvnError(
                f"{title} as {form.name} in {dtype} is not the same network: its logits differ by up to "
                f"{check.difference:.1e} of the largest, where {limit:.0e} is allowed, most on image "
                f"{int(differs.argmax()) + 1} of {check.images}, and {check.images - check.same} images get "
                "another class; nothing is written"
            )
        put(file, output)
    return check


def compare(expected: Tensor, found: Tensor) -> Check:
    """Compares logits, float (images, classes), with those that they should be."""
    size, difference = expected.abs().max(), (expected - found).abs().max()
    same = (expected.argmax(1) == found.argmax(1)).sum()
    return Check(float(difference / size) if difference else 0.0, int(same), len(expected))


@contextlib.contextmanager
def _named(title: str) -> Iterator[None]:
    """Says in a line what a library says at length."""
    try:
        yield
    except Exception as error:  # a converter raises anything at all
        if isinstance(error, DvnError) or is_out_of_memory(error):
            raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DvnError(f"{title}: {first}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lets nothing onto the terminal of what converters print, also those in C++."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        for stream in (1, 2):
            stack.callback(os.close, kept := os.dup(stream))
            stack.callback(os.dup2, kept, stream)
            os.dup2(nowhere.fileno(), stream)
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
