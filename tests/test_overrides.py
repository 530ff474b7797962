"""What is read of YAML as a user writes it."""

import pytest
import yaml

from dvn_cli.errors import InputError
from dvn_cli.overrides import override_key, parse_override, read_yaml

LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
MERGES = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 10))


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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"a0: &a0 x\n{LAUGHS}", "with its aliases it is larger than 1 MiB"),
        (f"a0: &a0 {{b: 1}}\n{MERGES}", "with its aliases it is larger than 1 MiB"),
        ("&a [*a]", "with its aliases it is larger than 1 MiB"),
        ("[" * 5000, "nested too deeply"),
        ("a: {b: [1, " + "9" * 5000 + "]}", "a.b.1 is a number of 5,000 digits"),
        ("1:" * 5000 + "1", "it is a number of 10,001 digits"),
    ],
)
def test_what_has_no_end_is_refused(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_yaml(text)


@pytest.mark.parametrize("text", ["!!timestamp x", "!!int ''", "!!bool x", "!!float " + "1:" * 3000 + "1.5", "!!int x"])
def test_a_value_that_is_none_of_its_kind_is_not_yaml(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)
    with pytest.raises(InputError, match=r"^the value of seed is not YAML: .{,80}$"):
        parse_override(f"seed={text}")


def test_a_long_key_or_value_is_said_in_short() -> None:
    with pytest.raises(InputError, match=r"^a: it is nested too deeply"):
        parse_override("a=" + "[" * 5000)
    with pytest.raises(InputError, match="give a number from 0 to 0"):
        override_key({"tasks": [{}]}, f"tasks.{'9' * 5000}.name", "x")
