import pytest
import torch
from torch import Tensor, nn

from dvn_cli.errors import InputError
from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.trace import trace


class Classifier(nn.Module):
    """With an auxiliary head that the result does not depend on, a module that is used twice, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.block = nn.Conv2d(4, 4, 1)
        self.same = self.block
        self.aux, self.head = nn.Linear(4, 2), nn.Linear(4, 2)
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        aux = self.aux(x.mean((2, 3)))
        x = self.same(self.block(x).relu()).mean((2, 3)) * self.table
        return self.head(x), aux


@pytest.mark.parametrize("train", [False, True])
def test_what_is_read_and_what_is_left_out(train):
    module = Classifier().eval()
    module.block.train()
    traced = trace(module, (3, 8, 8), train)
    assert [m.training for m in (module, module.stem, module.block)] == [False, False, True]
    statistics = {"stem.1.running_mean", "stem.1.running_var", *(["stem.1.num_batches_tracked"] if train else [])}
    weights = {f"{m}.{p}" for m in ("stem.0", "stem.1", "block", "head") for p in ("weight", "bias")}
    assert {name for key, name in traced.names.items() if isinstance(traced.sources[key], nn.Parameter)} == weights
    assert sorted(traced.names.values()) == sorted(weights | statistics)  # a shared module's are there once
    placeholders = {str(node.target) for node in traced.graph.find_nodes(op="placeholder")}
    assert placeholders == {traced.input, *traced.sources}
    assert len(traced.sources) == len(traced.names) + 1  # the table is in no state_dict


def test_no_weights_are_needed():
    with torch.device("meta"):
        module = Classifier()
    labeller = Labeller(2)
    labeller.run(trace(module, (3, 8, 8), True))
    assert labeller.output is not None
    assert len(labeller.output) == 2


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3))) if x.sum() > 0 else self.head(x.amax((2, 3)))


def test_what_cannot_be_exported_is_said_in_a_line():
    with pytest.raises(InputError, match=r"Branches cannot be exported at \(3, 8, 8\)") as caught:
        trace(Branches(), (3, 8, 8), False)
    assert "\n" not in str(caught.value)


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.head(x.mean((2, 3)))


def test_a_region_in_another_precision_is_refused():
    with pytest.raises(InputError, match=r"operator wrap_with_autocast .* is not supported"):
        Labeller(2).run(trace(Autocast(), (3, 8, 8), False))
