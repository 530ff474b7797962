"""Narrow networks against masked ones: the proof that a backbone is divided rightly, on whatever machine it runs."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dvn_cli.dividing import divide_graphs
from dvn_cli.graph.empty_init import empty_init
from dvn_cli.graph.narrow import Narrowed, narrow, on_device
from dvn_cli.graph.trace import Traced, trace
from dvn_cli.partition import Partition
from dvn_cli.reference import KeptStatistics, first_tensor, masked, masks_by_axes, randomised
from dvn_cli.units.assign import EVEN, Assignment, Rule, label_mask, unit_of_labels
from dvn_cli.units.order import paper_order

GAINS = (1.0, 0.85, 0.7)
"""Of the random weights: the next one where rounding errors grow too large with the last."""

OTHERS = 4
"""Draws of weights that tell what a network lacks from what happens to be zero in it."""

TOLERANCE = 1e-5
"""Of the relative difference; some models compute in single precision whatever they are given."""


@dataclass(frozen=True)
class Check:
    """What came of comparing a partition's networks with masked ones.

    Attributes:
        networks: how many were compared, each in eval and in train mode.
        difference: the largest relative difference.
        differing: units, mode (`eval` or `train`) and difference of those beyond the tolerance.
        seconds: that it took.
    """

    networks: int
    difference: float
    differing: tuple[tuple[tuple[int, ...], str, float], ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; an infinite difference is None."""
        return {
            "networks": self.networks,
            "difference": _finite(self.difference),
            "tolerance": TOLERANCE,
            "differing": [
                {"units": list(units), "mode": mode, "difference": _finite(difference)}
                for units, mode, difference in self.differing
            ],
            "seconds": self.seconds,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def check(partition: Partition, progress: Callable[[str], None] = lambda what: None) -> Check:
    """Compares the lowest and the top level of every task with the backbone in which all else is zero.

    In double precision, with random weights and statistics, in eval and train mode; of a task's orders those of the
    paper count.

    Args:
        progress: is told what goes on.
    """
    spec, start = partition.spec, time.perf_counter()
    all_units = tuple(range(1, partition.units + 1))
    sets = list(dict.fromkeys([*((unit,) for unit in all_units), all_units]))
    for gain in GAINS:
        progress("tracing the backbone once more")
        comparison = Comparison(empty_init(spec.build), (spec.in_chans, *spec.input_size), gain=gain)
        comparison.divide(partition.units, partition.rule, partition.assignment)
        worst, differing, unstable = 0.0, [], False
        for units in sets:
            for train in (False, True):
                progress(f"checking {_named(units)} in {_mode(train)} mode")
                difference = comparison.error(units, train)
                worst = max(worst, difference)
                if not difference < TOLERANCE:
                    differing.append((units, _mode(train), difference))
                    unstable = unstable or comparison.is_unstable(units, train)
        if not unstable:
            break
    return Check(len(sets), worst, tuple(differing), round(time.perf_counter() - start, 2))


def _mode(train: bool) -> str:
    return "train" if train else "eval"


def _named(units: Sequence[int]) -> str:
    return f"unit {units[0]}" if len(units) == 1 else f"units {units[0]} to {units[-1]}"


def networks(units: int) -> list[tuple[int, ...]]:
    """Every set of units that a task uses by the paper's orders, smallest first."""
    orders = [paper_order(task, units) for task in range(1, units + 1)]
    return sorted(
        {tuple(sorted(order[:n])) for order in orders for n in range(1, units + 1)}, key=lambda s: (len(s), s)
    )


class Comparison:
    """Narrowed against masked networks of one module.

    Args:
        module: any; it is copied and randomised.
        input_shape: channels, height, width.
        modes: for which graphs (train or not).
        device: where they are compared.
        gain: see `randomised`; below 1 a deep network amplifies rounding errors less.
    """

    def __init__(
        self,
        module: nn.Module,
        input_shape: tuple[int, int, int],
        modes: Sequence[bool] = (False, True),
        batch: int = 3,
        device: str = "cpu",
        gain: float = 1.0,
    ) -> None:
        self.module = randomised(module, gain)
        generator = torch.Generator().manual_seed(1)
        self.traced: dict[bool, Traced] = {mode: trace(self.module, input_shape, mode) for mode in modes}
        self.module.to(device)  # the traces mask its buffers, and need no parameter's values
        self.x = torch.randn(batch, *input_shape, generator=generator, dtype=torch.double).to(device)
        self.whole: dict[bool, KeptStatistics] = {}

    def divide(self, units: int, rule: Rule = EVEN, assignment: Assignment | None = None) -> Assignment:
        """Divides the module among so many units, or as an assignment says that was made by the rule."""
        state = self.module.state_dict(keep_vars=True)
        division = divide_graphs(self.traced, units, state, rule, assignment is None)
        self.labeller, self.labels = division.labeller, division.labels
        self.assignment, self.groups = assignment or division.assignment, division.groups
        self.unit = unit_of_labels(self.labeller, self.assignment)
        return self.assignment

    def reference(self, module: nn.Module, train: bool, others: Sequence[nn.Module] = ()) -> tuple[Tensor, nn.Module]:
        """Output of a masked module, whose running statistics are afterwards what the run made of them.

        Args:
            others: the same with other weights, which tell what it lacks from what happens to be zero.
        """
        if train not in self.whole:
            mode = KeptStatistics()
            with torch.no_grad(), mode:
                copy.deepcopy(self.module).train(train)(self.x)
            self.whole[train] = mode
        modes = [KeptStatistics() for _ in others]
        for mode, other in zip(modes, others, strict=True):
            with torch.no_grad(), mode:
                other.train(train)(self.x)
        with torch.no_grad(), KeptStatistics(self.whole[train], modes):
            return first_tensor(module.train(train)(self.x)), module

    def tensors(self, names: Sequence[str], units: Sequence[int]) -> list[Tensor]:
        state, result = self.module.state_dict(), []
        for name in names:
            tensor = state[name]
            for dim, mask in enumerate(masks_by_axes(self.assignment, name, tensor.shape, units)):
                if not mask.all():
                    tensor = tensor.index_select(dim, mask.nonzero().reshape(-1).to(tensor.device))
            result.append(tensor.clone() if tensor is state[name] else tensor)
        return result

    def network(self, units: Sequence[int], train: bool) -> Narrowed:
        mask = label_mask(self.labeller, self.unit, units, 10**9)
        start = time.perf_counter()
        net = narrow(self.traced[train], self.labels, self.labeller, mask, {})
        self.seconds = time.perf_counter() - start
        return Narrowed(on_device(net.module, self.x.device), net.names) if self.x.device.type != "cpu" else net

    def narrowed(self, units: Sequence[int], train: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Output of the narrow network, and its tensors afterwards."""
        net = self.network(units, train)
        tensors = self.tensors(net.names, units)
        with torch.no_grad():
            return net.module(self.x, *tensors), dict(zip(net.names, tensors, strict=True))

    def without_gradient(self, units: Sequence[int]) -> list[str]:
        """The parameters without a finite gradient in the train graph that have one in the module itself."""
        net = self.network(units, True)
        named = dict(zip(net.names, self.tensors(net.names, units), strict=True))
        parameters = [name for name, _ in self.module.named_parameters() if name in named]
        trainable = {name: named[name].requires_grad_() for name in parameters}
        net.module(self.x, *named.values()).square().sum().backward()
        idle = [name for name, t in trainable.items() if t.grad is None or not bool(t.grad.isfinite().all())]
        if idle:
            module = copy.deepcopy(self.module).train()
            first_tensor(module(self.x)).square().sum().backward()
            own = {name for name, p in module.named_parameters() if p.grad is not None}
            idle = [name for name in idle if name in own]
        return idle

    def is_unstable(self, units: Sequence[int], train: bool) -> bool:
        """Whether the reference changes by more than 1e-9 where its input does in the last digits: no error says much.

        As in the 50 blocks of SENet-154, whose gates see values so large that they are steps.
        """
        module = masked(self.module, self.assignment, units)
        before, _ = self.reference(copy.deepcopy(module), train)
        self.x *= 1 + 1e-14
        after, _ = self.reference(module, train)
        self.x /= 1 + 1e-14
        return bool((after - before).abs().max() > 1e-9 * before.abs().max())

    def error(self, units: Sequence[int], train: bool) -> float:
        """The worst relative difference, of outputs and running statistics; infinite where the reference is not finite.

        Relative to the greatest value of the output.
        """
        error = self._error(units, train)
        if error < TOLERANCE:
            return error
        # In a network of few channels a position may be zero in all of them, and look like one that it lacks.
        drawn = (randomised(self.module, seed=seed) for seed in range(1, OTHERS + 1))
        return self._error(units, train, [masked(module, self.assignment, units) for module in drawn])

    def _error(self, units: Sequence[int], train: bool, others: Sequence[nn.Module] = ()) -> float:
        expected, module = self.reference(masked(self.module, self.assignment, units), train, others)
        result, after = self.narrowed(units, train)
        pairs = [(result, expected)]
        state = module.state_dict()
        for name, tensor in after.items():
            if name.endswith(("running_mean", "running_var")):
                mask = masks_by_axes(self.assignment, name, state[name].shape, units)[0]
                wanted = state[name][mask.to(tensor.device)]
                pairs.append((tensor, wanted))
        worst = 0.0
        for a, b in pairs:
            if a.shape != b.shape or not bool(b.isfinite().all()):
                return math.inf
            difference = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
            worst = max(worst, math.inf if math.isnan(difference) else difference)
        return worst
