import pytest
from torch import nn

from dvn_cli.backbones import BackboneSpec
from dvn_cli.dividing import partition_backbone
from dvn_cli.errors import InputError
from dvn_cli.undivided import whole

SPEC = BackboneSpec("timm", "small", 4, 3, (8, 8))


FEATURES = [nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Flatten(), nn.Linear(512, 5))]


@pytest.mark.parametrize("last", FEATURES)
def test_what_gives_no_logits_is_refused(last):
    module = nn.Sequential(nn.Conv2d(3, 8, 1), last)
    with pytest.raises(InputError, match=r"^small has no classifier of 4 classes: it gives something else$"):
        partition_backbone(SPEC, 2, module=module)


@pytest.mark.parametrize("units", [2, 4])
def test_groups_are_divided_so_that_more_is(units):
    """Four groups that are added to one another: as wholes they would be one class of channels."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.groups, self.head = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, groups=4), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(sum(self.groups(self.stem(x)).chunk(4, 1)).mean((2, 3)))

    partition = partition_backbone(SPEC, units, module=Summed())
    assert partition.assignment.axes[partition.assignment.tensors["stem.weight"][0]] == tuple(
        tuple((8 * group + 8 // units * unit, 8 * group + 8 // units * (unit + 1)) for group in range(4))
        for unit in range(units)
    )


class Repeated(nn.Module):
    """Two channels, repeated; those of a depthwise convolution go with them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.head = nn.Conv2d(3, 2, 1), nn.Conv2d(12, 12, 3, groups=12), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.depthwise(self.stem(x).repeat_interleave(6, 1)).mean((2, 3)))


class WithImage(nn.Module):
    """Channels to which the image is added, which all units have; others are coupled with them later on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12)
        self.wide, self.back, self.head = nn.Conv2d(12, 16, 1), nn.Conv2d(16, 12, 1), nn.Linear(12, 4)

    def forward(self, x):
        y = self.norm(self.stem(x) + x.repeat(1, 4, 1, 1))
        return self.head((y + self.back(self.wide(y).relu())).mean((2, 3)))


def test_the_reason_for_what_is_whole_is_the_true_one():
    reasons = {name: one.why for one in whole(partition_backbone(SPEC, 2, module=WithImage())) for name in one.places}
    because = "channels that all units need for operator aten.add.Tensor (WithImage)"
    assert reasons == {
        **dict.fromkeys(("stem.weight", "stem.bias", "back.bias"), because),
        **dict.fromkeys(("norm.weight", "norm.bias"), "no channels that units divide"),
        **dict.fromkeys(("head.weight", "head.bias"), "one number for each class"),
    }

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = Repeated(), WithImage()

        def forward(self, x):
            return self.narrow(x) + self.wide(x)

    reasons = {name: one.why for one in whole(partition_backbone(SPEC, 4, module=Both())) for name in one.places}
    assert reasons["narrow.stem.weight"] == "channels that only go together, in fewer groups than the 4 units"
    assert reasons["wide.stem.weight"] == because.replace("Tensor", "Tensor in wide")
    assert "wide.wide.weight" not in reasons
