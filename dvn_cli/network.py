"""All networks in one: the shared store, what is private to tasks and levels, and every network as a view of it."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from dvn_cli import checkpoint
from dvn_cli.backbones import Preprocessing
from dvn_cli.errors import InputError
from dvn_cli.graph.dtype import recast
from dvn_cli.graph.narrow import Indices, Narrowed, on_device
from dvn_cli.partition import Networks, Owner, Partition, check_size
from dvn_cli.tasks import Task

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
            root.add_module(name, nn.Module())
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


class VirtualNetwork(nn.Module):
    """One network cut out: an ordinary module with the backbone's own parameter names.

    It maps images, float (batch, channels, height, width), normalised by the task's mean and std, to logits (batch,
    classes), in train mode with dropout and batch statistics as the backbone's.

    Attributes:
        task: the task that it solves.
        level: its level, from 1.
    """

    def __init__(
        self,
        networks: Networks,
        tensors: Mapping[str, Tensor],
        trainable: set[str],
        task: Task,
        level: int,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """`aliases`: other names for some of the tensors, which stay one tensor."""
        super().__init__()
        self.task, self.level, self._origin = task, level, networks.origin
        places = {name: register(self, name, tensor, name in trainable) for name, tensor in tensors.items()}
        for name, first in (aliases or {}).items():
            module, key = places[first]
            register(self, name, getattr(module, key), first in trainable)
        self._where = device_and_dtype(self)
        # Copies: the constants in them move and change their type with this module.
        self.train_graph, self.eval_graph = copy.deepcopy(networks.train.module), copy.deepcopy(networks.eval.module)
        self._places = {
            mode: [places[name] for name in narrowed.names]
            for mode, narrowed in ((True, networks.train), (False, networks.eval))
        }

    def forward(self, images: Tensor) -> Tensor:
        if is_of_other_size(images, self.task.input_size):
            check_size(images, self._origin, self.training)
        graph = self.train_graph if self.training else self.eval_graph
        return graph(images, *[getattr(module, key) for module, key in self._places[self.training]])

    def _apply(self, *args: Any, **kwargs: Any) -> "VirtualNetwork":
        super()._apply(*args, **kwargs)
        (device, dtype), (_, before) = device_and_dtype(self), self._where
        if (device, dtype) != self._where:
            self.train_graph, self.eval_graph = (on_device(g, device) for g in (self.train_graph, self.eval_graph))
            for graph in (self.train_graph, self.eval_graph):
                recast(graph, before, dtype)
            self._where = device, dtype
        return self

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"VirtualNetwork(task={self.task.name!r}, level={self.level}, parameters={count})"


class DeepVirtualNetwork(nn.Module):
    """The networks of all tasks and levels in one set of weights (section 3 of the paper).

    Its tensors are those of the file: `shared.NAME`, and where they exist `task.T.NAME` and `task.T.level.L.NAME`,
    NAME being the backbone's own. What a network has no tensor of its own for, it takes a slice of the shared one of.

    Attributes:
        partition: the backbone and its units.
        tasks: the tasks, number 1 first.
        training_record: how it was trained; None for a fresh partition.
        preprocessing: how images were prepared for the weights that it started from; None where those were random.
    """

    def __init__(
        self,
        partition: Partition,
        tasks: Sequence[Task],
        tensors: Mapping[str, Tensor],
        training_record: Mapping[str, Any] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """`tensors` are by their names in the file, such as `shared/conv1.weight`."""
        super().__init__()
        self.preprocessing = preprocessing
        self.partition, self.tasks, self.training_record = partition, list(tasks), training_record
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._plans: dict[tuple[int, int, bool], tuple[fx.GraphModule, list[tuple[nn.Module, str, Cut]]]] = {}
        for name, tensor in tensors.items():
            self._register(name, tensor)

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
        return checkpoint.find_task({"tasks": [t.to_dict() for t in self.tasks]}, task)

    def source(self, name: str, task: int, level: int) -> str:
        """Where a network's tensor comes from: its own, its task's, or the shared one."""
        own = f"task/{task}/level/{level}/{name}"
        return next(n for n in (own, f"task/{task}/{name}", f"shared/{name}") if n in self._places)

    def make_private(self, owners: Mapping[str, Owner] | None = None) -> None:
        """Gives tasks and networks tensors of their own: copies of the slices that they had so far.

        Args:
            owners: of each tensor; by default each task gets its stem, and each network its norms and classifier.
        """
        owners = self.partition.owners if owners is None else owners
        private = {name: owner for name, owner in owners.items() if owner != "shared"}
        new: dict[str, Tensor] = {}
        for number, level in self:
            kept = self.networks(number, level).kept
            for name, owner in private.items():
                prefix = f"task/{number}/" if owner == "task" else f"task/{number}/level/{level}/"
                source = self.source(name, number, level)
                if prefix + name not in self._places and prefix + name not in new:
                    module, key = self._places[source]
                    cut = () if owner == "task" else as_cut(kept[name])
                    new[prefix + name] = taken(getattr(module, key), cut).detach().clone()
        for name, tensor in new.items():
            self._register(name, tensor)
        for name in private:
            place = self._places.pop(f"shared/{name}", None)
            if place is not None:
                delattr(*place)
        self._plans.clear()

    @torch.no_grad()
    def inherit(self, task: int, level: int, before: Sequence[tuple[int, int]]) -> None:
        """Starts what a network has of its own from what others have learnt: all but its classifier.

        Its norms from the latest network of the same units, where there is one; the stem of a task that has no other
        network yet from the latest task.

        Args:
            before: numbers of task and level of the others, the latest last.
        """
        head = self.partition.head
        for name in self.partition.shapes:
            own = self.source(name, task, level)
            if name in head or own in {f"shared/{name}", *(self.source(name, *of) for of in before)}:
                continue
            units = self.tasks[task - 1].kept(level)
            alike = [of for of in before if "/level/" not in own or self.tasks[of[0] - 1].kept(of[1]) == units]
            tensors = self.file_tensors()
            if alike:
                tensors[own].copy_(tensors[self.source(name, *alike[-1])])

    def networks(self, task: int, level: int) -> Networks:
        """The graphs of a task and level, both by number from 1, and what they take of each tensor."""
        of = self.tasks[task - 1]
        return self.partition.networks(of.kept(level), len(of.classes), of.input_size)

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
        cut = as_cut(self.networks(task, level).kept[name])
        return module, key, tuple(part.to(device) if isinstance(part, Tensor) else part for part in cut)

    def forward(self, images: Tensor, task: int, level: int, training: bool | None = None) -> Tensor:
        """The logits (batch, classes) of a task and level, by number from 1; gradients meet in the shared tensors.

        `training` says which mode this one network is in; by default that of all.
        """
        key = (task, level, self.training if training is None else training)
        if is_of_other_size(images, self.tasks[task - 1].input_size):
            check_size(images, self.networks(task, level).origin, key[2], self.partition)
        if key not in self._plans:
            networks = self.networks(task, level)
            narrowed: Narrowed = networks.train if key[2] else networks.eval
            with torch.inference_mode(False):  # what is evaluated first may be trained later
                module = on_device(narrowed.module, images.device)
                self._plans[key] = (module, [self._place(name, task, level) for name in narrowed.names])
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
        checkpoint.check_level({"tasks": [t.to_dict() for t in self.tasks]}, number, level)
        tensors = {name: tensor.detach().clone() for name, tensor in self.tensors(number, level).items()}
        networks = self.networks(number, level)
        of, partition = self.tasks[number - 1], self.partition
        network = VirtualNetwork(networks, tensors, partition.parameters, of, level, partition.aliases)
        return network.train(self.training)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """All networks: numbers of task and level."""
        for number, task in enumerate(self.tasks, 1):
            for level in range(1, len(task.levels) + 1):
                yield number, level

    def header(self, path: str | os.PathLike[str]) -> checkpoint.Header:
        """What the header of its file says, before there is one: what counts networks needs no more."""
        metadata = {
            "format": checkpoint.FORMAT,
            "kind": "checkpoint",
            **self.partition.metadata(),
            "tasks": [task.to_dict() for task in self.tasks],
            "training": self.training_record,
            "preprocessing": self.preprocessing and self.preprocessing.to_dict(),
        }
        stored = {
            name: checkpoint.Stored(DTYPES[tensor.dtype], tuple(tensor.shape), 0, 0)
            for name, tensor in self.file_tensors().items()
        }
        return checkpoint.Header(Path(path), metadata, stored)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the checkpoint, atomically."""
        header, own = self.header(path), self.file_tensors()
        tensors = {
            name: checkpoint.Tensor(stored.dtype, stored.shape, _bytes(own[name]))
            for name, stored in header.tensors.items()
        }
        checkpoint.write(path, tensors, header.metadata)


