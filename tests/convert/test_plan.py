"""Swapping blocks of a user's model: same results, same checkpoints, and back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from xattn_kernels.convert import KINDS, convert_, revert_
from xattn_kernels.convert.blocks import Converted
from xattn_kernels.modules import CrossAttention, CrossScaleHead, CrossTaskAttention
from xattn_kernels.testing import op_by_op
from xattn_models import op_by_op as network

from .support import (
    TASKS,
    GlobalContextAttentionBlock,
    distance,
    identities,
    image,
    inference,
    norms,
    pair,
    randomise,
    step,
    tree,
    whole_network,
)

# The network


RESIDUAL = 4 * len(TASKS) * 2 + 3
"""Residual blocks of the network's initial heads and feature propagation."""


def test_network_in_inference() -> None:
    model = whole_network()
    expected = inference(model, image())
    names, state = identities(model), list(model.state_dict())
    report = convert_(model)
    attention = [e for e in report if e.kind != "residual_block"]
    assert [(e.name, e.class_name, e.replacement) for e in attention] == [
        *(
            (
                f"distillation_scale_{s}",
                "MultiTaskDistillationModule",
                "ConvertedCrossTaskAttention",
            )
            for s in range(4)
        ),
        *((f"heads.{t}", "CrossScaleHead", "ConvertedCrossScaleHead") for t in TASKS),
    ]
    assert len(report.converted) == 7 + RESIDUAL and not report.left
    assert identities(model) == names and list(model.state_dict()) == state
    assert distance(inference(model, image()), expected) <= 1e-5
    assert not any(type(m) is network.GlobalContextAttentionBlock for m in model.modules())


def test_network_trains_alike() -> None:
    model = whole_network().double()
    other = copy.deepcopy(model)
    convert_(other)
    x = image(torch.float64)
    assert distance(step(other, x), step(model, x)) <= 1e-6


def test_optimiser_and_checkpoint_of_before() -> None:
    """One made for the model's parameters keeps working on the converted model, and back."""
    model, same = whole_network().double(), whole_network().double()
    optimisers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (model, same)]
    x = image(torch.float64)
    for number in range(3):
        if number == 1:
            convert_(model)
        if number == 2:
            revert_(model)
        for m, optimiser in zip((model, same), optimisers, strict=True):
            step(m, x)
            optimiser.step()
    # Adam divides by the size of the gradient, rounding errors included, where that is all.
    assert distance(inference(model, x), inference(same, x)) <= 1e-4
    for (a, x), (b, y) in zip(model.state_dict().items(), same.state_dict().items(), strict=True):
        assert a == b and x.shape == y.shape


def test_revert_is_exact() -> None:
    model = whole_network()
    before, expected = tree(model.eval()), inference(model, image())
    report = convert_(model)
    assert tree(model) != before
    assert revert_(model) == tuple(e.name for e in report)
    assert tree(model) == before
    for name, y in inference(model, image()).items():
        assert torch.equal(y, expected[name]), name
    assert revert_(model) == ()


def test_revert_after_training_and_loading() -> None:
    model, other = whole_network(), whole_network()
    convert_(model)
    step(model, image())
    for p in other.parameters():
        p.data.mul_(1.1)
    model.load_state_dict(other.state_dict(), strict=True)
    model.double().eval()
    revert_(model)
    found = inference(model, image(torch.float64))
    expected = inference(other.double(), image(torch.float64))
    assert all(torch.equal(found[name], y) for name, y in expected.items())
    assert not any(module.training for module in model.modules())
    model.train()
    convert_(model)
    revert_(model.eval())
    assert not any(module.training for module in model.modules())


def test_twice_is_once() -> None:
    model = whole_network()
    convert_(model)
    modules = [*map(id, model.modules())]
    report = convert_(model)
    assert len(report) == 0 and str(report) == "0 swapped, 0 left"
    assert [*map(id, model.modules())] == modules


def test_auxiliary_tasks() -> None:
    model = network.MultiTaskDistillationModule(TASKS[:1], ("edge", *TASKS), 8)
    holder = nn.ModuleList([randomise(model)])
    features = {f"features_{t}": torch.randn(1, 8, 4, 6) for t in ("edge", *TASKS)}
    with torch.no_grad():
        expected = holder[0].eval()(features)
        assert len(convert_(holder).converted) == 1
        assert distance(holder[0](features), expected) <= 1e-5
    assert holder[0].auxilary_tasks == ["edge", *TASKS]


# One block


@pytest.mark.parametrize(
    "block", [GlobalContextAttentionBlock, network.GlobalContextAttentionBlock]
)
def test_attention_block(block: type[nn.Module]) -> None:
    model = pair(block(8)).double()
    other = copy.deepcopy(model)
    state = list(other.state_dict())
    [entry] = convert_(other)
    assert entry.replacement == "ConvertedCrossAttention" and entry.difference < 1e-8
    assert isinstance(other.block, CrossAttention) and list(other.state_dict()) == state
    x = image(torch.float64, (6, 8))
    assert distance(inference(other, x), inference(model, x)) <= 1e-9
    assert distance(step(other, x), step(model, x)) <= 1e-8


