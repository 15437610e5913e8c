"""The rooms of the package import downwards only, and no two files import each other.

As a script it counts rooms, floors, arrows and circles of a checkout: ``python tests/repository/test_rooms.py [ROOT]``.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "d2o_fast"
FLOORS = (  # from the ground up; rooms of one floor do not know each other
    {"errors", "software"},
    {"checks", "functions"},
    {"config", "files", "kernels"},
    {"loss", "data"},
    {"model"},
    {"forward", "sampling"},
    {"anchors"},
    {"training", "doctor"},
    {"demo", "arguments"},
    {"cli"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
Graph = dict[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its dotted name, the linked ``kernels`` included."""
    found = {}
    for folder, _, names in os.walk(root / PACKAGE, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                parts = (Path(folder).relative_to(root) / name).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = Path(folder) / name
    return found


def imports(files: dict[str, Path]) -> Graph:
    """Module -> the modules of the package that it imports, at any depth of its code."""
    graph = {}
    for module, path in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:  # relative: from the package that holds this module
                    here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                    base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
                names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        graph[module] = {name for name in names if name in files and name != module}
    return graph


def room_of(module: str) -> str:
    """The first name below the package; of the package itself, its own."""
    return module.split(".")[1] if "." in module else module


def faults(graph: Graph) -> list[str]:
    """Imports that do not go down, and rooms without a floor."""
    found = [
        f"{module}: no floor for its room" for module in graph if module != PACKAGE and room_of(module) not in FLOOR
    ]
    for module, targets in graph.items():
        room = room_of(module)
        for target in targets if room in FLOOR else ():
            if target == PACKAGE:
                below = room in ("cli", "demo")  # all others are imported by the root package
            else:
                below = room_of(target) == room or FLOOR.get(room_of(target), len(FLOORS)) < FLOOR[room]
            if not below:
                found.append(f"{module} imports {target}, which is not below it")
    return found


def circle(graph: Graph) -> list[str]:
    """Modules that import each other in a circle, the first one found; [] if there is none."""
    try:
        TopologicalSorter({m: targets - {PACKAGE} for m, targets in graph.items() if m != PACKAGE}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_import_goes_down() -> None:
    files = modules()
    assert len(files) >= 60, f"only {len(files)} modules seen below {ROOT / PACKAGE}"
    assert faults(imports(files)) == []


def test_no_two_files_import_each_other() -> None:
    assert circle(imports(modules())) == []


def test_rooms_import_nothing_in_their_init() -> None:
    """``import d2o_fast`` would load transformers otherwise, and names that are re-exported make circles."""
    for module, path in modules().items():
        if path.name == "__init__.py" and module != PACKAGE:
            statements = ast.parse(path.read_text(encoding="utf-8")).body
            assert [type(statement) for statement in statements] == [ast.Expr], f"{path} holds more than a docstring"


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("loss.ops", "from d2o_fast.data.row import Row", "d2o_fast.loss.ops imports d2o_fast.data.row"),
        ("model.parts", "from ..training import trainer", "d2o_fast.model.parts imports d2o_fast.training"),
        ("anchors.build", "import d2o_fast", "d2o_fast.anchors.build imports d2o_fast"),
        ("novelty", "", "d2o_fast.novelty: no floor"),
    ],
)
def test_a_fault_is_found(module: str, line: str, fault: str, tmp_path: Path) -> None:
    files = modules()
    path = tmp_path / "changed.py"
    path.write_text(line + "\n")
    assert any(found.startswith(fault) for found in faults(imports({**files, f"{PACKAGE}.{module}": path})))


def test_a_circle_is_found(tmp_path: Path) -> None:
    path = tmp_path / "layout.py"
    path.write_text("def late():\n    from d2o_fast.loss import ops\n")
    assert f"{PACKAGE}.loss.layout" in circle(imports({**modules(), f"{PACKAGE}.loss.layout": path}))


def count(root: Path) -> str:
    """Rooms, floors, arrows between rooms and circles of the checkout in ``root``."""
    graph = imports(modules(root))
    rooms: Graph = {}
    for module, targets in graph.items():
        if module != PACKAGE:
            rooms.setdefault(room_of(module), set()).update({room_of(t) for t in targets if t != PACKAGE})
    arrows = {(room, target) for room, targets in rooms.items() for target in targets if room != target}
    circles = [part for part in _components(rooms) if len(part) > 1]
    part_of = {room: i for i, part in enumerate(_components(rooms)) for room in part}
    below = {
        i: {part_of[t] for room, t in arrows if part_of[room] == i and part_of[t] != i} for i in set(part_of.values())
    }
    floors: dict[int, int] = {}
    for i in TopologicalSorter(below).static_order():
        floors[i] = 1 + max((floors[j] for j in below[i]), default=0)
    named = "; ".join(" <-> ".join(sorted(part)) for part in circles)
    return (
        f"{len(rooms)} rooms on {max(floors.values())} floors, {len(arrows)} arrows between them, "
        f"{len(circles)} circles"
        f"{f' ({named})' if named else ''}"
    )


def _components(graph: Graph) -> list[set[str]]:
    """Rooms that reach each other, together; every other room alone."""

    def reach(start: str) -> set[str]:
        seen, waiting = set[str](), [start]
        while waiting:
            for target in graph.get(waiting.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
        return seen

    reached = {room: reach(room) for room in graph}

    def together(room: str) -> Iterable[str]:
        return (other for other in graph if other in reached[room] and room in reached[other])

    return [set(part) for part in {frozenset({room, *together(room)}) for room in graph}]


if __name__ == "__main__":
    print(count(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT))
