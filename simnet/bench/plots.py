"""Reports of the benchmarks as pictures: growth, throughput against concurrency, latency percentiles, a token's time.

They show what a report holds and nothing else. matplotlib is an extra: `require` says before anything is measured that
it is missing, or that the folder is none to write to.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from protocol.errors import InputError

OURS, THEIRS = "sotto", "transformers"
COLOURS = {OURS: "tab:blue", THEIRS: "tab:orange", "theory": "tab:grey"}
DPI = 120
PARTS = ("compute", "client", "software")  # of a token's time


def require(folder: Path) -> None:
    """Raises InputError when no pictures can be made, or not in `folder`, which is made here."""
    _matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # permissions alone do not say it
            pass
    except OSError as error:
        raise InputError(f"no pictures can be written into {folder} ({error.strerror}): name another folder") from None


def _matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib: pip install -e '.[plots]' where sotto was cloned")


def growth(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """One picture for each axis of a `bench growth` report."""
    return [_axis(name, axis, folder) for name, axis in report.get("axes", {}).items()]


def serving(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Throughput against concurrency and latency percentiles of a `bench serve` report."""
    if not report.get("points"):
        return []
    return [_throughput(report, folder), _percentiles(report, folder)]


def breakdown(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Where a token's time goes, of a `bench engine` report with the section "software"."""
    parts = {dtype: each["software"]["token_us"] for dtype, each in report.items() if _has_software(each)}
    if not parts:
        return []
    figure, axes = blank("Where the time of a token goes", "precision", "microseconds per token")
    below = [0.0] * len(parts)
    for part in PARTS:
        heights = [each[part] for each in parts.values()]
        axes.bar(list(parts), heights, bottom=below, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.legend()
    return [saved(figure, folder / "token.png")]


def _has_software(part: Any) -> bool:
    return isinstance(part, dict) and "software" in part


def _axis(name: str, axis: Mapping[str, Any], folder: Path) -> Path:
    cost = axis["cost"]
    figure, axes = blank(f"Cost along {name}", axis["unit"], cost.replace("_", " "))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for who, key in ((OURS, cost), (THEIRS, f"library_{cost}"), ("theory", f"theory_{cost}")):
        points = [(point["x"], point[key]) for point in axis["points"] if key in point]
        if points:
            fitted = axis.get(key)
            words = f", exponent {fitted['exponent']:.2f}" if fitted else ""
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[who], label=who + words)
            if fitted and fitted["bend"]:
                axes.axvline(fitted["bend"]["at"], color=COLOURS[who], linestyle=":")
    axes.legend()
    return saved(figure, folder / f"growth-{name}.png")


def _throughput(report: Mapping[str, Any], folder: Path) -> Path:
    figure, axes = blank(f"Throughput, {report['workload']['name']}", "requests at once", "new tokens per second")
    axes.set_xscale("log", base=2)
    for who in (OURS, THEIRS):
        points = [(each["concurrency"], each[who]["tokens_per_s"]) for each in report["points"] if who in each]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[who], label=who)
    axes.legend()
    return saved(figure, folder / "throughput.png")


def _percentiles(report: Mapping[str, Any], folder: Path) -> Path:
    figure, axes = blank(f"Latency, {report['workload']['name']}", "requests at once", "ms, p50 full, p99 dotted")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for measure, colour in (("first_token_ms", "tab:blue"), ("per_token_ms", "tab:green")):
        for percentile, line in (("p50", "o-"), ("p99", "o:")):
            points = [
                (each["concurrency"], each[OURS][measure][percentile])
                for each in report["points"]
                if each[OURS][measure]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), line, color=colour, label=f"{measure[:-3]} {percentile}")
    axes.legend()
    return saved(figure, folder / "latency.png")


def blank(title: str, x: str, y: str) -> tuple[Any, Any]:
    """A figure without anything in it, and its axes. Raises InputError without matplotlib."""
    figure, (axes,) = panels(1, 1, (7, 4.5))
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def panels(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure of so many panels without anything in them, and the axes of each; those above each other share their x.
    Raises InputError without matplotlib."""
    _matplotlib()
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure alive

    figure = Figure(figsize=inches, layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex="col", squeeze=False).flat)
    for each in axes:
        each.grid(alpha=0.3)
    return figure, axes


def saved(figure: Any, path: Path) -> Path:
    """Write it as PNG; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI)
    return path
