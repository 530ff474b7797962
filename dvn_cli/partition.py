"""A backbone divided into units: given a set of them, the network of that set."""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dvn_cli.backbones import BackboneSpec, head
from dvn_cli.errors import InputError
from dvn_cli.graph import text
from dvn_cli.graph.compare import same_graph, same_logits
from dvn_cli.graph.empty_init import ONE_AT_A_TIME, empty_init
from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.narrow import Narrowed, narrow
from dvn_cli.graph.shape_check import shape_check
from dvn_cli.graph.stem import Stem, dims
from dvn_cli.graph.trace import EXAMPLE_BATCH, Traced, trace
from dvn_cli.store.metadata import DividedBackbone, Owner, Rule, TensorEntry
from dvn_cli.store.ownership import Assignment
from dvn_cli.store.schema import dumps, loads, parse
from dvn_cli.units.assign import CoupledGroup, class_dimensions, label_mask, unit_of_labels


@dataclass(frozen=True)
class Labelled:
    """A backbone's graph in one mode, labelled, and the unit of each label (see `unit_of_labels`)."""

    traced: Traced
    labeller: Labeller
    labels: dict[fx.Node, Any]
    unit: Tensor

    @classmethod
    def by_assignment(cls, traced: Traced, assignment: Assignment) -> "Labelled":
        """Labels a graph so that an assignment, made earlier, fits it.

        Raises:
            InputError: it does not, as when a library's new version built another backbone.
        """
        for whole_groups in (True, False):
            labeller = Labeller(assignment.units, whole_groups)
            labels = labeller.run(traced)
            try:
                unit = unit_of_labels(labeller, assignment)
                break
            except InputError:
                if not (whole_groups and labeller.had_choice):
                    raise
        used = [name for name in assignment.tensors if name in labeller.sources]
        if set(class_dimensions(labeller, used)) != {place for place in assignment.classes if place[0] in used}:
            raise InputError("the classes are in other tensors than when the backbone was divided")
        labeller.traced = traced.without_data()
        return cls(labeller.traced, labeller, labels, unit)


@dataclass(frozen=True)
class Origin:
    """What it takes to make a network's graphs, as for the other mode or for images of another size; plain data.

    Attributes:
        description: JSON of what `Partition.restore` needs.
        units: numbers of the network's units, from 1.
        classes: outputs of its classifier.
        input_size: height and width of its images.
    """

    description: str
    units: tuple[int, ...]
    classes: int
    input_size: tuple[int, int]

    @property
    def partition(self) -> "Partition":
        """The partition that it is of, restored where it is not in memory any more."""
        return _ALIVE.get(self.description) or _restored(self.description)

    def network(self, train: bool) -> Narrowed:
        """Returns the network in one of its modes."""
        return self.partition.network(self.units, self.classes, self.input_size, train)


