"""Modules without weights: all that an analysis of their graphs needs, at no memory."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn

ONE_AT_A_TIME = threading.RLock()
"""Held by a thread that builds or traces a backbone, for which torch is patched in the whole process."""


def empty_init(build: Callable[[], nn.Module], device: str = "cpu") -> nn.Module:
    """Builds a module whose parameters are there in shape only: memory that nobody writes to is never taken.

    Buffers hold what they hold, since tables of indices decide where data goes.

    Args:
        build: builds the module; called again, for a module with weights, where it needs those to build on.
        device: of the module; on `meta` buffers are there in shape only, too.
    """
    try:
        with ONE_AT_A_TIME, _parameters_on_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are loaded into parameters without data
            module = build()
    except Exception:  # its __init__ looks at a parameter; or it cannot be built at all, and says so once more
        return build().to(device)
    if any(buffer.is_meta for buffer in module.buffers()):  # or computes a buffer from one
        return build().to(device)
    empty: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                if id(parameter) not in empty:
                    data = torch.empty_like(parameter, device=device)
                    empty[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
                setattr(child, name, empty[id(parameter)])  # recurrent modules keep a list of their own by it
    return module.to(device)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter goes to the meta device as soon as a module has it, so that initialising it does nothing."""
    register, thread = nn.Module.register_parameter, threading.get_ident()

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        is_ours = threading.get_ident() == thread
        if is_ours and type(parameter) is nn.Parameter and not parameter.is_meta:
            if not hasattr(parameter, "on_meta"):  # what two modules share stays shared
                parameter.on_meta = nn.Parameter(parameter.to("meta"), parameter.requires_grad)  # type: ignore
            parameter = parameter.on_meta  # type: ignore
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", registered):
        yield
