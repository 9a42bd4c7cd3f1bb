"""Command line: ``python -m xattn_models predict | export``."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xattn_kernels import freeze_
from xattn_kernels.problem import ENGINES
from xattn_kernels.registry import list_backends

from .configs import CONFIGS
from .files import clip, replacing, shown

if TYPE_CHECKING:
    from .sca_mtl import SCAMTL

DTYPES = ("float32", "bfloat16", "float16", "float64")
MESSAGE, LINE = 1800, 300
"""Characters of an error, and of a line of it; torch lists thousands of names."""

EXPECTED = (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
"""What wrong arguments, files and machines raise. `--traceback` shows where."""


class UsageError(Exception):
    """Options that do not fit each other or this machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 if some of the images could not be predicted, or if nobody reads what is printed; 2 for
        arguments, checkpoints or machines with which nothing could be done; 130 after an
        interruption. Errors go to stderr.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        with warnings.catch_warnings():
            code = int(options.run(options))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _complain("interrupted; files are complete or as before", kind="note")
        return 130
    except BrokenPipeError:
        # Nobody reads on. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, *EXPECTED) as error:
        if options.traceback:
            raise
        _complain(_reason(error))
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xattn_models", description="SCA-MTL networks: predictions and exports."
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    network = argparse.ArgumentParser(add_help=False)
    _add_network(network.add_argument_group("network"))
    network.add_argument("--traceback", action="store_true", help="show where an error comes from")
    _add_predict(commands, network)
    _add_export(commands, network)
    return parser


def _add_network(group: Any) -> None:
    weights = group.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="safetensors, or a file of torch.save"
    )
    weights.add_argument(
        "--random-weights",
        action="store_true",
        help="untrained, from a fixed seed: shows that everything runs, and predicts nothing",
    )
    group.add_argument(
        "--key",
        help="of the parameters in the file of torch.save, such as model_ema; default: those that "
        "are no moving averages",
    )
    group.add_argument(
        "--config",
        choices=CONFIGS,
        help="a published setting; default: what the checkpoint tells, nyud_4 without one",
    )
    group.add_argument("--tasks", nargs="+", metavar="TASK", help="in the network's order")
    group.add_argument(
        "--num-outputs", nargs="+", type=int, metavar="N", help="channels, one number per task"
    )
    group.add_argument("--backbone", help="model of timm; default: hrnet_w18_small_v2")
    group.add_argument("--kind", choices=("linear", "softmax"), help="of the cross-attention")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="to compute in")
    group.add_argument("--device", default="cpu", help="to compute on; default: cpu")
    group.add_argument(
        "--engine",
        choices=("auto", *ENGINES),
        default="auto",
        help="of xattn_kernels; see python -m xattn_kernels info",
    )


def _add_predict(commands: Any, network: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "predict",
        parents=[network],
        help="predict for images; write pictures and arrays",
        description="Predict for images of any size. For every image, DIR/<its name>/ gets a "
        "picture of each task, a contact sheet (sheet.png) and the network's outputs (arrays.npz: "
        "float32, (channels, height, width) by task).",
    )
    parser.add_argument("--image", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--compile", action="store_true", help="run by torch.compile")
    parser.add_argument(
        "--max-pixels",
        type=_positive,
        metavar="N",
        help="refuse larger images (height times width), before they are decoded; default: what "
        "about 8 GiB of memory are enough for",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--no-pictures", action="store_true", help="write arrays.npz only")
    what.add_argument("--no-arrays", action="store_true", help="write pictures only")
    parser.set_defaults(run=_predict)


def _add_export(commands: Any, network: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "export",
        parents=[network],
        help="write the network as a program, by torch.export or as ONNX",
        description="Write the network as a program from an image (batch, 3, height, width), "
        "normalised, to the outputs of its tasks. ONNX files hold plain operators (the reference "
        "engine) and are checked with onnxruntime if it is installed.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--format", choices=("torch", "onnx"), required=True)
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images, multiples of 32; default: the configuration's, 480 640 without one",
    )
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--dynamic", action="store_true", help="take any number of images")
    parser.set_defaults(run=_export)


def _predict(options: argparse.Namespace) -> int:
    from PIL import Image
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from . import predict

    # Too large images are refused; Pillow's warning about them would be a second line.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    predict.check_stems(options.image)
    _check_machine(options)
    predictor = predict.Predictor(
        _network(options),
        device=options.device,
        dtype=getattr(torch, options.dtype),
        engine=options.engine,
        compile=options.compile,
        max_pixels=options.max_pixels,
    )
    freeze_(predictor.model)  # nobody else has it
    _make_folder(options.out)
    title = ", random weights: this is no prediction" if options.random_weights else ""
    failed = 0
    with Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=len(options.image) == 1,
    ) as progress:
        for path in progress.track(options.image, description="images"):
            try:
                folder = predict.predict_file(
                    predictor,
                    path,
                    options.out,
                    write_pictures=not options.no_pictures,
                    write_arrays=not options.no_arrays,
                    title=path.name + title,
                )
            # One image, whatever is wrong with it, does not keep the others from being done.
            except Exception as error:
                failed += 1
                reason = _reason(error)
                if not reason.startswith(shown(path)):
                    reason = f"{shown(path)}: {reason}"
                _complain(reason, progress.console)
                if options.traceback:
                    traceback.print_exception(error)
            else:
                print(folder, flush=True)
    if failed and len(options.image) > 1:
        _complain(f"{failed} of {len(options.image)} images could not be used")
    return int(failed > 0)


