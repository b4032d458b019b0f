"""Imports go one way: a module may import only from layers below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = [ROOT, ROOT / "kernels", ROOT / "profiling"]
PACKAGES = ("fastgrpo", "fastgrpo_kernels", "fastgrpo_profiling")

# Lowest first. Modules of one line may import each other, so long as no cycle arises.
LAYERS = [
    ["fastgrpo_kernels", "fastgrpo_profiling"],
    ["fastgrpo.config"],
    ["fastgrpo.types"],
    [
        "fastgrpo.data",
        "fastgrpo.answers",
        "fastgrpo.rewards",
        "fastgrpo.reflection",
        "fastgrpo.advantages",
        "fastgrpo.objective",
    ],
    [
        "fastgrpo.packing",
        "fastgrpo.metrics",
        "fastgrpo.live_figures",
        "fastgrpo.update_plan",
        "fastgrpo.checkpoint",
        "fastgrpo.run_log",
        "fastgrpo.callbacks",
    ],
    ["fastgrpo.model"],
    ["fastgrpo.hf_generation", "fastgrpo.accumulation"],
    ["fastgrpo.reference", "fastgrpo.policy", "fastgrpo.resolve", "fastgrpo.weight_sync"],
    ["fastgrpo.sampler"],
    ["fastgrpo.backends", "fastgrpo.reference_model"],
    ["fastgrpo.trainer", "fastgrpo.whole_checkpoints", "fastgrpo.timed_steps"],
    ["fastgrpo"],
    ["fastgrpo.evaluation", "fastgrpo.report"],
    ["fastgrpo.arguments", "fastgrpo.launch"],
    ["fastgrpo.demo", "fastgrpo.doctor"],
    ["fastgrpo.profile"],
    ["fastgrpo.cli", "fastgrpo.__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


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
    """The layer of the longest prefix that has one."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:end])) in RANK and (end == len(parts) or prefix != "fastgrpo"):
            return RANK[prefix]
    raise AssertionError(f"{module} has no layer: give it one in LAYERS")


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_imports_only_from_its_own_layer_or_below(module):
    above = {name for name in imports_of(FILES[module]) if rank_of(name) > rank_of(module)}
    assert not above, f"{module} imports {above} from above"


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


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_import_hides_in_a_function(module):
    assert imports_of(FILES[module]) == imports_of(FILES[module], top_level_only=True)


@pytest.mark.parametrize("package", ["fastgrpo_kernels", "fastgrpo_profiling"])
def test_the_kernels_and_the_profiler_stand_alone(package):
    heavy = ["transformers", "deepspeed", "accelerate", "datasets", "fastgrpo"]
    code = f"import {package}, sys; print(*[name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("folder", ["kernels", "profiling", "tests"])
def test_source_roots_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists(), "it would shadow another distribution's package"
