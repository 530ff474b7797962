"""Which classes are meant by what is written, in a recipe's file, on the command line and in `--data`."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dvn_cli.data import DataSpec
from dvn_cli.data.classes import corresponding, resolved, select
from dvn_cli.data.words import parse_data
from dvn_cli.errors import InputError
from dvn_cli.overrides import read_yaml
from dvn_cli.training import recipes

WORDS = [
    *("0", "1", "2", "3", "00", "01", "007", "00009", "08", "10", "1e3", "1.0", "2.0", ".5", "0x1", "0b1", "1_000"),
    *("+1", "-1", "yes", "no", "on", "off", "Yes", "true", "False", "null", "Null", "~", "=", "<<", ".nan", ".inf"),
    *("2024-01-01", "2024-13-45", "1:30", "0-4", "5-9", "a, b", "a: b", "a b", " a", "#a", "[a]", "{a: b}", "'a'"),
    *('"a"', "&a", "*a", "!a", "é", "猫", "a\nb", "", "-", "?", "a.b", "classes", "groups", "| a", "%a", "@a"),
]  # fmt: skip
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=6)
"""Any but a next line, which PyYAML does not read as it writes it."""
names = st.lists(st.sampled_from(WORDS) | TEXTS, min_size=2, max_size=7, unique=True)
TASK = {"name": "t", "data": {"source": "digits"}}
RECIPE = {"backbone": {"name": "wrn_10_1"}, "units": 2}
EXAMPLES = settings(max_examples=60, deadline=None)


def specs(folder: Path, key: str, written: str) -> list[DataSpec]:
    """What `classes` or `groups` is when it is written in each of the places where it can be."""
    block = f"{key}:\n  {written}\n"
    (folder / "r.yaml").write_text(
        f"backbone: {{name: wrn_10_1}}\nunits: 2\ntasks:\n- name: t\n  data: {{source: digits, {key}: {written}}}\n"
        f"scales:\n  flat: {{tasks.0.data.{key}: {written}}}\n  "
        f"nested: {{tasks.0.data: {{source: digits, {key}: {written}}}}}\n",
        encoding="utf-8",
    )
    (folder / "plain.yaml").write_text(yaml.safe_dump({**RECIPE, "tasks": [TASK]}))
    (folder / "data.yaml").write_text(f"source: digits\n{block}", encoding="utf-8")
    given = [
        *(recipes.read(folder / "r.yaml", [f"scale={scale}"]) for scale in ("full", "flat", "nested")),
        recipes.read(folder / "plain.yaml", [f"tasks.0.data.{key}={written}"]),
        recipes.read(folder / "plain.yaml", [f"tasks.*.data={{source: digits, {key}: {written}}}"]),
    ]
    return [
        *(recipe.tasks[0].data for recipe in given),
        parse_data([str(folder / "data.yaml")])[0],
        parse_data(["source=digits", f"{key}={written}"])[0],
    ]


def flow(value: Any, **options: Any) -> str:
    """A value in one line of YAML, everything quoted that needs to be."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, **options).strip()


def is_plain(name: str) -> bool:
    """Whether YAML can have a text without quotes, in a list and as a key."""
    try:
        item = yaml.compose(f"[{name}, x]").value[0]
        key = yaml.compose(f"{{{name}: x}}").value[0][0]
    except (yaml.YAMLError, AttributeError, IndexError):
        return False
    return (
        all(isinstance(n, yaml.ScalarNode) and (n.style, n.value) == (None, name) for n in (item, key)) and name != "<<"
    )


@EXAMPLES
@given(names, st.randoms(use_true_random=False), st.booleans())
def test_a_class_is_its_name(tmp_path_factory, source, random, allow_unicode):
    """Any of the classes there are, in any order, are those and no others; in quotes, and without where YAML can."""
    chosen = random.sample(source, random.randint(1, len(source)))
    folder = tmp_path_factory.mktemp("written")
    plain = [name for name in chosen if is_plain(name)]
    for wanted, written in ((chosen, flow(chosen, allow_unicode=allow_unicode)), (plain, f"[{', '.join(plain)}]")):
        for spec in specs(folder, "classes", written):
            assert select(spec, source).names == tuple(wanted)
            again = DataSpec(**json.loads(json.dumps(spec.model_dump(mode="json"))))
            assert select(again, source) == select(spec, source), "as a record or a checkpoint has it"


@EXAMPLES
@given(names, names, st.randoms(use_true_random=False))
def test_so_are_the_names_of_groups_and_of_their_members(tmp_path_factory, source, new, random):
    folder = tmp_path_factory.mktemp("written")
    groups: dict[str, list[str]] = {name: [] for name in new}
    for name in random.sample(source, random.randint(1, len(source))):
        groups[random.choice(new)].append(name)
    plain = {key: [name for name in old if is_plain(name)] for key, old in groups.items() if is_plain(key)}
    bare = ", ".join(f"{key}: [{', '.join(old)}]" for key, old in plain.items())
    for wanted, written in ((groups, flow(groups)), (plain, f"{{{bare}}}")):
        for spec in specs(folder, "groups", written):
            selection = select(spec, source)
            assert selection.names == tuple(wanted)
            assert [[source[index] for index in old] for old in selection.members] == list(wanted.values())
            assert resolved(spec, source).groups == wanted
            assert select(resolved(spec, source), source) == selection


ANIMALS = ("ant", "bee", "cat", "dog")
COUNTED = tuple(map(str, range(12)))
SORTED = ("0", "1", "10", "11", "2", "3")  # as folders are
PADDED = ("00000", "00001", "00008", "00009", "00010", "00011")
MIXED = ("ant", "2", "cat", "dog")


