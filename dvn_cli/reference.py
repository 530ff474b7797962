"""The masked network: what a narrow one must compute, by means that have nothing in common with labels on a graph.

It is the original `nn.Module` in double precision with the parameters of the other units set to zero, so that what
these would have computed is zero. Statistics over channels are taken over the others, under a `TorchFunctionMode`: a
channel is not there when its scale in the norm is zero; where there is no scale, an index of a dimension is not there
when all of it is zero in the masked network and is not in the whole one. Nothing here knows of graphs or of labels.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dvn_cli.units.assign import Assignment


def randomised(module: nn.Module, gain: float = 1.0, seed: int = 0) -> nn.Module:
    """A copy in double precision, nothing random in its forward pass, whose parameters hide no mistake.

    Args:
        gain: factor of the weights of contractions.
        seed: of all parameters and statistics.
    """
    module = copy.deepcopy(module).double()
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.double) * (high - low) + low

    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim < 2:
                p.copy_(uniform(p, -0.5, 0.5) if name.endswith("bias") else uniform(p, 0.6, 1.4))
            else:
                scale = gain * max(math.sqrt(2 / p[0].numel()), 0.02)
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.double) * scale)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(uniform(buffer, -0.5, 0.5))
            if name.endswith("running_var"):
                buffer.copy_(uniform(buffer, 0.5, 1.5))
    for m in module.modules():
        for attribute in ("p", "drop_prob", "drop_path", "dropout", "attn_drop_rate", "drop_rate", "attention_dropout"):
            if isinstance(getattr(m, attribute, None), float):
                setattr(m, attribute, 0.0)
    return module


class KeptStatistics(TorchFunctionMode):
    """Takes statistics over what is kept.

    Args:
        whole: what was seen when the whole network ran under this mode; None for that run itself.
        others: likewise of the masked network with other weights. What is not zero there is no part that it lacks.
    """

    def __init__(self, whole: "KeptStatistics | None" = None, others: "Sequence[KeptStatistics]" = ()) -> None:
        super().__init__()
        self.whole, self.others = whole, others
        self.seen: list[list[Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = FUNCTIONS.get(function)
        return own(self, function, *args, **(kwargs or {})) if own else function(*args, **(kwargs or {}))

    def mask(self, x: Tensor, scale: Tensor | None = None, apart: int | None = None) -> Tensor | None:
        """1 where an element is kept, 0 elsewhere, of a shape that broadcasts; None where all are.

        Args:
            scale: of the norm, in a shape that broadcasts with `x`: where it is zero nothing is kept.
            apart: a dimension over which nothing is taken.
        """
        covered: set[int] = set()  # dimensions of which the scale tells what is kept
        result = None
        if scale is not None and apart is None:
            covered = {x.ndim - 1 - d for d, size in enumerate(reversed(scale.shape)) if size > 1}
            result = None if bool(scale.all()) else scale.ne(0).to(x.dtype)
        seen = [x.detach().movedim(d, 0).reshape(n, -1).ne(0).any(1) for d, n in enumerate(x.shape)]
        place = len(self.seen)
        self.seen.append(seen)
        if self.whole is None or not seen[0].any():  # of what is zero altogether nothing can be told
            return result
        kept = [torch.stack(found).any(0) for found in zip(seen, *(o.seen[place] for o in self.others), strict=True)]
        for d, (now, before) in enumerate(zip(kept, self.whole.seen[place], strict=True)):
            if d != apart and d not in covered and (before & ~now).any():
                mask = (now | ~before).to(x.dtype).reshape([-1 if i == d else 1 for i in range(x.ndim)])
                result = mask if result is None else result * mask
        return result


def _dims(x: Tensor, dim: Any) -> list[int]:
    if dim is None:
        return list(range(x.ndim))
    return [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)]


def _last(x: Tensor, shape: Sequence[int]) -> list[int]:
    return list(range(x.ndim - len(shape), x.ndim))


def _moments(x: Tensor, mask: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count, dimensions kept."""
    weight = mask.expand(x.shape)
    count = weight.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * weight).sum(dims, keepdim=True) / count
    return mean, ((x - mean).square() * weight).sum(dims, keepdim=True) / count, count


