"""A new operator is one entry: its label rule and its rewrite, here of an operator of this file's own."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dvn_cli.check import Comparison
from dvn_cli.errors import InputError
from dvn_cli.graph import registry
from dvn_cli.graph.labels import Call, Labeller, Labels, from_vectors
from dvn_cli.graph.narrow import Narrower, as_it_is
from dvn_cli.graph.registry import enter


@torch.library.custom_op("dvn_test::peaks", mutates_args=())
def peaks(x: Tensor, channels: int) -> Tensor:
    """The greatest value of each channel, given how many channels there are."""
    return x.reshape(x.shape[0], channels, -1).amax(-1)


@peaks.register_fake
def _(x: Tensor, channels: int) -> Tensor:
    return x.new_empty(x.shape[0], channels)


def label(labeller: Labeller, call: Call) -> Labels:
    vectors = labeller.separate(call.labels("x"), prefer=[1])
    return from_vectors(call.shape, {dim: vector for dim, vector in vectors.items() if dim < 2})


def rewrite(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    return narrower.copy(node, {**args, "channels": narrower.size(narrower.labels[args["x"]], 1)})


class Peaked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.after, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.after(x * peaks(x.sigmoid(), 8)[..., None, None]).mean((2, 3)))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))


def errors() -> list[float]:
    """Of the networks of each of two units, and of both, against the module with the others' channels zeroed."""
    comparison = Comparison(Peaked(), (3, 6, 6), modes=(False,))
    comparison.divide(2)
    assert comparison.assignment.tensors["stem.weight"][0] is not None
    return [comparison.error(units, False) for units in ((1,), (2,), (1, 2))]


def test_without_an_entry_it_is_refused() -> None:
    with pytest.raises(InputError, match=r"^operator dvn_test.peaks.default \(Peaked\) is not supported$"):
        errors()


def test_with_an_entry_it_is_divided() -> None:
    enter("peaks", label=label, rewrite=rewrite)
    assert max(errors()) < 1e-8


def test_its_arguments_do_not_follow_by_themselves() -> None:
    enter("peaks", label=label, rewrite=as_it_is)
    with pytest.raises(RuntimeError, match=r"size of tensor a \(4\) must match"):
        errors()


def test_no_entry_is_without_a_rewrite() -> None:
    with pytest.raises(TypeError, match="rewrite"):
        enter("peaks", label=label)  # type: ignore[call-arg]


def test_no_operator_is_entered_twice() -> None:
    with pytest.raises(AssertionError, match="layer_norm has an entry"):
        enter("peaks", "layer_norm", label=label, rewrite=rewrite)
