"""From a module to an aten graph whose parameters are inputs (`torch.export`, training IR)."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from dvn_cli.errors import InputError
from dvn_cli.graph.empty_init import ONE_AT_A_TIME

# Higher-order operators that run a graph with something switched off, and where their arguments say so.
REGIONS = {"wrap_with_autocast": 2, "wrap_with_set_grad_enabled": 0}
EXAMPLE_BATCH = 2  # any number that torch.export does not specialise (0 and 1 it does)
AUTOCAST_OFF = "autocast_off"
"""In a node's `meta`: it computes in the types of its operands even where autocast is on. The value is the type of
device whose autocast that is, or None for that of the device that it runs on."""


@dataclass(frozen=True)
class Batched:
    """A size, or another integer, that follows the batch; `hint` is what it is at `EXAMPLE_BATCH`."""

    hint: int


@dataclass(frozen=True)
class Shaped:
    """What is known of a tensor of a graph."""

    shape: tuple[int | Batched, ...]


def described(value: Any) -> Any:
    """Returns what a node's `meta["val"]` says, without torch's own symbols: `Shaped`, a list, or a number."""
    if isinstance(value, Tensor):
        return Shaped(tuple(described(size) for size in value.shape))
    if isinstance(value, tuple | list):
        return [described(each) for each in value]
    if isinstance(value, torch.SymInt):
        return Batched(int(value.node.hint))  # type: ignore[arg-type]
    return value


@dataclass(frozen=True)
class Traced:
    """An aten graph in which everything that it reads is a placeholder.

    `sources` maps a placeholder's name to the tensor behind it: parameters, buffers and constants; `names` maps it to
    the tensor's name in the module (the first of several), for those that are in the module's `state_dict`. The rest
    are constants. The graph has one further placeholder, `input`, of shape (batch, channels, height, width), and
    returns one tensor. The `meta["val"]` of each node is as `described` returns it.
    """

    graph: fx.Graph
    input: str
    sources: Mapping[str, Tensor]
    names: Mapping[str, str]

    def names_of(self, nodes: Iterable[fx.Node]) -> set[str]:
        """Returns the names of those of some nodes that stand for the module's tensors."""
        return {self.names[str(n.target)] for n in nodes if n.op == "placeholder" and str(n.target) in self.names}

    def without_data(self) -> "Traced":
        """Returns the graph with its constants, but without the module's weights."""
        sources = {
            key: tensor.detach().to("meta") if key in self.names and tensor.is_floating_point() else tensor
            for key, tensor in self.sources.items()
        }
        return replace(self, sources=sources)


def hint(value: int | Batched) -> int:
    """The concrete number behind an integer that may follow the batch."""
    return value.hint if isinstance(value, Batched) else int(value)


def shape_of(value: Shaped | Tensor) -> tuple[int, ...]:
    return tuple(hint(size) for size in value.shape)


def trace(module: nn.Module, input_shape: tuple[int, int, int], train: bool) -> Traced:
    """Exports `module` in train or eval mode at a dynamic batch size; the module's own mode stays as it was.

    Args:
        module: a classifier whose forward takes one tensor (batch, channels, height, width).
        input_shape: channels, height, width.
        train: whether dropout and batch statistics are on in the graph.

    Raises:
        InputError: torch.export cannot trace the module.
    """
    parameter = next(module.parameters())
    example = torch.zeros(EXAMPLE_BATCH, *input_shape, device=parameter.device, dtype=parameter.dtype)
    was = {m: m.training for m in module.modules()}
    module.train(train)
    try:
        with ONE_AT_A_TIME, warnings.catch_warnings(), without_stack_traces():
            warnings.simplefilter("ignore")  # of tensors that a module keeps for later calls
            batch = ({0: torch.export.Dim.DYNAMIC},)
            program = torch.export.export(module, (example,), dynamic_shapes=batch, strict=False)
    except Exception as error:  # torch.export raises anything at all, from deep inside the module
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{type(module).__name__} cannot be exported at {input_shape}: {first[:200]}") from error
    finally:
        for m, mode in was.items():
            m.training = mode
    return _normalise(program, module)


def without_stack_traces() -> Any:
    """A context in which nodes note no lines of Python: nobody reads them, and they are a tenth of the time.

    Older releases of torch do not know the key, and note them all the same.
    """
    return mock.patch.object(fx.config, "do_not_emit_stack_traces", True, create=True)


