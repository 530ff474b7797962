from collections.abc import Iterator
from typing import Any

import pytest
import small

from dvn_cli.partition import Partition
from dvn_cli.training import setup
from dvn_cli.units.assign import EVEN, Rule


@pytest.fixture(autouse=True, scope="module")
def _trace_once() -> Iterator[None]:
    """Dividing a backbone takes a second, most of what a small run takes: done once for each backbone and units."""

    class Cached:
        @staticmethod
        def create(spec: Any, units: int, module: Any = None, assignment: Any = None, rule: Rule = EVEN) -> Partition:
            if assignment is None and rule == EVEN:
                return small.partitioned(spec, units)
            return Partition.create(spec, units, module, assignment, rule)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "Partition", Cached)
        yield
