"""Command line: ``python -m xattn_kernels info [--json]`` and ``python -m xattn_kernels bench``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from xattn_kernels import info


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m xattn_kernels")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    info_parser = commands.add_parser(
        "info", help="engines and why each is or is not there, versions, CPU, GPU, build"
    )
    info_parser.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("bench", help="speed and memory against the alternatives", add_help=False)
    if words[:1] == ["bench"]:
        return _bench(words[1:])
    options = parser.parse_args(words)
    facts = info.collect()
    print(json.dumps(facts, indent=2) if options.json else info.to_text(facts))
    return 0


def _bench(arguments: Sequence[str]) -> int:
    """Hand over to the benchmarks, whose dependencies are optional."""
    try:
        command = importlib.import_module("xattn_benchmarks.__main__")
    except ModuleNotFoundError as error:
        print(
            f"bench: the module {error.name!r} is missing; "
            "install what benchmarks need: pip install 'xattn_kernels[bench]'",
            file=sys.stderr,
        )
        return 2
    status: int = command.main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
