"""Which engine was measured to be the fastest for a problem on a GPU: the table behind ``auto``.

``measured.json`` has one entry for each compute capability, operator, element type, width and kind
of call, with the microseconds that engines took. On CUDA tensors ``auto`` takes the engines that a
GPU's entries name in the order of their times; the others are left to those who ask by name.

    python -m xattn_kernels.measured OUT/summary.json

takes what ``make gpu-check OUT=...`` measured into the table. Figures of engines whose results were
wrong anywhere in that run, for the operator and element type, are left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["FILE", "Entry", "Key", "capabilities", "entries", "find", "main", "merge", "of_summary"]

#: The table, shipped with the package.
FILE = Path(__file__).with_name("measured.json")
ABOUT = (
    "Microseconds of a call by engine, cold L2 cache, as measured by make gpu-check on the cards "
    "listed; auto takes the fastest. An engine without a figure was not measured, or was wrong."
)
#: The step of gpu-check that times the engines against each other.
STEP = "engines"


class Key(NamedTuple):
    """What the choice depends on.

    Attributes:
        capability: compute capability, such as ``"9.0"``.
        op: the operator.
        dtype: element type of the features, such as ``"bfloat16"``.
        channels: width of a head: C, or C / heads for the softmax operator.
        gradient: whether the backward pass belongs to the call.
    """

    capability: str
    op: str
    dtype: str
    channels: int
    gradient: bool


class Entry(NamedTuple):
    """A measured problem: its key, the tokens of its longest slot, microseconds by engine."""

    key: Key
    tokens: int
    microseconds: Mapping[str, float]

    def fastest_first(self) -> list[str]:
        """The measured engines in the order of their times, then of their names."""
        return sorted(self.microseconds, key=lambda name: (self.microseconds[name], name))


@functools.cache
def entries() -> tuple[Entry, ...]:
    """The shipped table; read once.

    Raises:
        RuntimeError: if the file cannot be read or is not such a table; the message names it.
    """
    try:
        return tuple(map(_entry, json.loads(FILE.read_text())["entries"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RuntimeError(f"{FILE} cannot be read ({error!r}); install again") from error


def _entry(row: Mapping[str, Any]) -> Entry:
    key = Key(
        str(row["capability"]),
        str(row["op"]),
        str(row["dtype"]),
        int(row["channels"]),
        bool(row["gradient"]),
    )
    times = {str(name): float(value) for name, value in row["microseconds"].items()}
    for name, value in times.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{key}: {name} took {value} microseconds, expected a positive number")
    if key.channels < 1:
        raise ValueError(f"{key}: expected a positive number of channels")
    return Entry(key, int(row["tokens"]), times)


def find(wanted: Key) -> Entry | None:
    """The entry of the nearest width (by ratio) that agrees in everything else; None without."""
    found = [entry for entry in entries() if entry.key._replace(channels=wanted.channels) == wanted]
    return min(
        found,
        key=lambda entry: (
            abs(math.log(entry.key.channels / wanted.channels)),
            entry.key.channels,
        ),
        default=None,
    )


def capabilities() -> dict[str, int]:
    """Compute capabilities that the table knows, and how many of its entries each has."""
    found: dict[str, int] = {}
    for entry in entries():
        found[entry.key.capability] = found.get(entry.key.capability, 0) + 1
    return found


# From results of gpu-check to the table.


def of_summary(summary: Mapping[str, Any]) -> list[Entry]:
    """The entries that a run of gpu-check gives, of its step `STEP`.

    Its rows are ``{"capability", "op", "dtype", "channels", "tokens", "gradient",
    "microseconds": {engine: ...}}``; a row has figures of engines alone whose results were right.
    A step named ``correct_*`` that failed takes away the engine's figures for what it was about.
    Of rows with one key, that with the most tokens counts.

    Raises:
        ValueError: if the run did not measure engines, or a row is not as described.
    """
    rows = ((summary.get(STEP) or {}).get("result") or {}).get("rows") or []
    if not rows:
        raise ValueError(f"the run has no rows of the step {STEP!r}: it measured no engines")
    wrong = _wrong(summary)
    found: dict[Key, Entry] = {}
    for row in rows:
        try:
            entry = _entry(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"step {STEP!r}: {row}: {error!r}") from error
        times = {
            name: value
            for name, value in entry.microseconds.items()
            if (name, entry.key.op, entry.key.dtype) not in wrong
        }
        known = found.get(entry.key)
        if times and (known is None or entry.tokens > known.tokens):
            found[entry.key] = entry._replace(microseconds=times)
    return list(found.values())


def _wrong(summary: Mapping[str, Any]) -> set[tuple[str, str, str]]:
    """(engine, operator, element type) of correctness steps that did not pass in full."""
    found = set()
    for entry in summary.values():
        about = entry.get("about")
        if about is not None and entry["state"] != "passed":
            found.add((about["engine"], about["op"], about["dtype"]))
    return found


def merge(
    old: Mapping[str, Any], fresh: Sequence[Entry], card: Mapping[str, Any]
) -> dict[str, Any]:
    """The table with new entries in the place of those of the same keys.

    Args:
        old: the table as the file has it.
        fresh: entries of one run.
        card: facts about the machine of that run; ``capability`` is needed.
    """
    merged = {entry.key: entry for entry in map(_entry, old["entries"])}
    merged |= {entry.key: entry for entry in fresh}
    cards = [known for known in old["cards"] if known["capability"] != card["capability"]]
    cards.append(dict(card))
    cards.sort(key=lambda known: str(known["capability"]))
    return {
        "about": ABOUT,
        "cards": cards,
        "entries": [_row(merged[key]) for key in sorted(merged)],
    }


def _row(entry: Entry) -> dict[str, Any]:
    times = {name: round(value, 2) for name, value in sorted(entry.microseconds.items())}
    return {**entry.key._asdict(), "tokens": entry.tokens, "microseconds": times}


def to_text(table: Mapping[str, Any]) -> str:
    """The table as the file has it: one entry a line."""

    def lines(rows: Iterable[Any]) -> str:
        joined = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        return f"[\n{joined}\n  ]" if joined else "[]"

    return (
        f'{{\n  "about": {json.dumps(table["about"])},\n  "cards": {lines(table["cards"])},\n'
        f'  "entries": {lines(table["entries"])}\n}}\n'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Take a run's figures into the table; returns 1, and writes nothing, if there are none."""
    parser = argparse.ArgumentParser(
        prog="python -m xattn_kernels.measured",
        description="Take what make gpu-check measured into the table that auto chooses by.",
    )
    parser.add_argument("summary", type=Path, help="summary.json of a run of make gpu-check")
    parser.add_argument("--into", type=Path, default=FILE, help="the table (default: the shipped)")
    options = parser.parse_args(arguments)
    try:
        summary = json.loads(options.summary.read_text())
        fresh = of_summary(summary)
        [card] = (summary.get("environment", {}).get("result") or {}).get("rows") or [{}]
        if not fresh:
            raise ValueError("all engines were wrong somewhere; nothing is taken")
        if "capability" not in card:
            raise ValueError("the run does not say on which card it was made")
        others = {entry.key.capability for entry in fresh} - {card["capability"]}
        if others:
            raise ValueError(f"made on {card['capability']}, but has rows of {', '.join(others)}")
        table = merge(json.loads(options.into.read_text()), fresh, card)
    except (OSError, ValueError) as error:
        print(f"{options.summary}: {error}")
        return 1
    options.into.write_text(to_text(table))
    print(f"{options.into}: {len(fresh)} problems measured on {card.get('card')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
