import pytest
import torch
from test_compensation import HIDDEN, SPEC, Block
from torch import Tensor, nn

from dvn_cli import calibration, compensation
from dvn_cli.dividing import partition_backbone
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.metadata import Rule
from dvn_cli.tasks import default_tasks

KEPT = torch.arange(HIDDEN // 2)  # of unit 1, where units are consecutive channels


def affine(norm: bool, linear: bool, noise: float = 0.0, bias: bool = True) -> nn.Module:
    """A residual block whose second half of hidden channels are multiples of those of the first half, nearly."""
    module = Block(norm, linear).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in (module.a.weight, module.a.bias):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
            others = torch.randn(tensor[KEPT].shape, generator=generator)
            tensor[len(KEPT) :] = 3 * tensor[KEPT.flip(0)] + noise * others
        if not bias:
            module.b.bias = None
    return module


@pytest.fixture
def images() -> list[Tensor]:
    return list(torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(10))


def divided(module: nn.Module, images: list[Tensor], divide: str = "inner") -> DeepVirtualNetwork:
    partition = partition_backbone(SPEC, 2, Rule(divide=divide), module)
    network = DeepVirtualNetwork.from_backbone(partition, module, default_tasks(2, 4, (8, 8), (0.0,) * 3, (1.0,) * 3))
    own = [*compensation.statistics(partition), *compensation.biases(partition)]
    network.make_private(dict.fromkeys(own, "network"), keep_shared=True)
    for level in (1, 2):  # statistics of these images, so that nothing but the lack of channels makes a difference
        for name, tensor in compensation.estimated(network, 1, 2, images).items():
            network.file_tensors()[f"task/1/level/{level}/{name}"].copy_(tensor)
    return network.eval()


def output(network: DeepVirtualNetwork, images: list[Tensor], changed: dict[str, Tensor]) -> Tensor:
    level = network.virtual_network(1, 1)
    assert not level.load_state_dict(changed, strict=False).unexpected_keys
    with torch.no_grad():
        return level(images[0])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_what_is_lacking_and_affine_in_what_is_there_is_made_up_for_exactly(images, norm, linear, monkeypatch):
    network = divided(affine(norm, linear), images)
    with torch.no_grad():
        wanted = network(images[0], 1, 2)
    assert (output(network, images, {}) - wanted).abs().max() > 0.1
    changed = calibration.calibrated(network, 1, 1, images)
    assert (output(network, images, changed) - wanted).abs().max() < 0.01 * wanted.abs().max()
    monkeypatch.setattr(calibration, "RIDGE", 0)
    changed = calibration.calibrated(network, 1, 1, images)
    torch.testing.assert_close(output(network, images, changed), wanted, rtol=1e-4, atol=1e-4)
    statistics = {"norm.running_mean", "norm.running_var"} if norm else set()
    assert changed.keys() == {"b.weight", "b.bias"} | statistics
    assert changed["b.weight"].shape[1] == HIDDEN // 2


class Shared(nn.Module):
    """A convolution that is applied at two scales, and to what it made itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.a(self.a(x).relu()).mean((2, 3)) + self.a(x[..., ::2]).mean((2, 3)))


class Tokens(nn.Module):
    """Channels that are divided, of which one layer mixes places: rows that a narrow network has fewer of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mix, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(16, 12), nn.Linear(8, 4)
        self.back = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        return self.head((x + self.back(self.mix(x).relu())).mean(2))


class Dead(nn.Module):
    """Hidden channels that are zero for all images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        with torch.no_grad():
            self.a.bias.fill_(-100)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("kind", [Shared, Tokens, Dead])
def test_layers_without_an_estimate_stay_what_they_are(images, kind):
    """And what is fitted comes no further from the top level."""
    network = divided(kind(), images, "all")
    changed = calibration.calibrated(network, 1, 1, images)
    assert not changed.keys() & {"a.weight", "a.bias", "mix.weight", "back.weight"}
    with torch.no_grad():
        wanted = network(images[0], 1, 2)
    before, after = ((output(network, images, each) - wanted).norm() for each in ({}, changed))
    assert after <= before * 1.01


def test_what_is_lacking_is_estimated_as_well_as_can_be(images):
    """By least squares, in double precision, as anyone would write it down."""
    module = affine(False, True, noise=1.0)
    network = divided(module, images)
    changed = calibration.calibrated(network, 1, 1, images)
    with torch.no_grad():
        hidden = module.a(module.stem(torch.cat(images)).permute(0, 2, 3, 1)).relu().reshape(-1, HIDDEN).double()
        wanted = hidden @ module.b.weight.T.double() + module.b.bias
        given = torch.cat([hidden[:, KEPT], torch.ones(len(hidden), 1)], 1)
        best = torch.linalg.lstsq(given, wanted).solution
        own = torch.cat([changed["b.weight"].T, changed["b.bias"][None]]).double()
        losses = [(given @ solution - wanted).square().mean() for solution in (best, own)]
    assert losses[0] <= losses[1] < 1.01 * losses[0]


def test_without_a_bias_nothing_but_the_weights_changes(images):
    network = divided(affine(False, True, bias=False), images)
    changed = calibration.calibrated(network, 1, 1, images)
    assert changed.keys() == {"b.weight"}
    with torch.no_grad():
        wanted = network(images[0], 1, 2)
    assert (output(network, images, changed) - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_layers_are_fitted_to_what_the_fitted_ones_before_them_give(images):
    """All groups divided: what the first layer lacks is missing in all that follow, and there is a head to fit too."""
    network = divided(affine(False, False, noise=0.5), images, "all")
    with torch.no_grad():
        wanted = network(images[0], 1, 2)
    changed = calibration.calibrated(network, 1, 1, images)
    assert changed.keys() == {"a.weight", "a.bias", "b.weight", "b.bias", "head.weight", "head.bias"}
    before, after = ((output(network, images, each) - wanted).square().mean() for each in ({}, changed))
    assert after < 0.3 * before
