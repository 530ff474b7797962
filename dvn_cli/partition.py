"""A backbone divided into units: given a set of them, the network of that set."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dvn_cli.backbones import BackboneSpec, head
from dvn_cli.errors import InputError
from dvn_cli.graph.compare import same_graph
from dvn_cli.graph.empty_init import empty_init
from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.narrow import Narrowed, narrow
from dvn_cli.graph.shape_check import shape_check
from dvn_cli.graph.statistics import running_tensors
from dvn_cli.graph.stem import Stem, dims, stem_tensors
from dvn_cli.graph.trace import EXAMPLE_BATCH, Traced, trace
from dvn_cli.store.metadata import DividedBackbone, Owner, Rule, TensorEntry
from dvn_cli.store.ownership import Assignment
from dvn_cli.store.schema import dumps, loads, parse
from dvn_cli.units.assign import EVEN, Bucket, assign, kept_labels, unit_of_labels

ENOUGH = 0.9
"""Share of the parameters that is divided where nobody asks for more."""


@dataclass(frozen=True)
class Networks:
    """The network of a set of units, in both of its forms.

    Attributes:
        origin: which network of which partition it is.
    """

    train: Narrowed
    eval: Narrowed
    origin: "Origin"


@dataclass(frozen=True)
class Origin:
    """What it takes to make a network's graphs again, as for images of another size; plain data.

    Attributes:
        partition: JSON of what `Partition.restore` needs.
        units: numbers of the network's units, from 1.
        classes: outputs of its classifier.
        input_size: height and width of its images.
    """

    partition: str
    units: tuple[int, ...]
    classes: int
    input_size: tuple[int, int]


@dataclass(frozen=True)
class Division:
    """Labelled graphs, and how the units divide what the labels tell apart."""

    labeller: Labeller
    labels: dict[fx.Node, Any]
    assignment: Assignment
    buckets: list[Bucket]


def divide(
    graphs: Iterable[Traced],
    units: int,
    state: Mapping[str, Tensor],
    rule: Rule = EVEN,
    by_weights: bool = True,
) -> Division:
    """Labels a backbone's graphs and divides it.

    Units get whole groups of grouped convolutions and norms where they can. Where too little is divided so (as when
    groups are summed), every group is divided alike if that divides more.

    Args:
        state: the backbone's `state_dict`, parameters among its tensors.
        by_weights: whether the weights are there, to be asked where the rule asks for them.

    Raises:
        InputError: an operator stands in the way; the message names it and its module.
    """
    graphs, best, most = list(graphs), None, -1.0
    for whole_groups in (True, False):
        labeller = Labeller(units, whole_groups)
        labels = {node: value for traced in graphs for node, value in labeller.run(traced).items()}
        names = [name for name in state if name in labeller.sources]
        parameters = {name: state[name] for name in names if isinstance(state[name], nn.Parameter)}
        weights = parameters if by_weights and rule.assign == "importance" else None
        assignment, buckets = assign(labeller, names, rule, weights)
        share = share_divided(assignment, {name: tuple(p.shape) for name, p in parameters.items()})
        if share > most:
            best, most = Division(labeller, labels, assignment, buckets), share
        if most >= ENOUGH or not labeller.had_choice:
            break
    assert best is not None
    return best


def share_divided(assignment: Assignment, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """The share of some tensors' elements that belong to a unit or a pair of units."""
    owned = assignment.owned_counts(range(1, assignment.units + 1))
    whole = sum(assignment.shared_elements(name, shape, owned) for name, shape in shapes.items())
    return 1 - whole / sum(map(math.prod, shapes.values()))


