"""The layout: no import circles, dependencies in one direction, short modules, one name for one thing."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"slr_core": "slr_core", "slr_server": "server"}
"""Packages and their folders: ``server/`` is installed as ``slr_server``."""

LAYERS = (
    "_version",
    "errors",
    "_install",
    "ray_cluster",
    "suggest",
    "yaml_text",
    "validation",
    "panics",
    "config",
    "params",
    "types",
    "loop",
    "model",
    "generation",
    "checkpoint",
    "reasoner",
    "engine",
    "slr_server",
)
"""Lowest first: a part imports itself and those before it. A part is a package or a module right below ``slr_core``."""
SIDES = {
    "client": "types",
    "tasks": "types",
    "training": "reasoner tasks",
    "evaluation": "engine client tasks training",
    "cli": "engine client tasks training evaluation",
}
"""Parts beside the layers: the highest layer and the other sides that each may import. The server imports ``tasks``."""
LAZY = {("cli", "slr_server")}
"""Against the order, inside a function alone: ``slr serve``."""

MOST_LINES = 400
LONG = re.compile(r"^# Over 400 lines: \w.{10,}$", re.MULTILINE)
"""How a longer module gives its reason: a comment before its first import."""

SAME_NAME = {
    "main": "the function behind a console script",
    "to_job": "each protocol module translates its own body",
}
"""Public names that more than one module defines, and why that confuses nobody."""
ENDPOINTS = ("slr_core.cli.", "slr_server.routes.")
"""A command or an endpoint is called after what it runs: there, the name belongs to the user's interface."""

SERVE_ONLY = ("fastapi", "starlette", "uvicorn", "httptools", "prometheus_client", "pydantic_settings")
"""What the extra ``serve`` installs."""


@dataclass(frozen=True)
class Module:
    """A module as written. ``imports`` holds (absolute name, inside a function) of each import."""

    name: str
    is_package: bool
    source: str
    tree: ast.Module
    imports: frozenset[tuple[str, bool]]

    @property
    def part(self) -> str:
        package, _, rest = self.name.partition(".")
        return rest.partition(".")[0] if package == "slr_core" else package


# -- reading the tree ----------------------------------------------------------------------------


def read(root: Path) -> dict[str, Module]:
    files = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            name = ".".join((package, *path.relative_to(root / folder).with_suffix("").parts))
            files[name.removesuffix(".__init__")] = path
    modules = {}
    for name, path in files.items():
        source = path.read_text()
        tree = ast.parse(source)
        is_package = path.name == "__init__.py"
        found = frozenset(imports_of(tree, name if is_package else name.rpartition(".")[0], files.keys()))
        modules[name] = Module(name, is_package, source, tree, found)
    return modules


def imports_of(node, package, names, lazy=False):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package.rsplit(".", child.level - 1)[0] if child.level else ""
            base = ".".join(filter(None, (base, child.module)))
            for alias in child.names:
                submodule = f"{base}.{alias.name}"
                yield (submodule if submodule in names else base), lazy
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(child, package, names, lazy or inside)


def ancestors(name):
    return {name[:i] for i, letter in enumerate(name) if letter == "."}


def public(tree):
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.name for node in tree.body if isinstance(node, definitions) and not node.name.startswith("_")]


# -- the checks: each gives the faults that it finds -----------------------------------------------


def circles(modules):
    """Imports of every kind count, ``TYPE_CHECKING`` and those inside functions too, apart from :data:`LAZY`."""
    edges = {}
    for name, module in modules.items():
        edges[name] = set()
        for target, lazy in module.imports:
            if target in modules and not (lazy and (module.part, modules[target].part) in LAZY):
                # Importing a.b.c runs a and a.b first.
                edges[name] |= {target, *(ancestors(target) & modules.keys())} - ancestors(name) - {name}
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in leaves:
            del edges[name]
    return [f"{name} imports, and is imported by, {', '.join(sorted(edges[name] & edges.keys()))}" for name in edges]


