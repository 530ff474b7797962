"""Placeholder."""


def train_command() -> None: ...