def test_arguments_by_name() -> None:
    model = pair()
    x, y = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 3, 2)
    expected = model.block(x, y)
    convert_(model)
    for found in (
        model.block(x, source_task_feats=y),
        model.block(source_task_feats=y, target_task_feats=x),
    ):
        torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match=r"\['source'\], expected \['source_task_feats'\]"):
        model.block(x, source=y)


def test_settings_stay() -> None:
    model = pair()
    norm = model.block.value_project.bn
    norm.momentum, norm.eps = None, 1e-3
    model.block.key_project[0].bn.eval()
    model.block.query_project.requires_grad_(False)
    model.block.note = "mine"
    before = {id(m): (m.momentum, m.eps, m.training) for m in norms(model)}
    convert_(model)
    after = {id(m): (m.momentum, m.eps, m.training) for m in norms(model)}
    assert after == before
    assert model.block.value_project.bn is norm and model.block.note == "mine"
    assert not model.block.key_project[0].bn.training and model.block.key_project[1].bn.training
    assert [p.requires_grad for p in model.block.query_project.parameters()] == [False] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_stays(dtype: torch.dtype) -> None:
    model = pair().to(dtype)
    expected = inference(model, image(dtype, (6, 8)))
    assert len(convert_(model).converted) == 1
    [found] = inference(model, image(dtype, (6, 8))).values()
    assert found.dtype is dtype
    assert distance({"": found}, expected) <= (1e-12 if dtype is torch.float64 else 2e-2)


def test_batch_norm_without_running_statistics() -> None:
    model = pair(GlobalContextAttentionBlock(8, track_running_stats=False)).double()
    other = copy.deepcopy(model)
    assert len(convert_(other).converted) == 1
    x = image(torch.float64, (6, 8))
    assert distance(inference(other, x), inference(model, x)) <= 1e-9


