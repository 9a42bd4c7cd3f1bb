"""Command line: ``python -m xattn_kernels info [--json]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from xattn_kernels import info


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m xattn_kernels")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    info_parser = commands.add_parser(
        "info", help="engines and why each is or is not there, versions, CPU, GPU, build"
    )
    info_parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    facts = info.collect()
    print(json.dumps(facts, indent=2) if options.json else info.to_text(facts))


if __name__ == "__main__":
    main()