def _bytes(tensor: Tensor) -> Any:
    return lambda: [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()]


def is_of_other_size(images: Tensor, size: tuple[int, int]) -> bool:
    """Tells whether images are known to have another height and width; a size that an export leaves open is not."""
    sizes = images.shape[-2:]
    return images.ndim > 2 and all(isinstance(n, int) for n in sizes) and tuple(sizes) != tuple(size)


def as_cut(kept: Indices) -> Cut:
    """What is kept along each dimension as slices where it is a run, so that what is taken is a view."""
    if all(indices is None for indices in kept):
        return ()
    cut: list[slice | Tensor] = []
    for indices in kept:
        if indices is None:
            cut.append(slice(None))
        elif int(indices[-1]) - int(indices[0]) + 1 == len(indices):
            cut.append(slice(int(indices[0]), int(indices[-1]) + 1))
        else:
            cut.append(indices)
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


def load(path: str | os.PathLike[str]) -> DeepVirtualNetwork | VirtualNetwork:
    """See `dvn_cli.load`."""
    header = checkpoint.read_header(path)
    metadata = header.metadata
    partition = Partition.restore(metadata)
    _check(header, partition)
    tensors = read_tensors(header)
    if header.kind == "checkpoint":
        tasks = [Task.from_dict(entry) for entry in metadata["tasks"]]
        found = metadata.get("preprocessing")
        preprocessing = None if found is None else Preprocessing.from_dict(found)
        return DeepVirtualNetwork(partition, tasks, tensors, metadata["training"], preprocessing).eval()
    task = Task.from_dict(metadata["task"])
    networks = partition.networks(metadata["kept"], len(task.classes), task.input_size)
    level, aliases = metadata["level"], partition.aliases
    return VirtualNetwork(networks, tensors, partition.parameters, task, level, aliases).eval()


