"""Cross-task and cross-scale attention on a photograph, in three ways: `make demo`.

A feature pyramid of the photograph (HRNet, random weights) goes through SCA-MTL's cross-task
attention (CTAM) and cross-scale attention (CSAM) at four scales:

* op by op, as stock PyTorch calls;
* fused, with this library's modules;
* the naive way they replace: all pairs of (task, scale) by softmax, with the scores stored.

No time is printed before the fused outputs are accepted against a float64 evaluation. Writes
demo.png and demo.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from demo_figure import draw
from demo_inputs import FeatureExtractor, bundled_photograph, fit
from demo_measure import Run
from demo_report import make_report, show
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from xattn_models.images import ImageError, open_image

SIZE = (480, 640)
SIZES = tuple((SIZE[0] * i // 5, SIZE[1] * i // 5) for i in range(1, 6))
"""(H, W) in pixels; multiples of 32, as HRNet needs."""
NAIVE_SECONDS = 30.0
WIDTH = 100
"""Columns that the table needs; a narrower terminal wraps it."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console()
    console.width = max(console.width, WIDTH)
    start, load = time.perf_counter(), os.getloadavg()[0]
    try:
        photograph = open_image(options.image) if options.image else bundled_photograph()
    except ImageError as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = [size for size in SIZES if size[0] <= options.height]
    with (
        Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):
        run = Run(progress, len(sizes), Path(folder), options.naive_seconds)
        extractor = FeatureExtractor()
        for size in sizes:
            run.features(size, extractor(fit(photograph, size)))
        try:
            run.verify_and_time()
        except AssertionError as error:
            progress.stop()
            console.print(f"[red]fused differs from op by op, so no time is shown:[/red] {error}")
            return 1
        run.measure_memory()
        run.measure_naive()
    seconds = time.perf_counter() - start
    image = "china.jpg of scikit-learn" if options.image is None else options.image.name
    report = make_report(image, run, seconds, load)
    (options.out / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(options.out / "demo.png", fit(photograph, sizes[-1]), report)
    show(console, report)
    console.print(f"Written: {options.out}/demo.png, {options.out}/demo.json; {seconds:.0f} s.")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", type=Path, help="photograph; default: scikit-learn's china.jpg")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument(
        "--height",
        type=int,
        choices=[height for height, _ in SIZES],
        default=SIZE[0],
        help=f"largest of the resolutions, in pixels; default: {SIZE[0]}",
    )
    parser.add_argument(
        "--naive-seconds",
        type=float,
        default=NAIVE_SECONDS,
        help="time for measuring the naive way, beyond which it is modelled; default: %(default)g",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
