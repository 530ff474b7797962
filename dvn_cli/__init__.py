"""dvn: Deep Virtual Networks, several tasks and several memory budgets in one set of weights.

Kim, Ahn, Torr, Oh, "Deep Virtual Networks for Memory Efficient Inference of Multiple Tasks", CVPR 2019.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from dvn_cli.network import DeepVirtualNetwork, VirtualNetwork

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> str:
    """Looks up `__version__` when it is asked for: finding the installed package's metadata takes time."""
    if name == "__version__":
        from importlib.metadata import version

        return version("dvn")
    raise AttributeError(f"module 'dvn_cli' has no attribute '{name}'")


def load(path: "str | os.PathLike[str]") -> "DeepVirtualNetwork | VirtualNetwork":
    """Returns what a file holds, in eval mode on the CPU.

    Args:
        path: a slice (then one network, an ordinary `nn.Module` whose `state_dict` has the backbone's own names), or a
            checkpoint (then all of them: `load(path).virtual_network(task, level)`).

    Raises:
        InputError: missing, truncated or foreign file, or one that the installed libraries build another backbone for.

    Example:
        >>> network = dvn_cli.load("dvn-task2-level1.safetensors")  # doctest: +SKIP
        >>> logits = network(images)  # doctest: +SKIP
    """
    from dvn_cli import loading  # torch and timm, only when there is something to load

    return loading.load(path)
