"""Checkpoints of every kind that comes, and what must be refused."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from network_support import pair
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from xattn_models import load_checkpoint, read_checkpoint, save_checkpoint
from xattn_models.checkpoints import LoadReport, Mismatch


def make_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.fixture
def model() -> nn.Module:
    return make_model()


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return list(found) == list(state) and all(torch.equal(found[k], state[k]) for k in state)


def other(model: nn.Module) -> dict[str, Tensor]:
    """Another state of the same model."""
    return {
        name: torch.rand(x.shape) if x.is_floating_point() else x + 3
        for name, x in model.state_dict().items()
    }


def test_network_round_trip(tmp_path: Path) -> None:
    """Between our network and the op-by-op one, in both directions."""
    ours, theirs = pair(("semseg", "depth"))
    theirs.load_state_dict(other(theirs))
    save_checkpoint(theirs, tmp_path / "a.safetensors")
    report = load_checkpoint(ours, tmp_path / "a.safetensors")
    assert set(report.loaded) == set(ours.state_dict()) and not report.misfits()
    assert same(ours, theirs.state_dict())
    ours.load_state_dict(other(ours))
    save_checkpoint(ours, tmp_path / "a.safetensors")
    load_checkpoint(theirs, tmp_path / "a.safetensors")
    assert same(theirs, ours.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_pickles(
    model: nn.Module, tmp_path: Path, wrapper: str | None, prefix: str, zipped: bool
) -> None:
    """`torch.save`, in its present and its former format, with what training programs add."""
    state = other(model)
    content = {prefix + name: x for name, x in state.items()}
    if wrapper:
        content = {"epoch": 3, "optimizer": {"state": {}}, wrapper: content}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    load_checkpoint(model, str(tmp_path / "a.pth"))
    assert same(model, state)


def test_prefix_of_only_some_names_stays(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    save_checkpoint(model, tmp_path / "a.safetensors")
    assert set(read_checkpoint(tmp_path / "a.safetensors")) == set(model.state_dict())


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_code_in_pickles_is_not_run(model: nn.Module, tmp_path: Path, form: str) -> None:
    content = {"state_dict": model.state_dict(), "extra": Payload(tmp_path / "made")}
    path = tmp_path / "a.pth"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(ValueError, match=r"a\.pth: "):
        load_checkpoint(model, path)
    assert not (tmp_path / "made").exists()


def test_names_and_shapes_that_do_not_fit(model: nn.Module, tmp_path: Path) -> None:
    state = other(model)
    del state["1.running_mean"]
    state["0.extra"] = torch.zeros(1)
    state["0.bias"] = torch.zeros(5)
    path = tmp_path / "a.pth"
    torch.save(state, path)
    with pytest.raises(RuntimeError) as caught:
        load_checkpoint(model, path)
    for part in ("a.pth", "1.running_mean", "0.extra", "0.bias", "[5]"):
        assert part in str(caught.value)
    state["0.bias"] = torch.ones(4)
    torch.save(state, path)
    report = load_checkpoint(model, path, strict=False)
    assert (report.missing, report.unexpected) == (("1.running_mean",), ("0.extra",))
    assert torch.equal(model[0].bias, torch.ones(4))


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("keep", [0, 1, 7, 9, 40, 0.5, 0.99])
def test_truncated_files(model: nn.Module, tmp_path: Path, kind: str, keep: float) -> None:
    """Named in the error; the model is as before."""
    path = tmp_path / "broken.ckpt"
    if kind == "safetensors":
        save_checkpoint(model, path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"broken\.ckpt"):
        load_checkpoint(model, path)
    assert same(model, before)


@pytest.mark.parametrize(
    "content", [b"no checkpoint at all", bytes(range(256)) * 4, b"\x80" * 64, b"PK" * 40]
)
def test_files_of_another_kind(model: nn.Module, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image\.png"):
        load_checkpoint(model, path)


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], {}, {"epoch": 3}, {1: torch.zeros(1)}, {"model": {"a": 1}}]
)
def test_pickles_of_something_else(model: nn.Module, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: .*expected names and tensors"):
        load_checkpoint(model, tmp_path / "a.pth")


def test_missing_file(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file"):
        load_checkpoint(model, tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="no such file, but a folder"):
        load_checkpoint(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file") as caught:
        load_checkpoint(model, "x" * 100_000)
    assert len(str(caught.value)) < 400


def test_interrupted_write_leaves_the_old_file(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(model, path)
    before = path.read_bytes()
    model.load_state_dict(other(model))

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_values_take_the_models_dtype_and_layout(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model.to(memory_format=torch.channels_last)
    save_checkpoint(model, path)
    double = make_model().double()
    load_checkpoint(double, path)
    assert torch.equal(double[0].weight, model[0].weight.double())


def test_shared_tensors_are_saved_once_each(tmp_path: Path) -> None:
    linear = nn.Linear(2, 2)
    model = nn.ModuleList([linear, linear])
    save_checkpoint(model, tmp_path / "a.safetensors")
    assert set(read_checkpoint(tmp_path / "a.safetensors")) == set(model.state_dict())


def test_a_file_object_is_no_path(model: nn.Module) -> None:
    with pytest.raises(TypeError):
        load_checkpoint(model, io.BytesIO())


# Wrappers


def compiled(model: nn.Module) -> nn.Module:
    wrapper: Any = torch.compile(model)
    return wrapper


class Outer(nn.Module):
    """A network with wrappers inside."""

    def __init__(self, model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.backbone = wrap(model)
        self.head = nn.Linear(2, 2)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "parallel, compiled": lambda model: compiled(nn.DataParallel(model)),
    "compiled, parallel": lambda model: nn.DataParallel(compiled(model)),
    "compiled, averaged": lambda model: AveragedModel(compiled(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_models(
    model: nn.Module, tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    """Saved under plain names; their own states are loaded; and they load plain ones."""
    wrapped = wrap(model)
    save_checkpoint(wrapped, tmp_path / "a.safetensors")
    assert set(read_checkpoint(tmp_path / "a.safetensors")) == set(model.state_dict())
    plain = make_model()
    plain.load_state_dict(other(plain))
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "b.pth")
    load_checkpoint(plain, tmp_path / "b.pth")
    assert same(plain, model.state_dict())
    plain.load_state_dict(other(plain))
    torch.save(plain.state_dict(), tmp_path / "c.pth")
    load_checkpoint(wrapped, tmp_path / "c.pth")
    inner: Any = wrapped
    while not isinstance(inner, nn.Sequential):
        inner = getattr(inner, "_orig_mod", None) or inner.module
    assert same(inner, plain.state_dict())


@pytest.mark.parametrize("name", ["compiled", "parallel", "parallel, compiled"])
def test_wrappers_within_a_model(model: nn.Module, tmp_path: Path, name: str) -> None:
    wrapped = Outer(model, WRAPPERS[name])
    save_checkpoint(wrapped, tmp_path / "a.safetensors")
    plain = Outer(make_model(), lambda x: x)
    load_checkpoint(plain, tmp_path / "a.safetensors")
    assert same(plain.backbone, model.state_dict())
    wrapped = Outer(make_model(), WRAPPERS[name])
    load_checkpoint(wrapped, tmp_path / "a.safetensors")
    save_checkpoint(wrapped, tmp_path / "b.safetensors")
    first, second = (read_checkpoint(tmp_path / f"{x}.safetensors") for x in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_count_of_averaged_models_is_left_out_when_read(model: nn.Module, tmp_path: Path) -> None:
    torch.save(AveragedModel(model).state_dict(), tmp_path / "a.pth")
    assert set(read_checkpoint(tmp_path / "a.pth")) == set(model.state_dict())


def test_prefixes_of_the_model_itself_stay(tmp_path: Path) -> None:
    for name in ("module", "model"):
        own = nn.ModuleDict({name: make_model()})
        state = other(own)
        torch.save(state, tmp_path / "a.pth")
        load_checkpoint(own, tmp_path / "a.pth")
        assert same(own, state)


def test_names_without_the_prefix_are_unexpected(model: nn.Module, tmp_path: Path) -> None:
    """A loss that is part of a Lightning module."""
    state = {f"model.{name}": x for name, x in other(model).items()}
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(3)}}, tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match=r"1 unexpected: 'loss\.weight'"):
        load_checkpoint(model, tmp_path / "a.ckpt")
    report = load_checkpoint(model, tmp_path / "a.ckpt", strict=False)
    assert report.unexpected == ("loss.weight",) and len(report.loaded) == len(state)


def test_plain_parameters_come_before_averages(model: nn.Module, tmp_path: Path) -> None:
    plain, average = other(model), other(model)
    averaged = {"module." + name: x for name, x in average.items()}
    path = tmp_path / "a.pth"
    torch.save({"model_ema": averaged, "model": plain, "mine": average}, path)
    load_checkpoint(model, path)
    assert same(model, plain)
    for key in ("model_ema", "mine"):
        load_checkpoint(make_model(), path, key="model")
        load_checkpoint(model, path, key=key)
        assert same(model, average)
    with pytest.raises(
        ValueError, match=r"a\.pth: key: got 'ema', expected one with tensors: 'mod"
    ):
        load_checkpoint(model, path, key="ema")


@pytest.mark.parametrize(
    "key", ["net", "network", "module", "ema", "model_ema", "ema_state_dict", "state_dict_ema"]
)
def test_other_keys(model: nn.Module, tmp_path: Path, key: str) -> None:
    state = other(model)
    torch.save({"epoch": 3, key: OrderedDict(state)}, tmp_path / "a.pth")
    load_checkpoint(model, tmp_path / "a.pth")
    assert same(model, state)


def test_two_sets_of_plain_parameters_are_ambiguous(model: nn.Module, tmp_path: Path) -> None:
    torch.save({"net": other(model), "model": other(model)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"under \['model', 'net'\]: choose one by key"):
        load_checkpoint(model, tmp_path / "a.pth")
    load_checkpoint(model, tmp_path / "a.pth", key="net")


# Fine-tuning, and what is said


def test_other_classes(model: nn.Module, tmp_path: Path) -> None:
    state = {**other(model), "0.weight": torch.ones(7, 3, 1, 1), "more": torch.ones(2)}
    del state["1.weight"]
    torch.save(state, tmp_path / "a.pth")
    weight, scale = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    report = load_checkpoint(model, tmp_path / "a.pth", strict=False)
    assert report == LoadReport(
        loaded=tuple(name for name in state if name not in ("0.weight", "more")),
        missing=("1.weight",),
        unexpected=("more",),
        mismatched=(Mismatch("0.weight", (7, 3, 1, 1), (4, 3, 1, 1)),),
    )
    assert torch.equal(model[0].weight, weight) and torch.equal(model[1].weight, scale)
    assert torch.equal(model[0].bias, state["0.bias"])
    assert str(report).splitlines() == [
        "5 entries loaded",
        "1 missing: '1.weight'",
        "1 unexpected: 'more'",
        "1 of another shape: 0.weight [7, 3, 1, 1], expected [4, 3, 1, 1]",
    ]


@pytest.mark.parametrize(
    "state",
    [
        {f"{'name' * 30}{i}": torch.ones(1) for i in range(3000)},
        {f"{i}.weight": torch.ones((1,) * 40) for i in range(3000)},
        {"n" * 1_000_000: torch.ones(1)},
    ],
    ids=["names", "shapes", "long"],
)
def test_errors_and_reports_are_short(state: dict[str, Tensor], tmp_path: Path) -> None:
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(3000))
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match=r"more|1,000,002 characters") as error:
        load_checkpoint(model, tmp_path / "a.pth")
    assert len(str(error.value)) < 2000
    report = load_checkpoint(model, tmp_path / "a.pth", strict=False)
    assert len(str(report)) < 2000 and str(report) == repr(report)


def test_batch_norms_of_old_checkpoints(model: nn.Module, tmp_path: Path) -> None:
    """Those of torch's first years count no batches; torch does not ask for it."""
    state = other(model)
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "a.pth")
    assert not load_checkpoint(model, tmp_path / "a.pth").misfits()