def _mean(mode: KeptStatistics, f: Any, input: Tensor, dim: Any = None, keepdim: bool = False, **more: Any) -> Tensor:
    mask = mode.mask(input)
    if mask is None:
        return f(input, keepdim=keepdim, dim=dim, **more) if dim is not None else f(input, **more)
    mean = _moments(input, mask, _dims(input, dim))[0]
    return mean if keepdim else mean.squeeze(_dims(input, dim))


def _spread(root: bool, with_mean: bool) -> Callable[..., Any]:
    def function(mode: KeptStatistics, f: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = mode.mask(input)
        if mask is None:
            return f(input, *args, **kwargs)
        given = dict(zip(("dim", "unbiased", "keepdim"), args, strict=False)) | kwargs
        dims = _dims(input, given.get("dim"))
        mean, spread, count = _moments(input, mask, dims)
        correction = given.get("correction", 1 if given.get("unbiased", True) else 0)
        spread = spread * count / (count - correction).clamp(min=1)
        results = [spread.sqrt() if root else spread, mean]
        results = results if given.get("keepdim", False) else [r.squeeze(dims) for r in results]
        return tuple(results) if with_mean else results[0]

    return function


def _sub(mode: KeptStatistics, f: Any, input: Any, other: Any, **more: Any) -> Tensor:
    """Of a statistic over some dimension too: what is left out stays zero, so that the next statistic leaves it out."""
    result = f(input, other, **more)
    if not isinstance(input, Tensor) or not isinstance(other, Tensor) or input.shape != result.shape:
        return result
    mask = mode.mask(input) if input.ndim == other.ndim and input.shape != other.shape else None
    return result if mask is None else result * mask


def _softmax(mode: KeptStatistics, f: Any, input: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    mask = mode.mask(input)
    if mask is None:
        return f(input, dim, *args, **kwargs)
    along = mask.amax([d for d in range(input.ndim) if d != dim % input.ndim], keepdim=True)
    return f(input.masked_fill(along == 0, -math.inf), dim, *args, **kwargs).masked_fill(along == 0, 0)


def _extremum(mode: KeptStatistics, f: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    mask = mode.mask(input)
    if mask is None or (args and isinstance(args[0], Tensor)):
        return f(input, *args, **kwargs)
    worst = -math.inf if "max" in f.__name__ else math.inf
    dims = _dims(input, args[0] if args else kwargs.get("dim"))
    along = mask.amax([d for d in range(input.ndim) if d not in dims], keepdim=True)
    return f(input.masked_fill(along == 0, worst), *args, **kwargs)


def _layer_norm(
    mode: KeptStatistics, f: Any, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, *rest: Any
) -> Tensor:  # fmt: skip
    mask = mode.mask(input, weight)
    if mask is None:
        return f(input, normalized_shape, weight, bias, eps)
    mean, variance, _ = _moments(input, mask, _last(input, normalized_shape))
    return _affine((input - mean) / (variance + eps).sqrt(), weight, bias) * mask


def _rms_norm(
    mode: KeptStatistics, f: Any, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Tensor:
    mask = mode.mask(input, weight)
    if mask is None:
        return f(input, normalized_shape, weight, eps)
    mean = _moments(input.square(), mask, _last(input, normalized_shape))[0]
    return _affine(input / (mean + (torch.finfo(input.dtype).eps if eps is None else eps)).sqrt(), weight, None) * mask


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _by_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1] + [1] * (x.ndim - 2)
    return _affine(x, *(None if t is None else t.reshape(shape) for t in (weight, bias)))


def _group_norm(
    mode: KeptStatistics, f: Any, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, *rest: Any
) -> Tensor:  # fmt: skip
    mask = mode.mask(input, None if weight is None else weight.reshape([1, -1] + [1] * (input.ndim - 2)))
    if mask is None:
        return f(input, num_groups, weight, bias, eps)
    grouped = (input.shape[0], num_groups, -1)
    mean, variance, _ = _moments(input.reshape(grouped), mask.expand(input.shape).reshape(grouped), [2])
    normal = ((input.reshape(grouped) - mean) / (variance + eps).sqrt()).reshape(input.shape)
    return _by_channel(normal, weight, bias) * mask


def _batch_norm(
    mode: KeptStatistics, f: Any, input: Tensor, running_mean: Any, running_var: Any, *args: Any, **kwargs: Any
) -> Tensor:
    names = ("weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    mask = mode.mask(input, apart=1) if given.get("training", False) else None
    if mask is None:
        return f(input, running_mean, running_var, *args, **kwargs)
    mean, variance, count = _moments(input, mask, [d for d in range(input.ndim) if d != 1])
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.flatten(), given.get("momentum", 0.1))
            running_var.lerp_((variance * count / (count - 1)).flatten(), given.get("momentum", 0.1))
    normal = (input - mean) / (variance + given.get("eps", 1e-5)).sqrt()
    return _by_channel(normal, given.get("weight"), given.get("bias")) * mask


def _attention(
    mode: KeptStatistics, f: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    mask = mode.mask(key)
    if mask is None:
        return f(query, key, value, *args, **kwargs)
    there = mask.amax([d for d in range(key.ndim) if d != key.ndim - 2]).expand(key.shape[-2]) > 0
    given = dict(zip(("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"), args, strict=False)) | kwargs
    if there.all():
        return f(query, key, value, *args, **kwargs)
    bias = query.new_zeros(there.shape).masked_fill(~there, -math.inf)
    mask = given.get("attn_mask")
    given["attn_mask"] = bias.expand(query.shape[-2], -1) if mask is None else mask + bias
    return f(query, key, value, **given)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **dict.fromkeys((torch.var, Tensor.var), _spread(root=False, with_mean=False)),
    **dict.fromkeys((torch.std, Tensor.std), _spread(root=True, with_mean=False)),
    torch.var_mean: _spread(root=False, with_mean=True),
    torch.std_mean: _spread(root=True, with_mean=True),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _sub),
    **dict.fromkeys((torch.softmax, Tensor.softmax, F.softmax, F.log_softmax), _softmax),
    **dict.fromkeys((torch.amax, Tensor.amax, torch.max, Tensor.max, torch.amin, Tensor.amin), _extremum),
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm),
    **dict.fromkeys((F.group_norm, torch.group_norm), _group_norm),
    F.batch_norm: _batch_norm,
    F.scaled_dot_product_attention: _attention,
}


def masks_by_axes(assignment: Assignment, name: str, shape: Sequence[int], units: Sequence[int]) -> list[Tensor]:
    """Returns for each dimension of a tensor which indices some units have, by the assignment's runs alone.

    Args:
        units: their numbers, from 1.
    """
    masks = []
    for size, axis in zip(shape, assignment.tensors.get(name, [None] * len(shape)), strict=True):
        mask = torch.ones(size, dtype=torch.bool)
        for unit, runs in enumerate(assignment.axes[axis] if axis is not None else []):
            for start, stop in runs:
                mask[start:stop] = unit + 1 in units
        masks.append(mask)
    return masks


def masked(module: nn.Module, assignment: Assignment, units: Sequence[int]) -> nn.Module:
    """Returns a copy of a backbone in which everything of units other than these, by number from 1, is zero."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                for dim, mask in enumerate(masks_by_axes(assignment, name, tensor.shape, units)):
                    tensor.mul_(mask.to(tensor.device).reshape([-1 if d == dim else 1 for d in range(tensor.ndim)]))
    return module


def first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output
