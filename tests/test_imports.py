"""Who may import whom: tools -> datasets, engine -> models -> ops; the scheme stands alone."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of each room the rooms below it, and (None: any) the other packages that it may import.
RULES = {
    "pointewa.ewa": ({"pointewa.ewa"}, {"torch"}),
    "pointewa.ops": ({"pointewa.ops"}, {"torch", "pytorch3d"}),
    "pointewa.models": ({"pointewa.models", "pointewa.ops", "pointewa.errors"}, {"torch"}),
    "pointewa.safe": ({"pointewa.safe", "pointewa.errors"}, None),
    "pointewa.runs": ({"pointewa.runs", "pointewa.models", "pointewa.ewa", "pointewa.safe", "pointewa.config",
                       "pointewa.errors"}, None),
    "pointewa.tasks": ({"pointewa"}, None),
    "pointewa.train": ({"pointewa"}, None),
    "pointewa.inference": ({"pointewa"}, None),
    "pointewa.study": ({"pointewa"}, None),
    "pointewa.viz": ({"pointewa.viz", "pointewa.models", "pointewa.ops", "pointewa.ewa", "pointewa.safe",
                      "pointewa.errors"}, None),
    "pointewa": ({"pointewa.models", "pointewa.safe", "pointewa.errors"}, None),  # the modules directly in it
    "datasets": ({"datasets", "pointewa.ops", "pointewa.safe", "pointewa.tasks.base", "pointewa.errors"}, None),
    "datasets.splits": ({"datasets", "pointewa"}, None),  # these two know the library and the data
    "datasets.subjects": ({"datasets", "pointewa"}, None),
    "tools": ({"tools", "datasets", "pointewa"}, None),
    "benchmarks": ({"benchmarks", "tools", "datasets", "pointewa"}, None),
}  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files():
    for folder in ("pointewa", "datasets", "tools", "benchmarks"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def within(name, parts):
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def test_every_part_imports_only_what_it_may():
    wrong, seen = [], set()
    for path in files():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        part = max((part for part in RULES if within(module, [part])), key=len)
        own, others = RULES[part]
        seen.add(part)
        for name in imports(path):
            package = name.split(".")[0]
            if package in ("pointewa", "datasets", "tools", "benchmarks"):
                allowed = within(name, own)
            else:
                allowed = others is None or package in sys.stdlib_module_names or package in others
            if not allowed:
                wrong.append(f"{module} imports {name}")
    assert seen == set(RULES)
    assert not wrong


def test_star_imports_are_not_used():
    assert not [path for path in files() for name in imports(path) if name.endswith(".*")]
