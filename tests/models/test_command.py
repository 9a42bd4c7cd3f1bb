"""The command line: predictions, and what comes of wrong files, machines and interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from file_support import full_disk, write_png
from PIL import Image

from xattn_models import SCAMTL, save_checkpoint, sca_mtl
from xattn_models.__main__ import main

BACKBONE = "test_efficientnet"
TASKS = ("semseg", "normals", "depth")
NUM_OUTPUTS = {"semseg": 5, "normals": 3, "depth": 1}
SHAPES = {"semseg": (5, 97, 131), "normals": (3, 97, 131), "depth": (1, 97, 131)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pickle of parameters alone."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "net.pth"
    torch.save({"state_dict": sca_mtl(TASKS, NUM_OUTPUTS, BACKBONE).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def model() -> SCAMTL:
    return sca_mtl(TASKS, NUM_OUTPUTS, BACKBONE).eval()


@pytest.fixture(scope="module")
def complete(model: SCAMTL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Safetensors that tell everything."""
    path = tmp_path_factory.mktemp("complete") / "net.safetensors"
    save_checkpoint(model, path)
    return path


@pytest.fixture
def loaded(model: SCAMTL, monkeypatch: pytest.MonkeyPatch) -> str:
    """Option for a network that is there already, for tests of what comes after loading."""
    monkeypatch.setattr("xattn_models.__main__._network", lambda _: model)
    return "--random-weights"


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (97, 131, 3), dtype=np.uint8)
    path = tmp_path / "a photograph.png"
    Image.fromarray(pixels).save(path)
    return path


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
        (("--random-weights", "--key", "ema"), "--key: expected with --checkpoint alone"),
        (("--random-weights", "--max-pixels", "0"), "--max-pixels: got '0', expected a positive"),
        (("--random-weights", "--max-pixels", "x"), "--max-pixels: got 'x', expected a positive"),
        (("--random-weights", "--max-pixels", "9" * 9999), "--max-pixels: got '999"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kind", "softmax"), "kind: got 'softmax', but the checkpoint has 'linear'"),
        (("--tasks", *reversed(TASKS)), "tasks: got ['depth', 'normals', 'semseg'], but the"),
        (("--tasks", *TASKS, "--num-outputs", 5, 3, 2), "num_outputs: got {'semseg': 5, 'nor"),
        (
            ("--backbone", "resnet18"),
            f"backbone: got 'resnet18', but the checkpoint has '{BACKBONE}'",
        ),
        (("--config", "nyud_4"), "tasks: got ['semseg', 'normals', 'edge', 'depth'], but the"),
        (("--key", "model_ema"), "key: got 'model_ema', expected one with tensors"),
    ],
)
def test_options_that_contradict_the_file(
    complete: Path,
    options: tuple[object, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = ("--image", "x.png", "--out", tmp_path / "out")
    assert run("predict", "--checkpoint", complete, *files, *options) == 2
    said = capsys.readouterr().err
    assert "net.safetensors" in said and message in said and len(said) < 2000
    assert not (tmp_path / "out").exists()


def test_every_image_is_done_for_itself(
    loaded: str, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with the others; each is named, in a line of its own."""
    folder = tmp_path / "images"
    folder.mkdir()
    write_png(folder / "large.png", 12_000, 12_000, 8, 0, b"")  # which Pillow would warn of
    write_png(folder / "huge.png", 16_000, 16_000, 8, 0, b"")  # which Pillow refuses
    Image.new("L", (1, 1)).save(folder / "one.png")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to(photograph)
    names = ("large", "huge", "empty", "folder", "missing", "one", "link")
    paths = [folder / f"{name}.png" for name in names]
    code = run(
        *("predict", loaded, "--out", tmp_path / "out", "--no-pictures"),
        *("--image", *paths, photograph),
    )
    said = capsys.readouterr()
    done = [tmp_path / "out" / name for name in ("one", "link", "a photograph")]
    assert code == 1 and said.out.splitlines() == [str(path) for path in done]
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert [line.partition(".png: ")[0] for line in errors[:-1]] == [
        f"error: {folder / name}" for name in names[:5]
    ]
    assert "got 12000 x 12000 = 144,000,000 pixels, for which about " in errors[0]
    assert "got 256,000,000 pixels, for which about " in errors[1]
    assert all("--max-pixels" in line for line in errors[:2])
    assert errors[-1] == "error: 5 of 8 images could not be used" and "Warning" not in said.err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("it\ndoes not run"), "it\ndoes not run"),
        (MemoryError(), "out of memory"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("line\n" * 99_999), " characters)"),
        (RuntimeError("x" * 99_999), " characters)"),
    ],
)
def test_errors_of_the_network_name_the_image(
    loaded: str,
    photograph: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(SCAMTL, "forward", fail)
    arguments = ("predict", loaded, "--out", tmp_path / "out")
    assert run(*arguments, "--image", photograph) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {photograph}: ") and message in said and len(said) < 2000
    assert run(*arguments, "--image", photograph, "--traceback") == 1
    assert "in fail" in capsys.readouterr().err


def test_full_disks(
    loaded: str, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.png"
    Image.new("L", (8, 8)).save(small)
    out = tmp_path / "out"
    with full_disk(20_000):
        code = run(
            *("predict", loaded, "--out", out, "--no-pictures"),
            *("--image", photograph, small),
        )
    said = capsys.readouterr()
    assert code == 1 and f"error: {photograph}: [Errno 27] File too large" in said.err
    assert [path.relative_to(out) for path in out.rglob("*")] == [
        *(Path("small"), Path("small/arrays.npz"))
    ]


def test_full_disks_leave_no_program(
    loaded: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of any network: here of a layer, whose program is written the same."""
    program = torch.export.export(torch.nn.Linear(600, 600), (torch.ones(1, 600),))
    monkeypatch.setattr("xattn_models.export.export", lambda *_, **__: program)
    path = tmp_path / "net.pt2"
    arguments = ("export", loaded, "--format", "torch", "--out", path)
    assert run(*arguments) == 0 and path.stat().st_size > 1_000_000
    path.write_bytes(b"before")
    with full_disk(1_000_000):
        assert run(*arguments) == 2
    assert "error: [Errno 27] File too large" in capsys.readouterr().err
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["net.pt2"]


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_places_where_no_folder_can_be(
    loaded: str,
    photograph: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    out: str,
) -> None:
    (tmp_path / "file").touch()
    arguments = ("predict", loaded, "--image", photograph)
    assert run(*arguments, "--out", tmp_path / out) == 2
    assert f"--out: got {tmp_path / out}, where a file is" in capsys.readouterr().err


def test_programs_are_files(
    loaded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (str(tmp_path), os.devnull):
        assert run("export", loaded, "--format", "torch", "--out", out) == 2
        assert f"--out: got {out}, a folder or a device, expected" in capsys.readouterr().err


def start(checkpoint: Path, out: Path, *images: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "xattn_models", "predict", "--checkpoint", checkpoint]
    return subprocess.Popen(
        [*command, "--no-pictures", "--out", out, "--image", *images],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_interruption(complete: Path, photograph: Path, tmp_path: Path) -> None:
    """One line; what was done is there, and nothing else."""
    images = [photograph, *(tmp_path / f"{i}.png" for i in range(400))]
    for image in images[1:]:
        image.symlink_to(photograph)
    process = start(complete, tmp_path / "out", *images)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == str(tmp_path / "out" / "a photograph")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1] == "note: interrupted; files are complete or as before"
    done = list((tmp_path / "out").iterdir())
    assert 1 <= len(done) < len(images)
    for folder in done:
        with np.load(folder / "arrays.npz") as arrays:
            assert {task: arrays[task].shape for task in arrays} == SHAPES


def test_nobody_reads_on(complete: Path, photograph: Path, tmp_path: Path) -> None:
    process = start(complete, tmp_path / "out", photograph)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 1 and said == ""
    assert (tmp_path / "out" / "a photograph" / "arrays.npz").exists()
