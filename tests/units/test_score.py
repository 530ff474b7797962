"""How much channels matter: what the layers that read them would lose in variance."""

import numpy as np
import torch
from torch import nn

from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.trace import trace
from dvn_cli.units.score import by_images


class Small(nn.Module):
    """Two layers with three channels between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.classifier = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 1), nn.Linear(2, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.second(self.first(images)).mean((2, 3)))


def test_variance_times_the_weights_that_read_it() -> None:
    module = Small().eval()
    with torch.no_grad():
        module.first.weight.copy_(torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1))
        module.second.weight.copy_(torch.tensor([[3.0, 1.0, 0.5], [4.0, 1.0, 0.0]]).view(2, 3, 1, 1))
    traced = trace(module, (1, 4, 4), train=False)
    labeller = Labeller(2)
    labels = labeller.run(traced)
    images = [torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    score = by_images(labeller, labels, traced, module.state_dict(), images)
    roots = labeller.coupled.roots()[labeller.sources["first.weight"][0].numpy()]
    expected = torch.cat(images).var(correction=0).item() * np.array([1 * 25, 4 * 2, 9 * 0.25])
    np.testing.assert_allclose(score[roots], expected, rtol=1e-4)
