"""vkernels: the operations vtrain is built on, one signature each, with a backend per kind of device.

Import it on its own: `import vkernels; y = vkernels.rms_norm(x, weight)`. `vkernels.force(op, backend)` overrides the
choice of backend. Importing needs torch and numpy only; Triton kernels are compiled when they are first called.
"""

from vkernels import modules
from vkernels.activations import geglu, quick_gelu, swiglu
from vkernels.adamw import adamw_step, clip_factor
from vkernels.angles import rope_tables
from vkernels.attention import varlen_attention
from vkernels.cross_entropy import linear_cross_entropy
from vkernels.decode import decode_attention
from vkernels.embedding import Slot, embed, embed_order
from vkernels.fsq import fsq_dequantize, fsq_quantize
from vkernels.huggingface import patch, unpatch
from vkernels.lfq import lfq_dequantize, lfq_entropy, lfq_quantize
from vkernels.logprob import linear_logprob
from vkernels.newton_schulz import newton_schulz
from vkernels.norms import add_rms_norm, layer_norm, rms_norm
from vkernels.registry import backends, force
from vkernels.rotary import qk_norm_rope, rope
from vkernels.sampling import sample_logits
from vkernels.tiles import attention_tiles
from vkernels.touched import Touched, embed_touched, lazy_adamw_rows
from vkernels.vq import (
    vq_code_sums,
    vq_ema_update,
    vq_nearest,
    vq_reset_codes,
    vq_straight_through,
    vq_usage,
)

__all__ = [
    "Slot",
    "Touched",
    "adamw_step",
    "add_rms_norm",
    "attention_tiles",
    "backends",
    "clip_factor",
    "decode_attention",
    "embed",
    "embed_order",
    "embed_touched",
    "force",
    "fsq_dequantize",
    "fsq_quantize",
    "geglu",
    "layer_norm",
    "lazy_adamw_rows",
    "lfq_dequantize",
    "lfq_entropy",
    "lfq_quantize",
    "linear_cross_entropy",
    "linear_logprob",
    "modules",
    "newton_schulz",
    "patch",
    "qk_norm_rope",
    "quick_gelu",
    "rms_norm",
    "rope",
    "rope_tables",
    "sample_logits",
    "swiglu",
    "unpatch",
    "varlen_attention",
    "vq_code_sums",
    "vq_ema_update",
    "vq_nearest",
    "vq_reset_codes",
    "vq_straight_through",
    "vq_usage",
]