@pytest.mark.parametrize(
    ("source", "written", "chosen"),
    [
        (ANIMALS, "[1, 0]", "bee ant"),
        (ANIMALS, "1-3", "bee cat dog"),
        (ANIMALS, "[cat, 0-1]", "cat ant bee"),
        (ANIMALS, '["2-3", ant]', "cat dog ant"),  # JSON has no other way to write a range
        (COUNTED, "[2, 10]", "2 10"),
        (SORTED, "[2, 10]", "2 10"),
        (SORTED, "0-3", "0 1 2 3"),
        (SORTED, "['2', \"10\", !!str 3]", "2 10 3"),
        (PADDED, "[00009, 00010]", "00009 00010"),
        (PADDED, "00008-00011", "00008 00009 00010 00011"),
        (("3", "17", "902"), "[902, 3]", "902 3"),
        (("no", "yes"), "[yes, no]", "yes no"),
        (("0-4", "5-9", "10-19"), "[5-9, 0-4]", "5-9 0-4"),
        (MIXED, "[2, 0, 3]", "2 ant dog"),
        (MIXED, "0-1", "ant 2"),
        (("1.0", "2.0"), "[2.0, 1.0]", "2.0 1.0"),
        (("-1", "1"), "[1, -1]", "1 -1"),
        (ANIMALS, "", "ant bee cat dog"),
        (ANIMALS, "null", "ant bee cat dog"),
        (("null", "x"), "[x, null]", "x null"),
        (("crane", "dog", "crane"), "[2, 1]", "crane dog"),
    ],
)
def test_names_indices_and_ranges(source, written, chosen, tmp_path):
    spec = parse_data(["source=digits", f"classes={written}"])[0]
    assert " ".join(select(spec, source).names) == chosen
    (tmp_path / "data.yaml").write_text(json.dumps({"data": spec.model_dump(mode="json")}))
    again = DataSpec(**read_yaml((tmp_path / "data.yaml").read_text())["data"])
    assert select(again, source) == select(spec, source), "JSON is YAML"


@pytest.mark.parametrize(
    ("source", "written", "told"),
    [
        (ANIMALS, "[ant, bea]", "no class 'bea'; did you mean 'bee'?; there are 4: ant, bee, cat, dog"),
        (("a", "H\u00fcndin"), '["Hu\u0308ndin"]', "there is one that looks the same, of other Unicode characters"),
        (ANIMALS, "[ant, '2']", "no class '2'; without quotes it is the index of 'cat'; there are 4"),
        (ANIMALS, "[0, 02]", "no class '02'; there are 4"),
        (ANIMALS, "2-4", "no classes '2-4': they are numbered 0 to 3"),
        (ANIMALS, "0-99999999999999999", "no classes '0-99999999999999999': they are numbered 0 to 3"),
        (ANIMALS, "00-02", "no classes '00-02': they are numbered 0 to 3"),
        (ANIMALS, "[-1, 0]", "no class '-1'"),
        (ANIMALS, "[1, 1_0]", "no class '1_0'"),
        (ANIMALS, "[0, ant]", "class 'ant' is named twice"),
        (SORTED, "[0, 4]", "no class '4'; there are 6: 0, 1, 10, 11, 2, 3"),
        (SORTED, "0-4", "no class '4'"),
        (PADDED, "[9, 10]", "no class is named '9', one is named '00009': if it is meant, write '00009'"),
        (PADDED, "0-1", "no class is named '0', one is named '00000': if it is meant, write '00000'"),
        (PADDED, "[0, 010]", "no class is named '0'"),
        (PADDED, "['9', 00010]", "no class '9'; did you mean '00009'?"),
        (("1.0", "2.0", "3.0"), "[1, 2]", "no class is named '1', one is named '1.0': if it is meant, write '1.0'"),
        (("1", "2"), "[01, 2]", "no class '01'; did you mean '1'?"),
        (("1e3", "x"), "[1000, x]", "one is named '1e3'"),
        (("3", "17", "902"), "[0, 1]", "no class '0'; there are 3: 3, 17, 902"),
        (("0-4", "5-9"), "0-1", "no class '0-1'"),
        (("0-4", "5-9"), "['0-1']", "no class '0-1'"),
        (("ant", "0", "cat", "dog"), "0-2", "'0-2' may mean a class by its name, '0', and others by index: list names"),
        (("crane", "dog", "crane"), "[crane, dog]", "2 classes are named 'crane': choose by index, 0 or 2"),
    ],
)
def test_what_may_mean_another_class_is_refused(source, written, told):
    spec = parse_data(["source=digits", f"classes={written}"])[0]
    with pytest.raises(InputError) as caught:
        select(spec, source)
    assert str(caught.value).startswith(told) or told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_many_names_on_the_command_line():
    """More than a path has room for."""
    source = [f"class number {number}" for number in range(1000)]
    classes, groups = flow(source), flow({"a": source[:500], "b": source[500:]})
    assert select(parse_data(["source=digits", f"classes={classes}"])[0], source).names == tuple(source)
    assert select(parse_data(["source=digits", f"groups={groups}"])[0], source).names == ("a", "b")


def test_two_classes_of_one_name_are_two():
    source = ("crane", "dog", "crane")
    selection = select(DataSpec(source="digits"), source)
    assert selection.names == source
    assert selection.relabelled(3).tolist() == [0, 1, 2]
    groups = DataSpec(source="digits", groups={"bird": 0, "machine": 2})
    assert resolved(groups, source) == groups, "no name would say which of the two"
    assert corresponding(source, source) == [0, 1, 2]
    assert corresponding(source, ("dog", "crane")) == [1, -1]
    assert corresponding(("dog", "cat"), source) == [-1, 0, -1]
