"""Predictions for images of any size and kind, and as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from xattn_models import SCAMTL, sca_mtl
from xattn_models.images import ImageError, crop, normalise, pad_to_multiple, read_image
from xattn_models.predict import Predictor, check_stems, folder_name, predict_file

BACKBONE = "test_efficientnet"
TASKS = ("semseg", "normals", "depth")
NUM_OUTPUTS = {"semseg": 5, "normals": 3, "depth": 1}
SHAPES = {"semseg": (5, 97, 131), "normals": (3, 97, 131), "depth": (1, 97, 131)}


@pytest.fixture(scope="module")
def model() -> SCAMTL:
    torch.manual_seed(0)
    return sca_mtl(TASKS, NUM_OUTPUTS, BACKBONE).eval()


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (97, 131, 3), dtype=np.uint8)
    path = tmp_path / "a photograph.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("size", [(97, 131), (64, 96), (1, 1)])
def test_predictor_pads_and_crops(model: SCAMTL, size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size)
    actual = Predictor(model)(image)
    with torch.no_grad():
        expected = model(pad_to_multiple(normalise(image)))
    assert list(actual) == list(TASKS)
    for task in TASKS:
        assert torch.equal(actual[task], crop(expected[task], size))
    single = Predictor(model)(image[0])
    assert all(single[task].shape == (NUM_OUTPUTS[task], *size) for task in TASKS)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-4), (torch.bfloat16, 0.2), (torch.float16, 0.05)],
)
def test_predictor_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    own = sca_mtl(TASKS, NUM_OUTPUTS, BACKBONE)
    image = torch.rand(3, 40, 50)
    expected = Predictor(own)(image)
    actual = Predictor(own, dtype=dtype)(image)
    for task in TASKS:
        assert actual[task].dtype == torch.promote_types(dtype, torch.float32)
        error = (actual[task] - expected[task]).abs().max() / expected[task].abs().max()
        assert error <= tolerance, task


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_predictor_engines(model: SCAMTL, engine: str) -> None:
    image = torch.rand(3, 64, 64)
    expected = Predictor(model)(image)
    for task, y in Predictor(model, engine=engine)(image).items():
        assert (y - expected[task]).abs().max() <= 1e-4 * expected[task].abs().max()


PIXELS = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def expected(model: SCAMTL) -> dict[str, torch.Tensor]:
    return Predictor(model)(torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255)


@pytest.mark.parametrize(
    "convert",
    [
        lambda pixels, path: pixels,
        lambda pixels, path: pixels / 255,
        lambda pixels, path: (pixels / 255).astype(np.float32)[:, ::-1].copy()[:, ::-1],
        lambda pixels, path: (pixels / 255).astype(">f4"),
        lambda pixels, path: Image.fromarray(pixels),
        lambda pixels, path: Image.fromarray(pixels).convert("RGBA"),
        lambda pixels, path: Image.open(path),
        lambda pixels, path: path,
        lambda pixels, path: str(path),
    ],
)
def test_predictor_takes_images_of_any_kind(
    model: SCAMTL,
    expected: dict[str, torch.Tensor],
    tmp_path: Path,
    convert: Callable[[Any, Path], Any],
) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    actual = Predictor(model)(convert(PIXELS, tmp_path / "image.png"))
    assert list(actual) == list(TASKS)
    for task in TASKS:
        assert actual[task].shape == (NUM_OUTPUTS[task], 40, 50)
        assert (actual[task] - expected[task]).abs().max() <= 1e-5 * expected[task].abs().max()


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, TypeError, "got NoneType, expected a tensor"),
        ([PIXELS], TypeError, "got list, expected a tensor"),
        (b"image.png", TypeError, "got bytes, expected a tensor"),
        (PIXELS.astype(np.uint16), TypeError, "got an array of uint16"),
        (PIXELS > 9, TypeError, "got an array of bool"),
        (PIXELS[..., 0], ValueError, r"shape \(40, 50\), expected \(H, W, 3\)"),
        (PIXELS.transpose(2, 0, 1), ValueError, r"shape \(3, 40, 50\), expected \(H, W, 3\)"),
        (PIXELS[:0], ValueError, r"got shape \(3, 0, 50\)"),
        (PIXELS.astype(np.float32), ValueError, r"from 0 to 254, expected \[0, 1\]"),
        (torch.full((3, 4, 4), 255.0), ValueError, r"from 255 to 255, expected \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), ValueError, "from nan to nan"),
        (torch.full((3, 4, 4), -torch.inf), ValueError, "from -inf to -inf"),
        ("missing.png", ImageError, "missing.png: does not exist"),
        (Image.new("F", (4, 4)), ImageError, "image: floating-point image"),
        (Image.new("RGB", (0, 4)), ImageError, "image: got 4 x 0 = 0 pixels"),
    ],
)
def test_predictor_names_what_it_does_not_take(
    model: SCAMTL, image: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Predictor(model)(image)


@pytest.mark.parametrize(
    "image",
    [PIXELS, torch.rand(3, 40, 50), Image.fromarray(PIXELS), "image.png"],
    ids=["array", "tensor", "picture", "file"],
)
def test_too_many_pixels(model: SCAMTL, tmp_path: Path, image: Any) -> None:
    if isinstance(image, str):
        image = tmp_path / image
        Image.fromarray(PIXELS).save(image)
    assert Predictor(model, max_pixels=2000)(image)["depth"].shape == (1, 40, 50)
    message = "got 40 x 50 = 2,000 pixels, for which about 0.0 GB .* at most 1,999: .*max_pixels"
    with pytest.raises((ValueError, ImageError), match=message):
        Predictor(model, max_pixels=1999)(image)


def test_limit_is_that_of_the_images_in_a_batch(model: SCAMTL) -> None:
    assert Predictor(model, max_pixels=1024)(torch.rand(3, 3, 32, 32))["depth"].shape[0] == 3


def test_predictor_refuses(model: SCAMTL) -> None:
    with pytest.raises(ValueError, match="'fpga'"):
        Predictor(model, engine="fpga")
    predictor = Predictor(model)
    with pytest.raises(TypeError, match=r"image: got torch\.uint8"):
        predictor(torch.zeros(3, 32, 32, dtype=torch.uint8))
    for shape in ((32, 32), (1, 32, 32), (1, 4, 32, 32)):
        with pytest.raises(ValueError, match="image: got shape"):
            predictor(torch.zeros(shape))


def test_files(model: SCAMTL, photograph: Path, tmp_path: Path) -> None:
    predictor = Predictor(model)
    folder = predict_file(predictor, photograph, tmp_path / "out", title="a title")
    assert folder == tmp_path / "out" / "a photograph"
    names = {"arrays.npz", "sheet.png", *(f"{task}.png" for task in TASKS)}
    assert {path.name for path in folder.iterdir()} == names
    expected = predictor(read_image(photograph))
    with np.load(folder / "arrays.npz") as arrays:
        assert set(arrays) == set(TASKS)
        for task in TASKS:
            assert arrays[task].dtype == np.float32 and arrays[task].shape == SHAPES[task]
            assert np.array_equal(arrays[task], expected[task].numpy())
    for task in TASKS:
        with Image.open(folder / f"{task}.png") as picture:
            assert picture.size == (131, 97)


def test_unusable_images_leave_nothing(model: SCAMTL, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="missing"):
        predict_file(Predictor(model), tmp_path / "missing.png", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failing", ["arrays", "picture", "sheet", "folder", "interruption"])
def test_failures_leave_the_files_from_before(
    model: SCAMTL,
    photograph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    out, predictor = tmp_path / "out", Predictor(model)
    folder = predict_file(predictor, photograph, out)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    Image.new("RGB", (64, 64), "red").save(photograph)
    error: type[BaseException] = OSError
    if failing == "arrays":
        monkeypatch.setattr(np.lib.format, "write_array", fail)
    elif failing == "picture":
        monkeypatch.setattr(Image.Image, "save", fail)
    elif failing == "sheet":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    elif failing == "interruption":
        monkeypatch.setattr("xattn_models.pictures.sheet", interrupt)
        error = KeyboardInterrupt
    else:
        monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(error):
        predict_file(predictor, photograph, out)
    monkeypatch.undo()
    assert [path.name for path in out.iterdir()] == [folder.name]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    predict_file(predictor, photograph, out)
    assert all(path.read_bytes() != before[path.name] for path in folder.iterdir())


def fail(*_: object, **__: object) -> None:
    raise OSError("disk full")


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


class Named(nn.Module):
    """Predicts under a name."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task, self.weight = task, nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.task: image[:, :1] * self.weight}


