"""When a result is accepted: as exact as plain PyTorch, op by op, in the same dtype.

A result x is compared with R, the oracle in float64 on the same, already rounded values, and with
E, the same oracle in the dtype of the computation. The errors of x may be `FACTOR` times those of
E and a few units of roundoff of what is compared. That holds for the largest error and for the L2
error of the whole, and for the L2 error of every channel.

A single E can be right by luck, as when equal values are rounded equally, and on either side of the
kink of a relu. So where x is off by more the oracle runs `AGAIN` more times, in both memory formats
and with the results of its layers changed in their last digit, and x is compared with the farthest
off. For float64, E is the oracle in float32, and its errors are scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xattn_kernels.testing.compare import UNIT

from .draws import GRADIENT
from .oracle_operators import rounded_otherwise

#: What is accepted whatever E does, relative to what is compared. In small problems op by op rounds
#: less than a kernel, and statistics in closed form lose digits that float64 has to spare.
FLOOR = {
    torch.float64: 1e-10,
    torch.float32: 16 * UNIT[torch.float32],
    torch.float16: 3 * UNIT[torch.float16],
    torch.bfloat16: 3 * UNIT[torch.bfloat16],
}
NOISE = {torch.float64: 1e-10}
"""The same for a gradient, relative to the largest one: otherwise 16 units of float32."""
FACTOR = 4.0
CHANNEL_FACTOR = 8.0
"""Of a few elements op by op can be right by luck."""
DEGENERATE_FACTOR = 16.0
"""Where batch norms normalise what has no variance: what is left is noise."""
OVERFLOWN = 4.0
"""Units of the largest element that op by op counts as being off by where 16 bits overflow."""
AGAIN = (8, 24)
"""How many times more, and how many times more again, where that may make the difference."""
HOPELESS = 100.0
"""A share of the allowed error that it does not change."""

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Precision:
    """How the oracle computes."""

    exact: bool
    """In float64; else in the dtype of the arguments, float32 for float64."""
    single: bool = False
    """In float32 for 16-bit arguments as well."""

    def dtype(self, given: torch.dtype) -> torch.dtype:
        if self.exact:
            return torch.float64
        return torch.float32 if self.single or given is torch.float64 else given

    def convert(self, x: Tensor) -> Tensor:
        """A leaf with the values of `x`."""
        if not x.is_floating_point():
            return x.detach().clone()
        y = x.detach().to(self.dtype(x.dtype)).clone(memory_format=torch.contiguous_format)
        return y.requires_grad_(x.requires_grad)


@dataclass
class Call:
    """One call of the package, and what it is compared with."""

    what: str
    ours: Callable[[], Results]
    oracle: Callable[[Precision], Results]
    dtype: torch.dtype
    """Of the computation."""
    slack: float = 0.0
    """Of gradients: allowed beyond, relative to the largest."""
    noise: float = 0.0
    """The same, absolute."""
    degenerate: bool = False
    """Whether batch norms may normalise what has no variance."""


class Mismatch(Exception):
    """A result that has another form than it should have."""


@dataclass
class Verdict:
    """What came of a case."""

    family: str
    seed: int
    description: str
    flags: list[str] = field(default_factory=list)
    unconfirmed: list[str] = field(default_factory=list)
    """Flags that the case lost when its features changed a little."""
    refusals: list[str] = field(default_factory=list)
    calls: int = 0
    recounted: int = 0
    """Calls for which the oracle ran again."""
    worst: float = 0.0
    """The largest share of an allowed error."""
    verbose: bool = False
    errors: list[str] = field(default_factory=list)
    """Of every result, if verbose."""

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, {self.family}: {self.description}"]
        lines += [f"  FLAG {flag}" for flag in self.flags]
        lines += [f"  not confirmed: {flag}" for flag in self.unconfirmed]
        lines += [f"  refused: {text}" for text in self.refusals]
        lines += [f"  {text}" for text in self.errors]
        return "\n".join([*lines, f"  largest share of an allowed error: {self.worst:.2f}"])


REFUSALS = (ValueError, NotImplementedError)


def judge(calls: Iterator[Call], verdict: Verdict) -> None:
    """Run the calls of a case and add to its verdict."""
    for call in calls:
        verdict.calls += 1
        try:
            _judge_call(call, verdict)
        except Mismatch as error:
            verdict.flags.append(f"{call.what}: {error}")


def _judge_call(call: Call, verdict: Verdict) -> None:
    exact, refused = _attempt(lambda: call.oracle(Precision(True)))
    ours, error = _attempt(call.ours)
    if error is not None:
        known = isinstance(error, REFUSALS)
        if known or refused is not None:
            verdict.refusals.append(f"{type(error).__name__}: {error}"[:90])
        else:
            raise Mismatch(f"raised {type(error).__name__}: {error}") from error
        return
    if refused is not None:
        raise Mismatch(f"gave a result where the oracle raised {refused!r}")
    assert exact is not None and ours is not None
    if ours.keys() != exact.keys():
        raise Mismatch(f"results {sorted(ours.keys() ^ exact.keys())} of one side only")
    others = [_by_op(call)]
    worst = _worst(call, ours, exact, others)
    verdict.recounted += worst[0] > 1
    for count in AGAIN:
        if 1 < worst[0] < (HOPELESS if len(others) > 1 else float("inf")):
            others += [_by_op(call, len(others) + i) for i in range(count)]
            worst = _worst(call, ours, exact, others)
    verdict.worst = max(verdict.worst, worst[0])
    if verdict.verbose:
        verdict.errors += [_described(call.what, n, ours[n], exact[n], others) for n in ours]
    if worst[0] > 1:
        raise Mismatch(worst[1])


def _described(what: str, name: str, x: Tensor, exact: Tensor, others: list[Results]) -> str:
    def distance(y: Tensor) -> float:
        return float((y.double() - exact.double()).norm())

    by_op = max(distance(other[name]) for other in others)
    size = float(exact.double().norm())
    return f"{what}, {name}: L2 error {distance(x):.1e} of {size:.1e}, op by op {by_op:.1e}"


def _by_op(call: Call, change: int = 0) -> Results:
    """Where that overflows in 16 bits, in float32; then `_shares` adds what 16 bits round."""
    with rounded_otherwise(change):
        found = call.oracle(Precision(False))
        if call.dtype.itemsize > 2 or all(map(_is_finite, found.values())):
            return found
        single = call.oracle(Precision(False, single=True))
    return {name: x if _is_finite(x) else single[name] for name, x in found.items()}


def _is_finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(x.isfinite().all())


def _attempt(run: Callable[[], Results]) -> tuple[Results | None, Exception | None]:
    try:
        return run(), None
    except Mismatch:
        raise
    except Exception as error:  # whatever it is, it is reported
        return None, error


def _worst(call: Call, ours: Results, exact: Results, others: list[Results]) -> tuple[float, str]:
    """The largest share of an allowed error, and whose it is."""
    gradients = [float(x.abs().max()) for name, x in exact.items() if _is_gradient(name, x)]
    largest = max((g for g in gradients if g < float("inf")), default=0.0)
    found = [(0.0, "")]
    for name, x in ours.items():
        by_op = [other[name] for other in others]
        noise = 0.0
        if name.startswith(GRADIENT):
            noise = (NOISE.get(call.dtype, FLOOR[torch.float32]) + call.slack) * largest
            noise += call.noise
        found += [
            (share, f"{name}: {text}")
            for share, text in _shares(x, exact[name], by_op, call, noise)
        ]
    return max(found)


def _is_gradient(name: str, x: Tensor) -> bool:
    return name.startswith(GRADIENT) and x.numel() > 0


def _shares(
    x: Tensor, exact: Tensor, by_op: list[Tensor], call: Call, noise: float
) -> Iterator[tuple[float, str]]:
    """Errors by what is allowed of them, in several norms.

    Args:
        x: a result.
        exact: the same in float64.
        by_op: the same op by op.
        call: in whose dtype was computed: where that of `x` is finer, rounding is as coarse.
        noise: allowed of any element. For gradients it comes from the largest of all: those that
            are zero but for rounding are rounded from terms of that size.
    """
    dtype = call.dtype
    if x.shape != exact.shape:
        raise Mismatch(f"shape {tuple(x.shape)}, expected {tuple(exact.shape)}")
    if not x.is_floating_point():
        yield (0.0 if torch.equal(x, exact) else float("inf")), f"got {x}, expected {exact}"
        return
    if not x.numel():
        return
    rounded = exact.to(x.dtype).double()
    finite, y = rounded.isfinite(), x.detach().double()
    if not torch.equal(y.isfinite(), finite):
        wrong = int((y.isfinite() != finite).sum())
        yield float("inf"), f"{wrong} elements are finite in one of both only"
        finite = finite & y.isfinite()
    elif not torch.equal(y[~finite].nan_to_num(), rounded[~finite].nan_to_num()):
        yield float("inf"), "infinities or NaN of another kind"
    floor = max(FLOOR[dtype], FLOOR[x.dtype])
    noise += torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    noise += 1e-34 if dtype is not torch.float64 else 1e-300  # kernels' exp ends there
    zero = torch.zeros((), dtype=torch.float64)
    size = torch.where(finite, exact, zero)
    error = torch.where(finite, y - exact, zero)
    factor = UNIT[torch.float64] / UNIT[torch.float32] if dtype is torch.float64 else 1.0
    worse = []
    for e in by_op:
        off = torch.where(finite & e.isfinite(), e.double() - exact, zero) * factor
        if e.dtype.itemsize > dtype.itemsize:  # it overflows in 16 bits
            off = off.abs() + OVERFLOWN * UNIT[dtype] * size.abs().amax()
        worse.append(off)
    for name, norm, times in _norms(exact):
        e, s = norm(error), norm(size)
        by = torch.stack([norm(w) for w in worse]).amax(dim=0)
        times = max(times, DEGENERATE_FACTOR) if call.degenerate else times
        count = error.numel() / e.numel()
        allowed = times * by + floor * s + noise * (count**0.5 if name != "largest error" else 1)
        share = e / allowed
        at = int(share.argmax())
        text = (
            f"{name}{f' of channel {at}' if e.numel() > 1 else ''} {e.flatten()[at]:.2e} of "
            f"{s.flatten()[at]:.2e}, op by op {by.flatten()[at]:.2e}"
        )
        yield float(share.max()), text


def _norms(x: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor], float]]:
    yield "largest error", lambda y: y.abs().max().reshape(1), FACTOR
    yield "L2 error", lambda y: y.norm().reshape(1), FACTOR
    if x.dim() in (3, 4) and x.numel() >= 8 * x.shape[1]:
        others = [d for d in range(x.dim()) if d != 1]
        yield "L2 error", lambda y: y.square().sum(dim=others).sqrt(), CHANNEL_FACTOR


def check_strides(name: str, gradient: Tensor, x: Tensor, *, strict: bool = True) -> None:
    """Raise Mismatch unless a gradient is dense and, if strict, laid out as its tensor.

    Equal elements that are one in memory have no order: then any dense layout is right.
    """
    extents = sorted(
        (b, n) for b, n in zip(gradient.stride(), gradient.shape, strict=True) if n > 1
    )
    step = 1
    for stride, n in extents if gradient.numel() else ():
        if stride != step:
            raise Mismatch(f"{name}: strides {gradient.stride()} of {tuple(x.shape)}")
        step *= n
    overlaps = any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True))
    if not strict or overlaps or not x.numel():
        return
    expected = torch.empty_like(x, device="meta").stride()
    triples = zip(x.shape, gradient.stride(), expected, strict=True)
    if not all(n == 1 or a == b for n, a, b in triples):
        raise Mismatch(f"{name}: strides {gradient.stride()}, expected {expected} for {x.stride()}")
