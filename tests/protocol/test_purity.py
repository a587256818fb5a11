"""The language of the mesh is pure: importing it brings neither an event loop, a socket, torch, nor a room of ours."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPURE = {"trio", "torch", "numpy", "socket", "ssl", "asyncio", "select", "subprocess", "random", "secrets", "libp2p"}
ROOMS = {"models", "equivariant", "worker", "client", "node", "simnet", "sotto"}
CLOCKS = {"time", "datetime", "os", "uuid", "random", "secrets"}


def test_a_fresh_interpreter_loads_nothing_impure() -> None:
    names = sorted(path.stem for path in (ROOT / "protocol").glob("*.py"))
    assert len(names) > 15
    code = "import sys\n" + "".join(f"import protocol.{name}\n" for name in names if name != "__init__")
    code += "print('\\n'.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "protocol" in loaded
    assert loaded & (IMPURE | ROOMS) == set()


def test_no_clock_and_no_randomness_is_imported() -> None:
    for path in sorted((ROOT / "protocol").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                assert name.partition(".")[0] not in CLOCKS, f"{path.name} imports {name}"
                assert name != "nacl.utils.random", f"{path.name} draws randomness"
