"""All networks in one: the shared store, what is private to tasks and levels, and every network as a view of it."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from dvn_cli.graph.dtype import TRACED, recast
from dvn_cli.graph.folding import before, fold
from dvn_cli.graph.narrow import Narrowed, on_device
from dvn_cli.graph.synchronised import synchronised
from dvn_cli.partition import Origin, Partition, check_size
from dvn_cli.store import shapes
from dvn_cli.store.file import Header, StoredTensor, TensorData, write
from dvn_cli.store.lookup import find_task
from dvn_cli.store.metadata import (
    CheckpointMetadata,
    DividedBackbone,
    Owner,
    Preprocessing,
    SliceMetadata,
    Task,
    TaskLevel,
    TrainingRecord,
    check_level,
    task_levels,
)
from dvn_cli.store.ownership import Run
from dvn_cli.store.schema import checked
from dvn_cli.units import count

DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.bool: "BOOL",
}
"""torch's dtypes by their names in safetensors."""

Cut = tuple[slice | Tensor, ...]  # for each dimension what is taken; () is everything


def register(root: nn.Module, path: str, tensor: Tensor, trainable: bool) -> tuple[nn.Module, str]:
    """Puts a tensor into a tree of modules under its dotted path. Returns the module that holds it, and its key."""
    *parents, key = path.split(".")
    for name in parents:
        if name not in root._modules:
            root._modules[name] = nn.Module()  # `add_module` refuses `features`, which is ours too
        root = root._modules[name]  # type: ignore[assignment]
    if trainable:
        root.register_parameter(key, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
    else:
        root.register_buffer(key, tensor)
    return root, key


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module's weights are, and of what floating type: those of the first."""
    first = next(p for p in module.parameters() if p.is_floating_point())
    return first.device, first.dtype


def on_float32(network: nn.Module, **which: Any) -> Callable[[Tensor], Tensor]:
    """Makes networks of any floating type take and give float32, as runtimes of files do; `which` goes to each call."""
    dtype = device_and_dtype(network)[1]
    return lambda images: network(images.to(dtype), **which).float()


class VirtualNetwork(nn.Module):
    """One network cut out: an ordinary module with the backbone's own parameter names.

    It maps images, float (batch, channels, height, width), normalised by the task's mean and std, to logits (batch,
    classes), in train mode with dropout and batch statistics as the backbone's.

    Attributes:
        metadata: what its file says.
    """

    def __init__(
        self,
        metadata: SliceMetadata,
        tensors: Mapping[str, Tensor],
        narrowed: Narrowed,
        origin: Origin,
        training: bool = False,
    ) -> None:
        """Puts tensors and a graph together.

        Args:
            metadata: what its file says.
            tensors: by the backbone's names; those with several stay one.
            narrowed: the graph of the mode that the network is in at first.
            origin: what the graph of the other mode is made by, once that is asked for.
            training: the mode.
        """
        super().__init__()
        self.metadata, self._origin = metadata, origin
        trainable = {name for name, entry in metadata.tensors.items() if entry.trainable}
        self._places = {name: register(self, name, tensor, name in trainable) for name, tensor in tensors.items()}
        for name, first in metadata.aliases.items():
            module, key = self._places[first]
            register(self, name, getattr(module, key), first in trainable)
        self._where = device_and_dtype(self)
        self._names: dict[bool, tuple[str, ...]] = {}
        self.train_graph: fx.GraphModule | None = None
        self.eval_graph: fx.GraphModule | None = None
        self._features: tuple[Any, Any] = (None, None)  # a graph, and its part before the classifier
        self._add_graph(narrowed, training)
        super().train(training)

    @property
    def task(self) -> Task:
        """The task that it solves."""
        return self.metadata.task

    @property
    def level(self) -> int:
        """Its level, from 1."""
        return self.metadata.level

    def header(self, path: str | os.PathLike[str]) -> Header[SliceMetadata]:
        """What the header of its file says."""
        tensors = {name: getattr(module, key) for name, (module, key) in self._places.items()}
        return Header(Path(path), self.metadata, _stored(tensors))

    def _add_graph(self, narrowed: Narrowed, training: bool) -> None:
        device, dtype = self._where
        with torch.inference_mode(False):
            graph = on_device(narrowed.module, device)  # a copy: its constants move and change their type with this one
            recast(graph, TRACED, dtype)
        self._names[training] = narrowed.names
        setattr(self, "train_graph" if training else "eval_graph", graph)

    def train(self, mode: bool = True) -> "VirtualNetwork":
        """Sets the mode; the graph of the other mode is made when that is first set."""
        if mode not in self._names:
            self._add_graph(self._origin.network(mode), mode)
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        self._check_size(images)
        graph = self.train_graph if self.training else self.eval_graph
        assert graph is not None
        places = [self._places[name] for name in self._names[self.training]]
        return graph(images, *[getattr(module, key) for module, key in places])

    def _check_size(self, images: Tensor) -> None:
        if is_of_other_size(images, self.task.input_size):
            check_size(images, self._origin, self.training)

    @property
    def features(self) -> Callable[[Tensor], Tensor]:
        """Calculates what the classifier is given, from images, in the mode that the network is in, with gradients.

        That is float (batch, features), or with height and width where it is so made; of several classifiers the first
        one's input. Where the backbone has a part of this name, it is that part, and calling it does the same.
        """
        part = self._modules.get("features")
        if part is None:
            return self._pre_logits
        part.forward = self._pre_logits  # a part holds tensors alone
        return part

    def _pre_logits(self, images: Tensor) -> Tensor:
        self._check_size(images)
        graph, names = (self.train_graph, self.eval_graph)[not self.training], self._names[self.training]
        assert graph is not None
        if self._features[0] is not graph:
            classifier = {name for name, _ in self.metadata.class_axis}
            self._features = graph, before(Narrowed(graph, names), classifier)
        return self._features[1](images, *[getattr(*self._places[name]) for name in names])

    def macs(self) -> int:
        """Returns the multiply-accumulates of one image."""
        origin, partition = self._origin, self._origin.partition
        image = (partition.spec.in_chans, *origin.input_size)
        return count.macs(origin.network(train=False), partition.tensors(origin.units, origin.classes), image)

    def standalone(self, fold_norms: bool = False) -> fx.GraphModule:
        """Returns the network in eval mode as a module made of torch's operators alone, with copies of no weights.

        Args:
            fold_norms: whether running statistics go into the layers before them.
        """
        mode = self.training
        graph = self.train(False).eval_graph
        self.train(mode)
        assert graph is not None
        tensors = {name: getattr(module, key) for name, (module, key) in self._places.items()}
        return fold(Narrowed(graph, self._names[False]), tensors, fold_norms)

    def _apply(self, *args: Any, **kwargs: Any) -> "VirtualNetwork":
        super()._apply(*args, **kwargs)
        (device, dtype), (_, before) = device_and_dtype(self), self._where
        if (device, dtype) != self._where:
            for name in ("train_graph", "eval_graph"):
                if (graph := getattr(self, name)) is not None:
                    setattr(self, name, moved := on_device(graph, device))
                    recast(moved, before, dtype)
            self._where = device, dtype
        return self

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"VirtualNetwork(task={self.task.name!r}, level={self.level}, parameters={count})"


class DeepVirtualNetwork(nn.Module):
    """The networks of all tasks and levels in one set of weights (section 3 of the paper).

    Its tensors are those of the file: `shared.NAME`, and where they exist `task.T.NAME` and `task.T.level.L.NAME`,
    NAME being the backbone's own. A network uses its private tensor where it has one, otherwise a slice of the shared
    one.

    Attributes:
        partition: the backbone and its units.
        tasks: the tasks, number 1 first.
        training_record: how it was trained; None for a fresh partition.
        preprocessing: how images were prepared for the weights that it started from; None where those were random.
        earlier: the divisions that there were before units were added.
        random: names of the backbone's tensors that those weights lack, such as a classifier of other classes; None
            where it started from none.
        compiled: whether networks in train mode are compiled when they first run.
        synchronised: whether their batch norms see the images of all processes.
    """

    def __init__(
        self,
        partition: Partition,
        tasks: Sequence[Task],
        tensors: Mapping[str, Tensor],
        training_record: TrainingRecord | None = None,
        preprocessing: Preprocessing | None = None,
        earlier: tuple[DividedBackbone, ...] = (),
    ) -> None:
        """`tensors` are by their names in the file, such as `shared/conv1.weight`."""
        super().__init__()
        self.preprocessing, self.earlier = preprocessing, earlier
        self.random: tuple[str, ...] | None = None
        self.partition, self.tasks, self.training_record = partition, list(tasks), training_record
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._plans: dict[tuple[int, int, bool], tuple[Callable[..., Any], list[tuple[nn.Module, str, Cut]]]] = {}
        self.compiled = self.synchronised = False
        for name, tensor in tensors.items():
            self._register(name, tensor)
        checked(self.metadata())  # what no file can say is refused now, not when it has been trained

    @classmethod
    def from_backbone(
        cls,
        partition: Partition,
        module: nn.Module,
        tasks: Sequence[Task],
        copy: bool = True,
        preprocessing: Preprocessing | None = None,
    ) -> "DeepVirtualNetwork":
        """A fresh partition: every network is a slice of the backbone, norms and classifier included.

        Args:
            copy: otherwise its tensors are the backbone's own, so that memory holds them once.
            preprocessing: that of the backbone's weights, where it has any.
        """
        state = module.state_dict()
        tensors = {f"shared/{name}": state[name].detach() for name in partition.shapes}
        if copy:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        return cls(partition, tasks, tensors, preprocessing=preprocessing)

    def _register(self, name: str, tensor: Tensor) -> None:
        own = name.rpartition("/")[2]
        self._places[name] = register(self, name.replace("/", "."), tensor, own in self.partition.parameters)

    def file_tensors(self) -> dict[str, Tensor]:
        """All tensors by their names in the file."""
        return {name: getattr(module, key) for name, (module, key) in self._places.items()}

    def number(self, task: int | str) -> int:
        """The number of a task, from 1, by its number or name; InputError where there is none."""
        return find_task(self.tasks, task)

    def source(self, name: str, task: int, level: int) -> str:
        """Where a network's tensor comes from: its own, its task's, or the shared one."""
        return shapes.source(self._places, name, task, level)

    def make_private(self, owners: Mapping[str, Owner] | None = None, keep_shared: bool = False) -> None:
        """Gives tasks and networks tensors of their own: copies of the slices that they had so far.

        Args:
            owners: of each tensor; by default each task gets its stem, and each network its norms and classifier.
            keep_shared: whether the tensors that they were copied from stay, for others to start from.
        """
        owners = self.partition.owners if owners is None else owners
        private = {name: owner for name, owner in owners.items() if owner != "shared"}
        new: dict[str, Tensor] = {}
        for number, level in self:
            for name, owner in private.items():
                prefix = f"task/{number}/" if owner == "task" else f"task/{number}/level/{level}/"
                source = self.source(name, number, level)
                if prefix + name not in self._places and prefix + name not in new:
                    module, key = self._places[source]
                    cut = () if owner == "task" else self._cut(name, number, level)
                    new[prefix + name] = taken(getattr(module, key), cut).detach().clone()
        for name, tensor in new.items():
            self._register(name, tensor)
        for name in () if keep_shared else private:
            place = self._places.pop(f"shared/{name}", None)
            if place is not None:
                delattr(*place)
        self._plans.clear()

    @torch.no_grad()
    def inherit(self, task: int, level: int, before: Sequence[TaskLevel]) -> None:
        """Starts what a network has of its own from what others have learnt: all but its classifier.

        Its norms from the latest network of the same units, where there is one; the stem of a task that has no other
        network yet from the latest task.

        Args:
            before: the others, the latest last.
        """
        head = self.partition.head
        for name in self.partition.shapes:
            own = self.source(name, task, level)
            if name in head or own in {f"shared/{name}", *(self.source(name, *other) for other in before)}:
                continue
            units = self.tasks[task - 1].units(level)
            alike = [
                other
                for other in before
                if "/level/" not in own or self.tasks[other.task - 1].units(other.level) == units
            ]
            tensors = self.file_tensors()
            if alike:
                tensors[own].copy_(tensors[self.source(name, *alike[-1])])

    def narrowed(self, task: int, level: int, training: bool) -> Narrowed:
        """The graph of a network, by the numbers of its task and level from 1, in train or eval mode."""
        own = self.tasks[task - 1]
        return self.partition.network(own.units(level), len(own.classes), own.input_size, training)

    def check(self, networks: Iterable[TaskLevel] | None = None) -> None:
        """Makes the graphs of networks, all by default, in both modes.

        Raises:
            InputError: a network cannot be narrowed, or does not take its task's images.
        """
        for task, level in self if networks is None else networks:
            for training in (True, False):
                self.narrowed(task, level, training)

    def origin(self, task: int, level: int) -> Origin:
        """What it takes to make a network's graphs later."""
        own = self.tasks[task - 1]
        return self.partition.origin(own.units(level), len(own.classes), own.input_size)

    def macs(self, task: int, level: int) -> int:
        """Multiply-accumulates of one image in a network, by the numbers of its task and level from 1."""
        own, spec = self.tasks[task - 1], self.partition.spec
        tensors = self.partition.tensors(own.units(level), len(own.classes))
        return count.macs(self.narrowed(task, level, training=False), tensors, (spec.in_chans, *own.input_size))

    def tensors(self, task: int, level: int) -> dict[str, Tensor]:
        """The tensors of one network by the backbone's names: views of this module's wherever slices are runs."""
        plan = {name: self._place(name, task, level) for name in self.partition.shapes}
        return {name: taken(getattr(module, key), cut) for name, (module, key, cut) in plan.items()}

    def _place(self, name: str, task: int, level: int) -> tuple[nn.Module, str, Cut]:
        source = self.source(name, task, level)
        module, key = self._places[source]
        if "/level/" in source:  # narrow already
            return module, key, ()
        device = getattr(module, key).device  # where indices are needed at every step
        cut = self._cut(name, task, level)
        return module, key, tuple(part.to(device) if isinstance(part, Tensor) else part for part in cut)

    def _cut(self, name: str, task: int, level: int) -> Cut:
        entry, shape = self.tasks[task - 1], self.partition.shapes[name]
        return as_cut(self.partition.assignment.runs(name, shape, entry.units(level), len(entry.classes)), shape)

    def forward(self, images: Tensor, task: int, level: int, training: bool | None = None) -> Tensor:
        """The logits (batch, classes) of a task and level, by number from 1; gradients meet in the shared tensors.

        `training` says which mode this one network is in; by default that of all.
        """
        key = (task, level, self.training if training is None else training)
        if is_of_other_size(images, self.tasks[task - 1].input_size):
            check_size(images, self.origin(task, level), key[2], self.partition)
        if key not in self._plans:
            narrowed = self.narrowed(*key)
            with torch.inference_mode(False):  # what is evaluated first may be trained later
                module = narrowed.module  # made on the CPU, and the same for all who use it
                module = module if images.device.type == "cpu" else on_device(module, images.device)
                if self.synchronised and key[2]:
                    module = synchronised(module)
                # Not `__call__`, whose code all modules share: of one code torch compiles eight forms at most.
                graph = torch.compile(module.forward, dynamic=False) if self.compiled and key[2] else module
                self._plans[key] = (graph, [self._place(name, task, level) for name in narrowed.names])
        graph, plan = self._plans[key]
        return graph(images, *[taken(getattr(module, name), cut) for module, name, cut in plan])

    def _apply(self, *args: Any, **kwargs: Any) -> "DeepVirtualNetwork":
        self._plans.clear()  # their constants and indices are where the weights were
        return super()._apply(*args, **kwargs)

    def virtual_network(self, task: int | str, level: int) -> VirtualNetwork:
        """A copy of one network that stands alone, in this one's mode.

        Raises:
            InputError: no such task or level.
        """
        number = self.number(task)
        check_level(self.tasks[number - 1], level)
        tensors = {name: tensor.detach().clone() for name, tensor in self.tensors(number, level).items()}
        own = self.tasks[number - 1]
        divided = self.metadata().divided_for(own)
        metadata = SliceMetadata(**divided, task_number=number, level=level, kept=own.units(level))
        narrowed, origin = self.narrowed(number, level, self.training), self.origin(number, level)
        return VirtualNetwork(metadata, tensors, narrowed, origin, self.training)

    def __iter__(self) -> Iterator[TaskLevel]:
        """Yields which networks there are."""
        yield from task_levels(self.tasks)

    def metadata(self) -> CheckpointMetadata:
        """Returns what its file says.

        Raises:
            InputError: something that no file can say.
        """
        return CheckpointMetadata(
            **self.partition.metadata().divided,
            tasks=tuple(self.tasks),
            training=self.training_record,
            preprocessing=self.preprocessing,
            earlier=self.earlier,
            random=self.random,
        )

    def header(self, path: str | os.PathLike[str]) -> Header[CheckpointMetadata]:
        """What the header of its file says, before there is one: what counts networks needs no more."""
        return Header(Path(path), self.metadata(), _stored(self.file_tensors()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the checkpoint, atomically."""
        write(path, to_data(self.file_tensors()), replace(self.metadata(), graph=self.partition.graph_text))


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    return {name: StoredTensor(DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def to_data(tensors: Mapping[str, Tensor]) -> dict[str, TensorData]:
    """Returns tensors as a file has them; each is copied from its device when it is written."""
    return {name: TensorData(DTYPES[t.dtype], tuple(t.shape), _bytes(t)) for name, t in tensors.items()}


def _bytes(tensor: Tensor) -> Any:
    return lambda: [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()]


def is_of_other_size(images: Tensor, size: tuple[int, int]) -> bool:
    """Tells whether images are known to have another height and width; a size that an export leaves open is not."""
    sizes = images.shape[-2:]
    return images.ndim > 2 and all(isinstance(n, int) for n in sizes) and tuple(sizes) != tuple(size)


def as_cut(runs: Sequence[Sequence[Run]], shape: Sequence[int]) -> Cut:
    """Returns what is taken of a tensor of a shape: along a dimension a slice where it can be, which gives a view."""
    if all(list(along) == [(0, size)] for along, size in zip(runs, shape, strict=True)):
        return ()
    cut: list[slice | Tensor] = []
    for along in runs:
        if len(along) > 1:
            cut.append(torch.cat([torch.arange(start, stop) for start, stop in along]))
        else:
            cut.append(slice(*along[0]) if along else slice(0))
    return tuple(cut)


def taken(tensor: Tensor, cut: Cut) -> Tensor:
    """What a cut takes of a tensor."""
    if not cut:
        return tensor
    tensor = tensor[tuple(part if isinstance(part, slice) else slice(None) for part in cut)]
    for dim, part in enumerate(cut):
        if isinstance(part, Tensor):
            tensor = tensor.index_select(dim, part.to(tensor.device))
    return tensor
