"""Who may import whom: tools -> study, inference -> train -> tasks -> models -> ops; ewa, compression, safe alone."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The rooms from the top of the house down: each may import those that it names, itself, and the packages after them
# (None: any).
BELOW = {
    "ewa": ((), {"torch"}),
    "compression": ((), {"torch"}),
    "ops": ((), {"torch", "pytorch3d", "torchvision"}),
    "models": (("ops", "errors"), {"torch", "timm"}),
    "safe": (("errors",), None),
    "config": (("models", "safe", "errors", "clone"), None),
    "runs": (("models", "ops", "ewa", "safe", "config", "errors"), None),
    "viz": (("models", "ops", "ewa", "safe", "errors"), None),
    "tasks": (("runs", "viz", "models", "config", "errors"), None),
    "train": (("tasks", "runs", "models", "ops", "ewa", "compression", "safe", "config", "errors"), None),
    "inference": (
        ("train", "study.statistics", "tasks", "runs", "viz", "models", "ops", "ewa", "safe", "config", "errors"),
        None,
    ),
    "study": (("train", "tasks", "runs", "safe", "config", "errors"), None),
    "datasets": (("tasks.base", "models.parts", "ops", "safe", "errors", "clone"), None),
    "tools": ((), None),
}
FOLDERS = {
    "pointewa": "pointewa",
    "datasets": "pointewa.datasets.layouts",
    "tools": "pointewa.tools",
    "benchmarks": "benchmarks",
}
RULES = {
    **{f"pointewa.{room}": ({f"pointewa.{one}" for one in (room, *below)}, others)
       for room, (below, others) in BELOW.items()},
    "pointewa": ({f"pointewa.{one}" for one in ("models", "safe", "errors", "clone", "tools", "__version__")}, None),
    "pointewa.datasets.splits": ({"pointewa"}, None),  # these two know the library and the data
    "pointewa.datasets.subjects": ({"pointewa"}, None),
    "pointewa.tools": ({"pointewa"}, None),
    "benchmarks": ({"benchmarks", "pointewa"}, None),
}  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files():
    """The modules of the package, wherever in the clone they are, and the benchmarks."""
    for folder, name in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ".".join((name, *path.relative_to(ROOT / folder).with_suffix("").parts))


def within(name, parts):
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def test_every_part_imports_only_what_it_may():
    wrong, seen = [], set()
    for path, module in files():
        part = max((part for part in RULES if within(module, [part])), key=len)
        own, others = RULES[part]
        seen.add(part)
        for name in imports(path):
            package = name.split(".")[0]
            if package in FOLDERS:
                allowed = within(name, own)
            else:
                allowed = others is None or package in sys.stdlib_module_names or package in others
            if not allowed:
                wrong.append(f"{module} imports {name}")
    assert seen == set(RULES)
    assert not wrong


def test_star_imports_are_not_used():
    assert not [path for path, _ in files() for name in imports(path) if name.endswith(".*")]


def test_the_rooms_are_those_of_the_folder():
    assert set(BELOW) == {path.parent.name for path in ROOT.glob("pointewa/*/__init__.py")}


def test_no_room_is_above_one_that_imports_it():
    def reached(room):
        below = {one for one in BELOW[room][0] if one in BELOW}
        return below.union(*(reached(one) for one in below)) if below else below

    assert all(room not in reached(room) for room in BELOW)


def test_a_trained_model_is_loaded_without_the_trainer():
    code = "import sys, torch; had = set(sys.modules); import pointewa; pointewa.load; print(*set(sys.modules) - had)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "pointewa.inference.predict" in loaded
    rooms = {name.split(".")[1] for name in loaded if name.startswith("pointewa.")}
    assert not rooms & {"tasks", "study", "viz"}
    assert not {"rich", "fcntl", "matplotlib", "h5py", "pointewa.train.trainer", "pointewa.runs.folder"} & set(loaded)