# Values


def cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: (x * 100 if x.is_floating_point() else x).to(dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cast(torch.int8), r"0\.weight: got torch\.int8, expected torch\.float32"),
        (cast(torch.bool), r"0\.weight: got torch\.bool"),
        (cast(torch.complex64), r"0\.weight: got torch\.complex64"),
        (lambda x: x * float("nan") if x.dim() else x, r"0\.weight: 12 of 12 .* not finite"),
        (lambda x: x / 0 if x.dim() == 1 else x, r"0\.bias: 4 of 4 values are not finite"),
        (lambda x: x.double() * 1e300 + 1e300, r"0\.weight: .* not finite as torch\.float32"),
        (lambda x: x.float() + 0.5, r"num_batches_tracked: got torch\.float32, expected"),
        (lambda x: x.to_sparse() if x.dim() == 1 else x, r"0\.bias: .* that is sparse"),
        (lambda x: x.to("meta"), r"0\.weight: .* on the meta device"),
    ],
)
def test_values_that_are_no_weights(
    model: nn.Module, tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    """Named in the error; nothing is loaded."""
    before = {name: x.clone() for name, x in model.state_dict().items()}
    torch.save({name: change(x) for name, x in other(model).items()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a\.pth: {message}|a\.pth: 1\.{message}"):
        load_checkpoint(model, tmp_path / "a.pth")
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(model: nn.Module, tmp_path: Path, dtype: torch.dtype) -> None:
    """Also where the counter of batches was converted with everything else."""
    state = {name: x.to(dtype) for name, x in other(model).items()}
    torch.save(state, tmp_path / "a.pth")
    load_checkpoint(model, tmp_path / "a.pth")
    assert torch.equal(model[0].weight, state["0.weight"].float())
    assert model[1].num_batches_tracked.item() == 3


def test_values_that_are_not_finite_can_be_asked_for(model: nn.Module, tmp_path: Path) -> None:
    state = {**other(model), "0.bias": torch.full((4,), torch.inf)}
    torch.save(state, tmp_path / "a.pth")
    load_checkpoint(model, tmp_path / "a.pth", finite=False)
    assert same(model, state)


def test_models_without_memory(tmp_path: Path) -> None:
    save_checkpoint(make_model(), tmp_path / "a.safetensors")
    with torch.device("meta"):
        empty = make_model()
    with pytest.raises(ValueError, match="the model has no memory"):
        load_checkpoint(empty, tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match=r"model: 0\.weight is on the meta device"):
        save_checkpoint(empty, tmp_path / "b.safetensors")


def test_values_that_no_type_of_torch_is(model: nn.Module, tmp_path: Path) -> None:
    save_file(other(model), tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes().replace(b'"F32"', b'"Q32"')
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.safetensors: neither safetensors"):
        load_checkpoint(model, tmp_path / "a.safetensors")


# Places


def test_links_stay_links(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    link = tmp_path / "last.safetensors"
    link.symlink_to(tmp_path / "runs" / "7.safetensors")
    save_checkpoint(model, link)
    assert link.is_symlink() and os.listdir(tmp_path / "runs") == ["7.safetensors"]
    load_checkpoint(model, link)


def test_places_where_no_file_can_be(model: nn.Module, tmp_path: Path) -> None:
    for path in (tmp_path, os.devnull):
        with pytest.raises(FileExistsError, match="is a folder or a device"):
            save_checkpoint(model, path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_checkpoint(model, tmp_path / "missing" / "a.safetensors")
    assert not os.listdir(tmp_path)
