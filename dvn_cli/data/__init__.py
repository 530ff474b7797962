"""Where a task's images come from and how they are batched."""

from dvn_cli.data.batches import Split, batch_count, batches, to_device
from dvn_cli.data.pool import Pool
from dvn_cli.data.sample import drawn, sample, some, unlabelled
from dvn_cli.data.spec import DataSpec
from dvn_cli.data.task import Chosen, Reader, TaskData, load_task, load_test

__all__ = [
    "Chosen",
    "DataSpec",
    "Pool",
    "Reader",
    "Split",
    "TaskData",
    "batch_count",
    "batches",
    "drawn",
    "load_task",
    "load_test",
    "sample",
    "some",
    "to_device",
    "unlabelled",
]
