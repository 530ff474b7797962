"""Accuracy of networks before and after their slices were fitted to images or put into 8-bit integers."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dvn_cli.budget import PLAIN
from dvn_cli.data.words import parse_data
from dvn_cli.device import choose
from dvn_cli.errors import InputError
from dvn_cli.evaluation.measure import measure_together, open_files
from dvn_cli.export import SliceFile
from dvn_cli.formats import find_format
from dvn_cli.network import DeepVirtualNetwork, on_float32


def top1_before_and_after(
    checkpoint: Path, cuts: Sequence[SliceFile], file_format: str, data: Sequence[str], note: Callable[[str], None]
) -> dict[tuple[int, int], tuple[float, float]]:
    """Measures networks of a checkpoint and their files on the same test images.

    Args:
        checkpoint: That the files are of.
        cuts: The files.
        file_format: Theirs. Of dvn's own they run on the device that there is, of others on the CPU.
        data: What they were fitted to, as `--calibrate` has it.
        note: Told of tasks that have no such test images, as where classes are others.

    Returns:
        Top-1 in per cent before and after, by task and level; none of those tasks.
    """
    measure = _own if file_format == PLAIN else _others
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for task in dict.fromkeys(cut.task for cut in cuts):
        try:
            found |= measure(checkpoint, [cut for cut in cuts if cut.task == task], file_format, data)
        except InputError as error:
            note(f"accuracy is not measured: {error}")
    return found


def _own(
    checkpoint: Path, cuts: Sequence[SliceFile], _: str, data: Sequence[str]
) -> dict[tuple[int, int], tuple[float, float]]:
    level = cuts[0].level if len(cuts) == 1 else None
    files = [checkpoint, *(cut.file for cut in cuts)]
    loaded = open_files(files, f"number:{cuts[0].task}", level, *parse_data(data, flat=True))
    top1 = {(row.file, row.level): row.top1 for each in loaded for row in each.evaluate(256, choose("auto"))}
    return {(cut.task, cut.level): (top1[str(checkpoint), cut.level], top1[str(cut.file), cut.level]) for cut in cuts}


def _others(
    checkpoint: Path, cuts: Sequence[SliceFile], file_format: str, data: Sequence[str]
) -> dict[tuple[int, int], tuple[float, float]]:
    task, read = cuts[0].task, find_format(file_format).module.read
    [loaded] = open_files([checkpoint], f"number:{task}", None, *parse_data(data, flat=True))
    assert isinstance(loaded.module, DeepVirtualNetwork)
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for cut in cuts:
        networks = [on_float32(loaded.module, task=task, level=cut.level), read(cut.file)]
        before, after = measure_together(networks, loaded.splits[task], loaded.module.tasks[task - 1])
        found[task, cut.level] = before.top1, after.top1
    return found
