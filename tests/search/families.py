"""All families of cases, and cases by number: one seed, one case."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from . import module_cases, operator_cases
from .draws import moved
from .judge import Call, Verdict, judge

Generate = Callable[[int], tuple[Any, Iterator[Call]]]

FAMILIES: dict[str, Generate] = {
    "linear": partial(operator_cases.attention, kind="linear"),
    "softmax": partial(operator_cases.attention, kind="softmax"),
    "block": operator_cases.block,
    "training_block": operator_cases.training_block,
    "pyramid": operator_cases.pyramid,
    "cross_attention": partial(module_cases.generate, "cross_attention"),
    "cross_task": partial(module_cases.generate, "cross_task"),
    "cross_scale": partial(module_cases.generate, "cross_scale"),
    "head": partial(module_cases.generate, "head"),
    "basic_block": partial(module_cases.generate, "basic_block"),
}


def family_of(seed: int) -> str:
    return [*FAMILIES][seed % len(FAMILIES)]


def seeds_of(family: str, start: int = 0) -> Iterator[int]:
    """The seeds of the cases of a family, from `start` on."""
    seed = start
    while True:
        if family_of(seed) == family:
            yield seed
        seed += 1


CONFIRMED = 2
"""Of the three cases with other features, in how many something has to be wrong for a flag."""


def run(seed: int, *, verbose: bool = False) -> Verdict:
    """Make the case of a seed, run it, and judge it.

    What is wrong has to be wrong as well where the features are a little different: a relu has two
    gradients at its kink, and both are right for what rounds to it.
    """
    verdict = _run_once(seed, verbose)
    if verdict.flags:
        others = []
        for move in range(3):
            with moved(move):
                others.append(_run_once(seed, False))
        if sum(bool(other.flags) for other in others) < CONFIRMED:
            verdict.unconfirmed, verdict.flags = verdict.flags, []
    return verdict


def _run_once(seed: int, verbose: bool) -> Verdict:
    family = family_of(seed)
    case, calls = FAMILIES[family](seed)
    verdict = Verdict(family, seed, "", verbose=verbose)
    judge(calls, verdict)
    verdict.description = repr(case)
    return verdict


@dataclass
class Summary:
    """What a search found in one family."""

    family: str
    cases: int = 0
    calls: int = 0
    recounted: int = 0
    seconds: float = 0.0
    refusals: Counter[str] = field(default_factory=Counter)
    flagged: list[Verdict] = field(default_factory=list)
    unconfirmed: list[Verdict] = field(default_factory=list)

    def add(self, verdict: Verdict, seconds: float) -> None:
        self.cases += 1
        self.calls += verdict.calls
        self.recounted += verdict.recounted
        self.seconds += seconds
        self.refusals.update(verdict.refusals)
        if verdict.flags:
            self.flagged.append(verdict)
        if verdict.unconfirmed:
            self.unconfirmed.append(verdict)

    def __str__(self) -> str:
        return (
            f"{self.family:16} {self.cases:6} cases {self.calls:6} calls "
            f"{self.recounted:5} recounted {self.refusals.total():5} refused "
            f"{len(self.unconfirmed):3} unconfirmed {len(self.flagged):3} flagged "
            f"{self.cases / max(self.seconds, 1e-9):7.1f} a second"
        )


def search(
    seeds: Iterable[int],
    done: Callable[[dict[str, Summary]], bool],
    report: Callable[[int, Verdict | None], None] = lambda seed, verdict: None,
) -> dict[str, Summary]:
    """Run the cases of `seeds` until `done`, which is asked after each.

    Args:
        seeds: which cases.
        done: whether what was found so far is enough.
        report: called with every seed before it runs, and with its verdict after.
    """
    summaries = {name: Summary(name) for name in FAMILIES}
    for seed in seeds:
        report(seed, None)
        before = time.perf_counter()
        verdict = run(seed)
        summaries[verdict.family].add(verdict, time.perf_counter() - before)
        report(seed, verdict)
        if done(summaries):
            break
    return summaries