@dataclass(eq=False)
class Partition:
    """Which unit owns what of a backbone. The backbone's graph of a mode is made when it is first asked for.

    Attributes:
        spec: how to build the backbone.
        rule: how channels were assigned to the units.
        assignment: which unit owns which indices of which tensor.
        owners: for each tensor who has one of its own: nobody (`shared`), each `task`, or each `network`, that is task
            and level.
        shapes: of the backbone's tensors.
        dtypes: of the backbone's tensors.
        parameters: names of the tensors that are trained; the rest are buffers.
        aliases: other names in the backbone's `state_dict` of tensors that it holds under several, and the first.
        kept: its graph in eval mode as its file has it; None where it was not read from one that does.
        groups: the coupled groups that were divided, or stayed shared; empty where it was read from a file.
    """

    spec: BackboneSpec
    rule: Rule
    assignment: Assignment
    owners: dict[str, Owner]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    parameters: set[str]
    aliases: dict[str, str]
    kept: str | None = None
    groups: Sequence[CoupledGroup] = ()
    _graphs: dict[bool, Labelled] = field(default_factory=dict, repr=False)
    _networks: dict[Any, Narrowed] = field(default_factory=dict, repr=False)
    _fitting: set[Any] = field(default_factory=set, repr=False)
    _resized: dict[tuple[int, int], "Partition"] = field(default_factory=dict, repr=False)
    _right: dict[Any, bool] = field(default_factory=dict, repr=False)
    _checked: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def of_module(
        cls, module: nn.Module, spec: BackboneSpec, rule: Rule, assignment: Assignment, owners: dict[str, Owner]
    ) -> "Partition":
        """Returns the partition of a backbone, built from `spec`, as an assignment says.

        Raises:
            InputError: the backbone lacks tensors that were assigned.
        """
        state = module.state_dict(keep_vars=True)
        if any(name not in state or state[name].ndim != len(axes) for name, axes in assignment.tensors.items()):
            raise _changed(spec, "has other tensors")
        names = [name for name in state if name in assignment.tensors]  # in the backbone's order, as optimizers want it
        first = {id(state[name]): name for name in names}
        return cls(
            spec=spec,
            rule=rule,
            assignment=assignment,
            owners={name: owners[name] for name in names},
            shapes={name: tuple(state[name].shape) for name in names},
            dtypes={name: state[name].dtype for name in names},
            parameters={name for name in names if isinstance(state[name], nn.Parameter)},
            aliases={name: first[id(t)] for name, t in state.items() if first.get(id(t), name) != name},
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

    def rebuilt(self, spec: BackboneSpec) -> "Partition":
        """Returns the same division of a backbone that differs in its classes or the size of its images alone."""
        return Partition.of_module(empty_init(spec.build), spec, self.rule, self.assignment, self.owners)

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
            graph=self.kept,
        )

    @functools.cached_property
    def graph_text(self) -> str | None:
        """What a file keeps of the backbone's graph in eval mode; None where that cannot be written, or read again."""
        if self.kept is not None:
            return self.kept
        found = self._text(self.graph(False).traced)
        if found is not None:
            try:
                _of_text(replace(self.metadata(), graph=found))
            except InputError:
                return None
        return found

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.assignment.units

    @functools.cached_property
    def head(self) -> tuple[str, ...]:
        """Names of the tensors that map features to classes: the classifier's and those of hidden layers before it.

        In the order of the backbone, as optimizers count them when a run is resumed in another process.
        """
        inside = tuple(f"{path}." for path in head(self.spec))
        return tuple(name for name in self.shapes if name.startswith(inside))

    @functools.cached_property
    def frozen(self) -> set[str]:
        """Names of the parameters that the backbone's own code keeps as they are: its `requires_grad` is False."""
        named = empty_init(self.spec.build).named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if not parameter.requires_grad} & self.parameters

    def graph(self, train: bool) -> Labelled:
        """The whole backbone's graph in one mode.

        Raises:
            InputError: the installed libraries build another backbone than the one that was divided.
        """
        if train not in self._graphs:
            self.check_backbone(self.kept)  # whose graph in eval mode is the file's
            self._graphs[train] = Labelled.by_assignment(self._traced(train), self.assignment)
        return self._graphs[train]

    def check_backbone(self, kept: str | None) -> None:
        """Compares the backbone, as it is built now, with the graph that a file keeps of it.

        Where the texts differ, as other versions of torch may write them, both are given the same random tensors. There
        is nothing to compare where a file keeps none.

        Raises:
            InputError: the backbone computes something else than it did.
        """
        if kept is None or kept in self._checked:
            return
        traced = self.graph(False).traced if self.kept is None else self._traced(False)
        if self._text(traced) != kept:
            labelled = Labelled.by_assignment(traced, self.assignment)
            now = replace(self, kept=None, _graphs={False: labelled}, _networks={})
            before = _of_text(replace(self.metadata(), graph=kept))
            if before is not None and not before._gives_logits_of(now):
                raise _changed(self.spec, "computes something else")
        self._checked.add(kept)

    def _gives_logits_of(self, other: "Partition") -> bool:
        units, classes = range(1, self.units + 1), self.spec.num_classes
        image = (2, self.spec.in_chans, *self.spec.input_size)
        return same_logits(
            self.network(units, classes), other.network(units, classes), self.tensors(units, classes), image
        )

    def _traced(self, train: bool) -> Traced:
        traced = trace(empty_init(self.spec.build), (self.spec.in_chans, *self.spec.input_size), train)
        if not set(traced.names.values()) <= set(self.shapes):
            raise _changed(self.spec, "has other tensors")
        return traced

    def _text(self, traced: Traced) -> str | None:
        return text.write(traced, self.shapes, self.dtypes, self.assignment.classes)

    def network(
        self, units: Sequence[int], classes: int, input_size: tuple[int, int] | None = None, train: bool = False
    ) -> Narrowed:
        """The network of a set of units, in train or eval mode.

        Args:
            units: their numbers, from 1.
            classes: outputs of its classifier, at most the backbone's.
            input_size: height and width of its images; the stem's stride follows, so that whatever the size, what
                comes after the stem has the backbone's own resolution.

        Raises:
            InputError: no stride of the stem does that, or the network cannot be narrowed so.
        """
        key = (tuple(sorted(units)), classes, input_size or self.spec.input_size, train)
        if key not in self._networks:
            with torch.inference_mode(False), torch.enable_grad():  # it may be evaluated first and trained later
                self._networks[key] = self._narrowed(*key, self.stem.strides(key[2]))
        return self._networks[key]

    def _narrowed(
        self,
        units: tuple[int, ...],
        classes: int,
        input_size: tuple[int, int],
        train: bool,
        strides: dict[str, list[int]],
    ) -> Narrowed:
        graph = self.graph(train)
        mask = label_mask(graph.labeller, graph.unit, units, classes)
        narrowed = narrow(graph.traced, graph.labels, graph.labeller, mask, strides)
        if self.kept is not None and not train:  # it was looked at before its file was written
            return narrowed
        batch = EXAMPLE_BATCH + 1  # another one than it was traced with
        image = torch.empty(batch, self.spec.in_chans, *input_size, device="meta")
        tensors = self.tensors(units, classes)
        constants = tuple(constant.shape for constant in narrowed.module.buffers())
        shapes = (narrowed.module.code, constants, tuple(map(tensors.__getitem__, narrowed.names)), image.shape)
        if shapes in self._fitting:  # such as of other units that are as large
            return narrowed
        logits = shape_check(narrowed, tensors, image)
        if logits.shape != (batch, classes):
            raise InputError(f"{self.spec.name} cannot be narrowed: it gives logits of shape {list(logits.shape)}")
        self._fitting.add(shapes)
        return narrowed

    def tensors(self, units: Sequence[int], classes: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of the network of a set of units."""
        return {
            name: (self.assignment.shape(name, shape, units, classes), self.dtypes[name])
            for name, shape in self.shapes.items()
        }

    def origin(self, units: Sequence[int], classes: int, input_size: tuple[int, int]) -> Origin:
        """Returns what it takes to make the network's graphs later."""
        _ALIVE[self._described] = self
        return Origin(self._described, tuple(units), classes, input_size)

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
            with ONE_AT_A_TIME, torch.inference_mode(False), torch.enable_grad():
                self._right[key] = self._is_right_at(size, origin, train)
        return self._right[key]

    def _is_right_at(self, size: tuple[int, int], origin: Origin, train: bool) -> bool:
        try:
            if size not in self._resized:
                self._resized.clear()
                self._resized[size] = self.rebuilt(replace(self.spec, input_size=size))
            here = self.network(origin.units, origin.classes, origin.input_size, train)
            strides = self.stem.strides(origin.input_size)
            there = self._resized[size]._narrowed(origin.units, origin.classes, size, train, strides)
        except InputError:  # the backbone takes no such images
            return False
        return same_graph(here.module, there.module)

    def check_images(self, input_size: tuple[int, int]) -> None:
        """Raises InputError where the stem cannot take images of a size, or would look at a part of them only."""
        self.stem.check_images(input_size)

    @functools.cached_property
    def stem(self) -> Stem:
        """The input layers of the backbone."""
        return Stem.read(self.graph(train=False).traced, self.spec.name, self.spec.input_size)


@torch._disable_dynamo  # which, unlike `torch.compiler.disable`, imports the compiler only when it is called
def check_size(images: Tensor, origin: Origin, train: bool, partition: Partition | None = None) -> None:
    """Raises InputError where a network is given images of a size that its graph is wrong for.

    Args:
        images: of another size than `origin.input_size`.
        origin: of the network.
        train: which of its graphs is to run.
        partition: that the network is of; the origin's by default.
    """
    size = (int(images.shape[-2]), int(images.shape[-1]))
    own = dims(origin.input_size)
    partition = origin.partition if partition is None else partition
    if (size, *astuple(origin)[1:], train) not in partition._right:
        with ONE_AT_A_TIME:  # or torch would say that it compiles where another thread has it trace
            if torch.compiler.is_compiling():
                raise InputError(
                    f"the network is made for images of {own}: export it for these, or call it once with {dims(size)}"
                )
            partition.is_right_at(size, origin, train)
    if not partition.is_right_at(size, origin, train):
        raise InputError(
            f"the network is made for images of {own}, and its graph is not right for those of {dims(size)}: resize "
            f"them to {own}, or make a partition with an input size of {dims(size)}"
        )


_ALIVE: weakref.WeakValueDictionary[str, Partition] = weakref.WeakValueDictionary()
"""Partitions that are in memory, by their descriptions."""


@functools.lru_cache(maxsize=2)
def _restored(description: str) -> Partition:
    metadata = parse(DividedBackbone, loads(description))
    if (kept := _of_text(metadata)) is not None:
        return kept
    spec, assignment = BackboneSpec(**vars(metadata.backbone)), metadata.assignment
    owners = {name: entry.owner for name, entry in metadata.tensors.items()}
    return Partition.of_module(empty_init(spec.build), spec, metadata.rule, assignment, owners)


def _of_text(metadata: DividedBackbone) -> Partition | None:
    """The partition of a file that keeps the backbone's graph; None where the graph cannot be used here.

    Raises:
        InputError: the graph is not one of this backbone.
    """
    spec = BackboneSpec(**vars(metadata.backbone))
    if metadata.graph is None:
        return None
    names, image = sorted(metadata.tensors), (spec.in_chans, *spec.input_size)
    found = text.read(metadata.graph, names, image, spec.num_classes)
    if found is None:
        return None
    if set(found.shapes) != set(names) or any(len(found.shapes[n]) != len(metadata.tensors[n].axes) for n in names):
        raise InputError("'graph' has other tensors than 'tensors'")
    partition = Partition(
        spec=spec,
        rule=metadata.rule,
        assignment=metadata.assignment,
        owners={name: metadata.tensors[name].owner for name in found.shapes},
        shapes=found.shapes,
        dtypes=found.dtypes,
        parameters={name for name, entry in metadata.tensors.items() if entry.trainable},
        aliases=dict(metadata.aliases),
        kept=metadata.graph,
    )
    partition._graphs[False] = Labelled.by_assignment(found.traced, partition.assignment)
    return partition


def _changed(spec: BackboneSpec, how: str) -> InputError:
    return InputError(f"{spec.name} is not the backbone that was divided: its code has changed since, and {how}")
