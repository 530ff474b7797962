"""From a backbone to its units: the one place where a backbone is traced, labelled and divided."""

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from dvn_cli import compensation
from dvn_cli.backbones import BackboneSpec, is_installed, load_pretrained, load_weights, preprocessing, resolve
from dvn_cli.data import unlabelled
from dvn_cli.data.words import Data
from dvn_cli.errors import InputError
from dvn_cli.graph.empty_init import empty_init
from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.statistics import running_tensors
from dvn_cli.graph.stem import stem_tensors
from dvn_cli.graph.trace import Traced, trace
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.partition import Labelled, Partition
from dvn_cli.store import slicing
from dvn_cli.store.metadata import Owner, Preprocessing, Rule, TaskLevel
from dvn_cli.store.ownership import Assignment
from dvn_cli.tasks import default_tasks
from dvn_cli.undivided import Whole, whole
from dvn_cli.units import count, score, widths
from dvn_cli.units.assign import EVEN, CoupledGroup, assign, unit_of_labels

MOST_UNITS = 1024

ENOUGH = 0.9
"""Share of the parameters that is divided where nobody asks for more."""

MEAN, STD = 0.5, 0.25
"""Of pixels in 0..1, where a backbone has no normalisation of its own."""

Note = Callable[[str], None]
"""Is told what happens, in a line each."""


def silent(_: str) -> None:
    pass


