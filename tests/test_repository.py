"""The repository keeps its promises: the README runs, the doors of the package are documented, imports go one way."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import torchimplicit as ti
from benchmarks.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "torchimplicit"

# A room of the package may import from the rooms in the lines above its own, and from nowhere else in the package.
FLOORS = [
    "_norms _options _solution _closure _tape _purity _precision _refinement _profile _eagerly _extension",
    "_layout _report linear _progress _tangent _evaluation",
    "_objective _shapes _spread _promises",
    "_problem",
    "solvers _adjoint _isolate _system",
    "_tolerance",
    "_books",
    "_iterate",
    "_mixed",
    "_stages _rules",
    "_equation",
    "_attach _transformed _unroll _traced",
    "_call",
    "_api",
    "diagnostics",
    "nn",
    "__init__",
    "experiments integrations",
]


def _blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", *(page for page in PAGES if _blocks(page, "python"))]


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at it
def test_the_python_of_a_document_runs(document: str) -> None:
    blocks = _blocks(document, "python")
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, document, "exec"), namespace)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_command_of_a_document_is_a_target(document: str) -> None:
    text = (ROOT / document).read_text()
    commands = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE))
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert "test" in commands
    assert commands <= targets


def test_the_readme_names_both_commands() -> None:
    commands = "\n".join(_blocks("README.md", "sh")).splitlines()
    assert {"make mnist", "make test"} <= {command.partition("#")[0].strip() for command in commands}


def test_links_between_documents_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("name", ti.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(ti, name)
    assert inspect.getdoc(thing)
    # A dataclass without a docstring of its own is given its signature for one.
    assert not (thing.__doc__ or "").startswith(f"{name}(")


@pytest.mark.parametrize("name", [name for name in ti.__all__ if inspect.isclass(getattr(ti, name))])
def test_every_public_method_is_documented(name: str) -> None:
    for method, function in vars(getattr(ti, name)).items():
        if not method.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
            assert inspect.getdoc(function), f"{name}.{method}"


def test_importing_the_library_brings_torch_and_nothing_else() -> None:
    program = """
import sys, torch
before = {name.partition(".")[0] for name in sys.modules}
import torchimplicit
print(*{name.partition(".")[0] for name in sys.modules} - before, "torchimplicit.experiments" in sys.modules)
"""
    assert _run(program).split() == ["torchimplicit", "False"]


def test_layers_and_diagnostics_are_imported_when_they_are_asked_for() -> None:
    program = """
import sys, torchimplicit as ti
parts = [f"torchimplicit.{name}" for name in ("nn", "diagnostics")]
print([part in sys.modules for part in parts])
print(sorted({"diagnostics", *ti.__all__} - set(dir(ti))))
print(ti.monitor.__name__, ti.check_gradients.__name__, [part in sys.modules for part in parts])
print(ti.nn is sys.modules["torchimplicit.nn"], ti.monitor is ti.monitor, hasattr(ti, "no_such_name"))
"""
    shown = ["[False, False]", "[]", "monitor check_gradients [False, True]", "True True False"]
    assert _run(program).splitlines() == shown
    assert _run("from torchimplicit import *; print(nn.__name__, check_gradients.__name__)").split() == [
        "torchimplicit.nn",
        "check_gradients",
    ]


def test_an_import_stays_small() -> None:
    """Modules, classes and allocations cost time: as many as few enough not to set off a pass over torch's objects."""
    program = """
import gc, sys, torch
gc.disable()
before, modules = gc.get_count()[0], len(sys.modules)
import torchimplicit
print(gc.get_count()[0] - before, len(sys.modules) - modules)
"""
    allocations, modules = (int(word) for word in _run(program).split())
    assert 0 < modules <= 90
    assert 0 < allocations <= 12_000


def _run(program: str) -> str:
    environment = {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def _room(module: tuple[str, ...]) -> str:
    return module[0] if module else "__init__"


def _imports(path: Path) -> Iterator[str]:
    """Yield the room of each import of the package itself, wherever in the file it stands."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (_room(tuple(parts[1:])) for parts in names if parts[0] == "torchimplicit")
        elif isinstance(node, ast.ImportFrom):
            parts = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                parts = here[: len(here) - node.level] + parts
            elif parts[0] == "torchimplicit":
                parts = parts[1:]
            else:
                continue
            if parts:
                yield _room(parts)
            else:  # `from . import nn`, `from torchimplicit import nn`: the names may be rooms
                rooms = " ".join(FLOORS).split()
                yield from (alias.name if alias.name in rooms else "__init__" for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    height = {room: level for level, floor in enumerate(FLOORS) for room in floor.split()}
    room = _room(path.relative_to(PACKAGE).with_suffix("").parts)
    assert room in height, f"{room} is new: give it a place in FLOORS"
    for other in _imports(path):
        assert other == room or height[other] < height[room], f"{room} must not import {other}"


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == ti.__version__
    assert f"{ti.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert isinstance(ti.nn, ModuleType)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_says_what_lives_in_it(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.splitlines()[0].strip()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_a_change_of_the_present_source(mutant: Mutant) -> None:
    changed = mutant.applied((PACKAGE / mutant.file).read_text())
    if mutant.file.endswith(".py"):
        ast.parse(changed)
