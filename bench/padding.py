"""Training on packed documents beside training on rows that are padded to the longest of a micro-batch.

    PYTHONPATH=. python bench/padding.py [--rounds 7] [--out FILE] [--quick]

share      percent of the rows that are padding: micro-batches of 8 in random order, and our loader's bins, for captions
           of 5..200 tokens beside the codes of a 512 and of a 1024 pixel picture; from lengths alone. Bins of documents
           of almost one length fill up only where they hold a whole number of them: 33792 = 8 * (4096 + 128)
step       real tokens per second of forward, backward and update on captions of 5..60 tokens and 64 codes, and the
           padding share of the same documents. Both ways share the weights' shape, the optimizer, the loss and its
           kernels; the ways take turns, a value is one step of 32 documents
Padded documents are right-padded and their labels masked. There is no mask: attention is causal, so no token sees the
padding behind it, and the padding's own rows are computed, as they are under a mask. The head leaves out rows without a
label in both ways, which favours padding: other trainers compute them. One thread; seconds are the processor's.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from harness import Rows

from vtrain.batch import Document, PackedBatch
from vtrain.data import Dataset, Loader, ShardWriter, Source, make_composer
from vtrain.data.format import SEGMENT, Modality, Role, Schema
from vtrain.data.manifest import publish
from vtrain.data.plan import pack
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.objectives.next_token import NextToken
from vtrain.train.optim import AdamW
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=2000, visual=1000)
SPECIALS = {"<|t2i|>": 1990, "<|soi|>": 1991}
CONFIG = DecoderConfig(4, 128, 4, 2, 384, qkv_bias=True, tied=True)
MICRO = 8  # documents of a padded micro-batch
DOCUMENTS = 32  # of a step
CODES, CAPTION = 64, (5, 60)
PACK_TOKENS = 1056  # three bins hold about as many tokens as 32 documents, 3152
BINS = 3
SHARES = {"512 px": 1024, "1024 px": 4096}  # codes of a picture
BIN_SIZES = (32768, 33792)
LONG_CAPTION = (5, 200)
PICTURES = 2**15  # whose lengths are packed


class Trainer:
    """A decoder with its objective and optimizer, as the loop trains it on one rank."""

    def __init__(self, config: DecoderConfig, vocab: Vocabulary, visual_softmax: str = "full") -> None:
        self.model, self.objective = Decoder(config, vocab), NextToken(visual_softmax)
        named = self.model.named_parameters()
        self.optimizer = AdamW(named, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def step(self, batches: Sequence[PackedBatch]) -> float:
        """One update; the mean loss."""
        count, whole = sum(batch.counts["next_token"] for batch in batches), torch.zeros(())
        for batch in batches:
            loss = self.objective(self.model, batch)[0]["next_token"][0] / count
            loss.backward()
            whole += loss.detach()
        norm = self.optimizer.clip(1.0, whole)
        self.optimizer.step(norm.isfinite().float())
        return whole.item()


def write(folder: Path, samples: int) -> Dataset:
    """Pictures of random codes with one caption of random text each."""
    rng = np.random.default_rng(0)
    captions = rng.integers(CAPTION[0], CAPTION[1] + 1, samples)
    segments = np.zeros(2 * samples, dtype=SEGMENT)
    segments["start"][1::2] = captions
    segments["modality"] = np.tile([Modality.TEXT, Modality.IMAGE], samples)
    segments["role"] = np.tile([Role.INPUT, Role.TARGET], samples)
    visual = VOCAB["visual"]
    ids = [x for n in captions for x in (rng.integers(0, 1990, n), rng.integers(visual.base, visual.end, CODES))]
    schema = Schema(VOCAB, SPECIALS)
    with ShardWriter(folder / "00000.vts", schema, uuid=bytes(range(16))) as writer:
        offsets = np.concatenate([[0], np.cumsum(captions + CODES)])
        keys = np.arange(1, samples + 1, dtype=np.uint64)
        writer.append_batch(np.concatenate(ids), offsets, segments, np.arange(samples + 1) * 2, keys=keys)
    publish(folder, schema, [writer.info])
    return Dataset(folder)


def packed_steps(dataset: Dataset) -> list[list[PackedBatch]]:
    """An epoch as the loader packs it."""
    composer = make_composer("text_to_image", drop_caption=0.1)
    options = {"pack_tokens": PACK_TOKENS, "bins_per_step": BINS, "prefetch": 0}
    return [step.batches for step in Loader([Source(dataset, max_epochs=1)], composer, VOCAB, **options)]


def padded_steps(packed: Sequence[Sequence[PackedBatch]]) -> list[list[PackedBatch]]:
    """The same documents in random order, eight at a time padded to the longest; whole steps only."""
    found = []
    for batch in itertools.chain.from_iterable(packed):
        found += [
            batch.ids[a:b].numpy() for a, b in itertools.pairwise(batch.cu_seqlens.tolist()[: batch.documents + 1])
        ]
    order = np.random.default_rng(1).permutation(len(found))
    batches = [padded([found[i] for i in order[at : at + MICRO]]) for at in range(0, len(order), MICRO)]
    size = DOCUMENTS // MICRO
    return [batches[at : at + size] for at in range(0, len(batches) - size + 1, size)]


def padded(documents: Sequence[np.ndarray]) -> PackedBatch:
    """Documents of one length; what was added is not scored, and is no token of the batch's count."""
    longest, made = max(map(len, documents)), []
    for ids in documents:
        row, weights = np.zeros(longest, np.int32), np.zeros(longest, np.float32)
        row[: len(ids)], weights[: len(ids)] = ids, 1
        made.append(Document(row, loss=weights))
    batch = PackedBatch.build(made, VOCAB)
    batch.tokens = sum(map(len, documents))
    return batch