def read_tensors(header: checkpoint.Header) -> dict[str, Tensor]:
    """All tensors of a file, each once; read and not mapped, so that memory holds them once and the file may go."""
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    tensors = {}
    with open(header.path, "rb") as file:
        for name, stored in header.tensors.items():
            if name in header.metadata["aliases"]:
                continue
            tensors[name] = torch.empty(stored.shape, dtype=dtypes[stored.dtype])
            file.seek(stored.start)
            if stored.stop > stored.start:
                file.readinto(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return tensors


def _check(header: checkpoint.Header, partition: Partition) -> None:
    """Raises InputError where a file lacks a tensor of one of its networks, or has one of another shape."""
    metadata = header.metadata
    networks: list[tuple[Any, list[int], Mapping[str, Any]]]
    if header.kind == "slice":
        networks = [(metadata["task"], metadata["kept"], header.tensors)]
    else:
        networks = [
            (entry, checkpoint.kept_units(entry, level), checkpoint.cut(header, number, level))
            for number, entry in enumerate(metadata["tasks"], 1)
            for level in range(1, len(entry["levels"]) + 1)
        ]
    axes, classes = partition.assignment.axes, set(partition.assignment.classes)
    for entry, kept, tensors in networks:
        for name, full in partition.shapes.items():
            shape = []
            for dim, (size, axis) in enumerate(zip(full, partition.assignment.tensors[name], strict=True)):
                runs = [(0, size)] if axis is None else checkpoint.kept_runs(axes[axis], kept, size)
                limit = len(entry["classes"]) if (name, dim) in classes else size
                shape.append(sum(min(stop, limit) - start for start, stop in runs if start < limit))
            if list(tensors[name].shape) != shape:
                raise InputError(
                    f"'{header.path}' is damaged: {name} has shape {list(tensors[name].shape)}, not {shape}"
                )
