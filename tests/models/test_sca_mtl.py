"""The whole network: against the op-by-op one, its state, its arguments, its modes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from network_support import OUTPUTS, Pyramid, assert_close, flat, image, loss, pair, perturb
from torch import Tensor, nn

from xattn_models import SCAMTL, sca_mtl

VARIANTS = [
    pytest.param({}, id="published"),
    pytest.param({"tasks": ("depth", "semseg")}, id="two"),
    pytest.param(
        {"tasks": ("depth",), "auxiliary_tasks": ("normals", "depth", "semseg")}, id="auxiliary"
    ),
    pytest.param({"kind": "softmax", "heads": 2}, id="softmax"),
    pytest.param({"task_softmax": True}, id="task_softmax"),
]


@pytest.mark.parametrize("options", VARIANTS)
def test_inference(options: dict[str, Any]) -> None:
    ours, theirs = pair(**options)
    with torch.no_grad():
        actual, expected = ours(image()), theirs(image())
    assert_close(flat(actual, ours), flat(expected, theirs))
    assert list(actual) == [*ours.tasks, "deep_supervision"]
    assert list(actual["deep_supervision"]) == [f"scale_{s}" for s in range(4)]


@pytest.mark.parametrize("options", VARIANTS)
def test_training(options: dict[str, Any]) -> None:
    """Outputs, gradients and running statistics, random skips of window blocks included."""
    ours, theirs = pair(training=True, **options)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(2)
        named = flat(model(image()), model)
        loss(named).backward()
        gradients = {f"grad.{k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
        buffers = {k: x for k, x in model.named_buffers() if "running" in k or "tracked" in k}
        results.append({**named, **gradients, **buffers})
    assert_close(*results, tolerance=1e-8)


def test_gradients_reach_all_parameters_but_the_dead_ones() -> None:
    model, _ = pair(("semseg", "depth"), ("semseg", "depth", "normals"), training=True)
    loss(flat(model(image()), model)).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert without == {name for name, _ in model.named_parameters() if ".norm2." in name}
    assert len(without) == 2 * (2 * 4 + 3)


def edit_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.125)


def step(model: nn.Module) -> None:
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    loss(flat(model(image()), model)).backward()
    optimiser.step()
    model.eval()


def load(model: nn.Module) -> None:
    state = model.state_dict()
    model.load_state_dict({k: v * 0.75 if v.is_floating_point() else v for k, v in state.items()})


def replace(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight = nn.Parameter(module.weight.detach() * 2)


@pytest.mark.parametrize("change", [edit_in_place, step, load, replace])
def test_changed_weights_are_seen(change: Callable[[nn.Module], None]) -> None:
    """Folded weights follow the parameters."""
    ours, theirs = pair()
    with torch.no_grad():
        before = ours(image())
    for model in (ours, theirs):
        change(model)
    with torch.no_grad():
        actual, expected = flat(ours(image()), ours), flat(theirs(image()), theirs)
    assert_close(actual, expected, 1e-8)
    assert not torch.equal(actual["semseg"], before["semseg"])


def test_dtype_changes_and_returns() -> None:
    ours, theirs = pair()
    with torch.no_grad():
        ours(image())
        expected = flat(theirs(image()), theirs)
        single = flat(ours.float()(image(dtype=torch.float32)), ours)
        assert {x.dtype for x in single.values()} == {torch.float32}
        assert_close(single, expected, 1e-4)
        assert_close(flat(ours.double()(image()), ours), expected, 1e-5)


def test_modes_switch() -> None:
    """Training after inference, also after inference mode; frozen batch norms."""
    ours, theirs = pair()
    with torch.inference_mode():
        ours(image())
    for model in (ours, theirs):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        torch.manual_seed(0)
        loss(flat(model(image()), model)).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if p.grad is not None:
            assert (p.grad - q.grad).norm() <= 1e-8 * q.grad.norm() + 1e-8, name
    ours.eval(), theirs.eval()
    with torch.no_grad():
        assert_close(flat(ours(image()), ours), flat(theirs(image()), theirs))


def test_batch_statistics_of_one_value_are_refused() -> None:
    model, _ = pair(training=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(image(1, 32, 32))


@pytest.mark.parametrize("size", [(32, 32), (32, 160), (96, 64)])
def test_sizes_and_batches(size: tuple[int, int]) -> None:
    """Every sample as by itself, in either memory format."""
    ours, theirs = pair()
    x = image(3, *size)
    with torch.no_grad():
        expected = flat(theirs(x), theirs)
        assert_close(flat(ours(x), ours), expected)
        last = x.contiguous(memory_format=torch.channels_last)
        assert_close(flat(ours(last), ours), expected)
        for i in range(3):
            single = flat(ours(x[i : i + 1]), ours)
            assert_close(single, {name: y[i : i + 1] for name, y in expected.items()})


def test_autocast() -> None:
    ours, _ = pair(dtype=torch.float32)
    x = image(dtype=torch.float32)
    with torch.no_grad():
        expected = flat(ours(x), ours)
        with torch.autocast("cpu", torch.bfloat16):
            actual = flat(ours(x), ours)
    assert_close(actual, expected, 0.1)
    ours.train()
    with torch.autocast("cpu", torch.bfloat16):
        named = flat(ours(x), ours)
    loss(named).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())
    assert {p.grad.dtype for p in ours.parameters() if p.grad is not None} == {torch.float32}


def test_bfloat16() -> None:
    ours, theirs = pair(dtype=torch.float32)
    with torch.no_grad():
        expected = flat(theirs(image(dtype=torch.float32)), theirs)
        actual = flat(ours.bfloat16()(image(dtype=torch.bfloat16)), ours)
    assert {x.dtype for x in actual.values()} == {torch.bfloat16}
    assert_close(actual, expected, 0.15)


def test_concurrent_calls() -> None:
    """From a cold cache and of several sizes, bitwise as one after the other."""
    model, _ = pair(dtype=torch.float32)
    images = [image(1, 32 * (1 + i % 3), 64, torch.float32) for i in range(9)]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)["semseg"]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, images))
    for x, y in zip(images, together, strict=True):
        assert torch.equal(run(x), y)


def test_copies() -> None:
    model, _ = pair()
    with torch.no_grad():
        expected = flat(model(image()), model)
        twin = copy.deepcopy(model)
        assert_close(flat(twin(image()), twin), expected)
        edit_in_place(twin)
        assert_close(flat(model(image()), model), expected)
        assert not torch.equal(twin(image())["depth"], expected["depth"])


def test_pickles() -> None:
    model, _ = pair()
    with torch.no_grad():
        expected = model(image())
        found = pickle.loads(pickle.dumps(model))(image())
    assert torch.equal(found["semseg"], expected["semseg"])


def test_hooks_run() -> None:
    """A hooked layer is called, in the backbone as elsewhere, and what it returns is used."""
    ours, theirs = pair()
    for name in ("backbone.stages.1.0", "scale_2.refinement.depth.0.conv1", "swTransform1.norm0"):
        for model in (ours, theirs):
            model.get_submodule(name).register_forward_hook(lambda _, __, y: 1.5 * y)
    linear = "swTransform2.layers.0.blocks.1.attn.qkv"
    for model in (ours, theirs):
        model.get_submodule(linear).register_forward_pre_hook(lambda _, x: (x[0] * 2,))
    with torch.no_grad():
        assert_close(flat(ours(image()), ours), flat(theirs(image()), theirs))


@pytest.mark.parametrize("training", [False, True])
def test_compile(training: bool) -> None:
    """As one graph."""
    ours, theirs = pair(("semseg", "depth"), training=training)
    if training:  # random skips would differ
        for model in (ours, theirs):
            for module in model.modules():
                if hasattr(module, "drop_prob"):
                    module.drop_prob = 0.0
                elif isinstance(getattr(module, "drop_path", None), float):
                    module.drop_path = 0.0
    backend = "eager" if training else "aot_eager"  # that of the backward takes a minute
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    results = []
    for model in (compiled, theirs):
        with torch.set_grad_enabled(training):
            named = flat(model(image()), theirs)
        if training:
            loss(named).backward()
        module = ours if model is compiled else model
        gradients = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
        results.append({**named, **gradients})
    assert_close(*results, tolerance=1e-8)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 3, 64, 80), ValueError, "height 64 and width 80, expected multiples of 32"),
        (torch.zeros(1, 3, 50, 64), ValueError, "height 50.*predict"),
        (torch.zeros(1, 3, 0, 64), ValueError, "height 0"),
        (torch.zeros(1, 1, 64, 64), ValueError, r"\(1, 1, 64, 64\), expected \(B, 3, H, W\)"),
        (torch.zeros(3, 64, 64), ValueError, r"\(3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(1, 3, 64, 64), TypeError, "float32.*expected torch.float64"),
        ("image.png", TypeError, "str"),
    ],
)
def test_images_are_checked(x: Tensor, error: type[Exception], message: str) -> None:
    model, _ = pair(("semseg", "depth"))
    with pytest.raises(error, match=f"image: got.*{message}"):
        model(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ("semseg",)}, "tasks: got.*at least two sources"),
        ({"tasks": ()}, "tasks"),
        ({"tasks": ("semseg", "semseg")}, r"tasks\[1\]: got 'semseg' a second time"),
        ({"tasks": ("semseg", "a.b")}, r"tasks\[1\]: got 'a.b'"),
        ({"tasks": "semseg"}, "tasks: got the string"),
        ({"tasks": ("semseg", "flow")}, "num_outputs.*'flow'"),
        ({"tasks": ("semseg", "depth"), "num_outputs": {"semseg": 4}}, "num_outputs: got tasks"),
        (
            {"tasks": ("semseg", "depth"), "num_outputs": {"semseg": 4, "depth": 1, "sal": 1}},
            "num_outputs: got tasks",
        ),
        (
            {"tasks": ("semseg", "depth"), "num_outputs": {"semseg": 4, "depth": 0}},
            r"num_outputs\['depth'\]: got 0",
        ),
        (
            {"tasks": ("semseg", "depth"), "auxiliary_tasks": ("depth", "normals")},
            r"auxiliary_tasks.*\['semseg'\] are not",
        ),
        ({"kind": "cosine"}, "kind: got 'cosine'"),
        ({"heads": 2}, "heads: got 2, expected 1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sca_mtl(backbone="hrnet_w18_small", **arguments)


def test_defaults() -> None:
    model = sca_mtl(backbone="hrnet_w18_small")
    assert model.tasks == model.auxiliary_tasks == ("semseg", "depth", "normals", "edge")
    assert model.num_outputs == {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}
    assert model.channels == (32, 64, 128, 256)


@pytest.mark.parametrize("name", ["hrnet_w18_small", "convnext_atto"])
def test_backbones(name: str) -> None:
    """Any pyramid: in training and inference, gradients into its first layer."""
    model = sca_mtl(("semseg", "depth"), backbone=name)
    assert isinstance(model, SCAMTL)
    perturb(model)
    x = torch.randn(2, 3, 64, 96)
    output = model(x)
    assert output["semseg"].shape == (2, 40, 64, 96)
    loss(flat(output, model)).backward()
    first = next(model.backbone.parameters())
    assert first.grad is not None and first.grad.isfinite().all() and first.grad.norm() > 0
    model.eval()
    with torch.no_grad():
        folded = flat(model(x), model)
    assert_close(folded, {k: y.detach() for k, y in flat(model(x), model).items()}, 1e-3)


def test_outputs_of_all_tasks_of_the_small_network() -> None:
    model = SCAMTL(Pyramid(), tuple(OUTPUTS), OUTPUTS).eval()
    output = model(torch.randn(1, 3, 32, 64))
    for task, count in OUTPUTS.items():
        assert output[task].shape == (1, count, 32, 64)
        for s in range(4):
            expected = (1, count, 8 >> s, 16 >> s)
            assert output["deep_supervision"][f"scale_{s}"][task].shape == expected
