"""Placeholder."""


def eval_command() -> None: ...
