"""Placeholder."""


def bench_command() -> None: ...
