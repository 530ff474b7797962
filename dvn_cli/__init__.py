"""dvn: Deep Virtual Networks, several tasks and several memory budgets in one set of weights.

Kim, Ahn, Torr, Oh, "Deep Virtual Networks for Memory Efficient Inference of Multiple Tasks", CVPR 2019.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvn_cli.benchmark import bench
    from dvn_cli.dividing import divide
    from dvn_cli.errors import DvnError, InputError
    from dvn_cli.evaluation.measure import evaluate
    from dvn_cli.export import slice
    from dvn_cli.loading import load
    from dvn_cli.network import DeepVirtualNetwork, VirtualNetwork
    from dvn_cli.runtime import Runtime
    from dvn_cli.training.experiment import Observer, train

    __version__: str

__all__ = [
    "DeepVirtualNetwork",
    "DvnError",
    "InputError",
    "Observer",
    "Runtime",
    "VirtualNetwork",
    "__version__",
    "bench",
    "divide",
    "evaluate",
    "load",
    "slice",
    "train",
]

_MODULES = {
    "DeepVirtualNetwork": "network",
    "DvnError": "errors",
    "InputError": "errors",
    "Observer": "training.experiment",
    "Runtime": "runtime",
    "VirtualNetwork": "network",
    "bench": "benchmark",
    "divide": "dividing",
    "evaluate": "evaluation.measure",
    "load": "loading",
    "slice": "export",
    "train": "training.experiment",
}
"""The module of each public name, imported when the name is asked for: torch takes seconds."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dvn")
    if name not in _MODULES:
        raise AttributeError(f"module 'dvn_cli' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dvn_cli.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
