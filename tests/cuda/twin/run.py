"""Runs tests of the CUDA engine on the host: pytest in a process of its own that has the twin.

By hand, with pytest's own arguments after the file::

    python tests/cuda/twin/run.py tests/cuda/on_host/linear.py -k widths
    python tests/cuda/twin/run.py --asan 0 tests/cuda/on_host/linear.py
    python tests/cuda/twin/run.py --races tests/cuda/on_host/linear.py
    python tests/cuda/twin/run.py --lenient ...    # without sources that do not compile
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from twin import build


def run(
    module: Path, arguments: Sequence[str], asan: bool = True, capture: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run pytest with the module as ``xattn_kernels._cuda``; see on_host/conftest.py."""
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--tb=short"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=build.ROOT,
        env={**build.environment(asan), "XATTN_TWIN_MODULE": str(module)},
        capture_output=capture,
        text=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], add_help=False)
    parser.add_argument("--asan", type=int, default=1, choices=(0, 1))
    parser.add_argument("--races", action="store_true")
    parser.add_argument("--lenient", action="store_true")
    options, arguments = parser.parse_known_args()
    asan = bool(options.asan) and not options.races
    try:
        module = build.build(asan=asan, races=options.races, lenient=options.lenient)
    except RuntimeError as error:
        sys.exit(f"{error}\nTo go on without: --lenient")
    return run(module, arguments, asan, capture=False).returncode


if __name__ == "__main__":
    sys.exit(main())
