"""Networks built from xattn_kernels' modules; this folder installs as ``xattn_models``."""

from xattn_kernels._version import __version__

from .checkpoints import LoadReport, load_checkpoint, read_checkpoint, save_checkpoint
from .configs import CONFIGS, Config, config
from .predict import Predictor
from .sca_mtl import SCAMTL, sca_mtl

__all__ = [
    "CONFIGS",
    "SCAMTL",
    "Config",
    "LoadReport",
    "Predictor",
    "__version__",
    "config",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "sca_mtl",
]
