"""The passes of the cross-attention block in training, for the table of resources."""

from __future__ import annotations

import torch

from xattn_kernels.schedule import Schedule

from .triton_table import Operator, Slots


def _call(slots: Slots, schedule: Schedule) -> None:
    from xattn_kernels.ops.cross_attention_block_training import triton as engine
    from xattn_kernels.ops.cross_attention_block_training.op import pairs_of

    features, outputs = slots(), slots(schedule.num_outputs)
    channels = features[0].size(1)
    pairs = pairs_of(schedule.edges_flat)
    targets = [slot for slot, _ in pairs.targets]
    sources = [slot for slot, _ in pairs.sources]
    center = engine.moments(features)[0].float()
    precise = torch.zeros(len(sources), dtype=torch.bool)
    grads = [torch.zeros(x.mT.shape).mT for x in features]

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, channels)

    first, second = zeros(len(targets), channels), zeros(len(targets), channels)
    layers = (first, zeros(len(targets), 2), second, zeros(len(targets), 3))
    both = (zeros(len(sources), 2, channels), zeros(len(sources), 2, 2), *layers[2:])
    engine.hidden_moments(features, center, targets, *layers[:3])
    state = engine.states(features, center, sources, *both)
    target = (features, center, targets, *layers, pairs.target_of_output, *state, 1e-12)
    engine.attend(*target, outputs)
    grad_s, grad_z, sums = engine.target_sums(*target, outputs)
    engine.target_gradients(*target, outputs, sums, precise, grads)
    source = (features, center, sources, *both, grad_s, grad_z)
    engine.source_sums(*source, precise, grads)
    engine.source_gradients(*source, sums, precise, grads)
    engine.input_gradient(features, center, first[:4], zeros(4), grads)


OPERATORS = {
    "cross_attention_block_training": Operator(
        _call, types=("bf16", "fp32"), flags=("SOURCE", "FIRST", "SECOND", "SUMS", "RESULTS")
    )
}
