"""Graphs of backbones: trace, label, narrow. Nothing here knows about tasks."""

from dvn_cli.graph import ops

__all__ = ["ops"]
