"""The house: every import runs downwards, what needs a GUI is in its room, nothing grows too large."""

import argparse
import ast
import re
from functools import cache
from pathlib import Path

import pytest

from ecodiff import units
from ecodiff.architectures.registry import ADAPTERS
from ecodiff.checkpoints.formats import FORMATS
from ecodiff.cli import commands
from ecodiff.learning.methods import METHODS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ecodiff"
# From the ground up: a room imports from rooms above itself in this list, and from itself.
ROOMS = (
    *("_moved", "errors", "units", "storage", "machine", "config"),
    *("pipelines", "checks", "model_files", "catalog"),
    *("architectures", "pruning", "metrics", "learning", "checkpoints", "runs"),
    *("__init__", "cli", "app", "__main__"),
)
TABLES = {"ecodiff_sliced_v1.py"}  # travels alone, so it is one file


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


@cache
def imports(path: Path) -> frozenset[tuple[str, bool]]:
    """Modules of ecodiff that a file imports, and whether it does so when it is imported itself."""
    found, names = set(), {name_of(file) for file in files()}
    package = path.parent.relative_to(ROOT).parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    typing = {id(n) for f in ast.walk(tree) if isinstance(f, ast.If) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing:
            continue
        base = (node.module or "") if not node.level else ".".join(package[: len(package) - node.level + 1])
        if node.level and node.module:
            base += f".{node.module}"
        for alias in node.names:
            target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in names else base
            if target.split(".")[0] == "ecodiff":
                found.add((target, id(node) not in inner))
    return frozenset(found)


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def test_every_arrow_goes_down():
    for path in files():
        own = ROOMS.index(room(name_of(path)))
        for target, _ in imports(path):
            assert ROOMS.index(room(target)) <= own, f"{path} imports {target}, which is above it"


def test_no_circles():
    graph = {name_of(path): {t for t, _ in imports(path)} - {name_of(path)} for path in files()}
    for name, targets in graph.items():  # a package's face is not what its rooms depend on
        graph[name] = {t for t in targets if not name.startswith(f"{t}.")}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join((*above, name))}"
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_page_needs_gradio_and_nothing_else_does():
    for path in files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = {
            name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        if "app" not in path.relative_to(PACKAGE).parts:
            assert not roots & {"gradio", "spaces"}, path


def test_the_page_knows_the_service_only():
    """And the ground floor: words, errors, the catalogue."""
    allowed = ("ecodiff.app.service", "ecodiff.app.ui", "ecodiff.app.limits", "ecodiff.app.server")
    allowed += ("ecodiff.errors", "ecodiff.units", "ecodiff.catalog")
    for path in (PACKAGE / "app" / "ui").glob("*.py"):
        wrong = {target for target, _ in imports(path) if not target.startswith(allowed)}
        assert not wrong, f"{path} imports {wrong}"


def test_nothing_is_too_large():
    for path in files():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 310 or path.name in TABLES, f"{path} has {len(lines)} lines"
        for node in ast.walk(ast.parse("\n".join(lines))):
            size = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert size <= 60, f"{path}: {node.name} has {size} lines"
            elif isinstance(node, ast.ClassDef):
                assert size <= 200, f"{path}: {node.name} has {size} lines"


def test_benchmarks_and_recipes_do_not_import_tests():
    for path in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("recipes/*.py")):
        assert "from tests" not in path.read_text(encoding="utf-8"), path


def test_every_kind_of_unit_is_found_somewhere():
    source = "".join(path.read_text() for path in (PACKAGE / "architectures").glob("*.py"))
    for name, kind in units.KINDS.items():
        assert f'"{name}"' in source and kind.word and kind.floor >= 0, f"no adapter yields {name}"
    assert len(ADAPTERS) == len(set(ADAPTERS)) > 10


@pytest.mark.parametrize("registry", [METHODS, FORMATS])
def test_what_is_registered_is_described(registry):
    for name, entry in registry.items():
        assert entry.name == name and (getattr(entry, "words", "") or entry.source)


def test_every_command_says_what_it_does():
    for name, module in commands().items():
        assert module.HELP and module.arguments.__doc__ and module.run.__doc__, name
    parser = argparse.ArgumentParser()
    commands()["export"].arguments(parser)
    assert all(re.search(rf"\b{name}\b", parser.format_help()) for name in FORMATS), "its formats"
