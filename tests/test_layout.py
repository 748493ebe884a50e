"""Which way imports point (section 2 of the design), and what modules may be called."""

import ast
import sys
from pathlib import Path

import pytest

import patchlib

PACKAGE = Path(patchlib.__file__).parent
# from the top down: a file imports from its own package and from what stands above it
ORDER = [
    ["errors"],
    ["registry"],
    ["config"],
    ["ops"],
    ["layers"],
    ["models"],
    ["weights"],
    ["factory"],
    ["preprocessing", "labels"],
    ["generation"],
    ["optimization"],
    ["text"],
    ["train"],
    ["cli"],
    ["__main__"],
]
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in names}
# what may be imported at the top of a file; all else is imported where it is used
CORE = {"torch", "einops", "safetensors", *sys.stdlib_module_names}
ON_DEMAND = {"ops.depthwise_triton": {"triton"}}  # imported as a whole where it is used

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports(path):
    """Absolute names of what a file imports, wherever it does: (name, level of nesting, only for type checkers)."""
    module = module_of(path)
    package = f"patchlib.{module}" if path.name == "__init__.py" else f"patchlib.{module}".rpartition(".")[0]

    def visit(node, depth, typing):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, depth, typing) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*above, *([child.module] if child.module else [])])
                for alias in child.names:
                    inner = f"{base}.{alias.name}"
                    known = base == "patchlib" or inner.removeprefix("patchlib.") in MODULES
                    yield (inner if known else base), depth, typing
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from visit(child, depth, True)
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from visit(child, depth + function, typing)

    return list(visit(ast.parse(path.read_text()), 0, False))


def ours(path):
    return [
        (name.removeprefix("patchlib").strip("."), *rest)
        for name, *rest in imports(path)
        if name.split(".")[0] == "patchlib"
    ]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_upward(path):
    own = module_of(path).split(".")[0]
    assert own in RANKS, f"{own} has no place in the order"
    for name, _, _ in ours(path):
        other = name.split(".")[0]
        if name == "__version__":
            continue
        assert other in RANKS, f"{module_of(path)} imports patchlib.{name}"
        assert other == own or RANKS[other] < RANKS[own], f"{module_of(path)} imports {name}, which stands below it"


def test_no_two_files_import_each_other():
    wanted = {module_of(path): {name for name, _, typing in ours(path) if not typing} for path in FILES}
    done: set[str] = set()
    while ready := {
        name for name, needs in wanted.items() if name not in done and needs & wanted.keys() <= done | {name}
    }:
        done |= ready
    assert wanted.keys() - done == set()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_the_top_of_a_file_imports_the_core_alone(path):
    allowed = CORE | {"patchlib"} | ON_DEMAND.get(module_of(path), set())
    roots = {name.split(".")[0] for name, depth, typing in imports(path) if depth == 0 and not typing}
    assert roots <= allowed


def test_the_registry_imports_errors_alone():
    for name in ("registry", "errors"):
        assert {one for one, *_ in ours(PACKAGE / f"{name}.py")} <= {"errors"}


def test_layers_know_no_models_config():
    for path in (PACKAGE / "layers").glob("*.py"):
        assert not {name for name, *_ in ours(path) if name.split(".")[0] in ("config", "models", "weights")}, path.name


def test_only_the_hub_speaks_to_the_hub():
    users = {module_of(path) for path in FILES for name, *_ in imports(path) if name.split(".")[0] == "huggingface_hub"}
    assert users == {"weights.hub"}


def test_no_module_bears_the_name_of_a_public_function():
    functions = {name for name in patchlib.__all__ if name.islower()}
    assert functions >= {"create_model", "preprocess", "save_pretrained"}
    stems = {part for name in MODULES for part in name.split(".")}
    assert not stems & functions


def test_no_file_evaluates_text_or_unpickles():
    """Besides torch.load in one place, which reads with weights_only=True."""
    calls = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                calls.setdefault(ast.unparse(node.func), []).append((module_of(path), ast.unparse(node)))
    for name in ("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "os.system", "subprocess.run"):
        assert name not in calls, calls.get(name)
    assert [where for where, _ in calls["torch.load"]] == ["weights.files"]
    assert all("weights_only=True" in call for _, call in calls["torch.load"])


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_every_file_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body
