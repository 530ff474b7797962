"""A level's network fitted to its task's top level, layer after layer, on images without labels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dvn_cli.compensation import arguments, present, runs
from dvn_cli.data import unlabelled
from dvn_cli.data.words import Data
from dvn_cli.graph.consumers import Consumer, consumers
from dvn_cli.graph.statistics import is_running_norm
from dvn_cli.graph.stepwise import Stepwise
from dvn_cli.loading import from_file
from dvn_cli.network import DeepVirtualNetwork, to_data
from dvn_cli.store.file import Header, TensorData
from dvn_cli.store.metadata import Calibration, CheckpointMetadata

RIDGE = 1e-3
"""Times the mean variance of the channels that a layer is given: what keeps its weights near to what they were."""


SEED = 0
"""Of the choice of images."""


class Calibrator:
    """Fits networks of one checkpoint to their tasks' top levels."""

    def __init__(
        self, checkpoint: Header[CheckpointMetadata], data: Data | Sequence[Data], note: Callable[[str], None]
    ) -> None:
        """Opens a checkpoint.

        Args:
            data: images, as of `evaluate`; their labels are not read, and a folder may hold nothing but images.
            note: is told, in a line, what was taken for what.
        """
        opened = from_file(checkpoint)
        assert isinstance(opened, DeepVirtualNetwork)
        self.network, self.data, self.note = opened, data, note
        self._images: dict[int, list[Tensor]] = {}

    def __call__(self, task: int, level: int) -> tuple[dict[str, TensorData], Calibration] | None:
        """Fits the network of a task and level, both from 1.

        Returns:
            the tensors that are others than in the checkpoint, by the backbone's names, and how they were calculated;
            None for a top level, which lacks nothing.

        Raises:
            InputError: there are no such images.
        """
        entry = self.network.tasks[task - 1]
        if level == len(entry.levels):
            return None
        if task not in self._images:
            channels = self.network.partition.spec.in_chans
            self._images[task] = unlabelled(self.data, entry, channels, SEED, self.note)
        images = self._images[task]
        changed = to_data(calibrated(self.network, task, level, images))
        return changed, Calibration(sum(map(len, images)), RIDGE)


@torch.no_grad()
def calibrated(network: DeepVirtualNetwork, task: int, level: int, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Fits the layers that lack channels, one after the other, to what they give in the task's top level.

    What such a layer reads in the top level is estimated from what it is given here, by ridge regression with an
    intercept, and the estimate is folded into its weights and its bias. Running statistics are those of the network as
    it is then.

    Args:
        task: by number from 1.
        level: likewise.
        batches: normalised images, float (batch, channels, height, width), which are run side by side.

    Returns:
        The tensors of the level's network that are changed, by the backbone's names.
    """
    top = len(network.tasks[task - 1].levels)
    whole, part = (_Network(network, task, each, batches) for each in (top, level))
    theirs = {whole.names[consumer.weight]: consumer for consumer in whole.consumers()}
    ours = {consumer.node: consumer for consumer in part.consumers()}
    changed: dict[str, Tensor] = {}
    for node in part.nodes:
        if is_running_norm(node):
            part.run_to(node)
            changed |= {part.names[statistic]: value for statistic, value in part.estimate_statistics_of(node)}
        elif node in ours:
            name = part.names[ours[node].weight]
            if name in theirs and part.tensors[name].shape[1] < whole.tensors[name].shape[1]:
                part.run_to(node)
                whole.run_to(theirs[name].node)
                outputs, inputs = (present(network, task, level, name, dim) for dim in (0, 1))
                changed |= _fit(whole, theirs[name], part, ours[node], outputs, inputs)
    return changed


class _Network(Stepwise):
    """The network of a task and level."""

    def __init__(self, network: DeepVirtualNetwork, task: int, level: int, batches: Sequence[Tensor]) -> None:
        narrowed = network.narrowed(task, level, training=False)
        super().__init__(narrowed.module, runs(network, task, level, batches))
        self.names, self.tensors = arguments(narrowed), network.tensors(task, level)

    def consumers(self) -> list[Consumer]:
        """The layers that mix all channels of their input by a weight of the backbone, which no other layer uses."""
        layers = [each for each in consumers(self.nodes[0].graph) if each.is_plain and each.weight in self.names]
        return [each for each in layers if len(each.weight.users) == 1]


def _fit(
    whole: _Network, theirs: Consumer, part: _Network, ours: Consumer, outputs: Tensor, inputs: Tensor
) -> dict[str, Tensor]:
    """Changes the weight and bias of a layer, which is next in both networks, and returns them by their names.

    One that is applied to each channel, of which the part has fewer, stays what it is: it has no such rows to go by.

    Args:
        outputs: which of the whole network's output channels of the layer the part has.
        inputs: likewise.
    """
    has_intercept = ours.bias is not None or ours.is_normalised
    wanted_mean, given_mean = (
        has_intercept * net.mean(consumer.input, consumer.dim) for net, consumer in ((whole, theirs), (part, ours))
    )
    square = torch.zeros(len(given_mean), len(given_mean), dtype=torch.double)
    product = torch.zeros(len(given_mean), len(wanted_mean), dtype=torch.double)
    both = zip(whole.rows(theirs.input, theirs.dim), part.rows(ours.input, ours.dim), strict=True)
    for wanted, given in both:
        if len(wanted) != len(given):
            return {}
        given = given - given_mean.to(given.dtype)
        square += given.T @ given
        product += given.T @ (wanted - wanted_mean.to(given.dtype))
    same = torch.zeros(len(wanted_mean), len(given_mean), dtype=torch.double)  # channels that both have
    same[inputs, torch.arange(len(inputs))] = 1
    variance = square.diagonal().mean() or 1.0  # none where all that the layer reads is constant
    ridge = RIDGE * variance * torch.eye(len(square), dtype=torch.double)
    estimate = same + torch.linalg.solve(square + ridge, product - square @ same.T).T
    weight = whole.tensors[part.names[ours.weight]][outputs].double()
    folded = torch.tensordot(weight, estimate, dims=([1], [0])).movedim(-1, 1)
    changed = {part.names[ours.weight]: part.set(ours.weight, folded)}
    if ours.bias is not None and ours.bias in part.names:
        rest = wanted_mean - estimate @ given_mean
        bias = whole.tensors[part.names[ours.bias]][outputs] + weight.reshape(*weight.shape[:2], -1).sum(2) @ rest
        changed[part.names[ours.bias]] = part.set(ours.bias, bias)
    return changed
