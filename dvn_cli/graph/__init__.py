"""Graphs of backbones: trace, label, narrow. Nothing here knows about tasks."""
