"""Results of record: ``results/<machine>/<preset>.json``, and the pictures drawn from them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import plots, report
from .core import PRESETS
from .suites import SUITES

RESULTS = Path(__file__).parent / "results"
THOROUGHNESS = ("smoke", "quick", "network", "scaling", "gpu", "full")
"""Presets, those whose figures are preferred last."""
PICTURES = {"scaling": 2, "alternatives": 2, "limits": 1, "recompute": 2, "network_scaling": 1}
"""How many of the first plots of a suite are kept as pictures, for the README."""

Run = dict[str, Any]


def machine(run: Run) -> str:
    """Name of the folder of a machine: ``cpu-2-cores``, ``h200``."""
    facts = run["environment"]
    if run["device"] == "cpu":
        return f"cpu-{facts['cores']}-cores"
    words = re.findall(r"[a-z0-9]+", str(facts.get("gpu") or "gpu").lower())
    return "-".join(word for word in words if word != "nvidia")


def adopt(file: Path, results: Path | None = None) -> Path:
    """Copy a run to its place; a run of some suites alone stands beside that of all.

    Raises:
        ReportError: if the file cannot be read, or is of a run that was cut off or failed.
    """
    run = report.read(file)
    failed = [name for name, result in run["suites"].items() if result["failure"] is not None]
    for what, names in (("was cut off before", run["unfinished"]), ("failed in", failed)):
        if names:
            raise report.ReportError(
                f"{file}: expected a whole run for the record, but this one {what} "
                f"{', '.join(names)}"
            )
    whole = set(PRESETS[run["preset"]].suites) <= set(run["suites"])
    name = "-".join([run["preset"], *([] if whole else run["suites"])])
    path = (results or RESULTS) / machine(run) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.resolve() != file.resolve():
        shutil.copy(file, path)
    return path


def read(folder: Path) -> list[Run]:
    """Runs of a machine, those last whose figures are preferred; none without the folder.

    Raises:
        ReportError: if a file cannot be read.
    """
    runs = [report.read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(
        runs, key=lambda run: (THOROUGHNESS.index(run["preset"]), run["environment"]["date"])
    )


def suites(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Every suite from the run that is preferred among those that have it."""
    found = {name: result for run in runs for name, result in run["suites"].items()}
    return {name: found[name] for name in (*SUITES, *found) if name in found}


def pictures(
    folder: Path, results: dict[str, dict[str, Any]]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """File and data of the plots of some suites that are kept as pictures."""
    for name, result in results.items():
        for number, plot in enumerate(result["plots"][: PICTURES.get(name, 0)], 1):
            yield folder / f"{name}-{number}.png", plot


def draw(folder: Path) -> list[Path]:
    """Draw the pictures that are outdated, and remove those of no plot; returns the former."""
    found = outdated(folder)
    wanted = dict(pictures(folder, suites(read(folder))))
    for path in found:
        if path in wanted:
            path.write_bytes(plots.png(wanted[path]))
        else:
            path.unlink()
    return found


def outdated(folder: Path) -> list[Path]:
    """Pictures that are missing, that show other data than those of record, or none of these."""
    wanted = dict(pictures(folder, suites(read(folder))))
    stale = [
        path
        for path, plot in wanted.items()
        if not path.exists() or plots.fingerprint_of(path) != plots.fingerprint(plot)
    ]
    return stale + [path for path in sorted(folder.glob("*.png")) if path not in wanted]
