"""vtrain's own ways through the corpora: written as a dataset of shards, read by one Loader in one process."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from corpus import PACK_TOKENS, Corpus, Way

from vtrain.data import Dataset, Loader, ShardWriter, Source, Step, make_composer
from vtrain.data.manifest import publish

BINS = 64  # of a step
SHARD_BATCHES = 12  # append_batch calls of a shard: about 130 MB as int32


def write(corpus: Corpus, folder: Path, copies: int = 1) -> None:
    """copies: how often the samples stand in the dataset, for one that is larger than what is generated."""
    infos = []
    for first in [*range(0, len(corpus.batches), SHARD_BATCHES)] * copies:
        name = f"{len(infos):06d}.vts"
        key = uuid.uuid5(uuid.NAMESPACE_OID, f"{corpus.name} {name}").bytes
        with ShardWriter(folder / name, corpus.schema, uuid=key, id_store=corpus.id_store) as writer:
            for batch in corpus.batches[first : first + SHARD_BATCHES]:
                writer.append_batch(**batch)
        infos.append(writer.info)
    publish(folder, corpus.schema, infos)


def counts(composer: str, **options: Any) -> Callable[[Corpus, Path], Iterator[int]]:
    """The tokens of each step of a loader with these options."""

    def steps(corpus: Corpus, folder: Path) -> Iterator[int]:
        dataset = Dataset(folder)
        loader = Loader(
            [Source(dataset)],
            make_composer(composer),
            dataset.schema.vocab,
            pack_tokens=PACK_TOKENS,
            bins_per_step=BINS,
            **options,
        )
        return (taken(step, options.get("raw", False)) for step in loader)

    return steps


def taken(step: Step, raw: bool) -> int:
    """The tokens of a step. Of raw packs the tensors of every bin are asked for, as the peers make them."""
    if raw:
        packs = step.batches
        _ = packs.ids.unbind(), packs.cu_seqlens.unbind()
        _ = packs.keys, packs.segments, packs.segment_cu, packs.runs, packs.run_cu
    return step.tokens


PLAIN = {
    "vtrain raw": Way(write, counts("language_model", raw=True, prefetch=0)),
    "vtrain raw, with a thread": Way(write, counts("language_model", raw=True, prefetch=2)),
    "vtrain language_model": Way(write, counts("language_model", prefetch=0)),
}
PICTURES = {
    "vtrain text_to_image": Way(write, counts("text_to_image", prefetch=0)),
    "vtrain text_to_image, with a thread": Way(write, counts("text_to_image", prefetch=2)),
}
