"""The rules of the house: imports point one way, and modules and functions stay short."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "retinanet_ext"
ROOMS = (
    ("errors", "files", "page", "doctor", "open_image", "torch_jit"),
    ("export.metadata", "export.onnx_predictor"),
    ("losses", "kernels", "sampling", "analysis"),
    ("config_keys",),
    ("data", "modeling"),
    ("config",),
    ("evaluation",),
    ("engine",),
    ("experiments", "prediction", "export"),
    ("run_commands",),
    ("cli", "__main__"),
)
"""From the bottom to the top. A room imports from its own row and from those before it. The modules
of a room that are named alone belong elsewhere than the room."""

LEVELS = {room: level for level, row in enumerate(ROOMS) for room in row}
PURE = (
    *("losses", "sampling", "analysis"),
    *("errors", "files", "page", "doctor", "open_image", "torch_jit"),
    *("export.metadata", "export.onnx_predictor"),
)
"""Rooms that work without Detectron2."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(module):
    """Return the room of a dotted module name; None for the package itself."""
    parts = module.split(".")[1:]
    alone = ".".join(parts[:2])
    return alone if alone in LEVELS else next(iter(parts), None)


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Return the modules that a file imports, inside of functions too; names within packages."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = (PACKAGE.parent / inner.replace(".", "/")).with_suffix(".py").exists()
                yield inner if is_module else node.module


def test_imports_point_one_way():
    for path in MODULES:
        room = room_of(name_of(path))
        if room is None:  # retinanet_ext/__init__.py, which imports the plugin when it is asked to
            continue
        for imported in imports_of(path):
            other = room_of(imported) if imported.startswith("retinanet_ext") else None
            if other:
                assert LEVELS[other] <= LEVELS[room], f"{path}: {room} imports {other}"
            if room in PURE:
                assert not imported.startswith("detectron2"), f"{path} imports {imported}"


def test_no_circle_of_modules():
    names = {name_of(path): path for path in MODULES}
    graph = {
        name: {m for m in imports_of(path) if m in names and m not in (name, "retinanet_ext")}
        for name, path in names.items()
        if name != "retinanet_ext"
    }
    while leaves := {name for name, imported in graph.items() if not imported & graph.keys()}:
        graph = {name: imported for name, imported in graph.items() if name not in leaves}
    assert not graph, f"import each other: {', '.join(sorted(graph))}"


def test_modules_and_functions_are_short():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "add_retinanet_ext_config":
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_no_two_modules_of_one_name():
    names = [path.stem for path in MODULES if path.stem != "__init__"]
    twins = {name for name in names if names.count(name) > 1}
    assert not twins, twins