def against_direction(modules):
    for name, module in modules.items():
        for target, lazy in sorted(module.imports):
            if target.partition(".")[0] not in FOLDERS or not module.part:
                continue
            part = modules[target].part if target in modules else ""
            if part not in (module.part, *below(module.part)) and not (lazy and (module.part, part) in LAZY):
                yield f"{name} imports {target}"


def below(part):
    if part in SIDES:
        layer, *sides = SIDES[part].split()
        return (*LAYERS[: LAYERS.index(layer) + 1], *sides)
    assert part in LAYERS, f"slr_core.{part} has no place in LAYERS or SIDES of this test"
    return (*LAYERS[: LAYERS.index(part)], *(["tasks"] if part == "slr_server" else []))


def absolute(modules):
    for name, module in modules.items():
        if module.part == "slr_server":
            for node in ast.walk(module.tree):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                yield from (
                    f"{name} imports {n}: its folder is `server`" for n in names if n.startswith(tuple(FOLDERS)[1:])
                )


def too_long(root, folders=("slr_core", "server", "benchmarks", "docs", "deploy")):
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        source = path.read_text()
        lines = source.count("\n")
        head = re.split(r"^(?:import|from) ", source, maxsplit=1, flags=re.MULTILINE)[0]
        reason = bool(LONG.search(head))
        if lines > MOST_LINES and not reason:
            yield f"{path.relative_to(root)} has {lines} lines and gives no reason"
        if lines <= MOST_LINES and reason:
            yield f"{path.relative_to(root)} has {lines} lines and needs no reason"


def unexported(modules):
    """Of each package that has ``__all__``: what it defines or imports lazily, and is not listed; and the reverse."""
    for name, module in modules.items():
        bound, listed, lazy = set(public(module.tree)), None, set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                lazy |= {a.asname or a.name for n in node.body if isinstance(n, ast.ImportFrom) for a in n.names}
        for node in module.tree.body:
            for target in assigned(node):
                bound.add(target)
                if target == "__all__":
                    listed = set(ast.literal_eval(node.value))
        if module.is_package and listed is not None:
            own = {target for node in module.tree.body for target in assigned(node)} | set(public(module.tree)) | lazy
            yield from (f"{name} lacks {n} in __all__" for n in sorted(own - listed) if not n.startswith("_"))
            yield from (f"{name} lists {n}, which it does not have" for n in sorted(listed - bound))


def assigned(node):
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def same_name(modules):
    homes = defaultdict(list)
    for name, module in modules.items():
        if not name.startswith(ENDPOINTS):
            for public_name in public(module.tree):
                homes[public_name].append(name)
    return [f"{n}: {', '.join(h)}" for n, h in sorted(homes.items()) if len(h) > 1 and n not in SAME_NAME]


def unlisted(modules, pyproject):
    listed = Counter(pyproject["tool"]["setuptools"]["packages"])
    packages = Counter(name for name, module in modules.items() if module.is_package)
    return sorted((listed - packages) + (packages - listed))


# -- this tree holds -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules():
    return read(ROOT)


def test_no_circle(modules):
    assert list(circles(modules)) == []


def test_one_direction(modules):
    assert list(against_direction(modules)) == []


def test_server_relative(modules):
    assert list(absolute(modules)) == []


def test_length():
    assert list(too_long(ROOT)) == []


def test_exports(modules):
    assert list(unexported(modules)) == []


def test_errors_exported(modules):
    exported = ast.unparse(modules["slr_core"].tree)
    errors = public(modules["slr_core.errors"].tree)
    assert [name for name in errors if f"'{name}'" not in exported] == []


def test_same_name(modules):
    assert list(same_name(modules)) == []


def test_packages_listed(modules):
    assert unlisted(modules, tomllib.loads((ROOT / "pyproject.toml").read_text())) == []


