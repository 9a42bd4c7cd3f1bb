"""Drop-in modules with the parameter names of the reference implementation."""

from xattn_kernels.modules.cross_attention import CrossAttention
from xattn_kernels.modules.cross_scale import CrossScaleAttention, CrossScaleHead
from xattn_kernels.modules.cross_task import CrossTaskAttention

__all__ = ["CrossAttention", "CrossScaleAttention", "CrossScaleHead", "CrossTaskAttention"]
