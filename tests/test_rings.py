"""The rings hold, and the check that says so can fail: a copy with forbidden imports breaks each contract."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("protocol", "models", "equivariant", "worker", "client", "node", "simnet", "sotto")
LINTER = "from importlinter.cli import lint_imports_command; lint_imports_command()"
INJECTED = {
    "worker": "import client\n",
    "client": "import libp2p\n",
    "protocol": "import trio\n",
    "models": "import protocol\n",
    "client/metalearning": "import trio\n",
}
BROKEN = {
    "Rings: imports point downward only": ("worker.injected -> client", "models.injected -> protocol"),
    "The language of the mesh is pure": ("protocol.injected -> trio",),
    "Key code never reaches a worker process": ("node.app_worker -> equivariant",),
    "libp2p stays in its room": ("client.injected -> libp2p",),
    "Selectors are pure": ("client.metalearning.injected -> trio",),
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    command = [sys.executable, "-c", LINTER, "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def copy_of_the_tree(folder: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=lambda _, names: [n for n in names if "." in n[:-3]])
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_imports_point_downward() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_each_contract_can_fail(tmp_path: Path) -> None:
    folder = copy_of_the_tree(tmp_path)
    for package, code in INJECTED.items():
        (folder / package / "injected.py").write_text(code, encoding="utf-8")
    with (folder / "node" / "app_worker.py").open("a", encoding="utf-8") as file:
        file.write("\nimport equivariant\n")
    done = lint(folder)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = " ".join(done.stdout.split())
    for contract, imports in BROKEN.items():
        assert f"{contract} BROKEN" in lines
        for forbidden in imports:
            assert forbidden in lines


def loaded_by(module: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has after importing `module`."""
    code = f"import sys, {module}\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["worker", "node.app_worker"])
def test_key_code_never_reaches_a_worker_process(module: str) -> None:
    parts = ROOT.joinpath(*module.split("."))
    if parts.with_suffix(".py").exists() or parts.is_dir():
        names = loaded_by(module)
        assert module.partition(".")[0] in names
        assert not names & {"equivariant", "client"}


def test_the_look_at_loaded_modules_sees_key_code() -> None:
    assert "equivariant" in loaded_by("client.sealing")
