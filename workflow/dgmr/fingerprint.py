"""Hashes of what a result depends on: values, code, commands, files. :mod:`dgmr.keys` puts them together."""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dgmr.errors import DgmrError
from dgmr.files import read_json, sha256, write_json

PACKAGE = Path(__file__).parent
RULES = PACKAGE.parent / "rules"
HASHES = Path("work/hashes.json")
# They say how a stage is called and checked, not what it computes: values reach it through its
# command line, which Snakemake watches.
_NEUTRAL = {"dgmr.params", "dgmr.errors", "dgmr.cli", "dgmr.fingerprint", "dgmr.keys"}
_DIRECTIVE = 4
"""Column of a rule's directives, as snakefmt has them."""
_BLANK = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)


def key(*parts: Any) -> str:
    """Twelve hexadecimal digits that change when any of the JSON-able ``parts`` does."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of ``packages``, by name."""
    return {name: importlib.metadata.version(name) for name in packages}


@functools.cache
def code(module: str) -> str:
    """Hash of the source of ``module`` and of all modules of this package it imports, in the end.

    ``dgmr.prune.orders``, say. Comments and docstrings do not count: it is a hash of the syntax
    tree, so rewording one reruns nothing. Templates beside a stage's modules count.
    """
    modules = sorted(_closure(module))
    trees = {name: _tree(_source(name)) for name in modules}
    templates = {
        path.name: path.read_text()
        for folder in sorted({_source(name).parent for name in modules})
        for path in sorted(folder.glob("*.jinja"))
    }
    return key(trees, templates)


@functools.cache
def command(rule: str) -> str:
    """The shell command of a rule in ``workflow/rules`` and the params it is put together from, as they
    are written there, but for spaces and comments; empty where it has none."""
    return _commands().get(rule, "")


@functools.cache
def _commands() -> dict[str, str]:
    """By rule. A Snakefile is no Python, but its tokens are."""
    found: dict[str, str] = {}
    for path in sorted(RULES.glob("*.smk")):
        before, rule, directive = "", "", ""
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if before == "rule":
                rule = token.string
            if token.type == tokenize.NAME and token.start[1] in (0, _DIRECTIVE):
                directive = token.string
            elif directive == "shell" and token.type == tokenize.STRING:
                found[rule] = found.get(rule, "") + ast.literal_eval(token.string)
            elif directive == "params" and token.type not in _BLANK:
                found[rule] = found.get(rule, "") + token.string
            before = token.string
    return found


def content(paths: Iterable[Path]) -> list[str | None]:
    """SHA-256 of each file, in the order of ``paths``; None for one that is not there.

    A file is read once and then again only when its size or time has changed: ``work/hashes.json``
    remembers. So touching a file, or checking out the same one again, changes nothing.
    """
    try:
        known = read_json(HASHES)
    except (OSError, ValueError):
        known = {}
    found: list[str | None] = []
    new = {}
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            found.append(None)
            continue
        seen = [status.st_size, status.st_mtime_ns]
        *was, digest = known.get(str(path), [None])
        if was != seen:
            digest = sha256(path)
            new[str(path)] = [*seen, digest]
        found.append(digest)
    if new:
        with contextlib.suppress(DgmrError):  # a full disk; they are read again next time
            write_json(HASHES, known | new)
    return found


def listing(folder: Path) -> str:
    """Hash of the names and sizes of all files in ``folder``, for folders too large to be read each time.

    So a file that is replaced by one of the same size is not noticed.
    """
    found = []
    for where, _, names in os.walk(folder, followlinks=True):
        within = os.path.relpath(where, folder)
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a link that leads nowhere
                found.append((within, name, os.stat(os.path.join(where, name)).st_size))
    return key(sorted(found))


def _closure(module: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or name in _NEUTRAL:
            continue
        found.add(name)
        waiting += _imports(name)
    return found


@functools.cache
def _imports(module: str) -> list[str]:
    """Modules of this package that ``module`` imports, anywhere in its text."""
    names: list[str] = []
    for node in ast.walk(ast.parse(_source(module).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # Either a module and names in it, or a package and modules in it.
            names += [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
    return [name for name in names if name.startswith("dgmr.") and _is_module(name)]


def _is_module(name: str) -> bool:
    base = PACKAGE.joinpath(*name.split(".")[1:])
    return base.with_suffix(".py").is_file()


def _source(name: str) -> Path:
    return PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")


@functools.cache
def _tree(path: Path) -> str:
    """Hash of the syntax tree without docstrings."""
    return key(_plain(ast.parse(path.read_text())))


def _plain(node: Any) -> Any:
    """As JSON, but not ``ast.dump``: a new Python's nodes have new fields, which are empty for older code."""
    match node:
        case list():
            return [_plain(each) for each in node if not _is_docstring(each)]
        case ast.AST():
            fields = ((name, _plain(value)) for name, value in ast.iter_fields(node))
            return [type(node).__name__, {name: value for name, value in fields if value}]
        case None:
            return None
        case _:
            return f"{type(node).__name__} {node!r}"


def _is_docstring(statement: Any) -> bool:
    """Of a module, class, function or attribute."""
    match statement:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
    return False