def padding_share(steps: Sequence[Sequence[PackedBatch]]) -> float:
    """Percent, of all rows."""
    batches = list(itertools.chain.from_iterable(steps))
    return 100 * (1 - sum(b.tokens for b in batches) / sum(b.ids.numel() for b in batches))


def share_of_padded(lengths: np.ndarray) -> float:
    groups = lengths[: len(lengths) // MICRO * MICRO].reshape(-1, MICRO)
    return 100 * (1 - groups.sum() / (groups.max(1) * MICRO).sum())


def share_of_packed(lengths: np.ndarray, pack_tokens: int) -> float:
    """Of all bins but the last, which is open when the data ends."""
    order, bin_cu = pack(lengths.astype(np.int32), pack_tokens)
    filled = np.add.reduceat(lengths[order], bin_cu[:-1])[:-1]
    return 100 * (1 - filled.mean() / pack_tokens)


def shares(rows: Rows) -> None:
    rng = np.random.default_rng(2)
    for name, codes in SHARES.items():
        lengths = 2 + codes + rng.integers(LONG_CAPTION[0], LONG_CAPTION[1] + 1, PICTURES)
        about = {"shape": {"codes": codes, "caption": list(LONG_CAPTION), "documents": PICTURES}}
        rows.add(f"share, {name}", "padded, 8 a batch", [share_of_padded(lengths)], "%", **about)
        for pack_tokens in BIN_SIZES:
            share = share_of_packed(lengths, pack_tokens)
            rows.add(f"share, {name}", f"vtrain, packed to {pack_tokens}", [share], "%", **about)


def rates(ways: dict[str, list[list[PackedBatch]]], rounds: int) -> dict[str, list[float]]:
    """Real tokens per second of each way's steps, in turns; the first round is not counted."""
    trainers = {name: Trainer(CONFIG, VOCAB) for name in ways}
    feeds: dict[str, Iterator] = {name: itertools.cycle(steps) for name, steps in ways.items()}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, trainer in trainers.items():
            batches = next(feeds[name])
            start = time.process_time()
            trainer.step(batches)
            found[name].append(sum(b.tokens for b in batches) / (time.process_time() - start))
    return {name: values[1:] for name, values in found.items()}


def steps(rows: Rows, rounds: int, samples: int) -> None:
    with tempfile.TemporaryDirectory(prefix="vtrain-bench-") as folder:
        packed = packed_steps(write(Path(folder), samples))[:-1]  # the last one is not full
    ways = {"padded, 8 a batch": padded_steps(packed), "vtrain, packed": packed}
    shape = {"codes": CODES, "caption": list(CAPTION), "documents": DOCUMENTS, "pack_tokens": PACK_TOKENS}
    baseline = None
    for name, values in rates(ways, rounds).items():
        share = round(padding_share(ways[name]), 3)
        row = rows.add("step", name, values, "tokens/s", shape=shape, dtype="float32", baseline=baseline, padding=share)
        baseline = baseline or row["p50"]
        rows.add("step, padding", name, [share], "%", shape=shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON lines are appended to it")
    parser.add_argument("--quick", action="store_true", help="a look: fewer rounds and samples")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows("padding", arguments.out)
    shares(rows)
    steps(rows, 2 if arguments.quick else arguments.rounds, 256 if arguments.quick else 1024)


if __name__ == "__main__":
    main()