def test_imports_no_serve(modules):
    """No module of ``slr_core`` imports a package of the extra ``serve`` when it is imported."""
    assert list(imports_serve(modules)) == []


def imports_serve(modules):
    for name, module in modules.items():
        if module.part != "slr_server":
            yield from (
                f"{name} imports {target}"
                for target, lazy in sorted(module.imports)
                if target.partition(".")[0] in SERVE_ONLY and not lazy
            )


@pytest.mark.slow
def test_needs_no_serve(modules):
    """Every module of ``slr_core`` is imported where the packages of the extra ``serve`` cannot be."""
    names = [name for name in modules if modules[name].part != "slr_server" and not name.endswith("__main__")]
    assert import_without(names, SERVE_ONLY) == (0, "")


def import_without(names, blocked, folder=ROOT):
    code = f"""
import sys
from importlib import import_module
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} belongs to the extra serve")
sys.meta_path.insert(0, Blocked())
for name in {names!r}:
    import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr.strip().rpartition("\n")[2]


# -- each check finds what it is for ---------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """Add files, by their module's name, to a project that is empty at first, and read it."""

    def write(files):
        for name, text in files.items():
            package, *rest = name.split(".")
            path = tmp_path.joinpath(FOLDERS[package], *rest).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            for parent in path.relative_to(tmp_path).parents[:-1]:
                (tmp_path / parent / "__init__.py").touch()
            path.write_text(text)
        return read(tmp_path)

    return write


@pytest.mark.parametrize(
    "back",
    [
        "from slr_core.loop.a import x",
        "from slr_core.loop import a",
        "import slr_core.loop.a",
        "from . import a",
        "from .a import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from slr_core.loop.a import x",
        "def f():\n    from slr_core.loop.a import x",
        "class C:\n    async def f(self):\n        import slr_core.loop.a",
    ],
)
def test_finds_circle(tree, back):
    assert circles(tree({"slr_core.loop.a": "import slr_core.loop.b", "slr_core.loop.b": ""})) == []
    assert len(circles(tree({"slr_core.loop.b": back}))) == 2


def test_finds_package_circle(tree):
    """A package's ``__init__`` runs before its modules: what it imports must not import one of them."""
    assert circles(tree({"slr_core.loop.a": "", "slr_core.model.b": "import slr_core.loop.a"})) == []
    assert circles(tree({"slr_core.loop.__init__": "import slr_core.model.b"})) != []


def test_lazy_server(tree):
    modules = tree({"slr_core.cli.serve": "def f():\n    import slr_server.cli", "slr_server.cli": ""})
    assert list(against_direction(modules)) == []
    modules = tree({"slr_core.cli.serve": "import slr_server.cli"})
    assert list(against_direction(modules)) == ["slr_core.cli.serve imports slr_server.cli"]


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("slr_core.engine.x", "slr_core.generation.y", True),
        ("slr_core.generation.x", "slr_core.engine.y", False),
        ("slr_core.loop.x", "slr_core.model.y", False),
        ("slr_core.config", "slr_core.params", False),
        ("slr_core.engine.x", "slr_server.y", False),
        ("slr_core.cli.x", "slr_server.y", False),
        ("slr_core.cli.x", "slr_core.evaluation.y", True),
        ("slr_core.training.x", "slr_core.engine.y", False),
        ("slr_core.engine.x", "slr_core", False),
        ("slr_server.x", "slr_core.engine.y", True),
        ("slr_server.x", "slr_core.evaluation.y", False),
        ("slr_server.x", "slr_core.training.y", False),
        ("slr_server.x", "slr_core", False),
    ],
)
def test_finds_direction(tree, module, target, allowed):
    modules = tree({f"{target}.__init__": "", module: f"import {target}"})
    assert list(against_direction(modules)) == ([] if allowed else [f"{module} imports {target}"])


