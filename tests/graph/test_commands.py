"""Every command on every backbone: a sample of the panel that changes from day to day, and the table of all."""

import datetime
import os
import random

import commands
import pytest
import table

from dvn_cli.store import slicing

QUICK = 15.0  # seconds that all commands took, by the table, on a machine that had more to do
SEED = os.environ.get("DVN_SAMPLE", datetime.date.today().isoformat())
ROWS = table.read(commands.TABLE, commands.Row)
SAMPLE = random.Random(SEED).sample(sorted(row.name for row in ROWS if row.passed and row.seconds <= QUICK), 1)


@pytest.mark.parametrize("name", SAMPLE)
def test_every_command_works(name):
    """Repeated with `DVN_SAMPLE` in the environment set to the seed."""
    row = commands.go_through(name)
    assert row.passed, f"DVN_SAMPLE={SEED}: {row.name}: {row.reason}"


def test_no_command_refuses_a_backbone_of_the_table():
    assert {row.name for row in ROWS} <= commands.names().keys()
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert [f"{row.name}: {row.reason}" for row in ROWS if row.outcome not in ("passed", "too large")] == []
    for row in ROWS:
        assert row.passed == ((row.partition, row.slice, row.load, row.train, row.bench) == ("0", "0", "ok", "0", "0"))


def test_what_a_command_does_wrong_is_told(monkeypatch):
    take = slicing._take
    monkeypatch.setattr(slicing, "_take", lambda array, runs: take(array, runs)[::-1])
    row = commands.go_through("timm/test_resnet")
    assert row.outcome == "failed"
    assert row.reason.startswith("load: AssertionError: ")
    assert (row.partition, row.slice, row.load, row.train) == ("0", "0", "wrong", "")


@pytest.mark.slow
def test_every_command_works_on_every_backbone():
    """Hours on two cores."""
    sizes = commands.names()
    names = sorted(sizes, key=lambda name: -sizes[name])
    rows = list(commands.run(names, jobs=os.cpu_count() or 1, limit=3600))
    print(commands.summary(rows))
    assert [f"{row.name}: {row.reason}" for row in rows if row.outcome not in ("passed", "too large")] == []
