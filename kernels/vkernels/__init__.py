"""vkernels: the operations vtrain is built on, one signature each, with a backend per kind of device.

Import it on its own: `import vkernels; y = vkernels.rms_norm(x, weight)`. `vkernels.force(op, backend)` overrides the
choice of backend. Importing needs torch only.
"""

from vkernels.activations import swiglu
from vkernels.attention import varlen_attention
from vkernels.cross_entropy import linear_cross_entropy
from vkernels.embedding import embed
from vkernels.fsq import fsq_dequantize, fsq_quantize
from vkernels.norms import rms_norm
from vkernels.registry import backends, force
from vkernels.rotary import rope
from vkernels.vq import vq_code_sums, vq_ema_update, vq_nearest

__all__ = [
    "backends",
    "embed",
    "force",
    "fsq_dequantize",
    "fsq_quantize",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "swiglu",
    "varlen_attention",
    "vq_code_sums",
    "vq_ema_update",
    "vq_nearest",
]
