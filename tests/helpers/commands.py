"""sotto's commands with folders of a test's own."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from sotto.__main__ import app


def sotto(folder: Path, *words: str, **env: str) -> Result:
    """A command in this process: it loads torch once."""
    folders = {"XDG_DATA_HOME": str(folder / "data"), "XDG_STATE_HOME": str(folder / "state")}
    return CliRunner().invoke(app, list(words), env={**folders, **env})
