"""Imports inside sdjax point one way, as docs/design.md draws them."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "sdjax"

FOUNDATION = {"typing", "config", "errors"}
MAY_IMPORT = {
    "__init__": {"errors", "model", "pipeline", "program"},
    "__main__": {"cli"},
    "errors": set(),
    "typing": set(),
    "config": {"errors"},
    "presets": {"config"},
    "models": FOUNDATION,
    "diffusion": FOUNDATION,
    "text": FOUNDATION,
    "recipe": FOUNDATION | {"__init__"},
    "parallel": FOUNDATION,
    "progress": FOUNDATION,
    "cache": FOUNDATION,
    "arguments": FOUNDATION,
    "weights": FOUNDATION | {"models"},
    "model": FOUNDATION | {"cache", "weights", "text", "parallel"},
    "sheet": FOUNDATION,
    "text_conditioning": FOUNDATION | {"models"},
    "data": FOUNDATION,
    "program": FOUNDATION | {"models", "diffusion", "text_conditioning"},
    "runner": FOUNDATION | {"model", "program", "parallel", "progress", "cache"},
    "pipeline": FOUNDATION
    | {"arguments", "model", "program", "runner", "diffusion", "parallel"},
    "training": FOUNDATION
    | {"models", "diffusion", "text", "weights", "data", "parallel", "cache", "sheet"}
    | {"text_conditioning", "model", "program", "pipeline", "arguments", "__init__"},
    "evaluation": FOUNDATION | {"models", "model", "pipeline", "data"},
    "cli": None,  # anything
}


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: pathlib.Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module != "sdjax":
                names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for parts in (name.split(".") for name in names):
            if parts[0] == "sdjax":
                known = len(parts) > 1 and parts[1] in MAY_IMPORT
                rooms.add(parts[1] if known else "__init__")
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_imports_point_one_way(path):
    allowed = MAY_IMPORT[room(path)]
    if allowed is not None:
        assert imported_rooms(path) <= allowed | {room(path)}


def test_nothing_in_the_package_imports_torch():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                module = getattr(node, "module", None) or names[0]
                assert module.split(".")[0] not in {"torch", "diffusers", "tensorflow"}
