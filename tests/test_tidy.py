"""Rules of the house that a linter does not know, checked on every Python file (after TigerBeetle's tidy)."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("protocol", "models", "equivariant", "worker", "client", "node", "simnet", "sotto")
FOLDERS = (*PACKAGES, "tests")
TEXTS = ("*.md", "Makefile", "pyproject.toml", ".ci/run", "docs/*.md", "equivariant/*.md", "sotto/demo/*.md")
FILE_LINES_MAX, FUNCTION_LINES_MAX, PARAMETERS_MAX = 500, 70, 6

# How often a file may catch everything; everybody else names what they expect.
SUPERVISORS = {
    "worker/service.py": 1,  # the service's one supervisor
    "client/driver.py": 1,  # the service's one supervisor
    "worker/engine.py": 2,  # whatever goes wrong in a forward or an answer is its steps' failure
    "node/engine_thread.py": 1,  # a thread's boundary: what a call raises is raised again in its caller's
    "models/tokenizer.py": 1,  # the tokenizers library raises bare Exception, and anything else goes on
    "node/serving.py": 1,  # the port's contract: what a handler raises costs its stream, never the node
    # The edge: libp2p raises anything, and one peer's failure must stay that peer's.
    "node/p2p/gossip.py": 2,
    "node/p2p/host.py": 1,
    "node/p2p/mesh.py": 1,
    "node/p2p/streams.py": 2,
    "node/p2p/tcp.py": 1,
    "node/p2p/upnp.py": 1,
    "node/p2p/yamux.py": 2,
    "sotto/portal.py": 2,  # threads' boundaries: what ends a thread is raised again in its caller's
    "simnet/checks/core.py": 1,  # whatever a check raises is that check's failure
    # The edge's virtual twin: handlers and validators that raise are part of the ports' contract.
    "simnet/gossip.py": 1,
    "simnet/network.py": 2,
}
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_METHODS = {("torch", "load"), ("torch", "save"), ("os", "system"), ("yaml", "load")}
# In two parts each, so that this file does not find itself.
MACHINE_PATH = re.compile(r"(?<![\w.~<>}/])/" + r"(?:work|tmp|home|root|Users|mnt)(?:/|\b(?![\w-]))")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX|HA" + r"CK)\b")

Problems = Iterator[tuple[int, str]]


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def catch_alls(tree: ast.AST) -> Problems:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and not _cleans_up(node):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {getattr(kind, "id", getattr(kind, "attr", "everything")) for kind in kinds}
            if names & {"everything", "Exception", "BaseException"}:
                yield node.lineno, "catches everything"


def _cleans_up(handler: ast.ExceptHandler) -> bool:
    """It undoes something and lets the exception go on."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def dangerous(tree: ast.AST) -> Problems:
    for node in ast.walk(tree):
        for module in _imported(node):
            if module.partition(".")[0] in BANNED_MODULES:
                yield node.lineno, f"imports {module}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
            yield node.lineno, f"calls {node.func.id}"
        if isinstance(node, ast.Attribute) and (getattr(node.value, "id", ""), node.attr) in BANNED_METHODS:
            yield node.lineno, f"uses {ast.unparse(node)}"
        if isinstance(node, ast.Global):
            yield node.lineno, "has global state"
        if isinstance(node, ast.FunctionDef) and node.name == "__del__":
            yield node.lineno, "has a __del__"


def acting_asserts(tree: ast.AST) -> Problems:
    """python -O leaves an assert out with what it does, so none calls a method of its own object."""
    for node in ast.walk(tree):
        for part in ast.walk(node.test) if isinstance(node, ast.Assert) else ():
            called = part.func if isinstance(part, ast.Call) else None
            if isinstance(called, ast.Attribute) and getattr(called.value, "id", "") == "self":
                yield node.lineno, f"asserts what {ast.unparse(called)} gives"


def long_functions(tree: ast.AST) -> Problems:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield node.lineno, f"{node.name} has {lines} lines"


def long_bodies(tree: ast.AST) -> Problems:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.body[0].lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield node.lineno, f"the body of {node.name} has {lines} lines"


def many_parameters(tree: ast.AST) -> Problems:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in given)
            if count > PARAMETERS_MAX:
                yield node.lineno, f"{node.name} has {count} parameters"


def libp2p_imports(tree: ast.AST) -> Problems:
    for node in ast.walk(tree):
        for module in _imported(node):
            if module.partition(".")[0] == "libp2p":
                yield node.lineno, "imports libp2p"


