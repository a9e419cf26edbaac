"""Batches of pixels for training image tokenizers: a permuted endless pass over a source, decoded by threads.

Step s holds the images at positions s*n .. s*n+n-1 of the endless order, whatever the number of ranks, so a step needs
no state but its number.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from vtrain.data.order import Order, epoch_key
from vtrain.data.prefetch import prefetch
from vtrain.data.sources import Record, Skipped

log = logging.getLogger(__name__)

CACHE_BYTES = 2**30  # decoded images kept in memory: a small set is decoded once


@dataclass
class ImageBatch:
    """images f32[B,3,H,W] in [-1,1], keys int64[B] (bits of u64), weights f32[B]: 0 = padding or unreadable."""

    images: torch.Tensor
    keys: torch.Tensor
    weights: torch.Tensor
    count: int  # images of weight 1, known to the host

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> ImageBatch:
        images = self.images.to(device, dtype, non_blocking=True)
        keys, weights = (t.to(device, non_blocking=True) for t in (self.keys, self.weights))
        return ImageBatch(images, keys, weights, self.count)


class ImageLoader:
    """Iterates the steps of one rank, each a list of `ImageBatch`es of `micro_batch` images.

    decode(record) -> uint8[resolution,resolution,3] reads and resizes, in `threads` threads. A record that it refuses
    with ValueError or OSError, or that the source skips, gets weight 0 and is told once (`skipped`: {name: reason}).
    """

    def __init__(
        self,
        records: Sequence[Record | Skipped],
        decode,
        *,
        resolution: int,
        images_per_step: int,
        micro_batch: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        threads: int = 4,
    ) -> None:
        if not records:
            raise ValueError("image loader: no images")
        self.records, self.decode = records, decode
        self.resolution, self.images_per_step = resolution, images_per_step
        self.micro_batch = micro_batch or -(-images_per_step // world)
        self.seed, self.rank, self.world, self.threads = seed, rank, world, threads
        self.skipped: dict[str, str] = {}
        self._cache: dict[int, tuple[int, np.ndarray]] = {}
        self._cached_bytes = 0
        self._order: tuple[int, Order] | None = None

    def steps(self, first: int = 0) -> Iterator[list[ImageBatch]]:
        """Steps from number `first` on, up to two prepared ahead."""
        return prefetch(self._steps(first), 2)

    def sequential(self) -> Iterator[ImageBatch]:
        """One pass in stored order for validation: the same number of batches on every rank, padded at the end."""
        n, group = len(self.records), self.micro_batch * self.world
        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, n, group):
                low = start + self.rank * self.micro_batch
                yield self._batch(pool, list(range(low, min(low + self.micro_batch, n))))

    def _steps(self, first: int) -> Iterator[list[ImageBatch]]:
        chunks = -(-self.images_per_step // self.micro_batch)
        with ThreadPoolExecutor(self.threads) as pool:
            step = first
            while True:
                numbers = self._numbers(step)
                mine = range(self.rank, -(-chunks // self.world) * self.world, self.world)
                cuts = [numbers[c * self.micro_batch : (c + 1) * self.micro_batch] for c in mine]
                yield [self._batch(pool, cut) for cut in cuts]
                step += 1

    def _numbers(self, step: int) -> list[int]:
        n = len(self.records)
        positions = np.arange(step * self.images_per_step, (step + 1) * self.images_per_step)
        out = np.empty_like(positions)
        for epoch in np.unique(positions // n).tolist():
            inside = positions // n == epoch
            out[inside] = self._epoch_order(epoch)(positions[inside] % n)
        return out.tolist()

    def _epoch_order(self, epoch: int) -> Order:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, Order(len(self.records), epoch_key(self.seed, 0, epoch)))
        return self._order[1]

    def _batch(self, pool: ThreadPoolExecutor, numbers: Sequence[int]) -> ImageBatch:
        kept = [found for found in pool.map(self._decoded, numbers) if found is not None]
        keys = np.zeros(self.micro_batch, dtype=np.uint64)
        pixels = np.zeros((self.micro_batch, self.resolution, self.resolution, 3), dtype=np.uint8)
        for i, (key, image) in enumerate(kept):
            keys[i], pixels[i] = key, image
        weights = torch.zeros(self.micro_batch)
        weights[: len(kept)] = 1.0
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)
        return ImageBatch(images, torch.from_numpy(keys.view(np.int64)), weights, len(kept))

    def _decoded(self, number: int) -> tuple[int, np.ndarray] | None:
        """(key, pixels) of a record; None where there is no picture to be had."""
        if number in self._cache:
            return self._cache[number]
        record = self.records[number]
        if isinstance(record, Skipped):
            return self._skip(record.name, record.reason)
        try:
            found = record.key, self.decode(record)
        except (ValueError, OSError) as error:
            return self._skip(record.name, str(error).removeprefix(f"{record.name}: "))
        if self._cached_bytes + found[1].nbytes <= CACHE_BYTES:
            self._cache[number] = found
            self._cached_bytes += found[1].nbytes
        return found

    def _skip(self, name: str, reason: str) -> None:
        if name not in self.skipped:
            self.skipped[name] = reason
            log.warning("skipped: %s: %s", name, reason)
