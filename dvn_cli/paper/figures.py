"""The paper's own figures: its scenarios, accuracies and times, as `figures.yaml` has them."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter

from dvn_cli.errors import InputError, did_you_mean


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figures(_Strict):
    """A row of a table of the paper: accuracies in per cent, and the parameters that are stored."""

    method: str
    units: int | tuple[int, ...]
    accuracy: tuple[float, ...]
    average: float | None = None
    stored: int | None = None


class Network(_Strict):
    """What the paper says of the cost of a network: milliseconds an image, density in per cent."""

    units: int
    params: int
    ms: float
    density: float | None = None
    speedup: float | None = None


class Times(_Strict):
    """The networks of which the paper gives times, those of one task."""

    source: str
    device: str | None = None
    task: int
    networks: tuple[Network, ...]


class Scenario(_Strict):
    """One of the paper's scenarios; `figures.yaml` says what its keys mean."""

    title: str
    source: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    average: bool = False
    rows: tuple[Figures, ...] = ()
    times: Times | None = None
    figure: Literal["epochs", "parameters"]


@functools.cache
def scenarios() -> Mapping[str, Scenario]:
    """The paper's scenarios by name."""
    text = Path(__file__).with_name("figures.yaml").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, Scenario]).validate_python(yaml.safe_load(text))


def find(name: str) -> Scenario:
    """The scenario of a name.

    Raises:
        InputError: there is none.
    """
    known = scenarios()
    if name not in known:
        raise InputError(f"no scenario '{name}'{did_you_mean(name, known) or '; the paper has ' + ', '.join(known)}")
    return known[name]