def test_finds_new_part(tree):
    with pytest.raises(AssertionError, match=r"slr_core\.utils has no place"):
        list(against_direction(tree({"slr_core.utils": "import slr_core.errors", "slr_core.errors": ""})))


@pytest.mark.parametrize("line", ["import slr_server.b", "from slr_server import b", "from slr_server.b import c"])
def test_finds_absolute(tree, line):
    assert list(absolute(tree({"slr_server.a": "from .b import c\nimport slr_core.errors"}))) == []
    assert len(list(absolute(tree({"slr_server.a": line})))) == 1


REASON = "# Over 400 lines: the formulas belong on one page.\n"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("x = 1\n" * 400, False),
        ("x = 1\n" * 401, True),
        ('"""A module."""\n\n' + REASON + "import re\n" + "x = 1\n" * 401, False),
        ("import re\n" + REASON + "x = 1\n" * 401, True),
        ("# Over 400 lines: long\n" + "x = 1\n" * 401, True),
        (REASON + "x = 1\n", True),
    ],
)
def test_finds_length(tree, tmp_path, source, fault):
    tree({"slr_server.a": source})
    assert len(list(too_long(tmp_path))) == fault


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from slr_core.a.b import X\n__all__ = ['X', 'f', 'V']\nV = 1\ndef f(): ...", None),
        ("__all__ = []\ndef f(): ...", "lacks f"),
        ("__all__ = []\nclass C: ...", "lacks C"),
        ("__all__ = []\nV: int = 1", "lacks V"),
        ("__all__ = []\n_V = 1", None),
        ("__all__ = ['X']", "lists X, which"),
        ("if TYPE_CHECKING:\n    from slr_core.a.b import X\n__all__ = ['X']", None),
        ("if TYPE_CHECKING:\n    from slr_core.a.b import X\n__all__ = []", "lacks X"),
        ("def f(): ...", None),
    ],
)
def test_finds_export(tree, source, fault):
    found = list(unexported(tree({"slr_core.a.__init__": source})))
    assert (fault is None and not found) or (len(found) == 1 and fault in found[0])


def test_finds_same_name(tree):
    assert same_name(tree({"slr_core.a": "class Usage: ...\ndef _f(): ...", "slr_server.b": "def _f(): ..."})) == []
    assert same_name(tree({"slr_server.b": "class Usage: ..."})) == ["Usage: slr_core.a, slr_server.b"]
    assert same_name(tree({"slr_server.b": "", "slr_server.routes.c": "async def Usage(): ..."})) == []


def test_finds_unlisted(tree):
    modules = tree({"slr_core.a.b": "", "slr_server.c": ""})
    listed = ["slr_core", "slr_core.a", "slr_server"]
    assert unlisted(modules, {"tool": {"setuptools": {"packages": listed}}}) == []
    assert unlisted(modules, {"tool": {"setuptools": {"packages": listed[:2]}}}) == ["slr_server"]
    assert unlisted(modules, {"tool": {"setuptools": {"packages": [*listed, "slr_core.gone"]}}}) == ["slr_core.gone"]


def test_finds_serve(tree, tmp_path):
    lazy = "def f():\n    import uvicorn"
    files = {"slr_core.a": "import json", "slr_core.b": "import fastapi.responses", "slr_core.c": lazy}
    assert list(imports_serve(tree(files))) == ["slr_core.b imports fastapi.responses"]
    assert import_without(["slr_core.a"], SERVE_ONLY, tmp_path) == (0, "")
    code, message = import_without(["slr_core.a", "slr_core.b"], SERVE_ONLY, tmp_path)
    assert (code, message) == (1, "ImportError: fastapi belongs to the extra serve")


def test_same_name_reasons(modules):
    """A name that only one module defines needs no reason."""
    names = Counter(name for module in modules.values() for name in public(module.tree))
    assert [name for name in SAME_NAME if names[name] < 2] == []