def test_sync_batch_norm() -> None:
    """Layers that are not the stock ones are called."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(pair())
    expected = inference(model, image(size=(6, 8)))
    assert len(convert_(model).converted) == 1
    assert isinstance(model.block.value_project.bn, nn.SyncBatchNorm)
    assert distance(inference(model, image(size=(6, 8))), expected) <= 1e-5


def test_revert_takes_exchanged_layers_along() -> None:
    model = pair()
    convert_(model)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    norm = model.block.value_project.bn
    revert_(model)
    assert isinstance(norm, nn.SyncBatchNorm) and model.block.value_project.bn is norm


def test_hooks_stay() -> None:
    model = pair()
    block, calls = model.block, []
    handle = block.register_forward_hook(lambda m, args, y: calls.append("block"))
    block.register_forward_pre_hook(lambda m, args: calls.append("before"))
    block.register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    block.value_project.conv.register_forward_hook(lambda m, args, y: calls.append("layer"))
    convert_(model)
    assert calls == []
    model(image(size=(6, 8))).sum().backward()
    assert calls == ["before", "layer", "block", "backward"]
    handle.remove()
    model.block.register_forward_hook(lambda m, args, y: calls.append("new"))
    revert_(model)
    calls.clear()
    model(image(size=(6, 8))).sum().backward()
    assert calls == ["before", "layer", "new", "backward"]


def test_hook_on_an_attention_block_inside() -> None:
    model = whole_network()
    calls = []
    inner = model.distillation_scale_3.cross_attention["depth"]["semseg"]
    inner.register_forward_hook(lambda m, args, y: calls.append(y.shape))
    expected = inference(model, image())
    assert not convert_(model).left
    assert distance(inference(model, image()), expected) <= 1e-5
    assert calls == [(2, 96, 2, 3)] * 2


def test_shared_block_stays_shared() -> None:
    block = GlobalContextAttentionBlock(8)
    model = nn.ModuleDict({"a": pair(block), "b": pair(block), "c": nn.Sequential(block)})
    assert [e.name for e in convert_(model)] == ["a.block", "b.block", "c.0"]
    assert model["a"].block is model["b"].block is model["c"][0]
    assert revert_(model) == ("a.block", "b.block", "c.0")
    assert model["a"].block is model["b"].block is model["c"][0] is block


def test_kinds() -> None:
    model = whole_network()
    report = convert_(model, kinds=["cross_attention"])
    assert {e.kind for e in report} == {"cross_attention"}
    assert len(report.converted) == 4 * 6 + 3 * 3
    expected = inference(model, image())
    # The outer blocks can follow, and both layers are put back.
    assert len(convert_(model, kinds=KINDS).converted) == 7 + RESIDUAL
    assert distance(inference(model, image()), expected) <= 1e-5
    assert len(revert_(model)) == 7 + 33 + RESIDUAL
    assert not any(isinstance(m, Converted) for m in model.modules())


def test_copies_and_pickles() -> None:
    model = whole_network()
    expected = inference(model, image())
    convert_(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        mine = {id(x) for x in (*model.parameters(), *model.modules())}
        assert not mine & {id(x) for x in (*other.parameters(), *other.modules())}
        assert distance(inference(other, image()), expected) <= 1e-5
        assert len(revert_(other)) == 7 + RESIDUAL
        assert type(other.heads["depth"]) is op_by_op.CrossScaleHead
        assert not mine & {id(x) for x in (*other.parameters(), *other.modules())}
        found = inference(other, image())
        assert all(torch.equal(found[name], y) for name, y in expected.items())


def test_wrapped_in_data_parallel() -> None:
    model = nn.DataParallel(pair())
    [entry] = convert_(model)
    assert entry.name == "module.block" and isinstance(model.module.block, CrossAttention)


def test_wrapped_in_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model, plain = pair().double(), pair().double()
        wrapped = nn.parallel.DistributedDataParallel(model)
        convert_(wrapped)
        x = image(torch.float64, (6, 8))
        found = step(wrapped, x)
        expected = {
            f"{key.split(' ')[0]} {'' if key == 'output ' else 'module.' + key.split(' ')[1]}": y
            for key, y in step(plain, x).items()
        }
        assert distance(found, expected) <= 1e-9
        assert revert_(wrapped) == ("module.block",)
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_model() -> None:
    """What was compiled is compiled anew for the other modules."""
    model = pair()
    expected = inference(model, image(size=(6, 8)))
    compiled: Any = torch.compile(model, backend="eager")
    assert distance(inference(compiled, image(size=(6, 8))), expected) == 0
    [entry] = convert_(compiled)
    assert entry.name == "_orig_mod.block" and isinstance(model.block, CrossAttention)
    seen = []
    model.block.register_forward_pre_hook(lambda m, args: seen.append(type(m).__name__))
    assert distance(inference(compiled, image(size=(6, 8))), expected) <= 1e-5
    assert seen == ["ConvertedCrossAttention"]
    revert_(compiled)
    assert distance(inference(compiled, image(size=(6, 8))), expected) == 0


def test_on_the_meta_device() -> None:
    """Values may come later."""
    with torch.device("meta"):
        model = pair()
    assert len(convert_(model).converted) == 1
    model.to_empty(device="cpu").load_state_dict(pair().state_dict())
    x = image(size=(6, 8))
    assert distance(inference(model, x), inference(pair(), x)) <= 1e-5


def test_nothing_changes_by_looking() -> None:
    model = pair(GlobalContextAttentionBlock(8, value=nn.LeakyReLU())).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    calls = []
    model.block.register_forward_hook(lambda *_: calls.append(1))
    assert not convert_(model).converted
    assert torch.equal(torch.get_rng_state(), state) and not calls
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# Arguments


def test_own_modules_are_passed_over() -> None:
    ours = [CrossAttention(4), CrossTaskAttention(TASKS, 4), CrossScaleHead((4, 6), 2)]
    assert len(convert_(nn.ModuleList(ours))) == 0


def test_model_is_itself_a_block() -> None:
    block = GlobalContextAttentionBlock(8)
    with pytest.raises(ValueError, match=r"model: got a GlobalContextAttentionBlock.*ModuleList"):
        convert_(block)
    holder = nn.ModuleList([block])
    convert_(holder)
    with pytest.raises(ValueError, match="model: got a ConvertedCrossAttention, which is itself"):
        revert_(holder[0])
    assert len(convert_(holder[0])) == 0


def test_unknown_arguments() -> None:
    with pytest.raises(ValueError, match="kinds: got \\('attention',\\), expected a sequence of"):
        convert_(pair(), kinds=("attention",))
    with pytest.raises(ValueError, match="kinds: got 'cross_attention'"):
        convert_(pair(), kinds="cross_attention")
    for function in (convert_, revert_):
        with pytest.raises(TypeError, match=r"model: got dict, expected an nn.Module"):
            function({})


def test_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    convert_(pair(), verbose=True)
    assert capsys.readouterr().out == (
        "1 swapped, 0 left\n"
        "swapped  block (GlobalContextAttentionBlock) for ConvertedCrossAttention\n"
    )


def test_residual_blocks_of_other_shapes_are_left() -> None:
    """Strides and dilations are not in the shapes of parameters."""

    def changed(**settings: object) -> nn.Module:
        block = op_by_op.BasicBlock(8, 8, 0.1)
        for name, value in settings.items():
            for convolution in (block.conv1, block.conv2):
                setattr(convolution, name, value)
        return block

    model = nn.ModuleList(
        [
            changed(),
            changed(dilation=(2, 2), padding=(2, 2)),
            changed(stride=(2, 2)),
            changed(padding_mode="reflect"),
        ]
    )
    report = convert_(model)
    assert [e.name for e in report.converted] == ["0"]
    assert all("3x3 convolution of stride 1" in e.reason for e in report.left)
    assert len(report.left) == 3
