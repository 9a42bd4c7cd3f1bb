"""The search by hand: `python -m tests.search --seed 12`, or `--seconds 600`."""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable

import torch

from .families import FAMILIES, Summary, run, search, seeds_of
from .judge import Verdict


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.search", description=__doc__)
    parser.add_argument("--seed", type=int, help="run one case, and show it and its errors")
    parser.add_argument("--seconds", type=float, default=600, help="how long to search")
    parser.add_argument("--from", type=int, dest="start", help="first seed; default: a fresh one")
    parser.add_argument("--family", choices=FAMILIES, help="search in this family alone")
    parser.add_argument("--trace", action="store_true", help="print every seed before it runs")
    arguments = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # cases are small
    # Memory that nobody wrote to is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    if arguments.seed is not None:
        verdict = run(arguments.seed, verbose=True)
        print(verdict)
        return int(bool(verdict.flags))
    start = random.SystemRandom().randrange(10**9) if arguments.start is None else arguments.start
    print(f"searching for {arguments.seconds:g} s from seed {start}", flush=True)
    seeds: Iterable[int] = itertools.count(start)
    if arguments.family:
        seeds = seeds_of(arguments.family, start)
    summaries = _search(seeds, arguments.seconds, arguments.trace)
    found = [summary for summary in summaries.values() if summary.cases]
    print("\n".join(map(str, found)))
    refusals: Counter[str] = sum((summary.refusals for summary in found), Counter())
    for text, count in refusals.most_common():
        print(f"refused {count:5}  {text}")
    flagged = [str(verdict.seed) for summary in found for verdict in summary.flagged]
    print(f"flagged seeds: {' '.join(flagged) or 'none'}")
    return int(bool(flagged))


def _search(seeds: Iterable[int], seconds: float, trace: bool) -> dict[str, Summary]:
    begin = minute = time.monotonic()

    def done(summaries: dict[str, Summary]) -> bool:
        nonlocal minute
        now = time.monotonic()
        if now - minute >= 60:
            minute = now
            cases = sum(summary.cases for summary in summaries.values())
            flagged = sum(len(summary.flagged) for summary in summaries.values())
            print(f"{now - begin:6.0f} s: {cases} cases, {flagged} flagged", flush=True)
        return now - begin >= seconds

    def report(seed: int, verdict: Verdict | None) -> None:
        if trace and verdict is None:
            print(f"seed {seed}", flush=True)
        if verdict is not None and (verdict.flags or verdict.unconfirmed):
            print(verdict, flush=True)

    return search(seeds, done, report)


if __name__ == "__main__":
    sys.exit(main())
