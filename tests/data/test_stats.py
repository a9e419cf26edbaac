"""Stats against plain Python over the samples, and the forecast against a packing by hand."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from shard_model import Sample, some_samples, write_shard
from small_datasets import SCHEMA, add_twin

from vtrain.data import exclude, manifest, stats
from vtrain.data.format import Modality, Role, read_pages
from vtrain.data.reader import Dataset

EXCLUDED = (3, 4, 11)


@pytest.fixture
def made(tmp_path):
    """(dataset, the samples that are not excluded): three shards; two keys stand twice, one of them three times."""
    found = [some_samples(count, seed=count) for count in (7, 12, 10)]
    found[0][0].key = found[1][5].key = found[2][2].key = 77
    found[2][0].key = found[2][1].key = 78
    found[1][0].key = found[0][3].key  # sample 3 is excluded: no repetition
    infos = [write_shard(tmp_path / f"{n}.vts", SCHEMA, samples) for n, samples in enumerate(found)]
    manifest.publish(tmp_path, SCHEMA, infos, skipped=4)
    add_twin(tmp_path, "clip", [1])
    exclude.leave_out(tmp_path, exclude.parse(",".join(map(str, EXCLUDED))))
    kept = [sample for n, sample in enumerate(chain(*found)) if n not in EXCLUDED]
    return Dataset(tmp_path), kept


def slow_kinds(samples: list[Sample]) -> tuple[Counter, Counter]:
    """(tokens by modality, samples by kind of segment)."""
    tokens, kinds = Counter(), Counter()
    for sample in samples:
        ends = [segment[0] for segment in sample.segments[1:]] + [len(sample.ids)]
        for segment, end in zip(sample.segments, ends):
            tokens[Modality(segment[1]).name.lower()] += end - segment[0]
        if not sample.segments:
            tokens["bare"] += len(sample.ids)
        kinds.update({f"{Role(s[2]).name.lower()} {Modality(s[1]).name.lower()}" for s in sample.segments})
    return +tokens, kinds


@pytest.mark.parametrize("chunk", [4, 1 << 16])
def test_the_numbers_are_those_of_the_samples(made, monkeypatch, chunk):
    monkeypatch.setattr(stats, "CHUNK", chunk)
    monkeypatch.setattr(stats, "KEYS_AT_ONCE", 3 * chunk)
    dataset, kept = made
    seen = []
    found = stats.measure(dataset, progress=lambda *step: seen.append(step))
    lengths = [len(sample.ids) for sample in kept]
    assert dict(zip(found.lengths, found.counts)) == Counter(lengths)
    assert found.lengths == sorted(found.lengths)
    for share in (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0):
        assert found.quantile(share) == np.quantile(lengths, share, method="inverted_cdf")
    tokens, kinds = slow_kinds(kept)
    assert (found.modalities, found.kinds) == (dict(tokens), dict(kinds))
    assert (found.samples, found.excluded, found.skipped, found.tokens) == (29, 3, 4, sum(lengths))
    assert found.repeated_keys == len(kept) - len({sample.key for sample in kept}) == 3
    assert seen[-1] == (26, 26)


def test_bytes_are_those_of_the_files(made):
    dataset, _ = made
    found = stats.measure(dataset)
    files = sorted(dataset.path.glob("*.vts"))
    assert found.file_bytes == sum(path.stat().st_size for path in files)
    assert found.token_bytes == sum(read_pages(path)[0].sections["TOK"].bytes for path in files)
    assert found.twin_bytes == {"clip": (dataset.path / "1.clip.vtf").stat().st_size}
    assert found.raw_bytes_per_token == 1  # 64 ids
    assert found.stored_tokens == dataset.tokens > found.tokens


def test_the_report_says_it_all_and_json_reads_back(made):
    found = stats.measure(made[0], [16, 64])
    text = found.describe()
    for part in ("29 in 3 shards, 3 excluded, 4 source records skipped, 3 with the key of another", "least 0", "95%",
                 "tokens by modality", "target image", "fill %", "twin clip"):  # fmt: skip
        assert part in text, part
    read = json.loads(found.json())
    assert read["tokens"] == found.tokens
    assert [row["pack_tokens"] for row in read["forecasts"]] == [16, 64]


def test_the_forecast_counts_what_the_packer_makes(monkeypatch):
    lengths = np.array([5, 3, 0, 9, 4, 2, 1, 8, 12, 6], dtype=np.int32)
    monkeypatch.setattr(stats, "RANKS", (1,))
    monkeypatch.setattr(stats, "MICRO_STEPS", 2)
    found = stats.forecast(lengths, 10)
    # The oldest that fits, then the longest that does: 5 3 | 9 | 4 2 1 would begin so without "finish".
    bins = [[5, 3, 2], [9, 1], [4, 6], [8]]
    assert (found.samples, found.too_long, found.bins) == (8, 1, len(bins))
    assert found.fill == pytest.approx(np.mean([sum(b) for b in bins[:-1]]) / 10)
    sizes = sorted(len(b) for b in bins[:-1])
    assert found.documents == [sizes[0], sizes[len(sizes) // 2], sizes[-1]]
    assert found.imbalance == {1: 1.0}  # one rank is its own mean


def test_imbalance_is_that_of_neighbours_in_cost():
    costs = np.array([1.0, 7, 3, 5, 2, 8, 4, 6, 100])  # one step of 2 ranks x 4 micro-steps; the rest is no step
    assert stats._imbalance(costs, 2) == pytest.approx(np.mean([8 / 7.5, 6 / 5.5, 4 / 3.5, 2 / 1.5]))
    assert stats._imbalance(costs, 3) is None


def test_a_forecast_is_of_samples_that_are_not_excluded(made, monkeypatch):
    dataset, kept = made
    full = [len(sample.ids) for sample in kept if sample.ids]
    assert stats.measure(dataset, [1000]).forecasts[0].samples == len(full)
    monkeypatch.setattr(stats, "FORECAST_SAMPLES", 10)
    assert stats.measure(dataset, [1000]).forecasts[0].samples <= 10
    with pytest.raises(ValueError, match="pack_tokens: 0"):
        stats.measure(dataset, [0])


def test_a_dataset_of_empty_samples_has_stats_too(tmp_path):
    info = write_shard(tmp_path / "a.vts", SCHEMA, [Sample(1, []), Sample(2, [])])
    manifest.publish(tmp_path, SCHEMA, [info])
    found = stats.measure(Dataset(tmp_path), [8])
    assert (found.tokens, found.lengths, found.counts, found.modalities) == (0, [0], [2], {})
    assert found.forecasts[0].bins == 0
    assert "2 in 1 shards" in found.describe()


def test_the_plot_is_a_picture_of_four_panels(made, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    from vtrain.data.stats_plot import draw

    for budgets in ([], [16, 32, 64]):
        draw(stats.measure(made[0], budgets), tmp_path / "plot.png")
        picture = np.asarray(Image.open(tmp_path / "plot.png").convert("L"))
        quarters = [half for rows in np.array_split(picture, 2) for half in np.array_split(rows, 2, axis=1)]
        assert min(q.std() for q in quarters) > 10
