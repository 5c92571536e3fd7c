"""
Lists the names that the code uses although their packages have not promised to keep them: names with a leading
underscore that it imports, reads or overrides, and attributes of modules and classes of others that it replaces.

    python tests/private_names.py [ROOT]      of a checkout; needs requirements-extra.txt

docs/reliability.md has a row for each. tests/test_reliability.py compares the two.
"""

import ast
import importlib
import sys
from pathlib import Path


# Of Python itself; and `_auto_class`, which the public `register_for_auto_class` sets.
NOT_COUNTED = {
    "_exit",
    "_replace",
    "_make",
    "_run_exitfuncs",
    "_asdict",
    "_fields",
    "_abc_impl",
    "sys.argv",
    "_auto_class",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def source_files(root: Path) -> list[Path]:
    """The files of the project, without its tests."""
    return sorted(
        path
        for pattern in ("*.py", "benchmarks/*.py", "scripts/*.py", "phase15/**/*.py")
        for path in root.glob(pattern)
    )


def defined_names(trees: dict[Path, ast.Module]) -> set[str]:
    """Private names that the project defines itself: functions, classes, variables, attributes of `self`."""
    names = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    names.add(node.attr)
    return names


def overridden(module, modules: set[str]) -> set[str]:
    """Private names that classes of a module define although a base of another package has them."""
    names = set()
    for cls in vars(module).values():
        if isinstance(cls, type) and cls.__module__ == module.__name__:
            others = [base for base in cls.__mro__ if base.__module__.split(".")[0] not in modules | {"builtins"}]
            known = {name for base in others for name in (*vars(base), *base.__dict__.get("__annotations__", ()))}
            names |= {name for name in vars(cls) if is_private(name) and name in known - NOT_COUNTED}
    return names


def replaced(tree: ast.Module, modules: set[str]) -> set[str]:
    """Attributes of imported modules and classes that are assigned to, as `package.Name = …`."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] not in modules:
            imported |= {alias.asname or alias.name for alias in node.names}
    targets = [target for node in ast.walk(tree) if isinstance(node, ast.Assign) for target in node.targets]
    return {
        ast.unparse(target)
        for target in targets
        if isinstance(target, ast.Attribute)
        and isinstance(target.value, ast.Name)
        and target.value.id in imported - modules
    }


def private_names(root: Path) -> dict[str, set[str]]:
    """The names, and the files that use each."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in source_files(root)}
    modules = {path.stem for path in trees} | {"benchmarks", "scripts", "phase15"}
    own = defined_names(trees) | NOT_COUNTED
    found: dict[str, set[str]] = {}
    for path, tree in trees.items():
        names = replaced(tree, modules)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] not in modules:
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                names |= {name for name in full if any(map(is_private, name.split(".")))}
            elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                names.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr", "setattr"):
                name = getattr(node.args[1], "value", None)
                names |= {name} if isinstance(name, str) and is_private(name) and name not in own else set()
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        names |= overridden(importlib.import_module(name), modules)
        for name in names - NOT_COUNTED:
            found.setdefault(name, set()).add(path.relative_to(root).as_posix())
    return found


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    sys.path.insert(0, str(root))
    names = private_names(root)
    for name, files in sorted(names.items()):
        print(f"{name}: {', '.join(sorted(files))}")
    print(f"{len(names)} names")
