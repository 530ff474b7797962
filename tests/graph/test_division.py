import pytest
from torch import nn

from dvn_cli.backbones import BackboneSpec
from dvn_cli.errors import InputError
from dvn_cli.partition import Partition

SPEC = BackboneSpec("timm", "small", 4, 3, (8, 8))


FEATURES = [nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Flatten(), nn.Linear(512, 5))]


@pytest.mark.parametrize("last", FEATURES)
def test_what_gives_no_logits_is_refused(last):
    module = nn.Sequential(nn.Conv2d(3, 8, 1), last)
    with pytest.raises(InputError, match=r"^small has no classifier of 4 classes: it gives something else$"):
        Partition.create(SPEC, 2, module)


@pytest.mark.parametrize("units", [2, 4])
def test_groups_are_divided_so_that_more_is(units):
    """Four groups that are added to one another: as wholes they would be one class of channels."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.groups, self.head = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, groups=4), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(sum(self.groups(self.stem(x)).chunk(4, 1)).mean((2, 3)))

    partition = Partition.create(SPEC, units, Summed())
    assert partition.assignment.axes[partition.assignment.tensors["stem.weight"][0]] == [
        [[8 * group + 8 // units * unit, 8 * group + 8 // units * (unit + 1)] for group in range(4)]
        for unit in range(units)
    ]
