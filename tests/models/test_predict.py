"""Predictions for images of any size, from Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from xattn_models import SCAMTL, sca_mtl
from xattn_models.__main__ import main
from xattn_models.images import ImageError, crop, normalise, pad_to_multiple, read_image
from xattn_models.predict import Predictor, check_stems, from_checkpoint, predict_file, settings

BACKBONE = "test_efficientnet"
TASKS = ("semseg", "normals", "depth")
NUM_OUTPUTS = {"semseg": 5, "normals": 3, "depth": 1}
SHAPES = {"semseg": (5, 97, 131), "normals": (3, 97, 131), "depth": (1, 97, 131)}


@pytest.fixture(scope="module")
def model() -> SCAMTL:
    torch.manual_seed(0)
    return sca_mtl(TASKS, NUM_OUTPUTS, BACKBONE).eval()


@pytest.fixture(scope="module")
def checkpoint(model: SCAMTL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "net.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return path


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (97, 131, 3), dtype=np.uint8)
    path = tmp_path / "a photograph.png"
    Image.fromarray(pixels).save(path)
    return path


# Python


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


def test_images_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="same name"):
        check_stems([Path("a/x.png"), Path("y.png"), Path("b/x.jpg")])


# Checkpoints


def test_tasks_from_a_pickle(model: SCAMTL, checkpoint: Path) -> None:
    assert settings(checkpoint) == {"num_outputs": NUM_OUTPUTS, "tasks": list(TASKS)}
    loaded = from_checkpoint(checkpoint, backbone=BACKBONE)
    assert loaded.tasks == TASKS
    state = model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in loaded.state_dict().items())


def test_auxiliary_tasks_from_a_pickle(tmp_path: Path) -> None:
    own = sca_mtl(("semseg",), NUM_OUTPUTS, BACKBONE, auxiliary_tasks=TASKS)
    torch.save(own.state_dict(), tmp_path / "net.pth")
    loaded = from_checkpoint(tmp_path / "net.pth", backbone=BACKBONE)
    assert loaded.tasks == ("semseg",) and loaded.auxiliary_tasks == TASKS


def test_safetensors_do_not_tell_the_order(model: SCAMTL, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, path)
    with pytest.raises(ValueError, match=r"net\.safetensors: has the tasks depth, normals, semseg"):
        from_checkpoint(path, backbone=BACKBONE)
    assert from_checkpoint(path, tasks=TASKS, backbone=BACKBONE).tasks == TASKS
    with pytest.raises(ValueError, match="has no outputs of"):
        from_checkpoint(path, tasks=("semseg", "sal"), backbone=BACKBONE)


def test_settings_in_safetensors(model: SCAMTL, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    noted = {"tasks": TASKS, "num_outputs": NUM_OUTPUTS, "backbone": BACKBONE}
    state = {name: x.contiguous() for name, x in model.state_dict().items()}
    save_file(state, path, {"sca_mtl": json.dumps(noted)})
    assert from_checkpoint(path).tasks == TASKS
    for damaged in ("{", "[]", "{}"):
        save_file(state, path, {"sca_mtl": damaged})
        with pytest.raises(ValueError, match=r"net\.safetensors: .*settings"):
            from_checkpoint(path)


def test_other_checkpoints(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth: no checkpoint of SCA-MTL"):
        settings(tmp_path / "net.pth")


# Command line


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_command(checkpoint: Path, photograph: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "a photograph"
    network = ("--checkpoint", checkpoint, "--backbone", BACKBONE)
    files = ("--image", photograph, "--out", tmp_path / "out")
    assert run("predict", *network, *files, "--no-pictures", "--engine", "reference") == 0
    assert [path.name for path in folder.iterdir()] == ["arrays.npz"]
    with np.load(folder / "arrays.npz") as arrays:
        assert {task: arrays[task].shape for task in arrays} == SHAPES
    assert run("predict", *network, *files, "--no-arrays", "--dtype", "bfloat16") == 0
    assert len(list(folder.iterdir())) == 5


def test_command_goes_on_after_a_corrupt_image(
    checkpoint: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrupt = tmp_path / "corrupt.jpg"
    corrupt.write_bytes(b"no image")
    code = run(
        *("predict", "--checkpoint", checkpoint, "--backbone", BACKBONE, "--no-pictures"),
        *("--image", corrupt, photograph, "--out", tmp_path / "out"),
    )
    said = capsys.readouterr()
    assert code == 1
    assert str(corrupt) in said.err.replace("\n", "") and "1 of 2 images" in said.err
    assert said.out.strip() == str(tmp_path / "out" / "a photograph")


def test_random_weights_are_said_to_be(
    photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        *("predict", "--random-weights", "--tasks", "semseg", "depth", "--num-outputs", 4, 1),
        *("--backbone", BACKBONE, "--image", photograph, "--out", tmp_path / "out"),
    )
    assert code == 0 and "weights are random" in capsys.readouterr().err
    assert (tmp_path / "out" / "a photograph" / "sheet.png").stat().st_size > 1000


def test_help_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "predict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "one of the arguments --checkpoint --random-weights is required"),
        (("--random-weights", "--engine", "fpga"), "invalid choice: 'fpga'"),
        (("--random-weights", "--engine", "cuda"), "--engine cuda: "),
        (("--random-weights", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("--random-weights", "--config", "kitti"), "invalid choice: 'kitti'"),
        (("--random-weights", "--device", "abacus"), "--device abacus: "),
        (("--random-weights", "--device", "meta"), "expected a device that holds data"),
        (("--random-weights", "--num-outputs", "1"), "--num-outputs: expected with --tasks"),
        (
            ("--random-weights", "--tasks", "a", "b", "--num-outputs", "1"),
            "--num-outputs: got 1 numbers",
        ),
        (
            ("--random-weights", "--config", "nyud_2", "--tasks", "a"),
            "--config and --tasks: expected one",
        ),
        (("--random-weights", "--tasks", "depth"), "at least two"),
        (("--random-weights", "--backbone", "lynx"), "backbone: got 'lynx'"),
        (("--checkpoint", "missing.pth"), "missing.pth: no such file"),
    ],
)
def test_errors_are_lines(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = run("predict", "--image", "x.png", "--out", tmp_path / "out", *options)
    except SystemExit as exit:
        code = int(str(exit.code))
    said = capsys.readouterr().err
    assert code == 2 and message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_network(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("predict", "--image", "x.png", "--out", tmp_path / "out")
    network = ("--checkpoint", checkpoint, "--backbone", BACKBONE)
    assert run(*arguments, *network, "--tasks", "semseg", "depth") == 2
    said = capsys.readouterr().err
    assert "net.pth" in said and "normals" in said
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert run(*arguments, "--checkpoint", corrupt) == 2
    assert "corrupt.safetensors" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"corrupt\.safetensors"):
        run(*arguments, "--checkpoint", corrupt, "--traceback")