def divide(
    backbone: str,
    units: int,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    divide: str = "all",
    assign: str = "even",
    widths: str = "even",
    round_to: int = 1,
    data: Data | Sequence[Data] | None = None,
    seed: int = 0,
    note: Note = silent,
    progress: Note = silent,
) -> DeepVirtualNetwork:
    """Divides a backbone into units: every task and level is then a network of its own in one set of weights.

    There is a task for each unit, with the backbone's classes, and a level for each number of units. What cannot be
    narrowed is refused here, not when it is used.

    Args:
        backbone: a model of timm or torchvision, `wrn_N_S`, `resnet_N`, a family, or `package.module:factory`.
        units: how many.
        num_classes: outputs of the classifier; by default the model's own.
        in_chans: channels of the images, likewise.
        input_size: of the images in pixels, one number for both or height and width; likewise.
        pretrained: whether to start from the published weights.
        weights: a state dict to start from instead, as safetensors or torch's.
        mean, std: of pixels in 0..1, that the weights want, one for all channels or one for each; likewise.
        interpolation, crop_pct, crop_mode: how images are resized for the weights, by timm's names; likewise.
        divide: `all` coupled groups of channels, or `inner` ones alone, so that all units share the residual stream.
        assign: `even`: units get runs of channels; `importance`: equally strong ones; `sorted`: unit 1 gets the best.
        widths: `even`: units have as many channels of each group; `macs`, `params`: best first, and more of the groups
            whose channels matter most to the logits for what they cost in the whole network; of its
            multiply-accumulates, or parameters, units take equal parts. Asks for `assign="sorted"`, weights and `data`.
        round_to: what units' widths are multiples of, where there are enough channels.
        data: images to tell by which channels of the weights matter, and to make up for those that levels lack, as of
            `evaluate`; their labels are not read, and a folder may hold nothing but images. By default the norm of a
            channel's weights tells, and nothing is made up for.
        seed: of random weights, and of the choice of images.
        note: is told what was done to make weights fit, and what was assumed.
        progress: is told what goes on.

    Returns:
        The networks, in train mode on the CPU; `save` writes them.

    Raises:
        InputError: the backbone is not known, cannot be divided, or the weights are not its own.
        DvnError: published weights cannot be downloaded.

    Example:
        >>> dvn = dvn_cli.divide("resnet18", units=4, num_classes=10)  # doctest: +SKIP
        >>> dvn.save("dvn.safetensors")  # doctest: +SKIP
    """
    if pretrained and weights is not None:
        raise InputError("pretrained or weights, not both: each says what the weights are")
    asked = {"mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    given = {key: value for key, value in asked.items() if value is not None}
    if given and not pretrained and weights is None:
        what = next(iter(given))
        raise InputError(f"{what} says how images are prepared for weights: give weights or pretrained with it")
    if data is not None and not pretrained and weights is None:
        raise InputError("data tells which channels of weights matter: give weights or pretrained with it")
    rule = Rule(assign, round_to, divide, widths)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    spec = resolve(backbone, num_classes, in_chans, size)
    prepared = _preprocessing(spec, given)
    weights = None if weights is None else Path(weights)
    progress(f"building {spec.name}")
    module, random = build(spec, seed=seed, weights=weights, pretrained=pretrained, note=note)
    normalisation = (MEAN,) * spec.in_chans, (STD,) * spec.in_chans
    if prepared is not None and prepared.mean is not None and prepared.std is not None:
        normalisation = prepared.mean, prepared.std
    else:
        note(f"{spec.name} has no mean and std: {MEAN} and {STD} of pixels in 0..1 are taken.")
    for_weights = prepared if pretrained or weights is not None else None
    resize = {} if for_weights is None else for_weights.resize
    tasks = default_tasks(units, spec.num_classes, spec.input_size, *normalisation, **resize)
    images: list[Tensor] = []
    if data is not None:
        progress("reading images")
        images = unlabelled(data, tasks[0], spec.in_chans, seed, note)
        note(f"{sum(map(len, images))} images tell which channels matter, and what levels lack")
    progress(f"dividing {spec.name}")
    partition = partition_backbone(spec, units, rule, module if rule.scores_channels else None, images)
    if images:
        partition = compensation.with_private_biases(partition)
    network = DeepVirtualNetwork.from_backbone(partition, module, tasks, copy=False, preprocessing=for_weights)
    network.random = tuple(random) if pretrained or weights is not None else None
    for number in range(1, units + 1):  # networks of as many units are alike
        progress(f"narrowing to {number} of {units} units")
        network.check([TaskLevel(1, number), TaskLevel(number, 1)])
    if images:
        progress("making up for what levels lack")
        own = {*compensation.statistics(partition), *compensation.biases(partition)}
        network.make_private(dict.fromkeys(own, "network"), keep_shared=True)
        compensation.compensate(network, dict.fromkeys(range(1, len(tasks) + 1), images))
    return network


def build(
    spec: BackboneSpec,
    *,
    seed: int,
    weights: Path | None = None,
    pretrained: bool = False,
    zero_init_last: bool = False,
    note: Note = silent,
) -> tuple[nn.Module, list[str]]:
    """Builds a backbone, with random weights or those that it is to start from.

    Args:
        seed: of random weights.
        weights: a state dict to load.
        pretrained: load the published weights instead.
        zero_init_last: whether residual branches are zero at first, where no weights are loaded.
        note: is told what was done to make weights fit.

    Returns:
        the module, and the names of its tensors that the weights lack: those of a classifier of other classes.

    Raises:
        InputError: as `load_weights`, or the blocks have no zero_init_last().
        DvnError: as `load_pretrained`.
    """
    torch.manual_seed(seed)
    module = spec.build()
    if zero_init_last and weights is None and not pretrained:
        blocks: list[Any] = [block for block in module.modules() if hasattr(block, "zero_init_last")]
        if not blocks:
            raise InputError(
                f"the blocks of {spec.name} have no zero_init_last(), as timm's ResNets do: set "
                "backbone.zero_init_last=false"
            )
        for block in blocks:
            block.zero_init_last()
    if weights is not None:
        return module, load_weights(module, spec, weights, note)
    return module, load_pretrained(module, spec, note) if pretrained else []


def _preprocessing(spec: BackboneSpec, given: Mapping[str, Any]) -> Preprocessing | None:
    """How images are prepared for a backbone's weights: its own way, but for what is given."""
    own = preprocessing(spec)
    if not given:
        return own
    numbers = {key: _per_channel(key, given[key], spec.in_chans) for key in ("mean", "std") if key in given}
    origin = f"{', '.join(given)} as given" + (f", the rest {own.origin}" if own else "")
    base = own or Preprocessing(origin, None, None, "bilinear", 1.0, "squash")
    result = replace(base, **{**given, **numbers, "origin": origin})
    if (result.mean is None) != (result.std is None):
        raise InputError(f"give both mean and std: {spec.name} has none for images of {spec.in_chans} channels")
    return result


def _per_channel(what: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise InputError(f"{what} has {len(values)} values for images of {channels} channels")
    return tuple(values) * (channels // len(values))


def partition_backbone(
    spec: BackboneSpec,
    units: int,
    rule: Rule = EVEN,
    module: nn.Module | None = None,
    images: Sequence[Tensor] = (),
) -> Partition:
    """Divides a backbone into units.

    Args:
        units: how many, at least 1.
        rule: how channels are assigned to units.
        module: the backbone, built from `spec`; it is not changed. By default one without weights is built here, and
            what comes of it is kept for the next one who asks for the same, unless it is of code that may change.
        images: batches, normalised and of the backbone's own size, to score channels by where the rule asks for that;
            by default the module's weights are.

    Raises:
        InputError: the backbone cannot be divided; the message names the operator and module, or the limit.
    """
    if module is not None:
        return _partition(spec, units, rule, module, images)
    return (_cached_partition if is_installed(spec) else _empty_partition)(spec, units, rule)


def _empty_partition(spec: BackboneSpec, units: int, rule: Rule) -> Partition:
    return _partition(spec, units, rule, empty_init(spec.build))


_cached_partition = functools.lru_cache(maxsize=8)(_empty_partition)


def _partition(
    spec: BackboneSpec, units: int, rule: Rule, module: nn.Module, images: Sequence[Tensor] = ()
) -> Partition:
    if not 1 <= units <= MOST_UNITS:
        raise InputError(f"a backbone has 1 to {MOST_UNITS:,} units, not {units}")
    graphs = {train: trace(module, (spec.in_chans, *spec.input_size), train) for train in (False, True)}
    division = divide_graphs(graphs, units, module.state_dict(keep_vars=True), rule, images=images)
    labeller, assignment, groups = division.labeller, division.assignment, division.groups
    if labeller.output is None or len(labeller.output) != spec.num_classes:
        raise InputError(f"{spec.name} has no classifier of {spec.num_classes} classes: it gives something else")
    if units > 1 and not any(group.sizes for group in groups):
        if any(group.is_whole_stream(rule) for group in groups):
            raise InputError(
                f"{spec.name} has no inner channels for {units} units: sums couple all that there are; divide all"
            )
        widest = max((group.channels for group in groups), default=0)
        raise InputError(
            f"{spec.name} cannot be divided into {units} units: at most {widest} channels can be told apart"
        )
    partition = Partition.of_module(module, spec, rule, assignment, _owners(graphs.values(), assignment))
    unit = unit_of_labels(labeller, assignment)
    graphs = {mode: graph.without_data() for mode, graph in graphs.items()}
    labeller.traced = graphs[True]
    labelled = {mode: Labelled(graph, labeller, division.labels, unit) for mode, graph in graphs.items()}
    return replace(partition, groups=groups, _graphs=labelled)


def _owners(graphs: Iterable[Traced], assignment: Assignment) -> dict[str, Owner]:
    """Says who has a copy of its own of each tensor; see the design's table.

    Private to the network are the tensors with a dimension of classes and those of norms with running statistics.
    """
    owners: dict[str, Owner] = dict.fromkeys(assignment.tensors, "shared")
    for traced in graphs:
        owners.update(dict.fromkeys(stem_tensors(traced), "task"))
    for traced in graphs:
        owners.update(dict.fromkeys(running_tensors(traced), "network"))
    owners.update(dict.fromkeys((name for name, _ in assignment.classes), "network"))
    return owners


@dataclass(frozen=True)
class Division:
    """Labelled graphs, and how the units divide what the labels tell apart."""

    labeller: Labeller
    labels: dict[fx.Node, Any]
    assignment: Assignment
    groups: list[CoupledGroup]


def divide_graphs(
    graphs: Mapping[bool, Traced],
    units: int,
    state: Mapping[str, Tensor],
    rule: Rule = EVEN,
    has_weights: bool = True,
    images: Sequence[Tensor] = (),
) -> Division:
    """Labels a backbone's graphs and divides it.

    Units get whole groups of grouped convolutions and norms where they can. Where too little is divided so (as when
    groups are summed), every group is divided alike if that divides more.

    Args:
        graphs: in train mode (True), in eval mode (False), or both.
        state: the backbone's `state_dict`, parameters among its tensors.
        has_weights: whether the weights are there, for a rule that scores channels.
        images: batches to score channels by, as of `partition_backbone`.

    Raises:
        InputError: an operator stands in the way; the message names it and its module.
    """
    best, most = None, -1.0
    for whole_groups in (True, False):
        labeller = Labeller(units, whole_groups)
        labels = {node: value for traced in graphs.values() for node, value in labeller.run(traced).items()}
        names = [name for name in state if name in labeller.sources]
        parameters = {name: state[name] for name in names if isinstance(state[name], nn.Parameter)}
        assignment, groups = assign(labeller, names, rule)
        share = share_divided(assignment, {name: tuple(p.shape) for name, p in parameters.items()})
        if share > most:
            best, most = Division(labeller, labels, assignment, groups), share
        if most >= ENOUGH or not labeller.had_choice:
            break
    assert best is not None
    if has_weights and rule.scores_channels:
        graph, worth = graphs[False], None
        classifier = [name for name, _ in best.assignment.classes]
        seen = score.Images(best.labels, graph, score.with_classifier(state, classifier), images) if images else None
        scores = [score.by_images(best.labeller, seen)] if seen else []
        scores.append(score.by_weights(best.labeller, parameters))
        if rule.widths != "even":
            if seen is None:
                raise InputError(
                    f"widths {rule.widths} is told by what trained weights make of images: give both weights and data, "
                    "or widths even"
                )
            cost = (
                widths.macs(best.labeller, best.labels, graph)
                if rule.widths == "macs"
                else widths.params(best.labeller, parameters)
            )
            worth = widths.Worth(score.by_logits(best.labeller, seen), cost)
        assignment, groups = assign(best.labeller, names, rule, scores, worth)
        best = replace(best, assignment=assignment, groups=groups)
    return best


def share_divided(assignment: Assignment, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """The share of some tensors' elements that belong to a unit or a pair of units."""
    owned = assignment.owned_counts(range(1, assignment.units + 1))
    shared = sum(assignment.shared_elements(name, shape, owned) for name, shape in shapes.items())
    return 1 - shared / sum(map(math.prod, shapes.values()))


# What came of it, in terms that a person can check


@dataclass(frozen=True)
class Level:
    """What a level of task 1 of a fresh partition holds.

    Attributes:
        level: from 1.
        units: how many it has.
        params: elements of its parameters.
        density: their share of those of the top level.
        macs: multiply-accumulates of one image.
        bytes: of its tensors in a file.
        divided: the share of its parameters that units own.
    """

    level: int
    units: int
    params: int
    density: float
    macs: int
    bytes: int
    divided: float


@dataclass(frozen=True)
class Summary:
    """What a division comes to.

    Attributes:
        partition: the division.
        levels: of task 1.
        lowest: parameters of level 1 of each task.
        whole: what units do not divide, and why, the most parameters first.
    """

    partition: Partition
    levels: list[Level]
    lowest: list[int]
    whole: list[Whole]

    @property
    def warning(self) -> str | None:
        """Why so few parameters are divided, where they are few and all were to be."""
        if self.levels[-1].divided >= ENOUGH or self.partition.rule.divide != "all":
            return None
        most = self.whole[0]
        remedy = ". Fewer units divide more." if "than the" in most.why else "."
        return (
            f"less than {100 * ENOUGH:.0f} % of the parameters are divided; of the others most are those of "
            f"{and_more(most.places)}: {most.why}{remedy}"
        )

    @property
    def private(self) -> dict[str, list[str]]:
        """Tensors of which each task, or each network, gets one of its own when training starts."""
        return {who: [name for name, o in self.partition.owners.items() if o == who] for who in ("task", "network")}

    @property
    def too_few(self) -> dict[int, list[str]]:
        """By their size the groups with fewer channels than there are units, each named by its first tensor."""
        found: dict[int, dict[str, None]] = {}
        for group in self.partition.groups:
            if not group.sizes and group not in self.stream:
                found.setdefault(group.channels, {})[group.places[0][0]] = None
        return {channels: list(found[channels]) for channels in sorted(found)}

    @property
    def stream(self) -> list[CoupledGroup]:
        """The groups that stay whole because sums couple them, where only inner ones are divided."""
        return [group for group in self.partition.groups if group.is_whole_stream(self.partition.rule)]

    @property
    def no_channels(self) -> dict[str, list[int]]:
        """Of each divided tensor the sizes along which nothing could be divided: image channels, kernels, positions."""
        partition = self.partition
        few = {place for group in partition.groups for place in group.places}
        sizes = {
            name: [
                size
                for dim, (size, axis) in enumerate(zip(partition.shapes[name], axes, strict=True))
                if axis is None and size > 1 and (name, dim) not in {*few, *partition.assignment.classes}
            ]
            for name, axes in partition.assignment.tensors.items()
            if any(axis is not None for axis in axes)
        }
        return {name: found for name, found in sizes.items() if found}

    def to_dict(self) -> dict[str, Any]:
        """As `dvn partition --json` has it."""
        return {
            "levels": [asdict(level) for level in self.levels],
            "coupled": [
                {"channels": group.channels, "units": list(group.sizes), "places": [list(p) for p in group.places]}
                for group in self.partition.groups
            ],
            "whole": [one.to_dict() for one in self.whole],
            "warning": self.warning,
            "private": self.private,
        }


def summarise(network: DeepVirtualNetwork, progress: Note = silent) -> Summary:
    """Counts what a division of `divide` comes to.

    Args:
        progress: is told what goes on.
    """
    partition, header, task = network.partition, network.header("the partition"), network.tasks[0]
    levels = []
    for level, units in enumerate(task.levels, 1):
        progress(f"counting level {level} of {partition.units}")
        params, density = count.params_and_density(header, 1, level)
        macs = network.macs(1, level)
        nbytes = slicing.count(header, 1, level).bytes
        levels.append(Level(level, units, params, density, macs, nbytes, count.divided_share(header, 1, level)))
    lowest = [slicing.count(header, number, 1).params for number in range(1, len(network.tasks) + 1)]
    return Summary(partition, levels, lowest, whole(partition))


def and_more(names: Sequence[str], shown: int = 1) -> str:
    """Lists the first of some names, and says how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
