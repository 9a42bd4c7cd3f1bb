"""What a parity case demands of a module, whichever implementation it is."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from xattn_kernels.testing import op_by_op

from .cases import HEAD_CHANNELS, TASKS, TOLERANCE, Case

Results = dict[str, Tensor]


def build(case: Case, package: object) -> nn.Module:
    """The case's module from a package that has classes of these names, in the case's state."""
    args = case.args
    if case.name.startswith("cam"):
        module = package.CrossAttention(args["C"])
    elif case.name.startswith("ctam"):
        module = package.CrossTaskAttention(TASKS[: args["nt"]], args["C"])
    else:
        module = package.CrossScaleHead(HEAD_CHANNELS, args["no"])
    return case.load(module)


def inputs(case: Case) -> tuple[Results, Callable[[nn.Module], Results]]:
    """Named inputs, and how to call a module with them for named outputs."""
    args = case.args
    if case.name.startswith("cam"):
        target = case.tensor("target", (args["B"], args["C"], *args["tgt"]))
        source = case.tensor("source", (args["B"], args["C"], *args["src"]))
        return {"target": target, "source": source}, lambda m: {"": m(target, source)}
    if case.name.startswith("ctam"):
        features = case.features()
        named = {f"features_{task}": x for task, x in features.items()}
        return named, lambda m: m(features)
    scales = case.scales()
    return {f"scale_{s}": x for s, x in enumerate(scales)}, lambda m: {"": m(scales)}


def outputs(case: Case, module: nn.Module) -> Results:
    """Outputs alone, named as in the file."""
    _, call = inputs(case)
    return {_name("output", name): y for name, y in call(module).items()}


def run(case: Case, module: nn.Module) -> Results:
    """Outputs, gradients and running statistics after one forward, named as in the file."""
    named, call = inputs(case)
    for x in named.values():
        x.requires_grad_()
    results = {}
    for name, output in call(module).items():
        results[_name("output", name)] = output.detach()
        weight = case.tensor(f"loss_weight_{name}" if name else "loss_weight", output.shape)
        output.backward(weight, retain_graph=True)
    gradients = {
        **{f"grad.{name}": x.grad for name, x in named.items()},
        **{f"grad.param.{name}": p.grad for name, p in module.named_parameters()},
    }
    for name, gradient in gradients.items():
        assert gradient is not None, f"{case.name}: {name} is None"
        results[name] = gradient
    if case.training:
        results |= {
            f"after.{name}": value
            for name, value in module.state_dict().items()
            if name.endswith(("running_mean", "running_var"))
        }
    return results


def compare(case: Case, results: Results) -> None:
    """Every result with the file; what is stored wrongly with the op-by-op modules instead."""
    own = run(case, build(case, op_by_op)) if case.args["B"] == 1 else {}
    errors = {}
    for name, actual in results.items():
        expected = own[name] if case.is_misread(name) else case.find(name)
        if expected is not None:
            errors[name] = case.error(name, actual, expected)
        else:
            assert name.startswith("after."), f"{name} is not in the file"
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong, f"{case.name}: relative L2 {wrong}"
    stored = {name.replace("gradsum.param.", "grad.param.") for name in case.expected}
    assert stored <= set(errors)


def _name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if name else prefix
