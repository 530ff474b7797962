"""Graphs of backbones: trace, label, narrow. Nothing here knows about tasks."""

from dvn_cli.graph import ops  # noqa: F401  (whatever is imported of here, operators have their entries)