@dataclass
class Partition:
    """A backbone's graphs, labelled, and which unit owns what of them.

    Attributes:
        spec: how to build the backbone.
        units: how many units there are.
        rule: how channels were dealt to them.
        assignment: which unit owns which indices of which tensor.
        buckets: the classes of coupled channels that were divided together (or stayed shared).
        owners: for each tensor who has one of its own: nobody (`shared`), each `task`, or each `network`, that is task
            and level.
        shapes: of the backbone's tensors.
        dtypes: of the backbone's tensors.
        parameters: names of the tensors that are trained; the rest are buffers.
        aliases: other names in the backbone's `state_dict` of tensors that it holds under several, and the first.
    """

    spec: BackboneSpec
    units: int
    rule: Rule
    assignment: Assignment
    buckets: list[Bucket]
    owners: dict[str, Owner]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    parameters: set[str]
    aliases: dict[str, str]
    _graphs: dict[bool, Traced] = field(repr=False)
    _labels: dict[fx.Node, Any] = field(repr=False)
    _labeller: Labeller = field(repr=False)
    _unit: Tensor = field(repr=False)
    _cache: dict[Any, Networks] = field(default_factory=dict, repr=False)
    _resized: dict[tuple[int, int], "Partition"] = field(default_factory=dict, repr=False)
    _right: dict[Any, bool] = field(default_factory=dict, repr=False)

    @classmethod
    def create(
        cls,
        spec: BackboneSpec,
        units: int,
        module: nn.Module | None = None,
        assignment: Assignment | None = None,
        rule: Rule = EVEN,
    ) -> "Partition":
        """Divides a backbone into units.

        Args:
            units: how many, at least 1.
            module: the backbone, built from `spec`; by default one without weights is built here. It is not changed.
            assignment: which unit owns what, where that is known already.
            rule: how channels are dealt to units; importance is that of the module's weights.

        Raises:
            InputError: the backbone cannot be divided; the message names the operator and module, or the limit.
        """
        if units < 1:
            raise InputError(f"a backbone has at least 1 unit, not {units}")
        module = empty_init(spec.build) if module is None else module
        input_shape = (spec.in_chans, *spec.input_size)
        graphs = {train: trace(module, input_shape, train) for train in (False, True)}
        state = module.state_dict(keep_vars=True)
        division = divide(graphs.values(), units, state, rule, by_weights=assignment is None)
        labeller, names, buckets = division.labeller, list(division.assignment.tensors), division.buckets
        if labeller.output is None or len(labeller.output) != spec.num_classes:
            raise InputError(f"{spec.name} has no classifier of {spec.num_classes} classes: it gives something else")
        if units > 1 and not any(bucket.sizes for bucket in buckets):
            widest = max((bucket.channels for bucket in buckets), default=0)
            raise InputError(
                f"{spec.name} cannot be divided into {units} units: at most {widest} channels can be told apart"
            )
        first = {id(state[name]): name for name in names}
        assignment = assignment or division.assignment
        if set(assignment.classes) != set(division.assignment.classes):
            raise InputError(f"the classes of {spec.name} are in other tensors: {spec.source} may have changed since")
        graphs = {train: traced.without_data() for train, traced in graphs.items()}
        labeller.traced = graphs[True]
        return cls(
            spec=spec,
            units=units,
            rule=rule,
            assignment=assignment,
            buckets=buckets,
            owners=_owners(graphs.values(), names, assignment),
            shapes={name: tuple(state[name].shape) for name in names},
            dtypes={name: state[name].dtype for name in names},
            parameters={name for name in names if isinstance(state[name], nn.Parameter)},
            aliases={name: first[id(t)] for name, t in state.items() if first.get(id(t), name) != name},
            _graphs=graphs,
            _labels=division.labels,
            _labeller=labeller,
            _unit=unit_of_labels(labeller, assignment),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Partition":
        return self  # holds no weights, and what it hands out is not changed

    @classmethod
    def restore(cls, metadata: DividedBackbone) -> "Partition":
        """Returns the partition that a checkpoint's or a slice's metadata describes; of slices of one, the same.

        Raises:
            InputError: the installed libraries build another backbone than the one that was divided.
        """
        return _restored(dumps(metadata.divided))

    def metadata(self) -> DividedBackbone:
        """Returns what `restore` needs."""
        return DividedBackbone(
            backbone=self.spec,
            units=self.units,
            rule=self.rule,
            axes=self.assignment.axes,
            class_axis=self.assignment.classes,
            tensors={
                name: TensorEntry(axes, name in self.parameters, self.owners[name])
                for name, axes in self.assignment.tensors.items()
            },
            aliases=self.aliases,
        )

    @functools.cached_property
    def head(self) -> set[str]:
        """Names of the tensors that map features to classes: the classifier's and those of hidden layers before it."""
        inside = tuple(f"{path}." for path in head(self.spec))
        return {name for name in self.shapes if name.startswith(inside)}

    def kept_whole_by(self, name: str) -> fx.Node | None:
        """Returns the operator for which all units have channels of a tensor, where there is one."""
        pinned = self._labeller.coupled.pinned_by
        found = (pinned(int(label)) for vector in self._labeller.sources[name] for label in vector[:1])
        return next((node for node in found if node is not None), None)

    def is_tied(self, name: str, dim: int) -> bool:
        """Tells whether some of a dimension's indices can be kept or dropped only together, as those of a head."""
        roots = self._labeller.coupled.find(self._labeller.sources[name][dim])
        roots = roots[roots > 0]
        return len(torch.unique(roots)) < len(roots)

    def networks(self, kept: Sequence[int], classes: int, input_size: tuple[int, int] | None = None) -> Networks:
        """The network of a set of units.

        Args:
            kept: numbers of the units, from 1.
            classes: outputs of its classifier, at most the backbone's.
            input_size: height and width of its images; the stem's stride follows, so that whatever the size, what
                comes after the stem has the backbone's own resolution.

        Raises:
            InputError: no stride of the stem does that, or the network cannot be narrowed so.
        """
        key = (tuple(sorted(kept)), classes, input_size or self.spec.input_size)
        if key not in self._cache:
            with torch.inference_mode(False):  # what is cached may be evaluated first and trained later
                self._cache[key] = self._networks(*key)
        return self._cache[key]

    def _networks(
        self,
        kept: tuple[int, ...],
        classes: int,
        input_size: tuple[int, int],
        strides: dict[str, list[int]] | None = None,
    ) -> Networks:
        keep = kept_labels(self._labeller, self._unit, kept, classes)
        strides = self._stem.strides(input_size) if strides is None else strides
        train, evaluate = (
            narrow(self._graphs[mode], self._labels, self._labeller, keep, strides) for mode in (True, False)
        )
        networks = Networks(train, evaluate, Origin(self._described, kept, classes, input_size))
        batch = EXAMPLE_BATCH + 1  # another one than it was traced with
        image = torch.empty(batch, self.spec.in_chans, *input_size, device="meta")
        for narrowed in (train, evaluate):
            logits = shape_check(narrowed, self.tensors(networks), image)
            if logits.shape != (batch, classes):
                raise InputError(f"{self.spec.name} cannot be narrowed: it gives logits of shape {list(logits.shape)}")
        return networks

    @functools.cached_property
    def _described(self) -> str:
        return dumps(self.metadata().divided)

    def is_right_at(self, size: tuple[int, int], origin: Origin, train: bool) -> bool:
        """Tells whether a network's graph, made for images of one size, is what it would be for those of another.

        The backbone is traced anew with images of the other size, and the two graphs are compared node by node.

        Args:
            size: height and width of the other images.
            origin: of the network.
            train: which of its two graphs.
        """
        key = (size, origin.units, origin.classes, origin.input_size, train)
        if key not in self._right:
            with torch.inference_mode(False), torch.enable_grad():
                self._right[key] = self._is_right_at(size, origin, train)
        return self._right[key]

    def _is_right_at(self, size: tuple[int, int], origin: Origin, train: bool) -> bool:
        try:
            if size not in self._resized:
                module = empty_init(self.spec.build)
                spec = replace(self.spec, input_size=size)
                self._resized.clear()
                self._resized[size] = Partition.create(spec, self.units, module, self.assignment, self.rule)
            here = self.networks(origin.units, origin.classes, origin.input_size)
            strides = self._stem.strides(origin.input_size)
            there = self._resized[size]._networks(origin.units, origin.classes, size, strides)
        except InputError:  # the backbone takes no such images
            return False
        return (
            same_graph(here.train.module, there.train.module)
            if train
            else same_graph(here.eval.module, there.eval.module)
        )

    def tensors(self, networks: Networks) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a network."""
        units, classes = networks.origin.units, networks.origin.classes
        return {
            name: (self.assignment.shape(name, shape, units, classes), self.dtypes[name])
            for name, shape in self.shapes.items()
        }

    def check_images(self, input_size: tuple[int, int]) -> None:
        """Raises InputError where the stem cannot take images of a size, or would look at a part of them only."""
        self._stem.check_images(input_size)

    @functools.cached_property
    def _stem(self) -> Stem:
        return Stem.read(self._graphs[False], self.spec.name, self.spec.input_size)


@torch.compiler.disable
def check_size(images: Tensor, origin: Origin, train: bool, partition: Partition | None = None) -> None:
    """Raises InputError where a network is given images of a size that its graph is wrong for.

    Args:
        images: of another size than `origin.input_size`.
        origin: of the network.
        train: which of its graphs is to run.
        partition: that the network is of; restored from the origin by default.
    """
    size = (int(images.shape[-2]), int(images.shape[-1]))
    own = dims(origin.input_size)
    partition = _restored(origin.partition) if partition is None else partition
    if torch.compiler.is_compiling() and (size, *astuple(origin)[1:], train) not in partition._right:
        raise InputError(
            f"the network is made for images of {own}: export it for these, or call it once with {dims(size)}"
        )
    if not partition.is_right_at(size, origin, train):
        raise InputError(
            f"the network is made for images of {own}, and its graph is not right for those of {dims(size)}: resize "
            f"them to {own}, or make a partition with an input size of {dims(size)}"
        )


@functools.lru_cache(maxsize=2)
def _restored(description: str) -> Partition:
    metadata = parse(DividedBackbone, loads(description))
    spec = BackboneSpec(**vars(metadata.backbone))
    partition = Partition.create(spec, metadata.units, assignment=metadata.assignment, rule=metadata.rule)
    if set(partition.shapes) != set(metadata.tensors):
        raise InputError(f"{spec.name} is not the backbone that was divided: {spec.source} may have changed since")
    return partition


def _owners(graphs: Iterable[Traced], names: Sequence[str], assignment: Assignment) -> dict[str, Owner]:
    """Says who has a copy of its own of each tensor; see the design's table.

    Private to the network are the tensors with a dimension of classes and those of norms with running statistics.
    """
    owners: dict[str, Owner] = dict.fromkeys(names, "shared")
    for traced in graphs:
        owners.update(dict.fromkeys(stem_tensors(traced), "task"))
    for traced in graphs:
        owners.update(dict.fromkeys(running_tensors(traced), "network"))
    owners.update(dict.fromkeys((name for name, _ in assignment.classes), "network"))
    return owners
