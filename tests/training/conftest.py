from collections.abc import Iterator
from typing import Any

import pytest
import small

from dvn_cli.partition import Partition
from dvn_cli.training import setup


@pytest.fixture(autouse=True, scope="module")
def _trace_once() -> Iterator[None]:
    """Dividing a backbone takes a second, most of what a small run takes: done once for each backbone and units."""

    class Cached:
        @staticmethod
        def create(spec: Any, units: int, module: Any = None, assignment: Any = None) -> Partition:
            return (
                small.partitioned(spec, units)
                if assignment is None
                else Partition.create(spec, units, None, assignment)
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "Partition", Cached)
        yield
