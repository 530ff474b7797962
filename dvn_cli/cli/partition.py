"""Placeholder."""


def partition_command() -> None: ...