def imports_of_tests(tree: ast.AST) -> Problems:
    """What several tests share is a module of another name."""
    for node in ast.walk(tree):
        names = _imported(node)
        if isinstance(node, ast.ImportFrom):  # relative ones too
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        for name in names:
            if any(part.startswith("test_") for part in name.split(".")):
                yield node.lineno, f"imports {name}"


def no_docstring(tree: ast.AST) -> Problems:
    assert isinstance(tree, ast.Module)
    if tree.body and ast.get_docstring(tree) is None:
        yield 1, "has no docstring"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []


def found(check: Callable[[ast.AST], Problems], paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {problem}"
        for path in paths
        for line, problem in check(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_only_supervisors_catch_everything() -> None:
    counts: dict[str, int] = {}
    for problem in found(catch_alls, sources(*PACKAGES)):
        counts[problem.partition(":")[0]] = counts.get(problem.partition(":")[0], 0) + 1
    assert {path: count for path, count in counts.items() if count > SUPERVISORS.get(path, 0)} == {}


def test_nothing_executes_what_it_was_sent() -> None:
    # between processes of its own: it reads no file, and nothing that others sent
    own = "client/metalearning/evaluate.py:"
    problems = found(dangerous, sources(*FOLDERS))
    assert [one for one in problems if not (one.startswith(own) and one.endswith("imports joblib"))] == []


def test_no_assert_does_anything() -> None:
    assert found(acting_asserts, sources(*PACKAGES)) == []


def test_functions_are_short() -> None:
    """Of commands only the body counts: each of their parameters is an option of the command line, with its help."""
    commands = [path for path in sources(*FOLDERS) if path.is_relative_to(ROOT / "sotto" / "commands")]
    others = [path for path in sources(*FOLDERS) if path not in commands]
    assert found(long_functions, others) + found(long_bodies, commands) == []


def test_parameters_are_few() -> None:
    """Commands are exempt: each of their parameters is an option of the command line."""
    paths = [path for path in sources(*PACKAGES) if not path.is_relative_to(ROOT / "sotto" / "commands")]
    assert found(many_parameters, paths) == []


def test_libp2p_stays_in_its_room() -> None:
    rooms = (ROOT / "node" / "p2p", ROOT / "tests" / "node" / "p2p")
    outside = [path for path in sources(*FOLDERS) if not any(path.is_relative_to(room) for room in rooms)]
    assert found(libp2p_imports, outside) == []


def test_no_test_imports_another() -> None:
    assert found(imports_of_tests, sources(*FOLDERS)) == []


def test_every_module_says_what_it_is() -> None:
    assert found(no_docstring, sources(*PACKAGES)) == []


def test_files_are_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*FOLDERS)}
    assert {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > FILE_LINES_MAX} == {}


@pytest.mark.parametrize("pattern", [MACHINE_PATH, UNFINISHED], ids=["machine paths", "unfinished"])
def test_no_file_holds(pattern: re.Pattern[str]) -> None:
    texts = [path for glob in TEXTS for path in sorted(ROOT.glob(glob))]
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*sources(*FOLDERS), *texts]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert hits == []


BAD = """
import pickle
from libp2p.host import x
from tests.a.test_b import c
def f(a, b, c, d, e, g, h):
    try:
        eval("1")
    except Exception:
        torch.load("x")
    try: pass
    except (ValueError, BaseException): pass
    try: pass
    except: pass
    try: pass
    except BaseException:
        undo()
        raise
    assert not self.leave(a)
    global y
""" + "\n".join("    a = 1" for _ in range(FUNCTION_LINES_MAX))


def test_the_checks_notice() -> None:
    tree = ast.parse(BAD)
    assert [line for line, _ in catch_alls(tree)] == [8, 11, 13]
    assert {what for _, what in dangerous(tree)} == {
        "imports pickle",
        "calls eval",
        "uses torch.load",
        "has global state",
    }
    for check in (acting_asserts, long_functions, many_parameters, libp2p_imports, imports_of_tests, no_docstring):
        assert len(list(check(tree))) == 1, check.__name__
    for way in ("import tests.a.test_b", "from tests.a import test_b", "from .test_b import c", "from . import test_b"):
        assert len(list(imports_of_tests(ast.parse(way)))) == 1, way
    for path in ("/wo" + "rk/x", '"/tm' + 'p"', "cd /ho" + "me/me"):
        assert MACHINE_PATH.search(path), path
    for fine in ("a/work/b", "node/tmp/x", "/p2p/x", "~/work/", "/workers"):
        assert not MACHINE_PATH.search(fine), fine
    assert UNFINISHED.search("# TO" + "DO: later")
