"""Imports go inwards: science knows neither Ray nor click, the runtime does not know the command line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import clifflab

ROOT = Path(clifflab.__file__).parent
RING = {"cli": 3, "__main__": 3, "runtime": 2}  # everything else is ring 1
RAY_ONLY_IN = "runtime"


def imports(file: Path) -> set[str]:
    """Every module that a file imports, at any depth, outside of ``TYPE_CHECKING`` blocks."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(file.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{file} imports by a relative path"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        todo.extend(ast.iter_child_nodes(node))
    return found


def part_of(name: str) -> str:
    return name.split(".")[1] if name.startswith("clifflab.") else ""


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_inwards(file: Path) -> None:
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(file):
        top = name.split(".")[0]
        if top == "ray":
            assert own == RAY_ONLY_IN, f"{file} imports {name}"
        if top in ("click", "rich"):
            assert RING.get(own, 1) >= 2, f"{file} imports {name}"
        if top == "clifflab":
            assert RING.get(part_of(name), 1) <= RING.get(own, 1), f"{file} imports {name}"


def test_the_rule_would_notice(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    import ray.data\n    from clifflab.cli import main\n")
    assert {"ray.data", "clifflab.cli.main"} <= imports(file)


def test_science_is_pure() -> None:
    for file in (ROOT / "science").rglob("*.py"):
        assert not {
            n for n in imports(file) if n.split(".")[0] in ("torch", "pyarrow", "transformers", "os", "pathlib")
        }
