"""What is read of YAML as a user writes it."""

import pytest
import yaml

from dvn_cli.errors import InputError
from dvn_cli.overrides import read_yaml


@pytest.mark.parametrize("text", [
    "groups: {a: [1], a: [2]}", "groups: {1: [1], '1': [2]}", "data: {groups: {<<: {}, yes: 1, yes: 2}}",
])  # fmt: skip
def test_a_group_is_given_once(text):
    with pytest.raises(InputError, match=r"key '.*' is there twice"):
        read_yaml(text)


def test_aliases_merge_keys_and_other_keys_are_as_ever():
    text = "{a: &a [1, yes, 010], classes: *a, groups: {<<: {yes: 01}, no: *a}, levels: *a, on: 2024-01-01}"
    read, plain = read_yaml(text), yaml.safe_load(text)
    assert read.pop("classes") == [1, "yes", "010"]
    assert read.pop("groups") == {"yes": "01", "no": [1, "yes", "010"]}
    plain.pop("classes"), plain.pop("groups")
    assert read == plain
