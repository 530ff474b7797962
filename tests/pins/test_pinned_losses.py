"""Losses of the recipes that come with dvn are what they were."""

from pathlib import Path

import numpy as np
import pinned
import pytest
import synthetic

STORED = pinned.json.loads(pinned.LOSSES.read_text())
SHORT = {f"{recipe}-dvn" for recipe in ("digits", "h1", "j1", "j2", "j3", "s1", "s2")}
SHORT |= {"digits", *(name for name in STORED if name.startswith("j1-"))}


def test_every_case_is_stored() -> None:
    assert set(STORED) == set(pinned.cases())


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.slow) for n in STORED])
def test_losses(name: str, data_sets: synthetic.DataSets, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In each stage two steps, in which every network has its turn."""
    found = pinned.losses(name, data_sets, tmp_path)
    each = [np.concatenate(epoch).astype(float) for epoch in found]
    assert not np.isnan(each).all(axis=0).any(), "a network was never trained"
    if request.config.getoption("exact"):
        assert found == STORED[name]
    assert len(found) == len(STORED[name])
    for ours, stored in zip(each, STORED[name], strict=True):
        # The loss of a network that is distilled from itself is rounding alone, which differs by processor.
        np.testing.assert_allclose(ours, np.concatenate(stored).astype(float), rtol=1e-3, atol=1e-5)
