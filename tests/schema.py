"""The JSON Schemas that come with dvn."""

import json
from importlib.resources import files
from typing import Any

import pytest


def validator(command: str) -> Any:
    """Of what a command prints with --json, `eval` or `bench`; skips the test where jsonschema is missing."""
    jsonschema = pytest.importorskip("jsonschema")
    content = json.loads((files("dvn_cli.evaluation") / f"{command}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content)