@pytest.mark.parametrize("task", ["../x", "/tmp/x", "a/b", "sheet"])
def test_tasks_that_are_no_file_names(task: str, photograph: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"task {task!r}: expected a name for a file of its own"):
        predict_file(Predictor(Named(task)), photograph, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tasks_with_names_of_numpys_arguments(photograph: Path, tmp_path: Path) -> None:
    for task in ("file", "allow_pickle"):
        folder = predict_file(Predictor(Named(task)), photograph, tmp_path / task)
        with np.load(folder / "arrays.npz") as arrays:
            assert list(arrays) == [task] and arrays[task].shape == (1, 97, 131)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (33, 1)])
def test_small_images(model: SCAMTL, size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("L", (size[1], size[0])).save(tmp_path / "small", format="PNG")
    folder = predict_file(Predictor(model), tmp_path / "small", tmp_path / "out")
    assert folder == tmp_path / "out" / "small"
    with np.load(folder / "arrays.npz") as arrays:
        assert {arrays[task].shape[1:] for task in arrays} == {size}


def test_images_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="same name"):
        check_stems([Path("a/x.png"), Path("y.png"), Path("b/x.jpg")])
    assert [folder_name(Path(name)) for name in ("a.tar.gz", "a", "...png", ".png")] == [
        *("a.tar", "a", "...png", ".png")
    ]
