"""The structure of the house, read from its imports: which way arrows point, how large files and folders are."""

import ast
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data", "models", "slurm", "trainer", "tools")
MAY_IMPORT = {
    "data": set(),
    "models": set(),
    "slurm": set(),
    "trainer": {"models", "data"},
    "tools": {"models", "data", "trainer", "slurm"},
}
FLOORS = {  # of each package, from the ground up: a room imports rooms of lower floors, and none of its own floor
    "models": ["choice", "backbones paths", "objectives sampling pretrained"],
    "data": ["errors randomness", "stores workers", "extraction", "neighbors", "batches", "sets"],
    "trainer": [
        "errors sinks",
        "ranks checkpoints",
        "engines",
        "config",
        "run_folder build",
        "batches estimate monitor precompute restore sampling",
        "evaluation analysis",
        "periodic",
        "loop",
        "ablation __main__",
    ],
}


def tracked(pattern: str) -> list[Path]:
    """Files of the repository, committed or about to be, relative to its root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [Path(line) for line in sorted(set(listed.splitlines())) if (ROOT / line).exists()]


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module."""
    found = {}
    for package in PACKAGES:
        for path in tracked(f"{package}/**.py"):
            parts = path.with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in known else node.module for name in names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name in known}


def graph() -> dict[str, set[str]]:
    """Which module imports which."""
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def room(module: str) -> str:
    """The sub-folder of a module, or the module itself where it lies in the package's own folder."""
    return ".".join(module.split(".")[:2])


def rooms() -> dict[str, set[str]]:
    """Which room imports which."""
    found: dict[str, set[str]] = {}
    for module, used in graph().items():
        found.setdefault(room(module), set()).update(room(name) for name in used)
    return {name: used - {name} for name, used in found.items()}


@pytest.mark.parametrize("nodes", [graph, rooms], ids=["modules", "rooms"])
def test_no_circle(nodes):
    try:
        TopologicalSorter(nodes()).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_arrows_between_packages_point_down():
    for module, used in graph().items():
        package = module.split(".")[0]
        others = {name.split(".")[0] for name in used} - {package}
        assert others <= MAY_IMPORT[package], f"{module} imports {others - MAY_IMPORT[package]}"


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_of_a_package_import_lower_floors_alone(package):
    floor_of = {f"{package}.{name}": floor for floor, names in enumerate(FLOORS[package]) for name in names.split()}
    inside = {name: used for name, used in rooms().items() if name.startswith(f"{package}.")}
    assert set(floor_of) == set(inside), "a room without a floor: add it to FLOORS, or one that is gone"
    for name, used in inside.items():
        for other in used & set(inside):
            assert floor_of[other] < floor_of[name], f"{name} (floor {floor_of[name]}) imports {other}"


def test_files_are_short_and_folders_small():
    for path in tracked("*.py"):
        assert len((ROOT / path).read_text().splitlines()) <= 400, path
    folders: dict[Path, set[str]] = {}
    for path in tracked("*"):
        for parent, child in zip(path.parents, (path, *path.parents), strict=False):
            folders.setdefault(parent, set()).add(child.name)
    for folder, inside in folders.items():
        files = [name for name in inside if (ROOT / folder / name).is_file() and name != "__init__.py"]
        assert len(files) <= 20, f"{folder}: {len(files)} files"


def test_the_training_loop_is_read_on_one_page():
    assert len((ROOT / "trainer/loop.py").read_text().splitlines()) <= 120
