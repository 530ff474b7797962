"""The optimizer of a recipe: which parameters it moves, how fast, and with how much weight decay."""

from collections.abc import Mapping
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn

from dvn_cli.errors import InputError
from dvn_cli.graph.empty_init import empty_init
from dvn_cli.graph.statistics import norm_parameters
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.partition import Partition
from dvn_cli.training.recipe import OptimizerKeys


def make_optimizer(keys: OptimizerKeys, network: DeepVirtualNetwork) -> torch.optim.Optimizer:
    """Returns the optimizer of a recipe, whose groups have an `lr_scale`: a factor on their learning rate.

    Raises:
        InputError: the recipe or the backbone says something of tensors that are not there.
    """
    own = {id(tensor): name.rpartition("/")[2] for name, tensor in network.file_tensors().items()}
    scales, decays = _by_layer(keys, network.partition)
    norms = set() if keys.norm_lr_factor == 1 else norm_parameters(network.partition.graph(train=True).traced)
    if keys.norm_lr_factor != 1 and not norms:
        name = network.partition.spec.name
        raise InputError(f"optimizer.norm_lr_factor: no operator of {name} is a norm with weights")
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            name = own[id(parameter)]
            decayed = decays.get(name, keys.decay_norms or parameter.ndim > 1)
            scale = scales.get(name, 1.0) * (keys.norm_lr_factor if name in norms else 1.0)
            groups.setdefault((decayed, scale), []).append(parameter)
    made: list[Any] = [
        {"params": groups[decayed, scale], "weight_decay": decayed * keys.weight_decay, "lr_scale": scale}
        for decayed, scale in sorted(groups, reverse=True)
    ]
    if keys.name == "adamw":
        return torch.optim.AdamW(made, lr=keys.lr, betas=(keys.momentum, 0.999))
    if keys.name == "sgd":
        return torch.optim.SGD(made, lr=keys.lr, momentum=keys.momentum, nesterov=keys.nesterov and keys.momentum > 0)
    return timm.optim.create_optimizer_v2(made, keys.name, keys.lr, keys.weight_decay, keys.momentum)


def _by_layer(keys: OptimizerKeys, partition: Partition) -> tuple[Mapping[str, float], Mapping[str, bool]]:
    """The factor on the learning rate of the backbone's tensors, and which have weight decay, as timm has them.

    Layers are those of timm's `group_matcher`; of a backbone that has none they are twelve tensors each, as in timm.

    Raises:
        InputError: what the backbone says of that is not as timm has it.
    """
    if keys.layer_decay is None and keys.decay_norms:
        return {}, {}
    module: Any = empty_init(partition.spec.build)
    if not hasattr(module, "group_matcher"):
        module.pretrained_cfg = {"classifier": tuple(name.rpartition(".")[0] for name in partition.head)}
    given = () if keys.decay_norms else getattr(module, "no_weight_decay", ())
    try:
        groups = timm.optim.param_groups_layer_decay(
            module,
            weight_decay=1.0,
            no_weight_decay_list=tuple(given() if callable(given) else given),
            weight_decay_exclude_1d=not keys.decay_norms,
            layer_decay=keys.layer_decay or 1.0,
        )
    except Exception as error:  # code of one's own
        raise InputError(
            f"{partition.spec.name}: group_matcher or no_weight_decay is not as timm has it: {error}"
        ) from None
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    each = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    return {n: group["lr_scale"] for n, group in each}, {n: group["weight_decay"] > 0 for n, group in each}


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns what changes in an optimizer, by names that `load_state` knows.

    That is the state of each parameter, and numbers of groups: some of timm's optimizers count steps there.
    """
    state = optimizer.state_dict()
    parts = [(str(index), of_one) for index, of_one in state["state"].items()]
    parts += [(f"group{index}", group) for index, group in enumerate(state["param_groups"])]
    return {
        f"{part}/{key}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=_DTYPES[type(value)])
        for part, values in parts
        for key, value in values.items()
        if isinstance(value, Tensor) or type(value) in _DTYPES
    }


_DTYPES = {int: torch.int64, float: torch.float64}


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `state_tensors` returned."""
    state, groups = dict[int, dict[str, Any]](), optimizer.state_dict()["param_groups"]
    for name, tensor in tensors.items():
        part, key = name.split("/")
        is_number = not tensor.ndim and tensor.dtype in _DTYPES.values()
        values = groups[int(part[5:])] if part.startswith("group") else state.setdefault(int(part), {})
        values[key] = tensor.item() if is_number else tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})
