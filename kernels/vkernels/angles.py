"""The angles of rotary embeddings: positions along one or several axes times the frequencies of the pairs.

Frequencies are scaled for long contexts as the `rope_scaling` (`rope_parameters`) dictionaries of Hugging Face say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vkernels.arguments import require_indices


def rope_tables(
    positions: torch.Tensor,
    head_dim: int,
    *,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
    max_seqlen: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin float32[T, D/2] of the rotary angles, for heads of D = head_dim, as `rope` and `qk_norm_rope` want.

    positions int[T]: pair i turns by theta^(-2i/D) per position. Of several axes, int[S, T]:
      without `sections`, each axis has D/S dimensions with a spectrum of their own, the first axis first (vision
      towers: S = 2, rows and columns);
      with `sections` (S numbers that add up to D/2) one spectrum is dealt out to the axes: the first sections[0] pairs
      go by axis 0 and so on (M-RoPE of Qwen2-VL), or with `interleaved` pair i goes by axis i % S while that axis has
      pairs left, else by axis 0 (Qwen3-VL).
    scaling: {"rope_type": "default" | "linear" | "llama3" | "yarn" | "longrope", ...} with Hugging Face's keys.
      longrope takes its long factors where max_seqlen, a number that the host knows, exceeds
      original_max_position_embeddings; leave it the same for a whole run, or documents change with their neighbours.

    Made on the device of positions, in float64 until the end: in float32 an angle at position 100000 is off by 4e-3.
    Only longrope copies from the host, its D/2 factors. ValueError for what does not fit.
    """
    _check(positions, head_dim, theta, sections, interleaved)
    axial = positions.dim() == 2 and sections is None
    dims = head_dim // positions.shape[0] if axial else head_dim
    frequencies, attention_factor = _scaled(dims, theta, scaling or {}, max_seqlen, positions.device)
    if axial:
        angles = torch.cat([axis.double()[:, None] * frequencies for axis in positions], -1)
    elif sections is None:
        angles = positions.double()[:, None] * frequencies
    else:
        angles = _deal(positions, sections, interleaved).double() * frequencies
    return (angles.cos() * attention_factor).float(), (angles.sin() * attention_factor).float()


def _check(positions, head_dim, theta, sections, interleaved) -> None:
    require_indices("rope_tables", positions=positions)
    if positions.dim() not in (1, 2):
        raise ValueError(f"rope_tables: positions {list(positions.shape)}, expected [T] or [axes, T]")
    if not theta > 0:
        raise ValueError(f"rope_tables: theta {theta}, expected a positive one")
    axes = positions.shape[0] if positions.dim() == 2 else 1
    if head_dim <= 0 or head_dim % (2 * axes if sections is None else 2):
        raise ValueError(f"rope_tables: head_dim {head_dim}, expected pairs for each of {axes} axes")
    if sections is None:
        if interleaved:
            raise ValueError("rope_tables: interleaved without sections, expected the pairs of each axis")
    elif positions.dim() != 2 or len(sections) != axes or sum(sections) != head_dim // 2:
        raise ValueError(
            f"rope_tables: sections {list(sections)} for positions {list(positions.shape)}, expected one per axis, "
            f"{head_dim // 2} pairs in all"
        )


def _deal(positions: torch.Tensor, sections: Sequence[int], interleaved: bool) -> torch.Tensor:
    """The position that each pair goes by, [T, D/2]."""
    T, pairs = positions.shape[1], sum(sections)
    if not interleaved:
        return torch.cat([axis[:, None].expand(T, n) for axis, n in zip(positions, sections)], -1)
    pair = torch.arange(pairs, device=positions.device)
    dealt = positions[0, :, None].expand(T, pairs)
    for i, n in enumerate(sections[1:], start=1):
        dealt = torch.where((pair % len(sections) == i) & (pair < n * len(sections)), positions[i, :, None], dealt)
    return dealt


def _scaled(dims: int, theta: float, scaling: Mapping[str, Any], max_seqlen: int, device) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair, float64[dims / 2], and what cos and sin are multiplied by."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _SCALINGS:
        raise ValueError(f"rope_tables: rope_type {kind!r}, expected one of {', '.join(_SCALINGS)}")
    make, keys = _SCALINGS[kind]
    missing = [key for key in keys if scaling.get(key) is None]
    if missing:
        raise ValueError(f"rope_tables: scaling of rope_type {kind!r} lacks {', '.join(missing)}")
    exponents = torch.arange(0, dims, 2, dtype=torch.float64, device=device) / dims
    return make(torch.pow(theta, -exponents), scaling, theta, max_seqlen)


def _default(frequencies, scaling, theta, max_seqlen):
    return frequencies, 1.0


def _linear(frequencies, scaling, theta, max_seqlen):
    return frequencies / scaling["factor"], 1.0


def _llama3(frequencies, scaling, theta, max_seqlen):
    """Pairs that turn more than `high` times in the original context stay, those below `low` turns are slowed down by
    the factor, and between the two it is blended linearly in the number of turns."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = frequencies * (scaling["original_max_position_embeddings"] / (2 * math.pi))
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling["factor"]), 1.0


def _yarn(frequencies, scaling, theta, max_seqlen):
    """Like llama3 with the blend linear in the number of the pair, between those that turn beta_fast and beta_slow
    times in the original context."""
    pairs, factor = len(frequencies), scaling["factor"]

    def pair_of(turns: float) -> float:
        return pairs * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / math.log(theta)

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    pair = torch.arange(pairs, dtype=torch.float64, device=frequencies.device)
    slow = ((pair - low) / (high - low if high != low else 1e-3)).clamp(0, 1)
    return frequencies * (1 - slow + slow / factor), _yarn_attention(scaling, factor)


def _yarn_attention(scaling: Mapping[str, Any], factor: float) -> float:
    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return scale(over) / scale(under) if over and under else scale(1.0)


def _longrope(frequencies, scaling, theta, max_seqlen):
    """A factor for each pair, found by search: one list for the original context, one for longer ones."""
    original = scaling["original_max_position_embeddings"]
    factors = scaling["long_factor" if max_seqlen > original else "short_factor"]
    if len(factors) != len(frequencies):
        raise ValueError(f"rope_tables: longrope has {len(factors)} factors, expected {len(frequencies)}, one per pair")
    factor, attention = scaling.get("factor"), scaling.get("attention_factor")
    if attention is None:
        if factor is None:
            raise ValueError("rope_tables: scaling of rope_type 'longrope' lacks factor or attention_factor")
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return frequencies / torch.tensor(factors, dtype=torch.float64, device=frequencies.device), attention


_BANDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_SCALINGS: dict[str, tuple[Callable, tuple[str, ...]]] = {  # rope_type -> (what it does, keys it cannot do without)
    "default": (_default, ()),
    "linear": (_linear, ("factor",)),
    "llama3": (_llama3, _BANDS),
    "yarn": (_yarn, ("factor", "original_max_position_embeddings")),
    "longrope": (_longrope, ("short_factor", "long_factor", "original_max_position_embeddings")),
}
