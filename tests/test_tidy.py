"""The house rules that a machine can hold: sizes, broad excepts, environment, pickle, `Any`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvtier

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_LINE = 100
MAX_PUBLIC_METHODS = 15

PACKAGE = Path(kvtier.__path__[0])
# The only places where any failure of ours becomes a miss, a counter, or an answer to a client.
SHELLS = {
    "engine/tier.py",
    "engine/vllm/line.py",
    "engine/vllm/tier.py",
    "node/movers.py",
    "node/connection.py",
}
# `cluster/local.py` sets what Ray takes from the environment and in no other way.
USES_ENVIRONMENT = {"config/host.py", "cluster/local.py"}

ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
PICKLES = {"pickle", "cloudpickle", "dill"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> list[str]:
    """Every module but the generated ones, by its path in the package."""
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return sorted(path.as_posix() for path in paths if not path.is_relative_to("wire/pb"))


def faults(name: str, text: str) -> Iterator[str]:
    """What is untidy in one module."""
    lines = text.splitlines()
    if len(lines) > MAX_MODULE_LINES:
        yield f"{len(lines)} lines, limit {MAX_MODULE_LINES}"
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE:
            yield f"line {number}: {len(line)} characters, limit {MAX_LINE}"
    for node in ast.walk(ast.parse(text)):
        where = f"line {getattr(node, 'lineno', 0)}"
        yield from (f"{where}: {fault}" for fault in faults_of_node(name, node))


def faults_of_node(name: str, node: ast.AST) -> Iterator[str]:
    if isinstance(node, Function):
        length = (node.end_lineno or 0) - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            yield f"{node.name} has {length} lines, limit {MAX_FUNCTION_LINES}"
        if any(mentions(annotation, "Any") for annotation in annotations(node)):
            yield f"{node.name} has Any in its signature"
    if isinstance(node, ast.ClassDef):
        public = [
            each.name
            for each in node.body
            if isinstance(each, Function) and not each.name.startswith(("_", "test_"))
        ]
        if len(public) > MAX_PUBLIC_METHODS:
            yield f"{node.name} has {len(public)} public methods, limit {MAX_PUBLIC_METHODS}"
    if isinstance(node, ast.ExceptHandler) and name not in SHELLS:
        broad = node.type is None or any(
            mentions(node.type, each) for each in ("Exception", "BaseException")
        )
        passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        if broad and not passes_on:
            yield "catches everything"
    if name not in USES_ENVIRONMENT and {*names(node)} & ENVIRONMENT:
        yield "uses the environment"
    if isinstance(node, ast.Import | ast.ImportFrom) and {*names(node)} & PICKLES:
        yield "imports pickle"


def annotations(function: Function) -> Iterator[ast.AST]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    yield from (each.annotation for each in every if each and each.annotation)
    if function.returns:
        yield function.returns


def mentions(expression: ast.AST, name: str) -> bool:
    return any(name in names(node) for node in ast.walk(expression))


def names(node: ast.AST) -> list[str]:
    """The names that one node itself brings up, without those below it."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return [name]
        case ast.Import(names=aliases):
            return [part for alias in aliases for part in alias.name.split(".")]
        case ast.ImportFrom(module=module, names=aliases):
            return [*(module or "").split("."), *(alias.name for alias in aliases)]
        case _:
            return []


@pytest.mark.parametrize("name", modules())
def test_the_module_is_tidy(name: str):
    assert [*faults(name, (PACKAGE / name).read_text())] == []


def test_all_rooms_are_looked_at():
    rooms = {name.split("/")[0] for name in modules()}
    assert {"core", "codec", "stores", "node", "engine", "router"} <= rooms


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x = 1\n" * 401, "401 lines"),
        (f"x = '{'y' * 100}'", "106 characters"),
        ("def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
        ("async def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
        ("class A:\n" + "".join(f"    def f{n}(self): ...\n" for n in range(16)), "16 public"),
        ("try: f()\nexcept Exception: pass", "catches everything"),
        ("try: f()\nexcept (OSError, BaseException) as e: pass", "catches everything"),
        ("try: f()\nexcept: pass", "catches everything"),
        ("try: f()\nexcept Exception: raise Other", "catches everything"),
        ("import os\nx = os.environ['A']", "uses the environment"),
        ("from os import getenv", "uses the environment"),
        ("import pickle", "imports pickle"),
        ("from cloudpickle import dumps", "imports pickle"),
        ("from ray import cloudpickle", "imports pickle"),
        ("def f(x: dict[str, Any]): ...", "f has Any"),
        ("def f() -> typing.Any: ...", "f has Any"),
    ],
)
def test_what_is_untidy_is_seen(text: str, fault: str):
    assert any(fault in each for each in faults("core/x.py", text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("node/movers.py", "try: f()\nexcept Exception: pass"),
        ("core/x.py", "try: f()\nexcept OSError: pass"),
        ("core/x.py", "try: f()\nexcept BaseException:\n  g()\n  raise"),
        ("config/host.py", "import os\nx = os.environ['A']"),
        ("core/x.py", "x = 1\n" * 400),
        ("core/x.py", "def f():\n" + "    x = 1\n" * 59),
        ("core/x.py", "class A:\n" + "".join(f"    def f{n}(self): ...\n" for n in range(15))),
        ("core/x.py", "def f(x: Anything) -> ManyOf[Any1]: ..."),
    ],
)
def test_what_is_tidy_is_left_alone(name: str, text: str):
    assert [*faults(name, text)] == []
