"""Networks built from xattn_kernels' modules; this folder installs as ``xattn_models``."""

from xattn_kernels._version import __version__

__all__ = ["__version__"]
