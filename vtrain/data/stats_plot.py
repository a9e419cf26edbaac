"""The picture of a dataset's stats (needs the extra `plots`): lengths, shares, and the packing forecast."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from vtrain.data.stats import RANKS, Stats
from vtrain.files import write_whole

BINS = 60


def draw(stats: Stats, target: Path) -> None:
    """Write a PNG of four panels."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'vtrain[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), dpi=120)
    _draw_lengths(axes[0, 0], stats)
    _draw_shares(axes[0, 1], stats)
    _draw_fill(axes[1, 0], stats)
    _draw_balance(axes[1, 1], stats)
    figure.suptitle(f"{Path(stats.path).name}: {stats.samples:,} samples, {stats.tokens:,} tokens", fontsize=12)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    plt.close(figure)
    write_whole(target, picture.getvalue())


def _draw_lengths(axes, stats: Stats) -> None:
    lengths, counts = np.array(stats.lengths), np.array(stats.counts)
    low, high = max(stats.quantile(0), 1), max(stats.quantile(1), 2)
    wide = high / low > 50  # lengths over orders of magnitude: bins of equal ratio
    edges = np.geomspace(low, high + 1, BINS + 1) if wide else np.linspace(low, high + 1, min(BINS, high - low + 1) + 1)
    axes.hist(lengths, bins=edges, weights=counts, color="tab:blue")
    if wide:
        axes.set_xscale("log")
    for share, style in ((0.5, "-"), (0.95, "--")):
        length = stats.quantile(share)
        axes.axvline(length, color="black", linewidth=1, linestyle=style, label=f"{100 * share:g} % <= {length}")
    axes.set(title="lengths", xlabel="tokens of a sample", ylabel="samples")
    axes.legend(fontsize=8)


def _draw_shares(axes, stats: Stats) -> None:
    tokens = max(stats.tokens, 1)
    readable = max(stats.samples - stats.excluded, 1)
    rows = [(f"tokens: {name}", count / tokens, "tab:blue") for name, count in stats.modalities.items()]
    rows += [(f"samples: {name}", count / readable, "tab:orange") for name, count in stats.kinds.items()]
    names, shares, colors = zip(*rows[::-1]) if rows else ((), (), ())
    bars = axes.barh(names, [100 * share for share in shares], color=colors)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set(title="shares", xlabel="% of tokens, % of samples with such a segment", xlim=(0, 112))


def _draw_fill(axes, stats: Stats) -> None:
    names = [str(f.pack_tokens) for f in stats.forecasts]
    padding = [100 * (1 - f.fill) for f in stats.forecasts]
    bars = axes.bar(names, padding, width=0.5, color="tab:blue")
    labels = [f"{100 * f.fill:.2f} % full\n{f.documents[1]} documents" for f in stats.forecasts]
    axes.bar_label(bars, labels=labels, padding=3, fontsize=8)
    axes.margins(y=0.25)
    axes.set(title="packing forecast", xlabel="tokens of a bin", ylabel="padding, %")


def _draw_balance(axes, stats: Stats) -> None:
    places = np.arange(len(stats.forecasts))
    width = 0.8 / len(RANKS)
    for n, ranks in enumerate(RANKS):
        excess = [100 * (f.imbalance.get(ranks, 1.0) - 1) for f in stats.forecasts]
        labels = [f"{e:.2f}" if ranks in f.imbalance else "too\nfew\nbins" for e, f in zip(excess, stats.forecasts)]
        bars = axes.bar(places + (n - (len(RANKS) - 1) / 2) * width, excess, width * 0.9, label=f"{ranks} ranks")
        axes.bar_label(bars, labels=labels, padding=3, fontsize=8)
    axes.set_xticks(places, [str(f.pack_tokens) for f in stats.forecasts])
    axes.margins(y=0.25)
    axes.set(title="cost of a layer on the dearest rank", xlabel="tokens of a bin", ylabel="above the mean, %")
    if stats.forecasts:
        axes.legend(fontsize=8)
