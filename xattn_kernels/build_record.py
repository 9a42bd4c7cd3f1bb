"""What the build wrote beside the native modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Written by the build beside the native modules.
PATH = Path(__file__).with_name("_build.json")


def read() -> dict[str, Any] | None:
    """Return what the build wrote beside the native modules; None without a build.

    Keys: ``version``, ``python``, ``cpu`` (``compiler``, ``isas``), ``cuda`` (``built``,
    ``requested``, ``reason``, ``toolkit``, ``architectures``).

    Raises:
        RuntimeError: if the file is there but cannot be read; the message names it.
    """
    try:
        record: dict[str, Any] = json.loads(PATH.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{PATH} cannot be read ({error}); install again") from error
    return record
