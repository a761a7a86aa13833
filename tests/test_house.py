"""The rules of the house, read off the source: who may import whom, no architecture by name, nothing swallowed."""

from __future__ import annotations

import ast
import importlib
import importlib.resources
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import weft

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "rewrite": {"rewrite"},
    "quant": {"quant"},
    "kernels": {"kernels", "quant"},
    "passes": {"passes", "rewrite", "quant", "kernels"},
    "weft": {"weft", "rewrite", "passes", "kernels", "quant"},
}
COMMON = ("errors", "text")
"""The modules of the face that every folder may import: they import nothing of weft."""
ENGINE = tuple(f for f in MAY_IMPORT if f != "weft")
COMMON_WORDS = {"align", "bit", "clip", "codegen", "cvt", "encoderdecoder"}  # cvt: an instruction of PTX
"""Names of model types that are words of English or of torch first."""
ARCHITECTURES = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in CONFIG_MAPPING_NAMES} - COMMON_WORDS


def sources(*folders: str) -> list[Path]:
    """Every Python file of ``folders``."""
    return sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """``path`` as a test's name."""
    return str(path.relative_to(ROOT))


def imported_folders(tree: ast.AST, own: str) -> Iterator[str]:
    """The top-level folders that a file of folder ``own`` imports, in any spelling; the face counts as ``weft``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [a.name.split(".") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            paths = [base + [a.name] for a in node.names]
            if node.level:
                paths = [["weft", *([own] if node.level == 1 and own != "weft" else []), *path] for path in paths]
        else:
            continue
        for path in paths:
            if path[0] == "weft" and path[1:] and path[1] in COMMON:
                continue
            if path[0] == "weft":
                yield path[1] if len(path) > 1 and path[1] in MAY_IMPORT else "weft"
            elif path[0] in MAY_IMPORT:
                yield f"{path[0]} (not as weft.{path[0]})"


def architectures(tree: ast.AST) -> set[str]:
    """``model_type`` and the architectures that identifiers and strings name; docstrings may name them."""
    prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    found: set[str] = set()
    for node in ast.walk(tree):
        texts = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")]
        if isinstance(node, ast.Constant) and id(node) not in prose:
            texts.append(node.value)
        for text in texts:
            if isinstance(text, str):
                found |= named_in(text)
    return found


def named_in(text: str) -> set[str]:
    """Long names count anywhere in ``text``, short ones only as a word of their own."""
    whole = re.sub(r"[^a-z0-9]", "", text.lower())
    words = {w.lower() for w in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+", text)}
    found = {a for a in ARCHITECTURES if a in words or (len(a) > 4 and a in whole)}
    return found | ({"model_type"} if "model_type" in text else set())


def swallowed(tree: ast.AST) -> list[int]:
    """Lines of handlers that catch everything and do nothing."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and all(isinstance(s, ast.Pass | ast.Continue) or ast.unparse(s) == "..." for s in node.body)
    ]


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions and methods of public classes, and public classes, without a docstring."""
    found = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        methods = [m for m in node.body if isinstance(m, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
        found += [d.name for d in (node, *methods) if not d.name.startswith("_") and ast.get_docstring(d) is None]
    return found


def exceptions() -> Iterator[type[BaseException]]:
    """The public classes of exceptions that the five folders define."""
    for path in sources(*MAY_IMPORT):
        parts = path.relative_to(ROOT).with_suffix("").parts
        classes = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
        if any(name.endswith("Error") for name in classes):
            module = importlib.import_module(".".join(parts if parts[0] == "weft" else ("weft", *parts)))
            yield from (c for c in (getattr(module, n) for n in classes) if issubclass(c, BaseException))


@pytest.mark.parametrize("path", sources(*MAY_IMPORT), ids=name_of)
def test_imports_follow_the_direction_of_the_house(path: Path) -> None:
    """The third column of the table in docs/architecture.md."""
    own = path.relative_to(ROOT).parts[0]
    assert set(imported_folders(ast.parse(path.read_text()), own)) <= MAY_IMPORT[own]


@pytest.mark.parametrize("path", sources(*ENGINE), ids=name_of)
def test_the_engine_names_no_architecture(path: Path) -> None:
    """Rules match operations: no model type, class or module name decides anything."""
    assert architectures(ast.parse(path.read_text())) == set()


@pytest.mark.parametrize("path", sources(*MAY_IMPORT, "examples", "benchmarks", "tests"), ids=name_of)
def test_no_exception_is_swallowed(path: Path) -> None:
    """An error is handled, reported or raised."""
    assert swallowed(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", sources(*MAY_IMPORT), ids=name_of)
def test_what_is_public_is_documented(path: Path) -> None:
    """Every public function, class and method has a docstring."""
    assert undocumented(ast.parse(path.read_text())) == []


def test_every_error_can_be_caught_as_one() -> None:
    """Public classes of exceptions, in whatever folder, derive from ``WeftError``."""
    assert len(raised := list(exceptions())) > 10 and not [c for c in raised if not issubclass(c, weft.WeftError)]


@pytest.mark.parametrize("name", COMMON)
def test_what_every_folder_imports_imports_none(name: str) -> None:
    """Else folders could reach each other through it."""
    assert set(imported_folders(ast.parse((ROOT / "weft" / f"{name}.py").read_text()), "weft")) == set()


def test_types_are_shipped() -> None:
    """Type checkers read the annotations of the installed package."""
    assert importlib.resources.files("weft").joinpath("py.typed").is_file()


@pytest.mark.parametrize(
    ("own", "line", "folders"),
    [
        ("rewrite", "from ..kernels.rms_norm import rms_norm", {"kernels"}),
        ("rewrite", "from .. import kernels", {"kernels"}),
        ("rewrite", "from . import graph", {"rewrite"}),
        ("kernels", "import weft.passes.defaults", {"passes"}),
        ("kernels", "from weft import optimize", {"weft"}),
        ("passes", "from weft.api import optimize", {"weft"}),
        ("quant", "import kernels.rows", {"kernels (not as weft.kernels)"}),
        ("weft", "from .api import optimize", {"weft"}),
        ("weft", "from .rewrite.errors import WeftError", {"rewrite"}),
        ("quant", "import torch.library", set()),
        ("quant", "from weft.errors import WeftError", set()),
        ("quant", "from ..errors import WeftError", set()),
        ("quant", "from weft.errors_of_another import WeftError", {"weft"}),
    ],
)
def test_every_spelling_of_an_import_is_seen(own: str, line: str, folders: set[str]) -> None:
    """The reader of imports itself."""
    assert set(imported_folders(ast.parse(line), own)) == folders


def test_the_readers_see_what_is_forbidden() -> None:
    """The other readers, on code that breaks each rule."""
    code = """
def f(m):
    try:
        return m.config.model_type == "x" or isinstance(m, LlamaMLP)
    except Exception:
        pass
"""
    tree = ast.parse(code)
    assert architectures(tree) == {"model_type", "llama"}
    assert architectures(ast.parse('"""As Llama does."""\ngpt_neox = "opt"')) >= {"gptneox", "opt"}
    assert swallowed(tree) == [5]
    assert undocumented(tree) == ["f"]
