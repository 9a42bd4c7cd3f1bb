"""The pyramid projection's part of the table of resources: the head of four levels."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn_kernels.ops.pyramid_projection import triton as engine
from xattn_kernels.schedule import Schedule

from .triton_table import Operator, Slots

#: Of the levels, each with what it attends to, as the published head has them.
_WIDTHS, _HIDDEN = (144, 216, 288, 288), 1080
_SIZES = ((120, 160), (60, 80), (30, 40), (15, 20))


def _call(slots: Slots, _: Schedule) -> None:
    like = slots(1)[0]

    def make(*shape: int) -> Tensor:
        return like.new_empty(shape)

    features = [make(1, c, *size) for c, size in zip(_WIDTHS, _SIZES, strict=True)]
    weights = [make(_HIDDEN, c) for c in _WIDTHS]
    vector = make(_HIDDEN)
    for outputs in (1, 40):  # depth or edges; classes
        classifier, bias = make(outputs, _HIDDEN), make(outputs)
        head = (features, weights, vector, vector, classifier)
        engine.forward(*head, bias, False, 1e-5, False)
    engine.forward(*head, bias, False, 1e-5, True)
    engine.forward(*head, bias, True, 1e-5, False)
    results = engine.forward(*head, bias, True, 1e-5, True)
    grad, statistics = torch.empty_like(results.output), (results.mean, results.var)
    wanted = [True] * 12
    engine.backward(grad, *head, *statistics, results.hidden, True, 1e-5, wanted)


OPERATORS = {
    "pyramid_projection": Operator(
        _call, widths=_WIDTHS[:1], flags=("PROJECT", "STORE", "MOMENTS", "CLASSIFY", "SUMS")
    )
}
