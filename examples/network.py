"""The network in a few lines, and a picture of what it returns.

Trained weights are not to be had, so the network is first overfitted to the photograph with labels
computed from it (`train_tiny`); the picture says so. With --checkpoint it takes yours instead.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from demo_inputs import bundled_photograph, fit
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from train_tiny import overfit

from xattn_models import pictures, save_checkpoint
from xattn_models.images import ImageError, open_image, to_tensor
from xattn_models.predict import Predictor, from_checkpoint

SIZE = (192, 256)
"""(H, W) in pixels."""
STEPS = 60


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(stderr=True)
    start = time.perf_counter()
    try:
        photograph = open_image(options.image) if options.image else bundled_photograph()
    except ImageError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    image = fit(photograph, tuple(options.size))
    title = str(options.checkpoint)
    if options.checkpoint:
        model = from_checkpoint(options.checkpoint)
    else:
        title = (
            f"no trained network: overfitted on this image for {options.steps} steps, on labels "
            "computed from its colours"
        )
        with Progress(
            *Progress.get_default_columns(), TimeElapsedColumn(), console=console
        ) as progress:
            task = progress.add_task("training", total=options.steps)
            model = overfit(
                to_tensor(image),
                options.steps,
                lambda step, loss: progress.update(
                    task, completed=step, description=f"loss {loss:.3f}"
                ),
            )

    outputs = Predictor(model)(to_tensor(image))

    drawn = {task: pictures.draw(task, y.numpy()) for task, y in outputs.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pictures.sheet(options.out, image, drawn, title=title, width=2.6)
    if options.save:
        save_checkpoint(model, options.save)
    print(f"{options.out}; {time.perf_counter() - start:.0f} s")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", type=Path, help="photograph; default: scikit-learn's china.jpg")
    parser.add_argument("--out", type=Path, default=Path("out/network.png"), help="the picture")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument(
        "--size", type=int, nargs=2, default=SIZE, metavar=("H", "W"), help="default: 192 256"
    )
    parser.add_argument("--checkpoint", type=Path, help="use these parameters, do not train")
    parser.add_argument("--save", type=Path, help="write the trained parameters")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
