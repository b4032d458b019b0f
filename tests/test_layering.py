"""Imports go one way: a module may import only from folders before its own in `ORDER`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = [ROOT, ROOT / "kernels", ROOT / "profiling"]
PACKAGES = ("fastgrpo", "fastgrpo_kernels", "fastgrpo_profiling")

# Lowest first: a folder imports from those on the lines before its own, and from itself so long as no cycle arises.
ORDER = [
    "fastgrpo_kernels",
    "fastgrpo_profiling",
    "fastgrpo.safe_text",
    "fastgrpo.settings",
    "fastgrpo.config",
    "fastgrpo.types",
    "fastgrpo.atomic_files",
    "fastgrpo.rewards",
    "fastgrpo.scoring",
    "fastgrpo.model",
    "fastgrpo.data",
    "fastgrpo.sampler",
    "fastgrpo.update",
    "fastgrpo.plain",
    "fastgrpo.training",
    "fastgrpo.evaluation",
    "fastgrpo.report",
    "fastgrpo",
    "fastgrpo.cli",
    "fastgrpo.demo",
    "fastgrpo.profile",
    "fastgrpo.lab",
    "fastgrpo.cli.demo",
    "fastgrpo.cli.lab",
    "fastgrpo.cli.profile",
    "fastgrpo.cli.main",
    "fastgrpo.__main__",
]
RANK = {name: rank for rank, name in enumerate(ORDER)}


def module_files() -> dict[str, Path]:
    files = {}
    for root in SOURCE_ROOTS:
        for package in PACKAGES:
            for path in (root / package).rglob("*.py"):
                parts = path.relative_to(root).with_suffix("").parts
                files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = module_files()


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Modules of ours that a file imports, anywhere in it: an import inside a function hides no cycle here."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else module for name in names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def rank_of(module: str) -> int:
    """The place of the longest prefix that has one."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:end])) in RANK and (end == len(parts) or prefix != "fastgrpo"):
            return RANK[prefix]
    raise AssertionError(f"{module} has no place: give it one in ORDER")


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_imports_only_from_its_own_folder_or_earlier_ones(module):
    later = {name for name in imports_of(FILES[module]) if rank_of(name) > rank_of(module)}
    assert not later, f"{module} imports {later}, which come later"


def test_no_import_cycle():
    graph = {module: imports_of(path) - {module} for module, path in FILES.items()}
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"cycle: {' → '.join([*trail, module])}"
        if module in finished:
            return
        for name in sorted(graph.get(module, ())):
            visit(name, (*trail, module))
        finished.add(module)

    for module in sorted(graph):
        visit(module, ())


# The package hands out its two names, and a command imports what takes seconds, when they are asked for.
LAZY = {"fastgrpo", *(module for module in FILES if module.startswith("fastgrpo.cli."))}


@pytest.mark.parametrize("module", sorted(FILES.keys() - LAZY))
def test_no_import_hides_in_a_function(module):
    assert imports_of(FILES[module]) == imports_of(FILES[module], top_level_only=True)


def test_the_command_line_starts_light():
    heavy = ["torch", "transformers", "datasets", "accelerate", "rich", "fastgrpo.config"]
    code = f"import fastgrpo.cli.main as m, sys; m.main(['--help']); print(*[n for n in {heavy} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("package", ["fastgrpo_kernels", "fastgrpo_profiling"])
def test_the_kernels_and_the_profiler_stand_alone(package):
    others = {"fastgrpo_kernels", "fastgrpo_profiling"} - {package}
    heavy = ["transformers", "deepspeed", "accelerate", "datasets", "fastgrpo", *others]
    code = f"import {package}, sys; print(*[name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("folder", ["kernels", "profiling", "tests"])
def test_source_roots_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists(), "it would shadow another distribution's package"