def _export(options: argparse.Namespace) -> int:
    from . import export

    if options.format == "onnx" and options.engine not in ("auto", "reference"):
        raise UsageError(
            f"--engine: got {options.engine!r}, expected 'reference': ONNX has no operators for "
            "other engines' kernels"
        )
    _check_machine(options)
    size = options.size or (CONFIGS[options.config].image_size if options.config else (480, 640))
    model = _network(options).eval().to(options.device, getattr(torch, options.dtype))
    size, out = (size[0], size[1]), options.out
    if out.exists() and not out.is_file():
        raise UsageError(f"--out: got {shown(out)}, a folder or a device, expected a file")
    _make_folder(out.parent)
    if options.format == "torch":
        program = export.export(
            model, size, batch=options.batch, dynamic=options.dynamic, engine=options.engine
        )
        # By way of memory: torch ends the process when a disk is full.
        data = io.BytesIO()
        torch.export.save(program, data)
        with replacing(out) as file:
            file.write(data.getbuffer())
        print(f"{out}: import xattn_kernels, torch.export.load it, run it under torch.no_grad")
        return 0
    error = export.export_onnx(model, out, size, batch=options.batch, dynamic=options.dynamic)
    if error is None:
        print(f"{out}: not checked, for onnxruntime is not installed")
    else:
        print(f"{out}: onnxruntime differs from torch by at most {error:.1e} of the largest value")
    return 0


def _network(options: argparse.Namespace) -> SCAMTL:
    from . import predict
    from .sca_mtl import sca_mtl

    arguments = _arguments(options)
    if options.checkpoint is not None:
        return predict.from_checkpoint(options.checkpoint, key=options.key, **arguments)
    if options.key is not None:
        raise UsageError("--key: expected with --checkpoint alone")
    if "tasks" not in arguments:
        arguments = {**CONFIGS["nyud_4"].arguments(), **arguments}
    _complain("the weights are random: what comes out predicts nothing", kind="note")
    torch.manual_seed(0)
    return sca_mtl(**arguments)


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `sca_mtl` that the options give."""
    arguments: dict[str, Any] = {}
    if options.config is not None:
        if options.tasks is not None:
            raise UsageError("--config and --tasks: expected one of them")
        arguments = CONFIGS[options.config].arguments()
    if options.num_outputs is not None:
        if options.tasks is None:
            raise UsageError("--num-outputs: expected with --tasks alone")
        if len(options.num_outputs) != len(options.tasks):
            raise UsageError(
                f"--num-outputs: got {len(options.num_outputs)} numbers, expected one for each of "
                f"the {len(options.tasks)} tasks"
            )
        arguments["num_outputs"] = dict(zip(options.tasks, options.num_outputs, strict=True))
    for name in ("tasks", "backbone", "kind"):
        if getattr(options, name) is not None:
            arguments[name] = getattr(options, name)
    return arguments


def _check_machine(options: argparse.Namespace) -> None:
    """Refuse engines and devices that this machine has not, before anything is loaded."""
    for engine in list_backends():
        if engine.name == options.engine and not engine.available:
            raise UsageError(f"--engine {engine.name}: {engine.reason}")
    try:
        usable = torch.empty(0, device=options.device).device.type != "meta"
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--device {options.device}: {reason}") from error
    if not usable:
        raise UsageError(f"--device: got {options.device!r}, expected a device that holds data")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"--out: got {shown(path)}, where a file is, expected a folder") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {clip(text, 30)!r}, expected a positive integer")
    return int(text)


def _reason(error: Exception) -> str:
    from .images import ImageError

    text = str(error) or ("out of memory" if isinstance(error, MemoryError) else "")
    if isinstance(error, (UsageError, ImageError, *EXPECTED)) and text:
        return text
    return f"{type(error).__name__}: {text}"


def _complain(message: str, console: Any = None, kind: str = "error") -> None:
    lines = [clip(line, LINE) for line in message.strip().splitlines()]
    text = f"{kind}: {clip(chr(10).join(lines), MESSAGE)}"
    if console is None:
        print(text, file=sys.stderr)
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
