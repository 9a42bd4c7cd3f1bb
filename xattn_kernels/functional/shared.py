"""What the functions share."""

from __future__ import annotations

import math


def check_eps(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: got {eps!r}, expected a positive finite number")