def _normalise(program: torch.export.ExportedProgram, module: nn.Module) -> Traced:
    signature = program.graph_signature
    graph = fx.Graph()
    device = next(module.parameters()).device.type
    result = _inlined(graph, program.graph_module, {}, device)
    while isinstance(result, tuple | list):  # a dict-like or several outputs: the first is the classifier's
        result = result[0]
    if not isinstance(result, fx.Node):
        raise InputError(f"{type(module).__name__} does not return a tensor")
    graph.output(result)
    for node in list(graph.nodes):
        if node.op == "call_function" and "assert" in str(node.target):
            graph.erase_node(node)
    persistent = set(module.state_dict(keep_vars=True))
    owners = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    _keep_what_matters(graph, {key: name.rpartition(".")[0] for key, name in owners.items()})
    state: dict[str, Tensor] = {
        **dict(module.named_buffers(remove_duplicate=False)),
        **dict(module.named_parameters(remove_duplicate=False)),
    }
    first_name: dict[int, str] = {}  # of a tensor that several modules share, as `named_parameters` has it
    for name, tensor in state.items():
        first_name.setdefault(id(tensor), name)
    placeholders: dict[str, fx.Node] = {}
    sources: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    input_name = ""
    for node in graph.find_nodes(op="placeholder"):
        key = str(node.target)
        if key in owners:
            name = first_name[id(state[owners[key]])]
            first = placeholders.setdefault(name, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
                continue
            sources[key] = state[name]
            if name in persistent:
                names[key] = name
        elif key in signature.inputs_to_lifted_tensor_constants:
            sources[key] = program.constants[signature.inputs_to_lifted_tensor_constants[key]]
        else:
            input_name = key
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = described(node.meta["val"])
    return Traced(graph, input_name, sources, names)


def _inlined(
    graph: fx.Graph,
    module: fx.GraphModule,
    copies: dict[fx.Node, Any],
    device: str,
    meta: Mapping[str, Any] | None = None,
) -> Any:
    """Copies a module's graph to the end of `graph`, with its regions without autocast or gradients laid open.

    Args:
        copies: what stands for the module's nodes; filled in.
        device: the type of device that it was traced on.
        meta: what to note of every node.

    Returns:
        What the graph returns, in terms of the copies.
    """
    for node in module.graph.nodes:
        region = getattr(node.target, "__name__", "")
        if node.op == "output":
            return fx.node.map_arg(node.args[0], lambda n: copies[n])
        if node.op == "get_attr" and isinstance(value := getattr(module, node.target, None), fx.GraphModule):
            copies[node] = value
        elif region in REGIONS and not node.args[REGIONS[region]]:
            at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node))
            inner, inputs = copies[node.args[at]], [copies[a] for a in node.args[at + 1 :]]
            places = inner.graph.find_nodes(op="placeholder")
            noted = dict(meta or {})
            if region == "wrap_with_autocast":
                noted[AUTOCAST_OFF] = None if node.args[0] == device else node.args[0]
            copies[node] = _inlined(graph, inner, dict(zip(places, inputs, strict=True)), device, noted)
            if region == "wrap_with_set_grad_enabled":
                copies[node] = fx.node.map_arg(copies[node], lambda n: _detached(graph, n))
        elif region == "getitem" and not isinstance(copies[node.args[0]], fx.Node):
            copies[node] = copies[node.args[0]][node.args[1]]
        elif node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            copies[node].meta.update(meta or {})
    raise AssertionError("a graph has an output")


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    result = graph.call_function(torch.ops.aten.detach.default, (node,))
    result.meta = dict(node.meta)
    return result


def _keep_what_matters(graph: fx.Graph, modules: Mapping[str, str]) -> None:
    """Removes what the result does not depend on (auxiliary heads), but keeps writes to running statistics.

    `num_batches_tracked += 1` has no reader: such a write stays when another tensor of the same module is needed.

    Args:
        graph: changed in place.
        modules: for each placeholder that holds a module's tensor, the module's path.
    """
    nodes = list(graph.nodes)
    needed: set[fx.Node] = set()
    found: list[fx.Node] = [nodes[-1]]
    while found:
        needed.update(found)
        for node in reversed(nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        alive = {modules[str(n.target)] for n in needed if n.op == "placeholder" and str(n.target) in modules}
        found = [
            node for node in nodes
            if node not in needed and is_inplace(node)
            and ((base := base_of(node.all_input_nodes[0])) in needed or modules.get(str(base.target)) in alive)
        ]  # fmt: skip
    for node in reversed(nodes):
        if node not in needed:
            graph.erase_node(node)


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory a view looks at; the node itself where it is no view."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def is_view(node: fx.Node) -> bool:
    """Whether the operator's result may share the memory of its first argument, by its schema."""
    return bool(getattr(node.target, "is_view", False) and node.all_input_nodes)


def is_inplace(node: fx.Node) -> bool:
    """Whether the operator writes to its first argument, by its schema."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.arguments and schema.arguments[0].alias_info and schema.arguments[0].is_write)


def writers(node: fx.Node) -> list[fx.Node]:
    """The operators that change a node's memory in place, and the views through which they do."""
    readers = [user for user in node.users if user.all_input_nodes[0] is node]
    return [user for user in readers if is_inplace(user) or (is_view(user) and writers(user))]


def refusal(node: fx.Node, why: str = "") -> InputError:
    """Returns the refusal of a model, by the operator and the module that stands in the way."""
    return InputError(f"operator {located(node)} is not supported{' ' + why if why else ''}")


def located(node: fx.Node) -> str:
    """Names a node's operator and the module that it is in."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = list(stack.values())[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else kind.__name__
    where = f" in {path.removeprefix('L__self__.').removeprefix('L[self].') or 'the model'}" if path else ""
    return f"{node.target}{where}" + (f" ({kind.rpartition('.')[2]})" if kind else "")


def arguments_of(node: fx.Node) -> list[Any]:
    """Returns the arguments in the schema of a node's operator; none where it is no operator of torch."""
    schema = getattr(node.target, "_schema", None)
    return schema.arguments if schema else []


def bind(node: fx.Node) -> dict[str, Any]:
    """Returns what an operator is called with, by the names of its schema, defaults filled in."""
    schema = arguments_of(node)
    given = {**dict(zip((a.name for a in schema), node.args, strict=False)), **node.kwargs}
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}
