"""The layout: what each room of the package may import, and how long a file may be."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dvn_cli

PACKAGE = Path(dvn_cli.__file__).parent
LINES = 500

ROWS = (
    {"dvn_cli", "__main__"},  # the public names
    {"cli"},
    {"paper"},
    {"evaluation", "benchmark", "worker", "training"},
    {"dividing", "widening", "loading", "export", "runtime", "check", "calibration", "formats", "budget", "planning"},
    {"compensation"},
    {"undivided"},
    {"network", "partition", "reference", "tasks"},
    {"backbones"},
    {"data"},
    {"units"},
    {"graph"},
    {"store"},
    {"files", "overrides", "errors", "device", "processes", "report"},
)
"""The rooms, each a package or a module of `dvn_cli`: a room may import those of its own row and of the rows below."""


def modules() -> dict[str, Path]:
    """The modules by their names within the package, `cli.eval` for one; the package itself is `dvn_cli`."""
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix("__init__").rstrip(".") or "dvn_cli": path for path, name in names.items()}


def imports(source: str, known: set[str]) -> set[str]:
    """The modules of the package that a source imports, anywhere in it, those for types alone included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.partition(".")[0] == "dvn_cli":
                inside = target.removeprefix("dvn_cli").removeprefix(".")
                while inside and inside not in known:  # a name of a module
                    inside = inside.rpartition(".")[0]
                found.add(inside or "dvn_cli")
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


@pytest.fixture(scope="module")
def arrows() -> set[tuple[str, str]]:
    found = modules()
    return {
        (module, target)
        for module, path in found.items()
        for target in imports(path.read_text(encoding="utf-8"), set(found))
        if target != module
    }


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import dvn_cli.files
from dvn_cli import errors as wrong
if TYPE_CHECKING:
    from dvn_cli.data.task import Data
def later():
    from dvn_cli.graph import labels, trace
    import torch
"""
    known = {"dvn_cli", "files", "errors", "data", "data.task", "graph", "graph.labels"}
    assert imports(source, known) == {"files", "errors", "data.task", "graph.labels", "graph"}


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in modules()} <= set().union(*ROWS)


def test_imports_go_down(arrows: set[tuple[str, str]]) -> None:
    row = {name: number for number, names in enumerate(ROWS) for name in names}
    assert {arrow for arrow in arrows if row[room(arrow[0])] > row[room(arrow[1])]} == set()


def test_there_is_no_circle(arrows: set[tuple[str, str]]) -> None:
    """Neither of rooms nor of modules."""
    of_rooms = {(room(a), room(b)) for a, b in arrows if room(a) != room(b)}
    for edges in (arrows, of_rooms):
        sorter: TopologicalSorter[str] = TopologicalSorter()
        for module, target in edges:
            sorter.add(module, target)
        try:
            sorter.prepare()
        except CycleError as error:
            pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_no_file_is_long() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert [path.relative_to(PACKAGE).as_posix() for path, count in lines.items() if count > LINES] == []
