"""What a parity case demands of a module, whichever implementation it is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .cases import Case


def cross_attention(case: Case, module: nn.Module) -> None:
    case.load(module)
    batch, channels = case.args["B"], case.args["C"]
    target = case.tensor("target", (batch, channels, *case.args["tgt"])).requires_grad_()
    source = case.tensor("source", (batch, channels, *case.args["src"])).requires_grad_()
    output = module(target, source)
    _check(case, module, {"": output}, {"target": target, "source": source})


def cross_task_attention(case: Case, module: nn.Module) -> None:
    case.load(module)
    features = {task: x.requires_grad_() for task, x in case.features().items()}
    outputs = module(features)
    assert list(outputs) == list(features)
    inputs = {f"features_{task}": x for task, x in features.items()}
    _check(case, module, outputs, inputs)


def cross_scale_head(case: Case, module: nn.Module) -> None:
    case.load(module)
    scales = [x.requires_grad_() for x in case.scales()]
    output = module(scales)
    _check(case, module, {"": output}, {f"scale_{s}": x for s, x in enumerate(scales)})


def _check(
    case: Case, module: nn.Module, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> None:
    for name, output in outputs.items():
        case.check(f"output.{name}" if name else "output", output)
    for name, output in outputs.items():
        weight = case.tensor(f"loss_weight_{name}" if name else "loss_weight", output.shape)
        output.backward(weight, retain_graph=True)
    for name, x in inputs.items():
        case.check(f"grad.{name}", x.grad)
    for name, p in module.named_parameters():
        case.check(f"grad.param.{name}", p.grad)
    state = module.state_dict()
    assert list(state) == list(case.shapes)
    after = [key for key in case.expected if key.startswith("after.")]
    for key in after:
        case.check(key, state[key.removeprefix("after.")])
    compared = {key.removeprefix("gradsum.").removeprefix("grad.") for key in case.expected}
    assert compared >= {f"param.{name}" for name, _ in module.named_parameters()}
