"""Pretraining: packed documents of token shards, a decoder, next-token cross-entropy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from vtrain.batch import PackedBatch
from vtrain.config import ConfigError
from vtrain.data.compose import Composer, make_composer
from vtrain.data.loader import Loader, sequential_batches
from vtrain.data.mix import Source, check_sources
from vtrain.data.order import BlockOrder
from vtrain.data.prefixes import encode_prefixes
from vtrain.data.reader import Dataset
from vtrain.describe import describe_batch
from vtrain.dist.comm import sum_over_ranks
from vtrain.dist.fsdp import full, shard
from vtrain.dist.mesh import World
from vtrain.files import copy_folder
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.models.flops import peak_flops, train_flops
from vtrain.models.hf import (
    check_vocabulary,
    copy_parameters,
    export_hf,
    import_hf,
    kept_rows,
    read_hf_config,
    read_vocabulary,
)
from vtrain.models.presets import from_hf_config, preset
from vtrain.objectives.next_token import NextToken
from vtrain.settings import PretrainSettings
from vtrain.text import load_text_tokenizer
from vtrain.train import checkpoint
from vtrain.train.freeze import apply_trainable
from vtrain.train.kernel_tables import kernel_tables
from vtrain.train.loop import DataEnded, Work
from vtrain.train.optim import AdamW
from vtrain.train.pictures import PictureDrawer
from vtrain.train.stage import matched, resized
from vtrain.train.tasks.root import Root, compute_dtype
from vtrain.vocab import Vocabulary

ASSETS = ("text_tokenizer", "image_tokenizer")  # folders of a dataset that its models need to be used


class Plan:
    """What a configuration resolves to: datasets, vocabulary, composer and the model's shape. No process group."""

    def __init__(self, settings: PretrainSettings) -> None:
        self.settings = settings
        data = settings.data
        every = (*data.sources, *settings.eval.sources)
        captioned = [Path(s.path) for s in every if (s.composer or data.composer) == "text_to_image"]
        self.prefixes = encode_prefixes(data.prefixes, captioned)
        self.sources = [
            Source(
                Dataset(s.path),
                s.weight_schedule or s.weight,
                s.name,
                s.max_epochs or None,
                composer=self.composer(s.composer) if s.composer else None,
                order=BlockOrder(data.block, data.open_blocks) if data.order == "blocks" else None,
            )
            for s in data.sources
        ]
        self.vocab: Vocabulary = self.sources[0].dataset.schema.vocab
        self.eval_sources = [
            Source(Dataset(s.path), 1.0, s.name, composer=self.composer(s.composer, training=False))
            for s in settings.eval.sources
        ]
        check_sources(self.sources, self.vocab)
        for source in self.eval_sources:  # one by one: a held-out set may have the name of the set it was cut from
            check_sources([self.sources[0], Source(source.dataset, name=f"eval {source.name}")], self.vocab)
        self.tables = NextToken(settings.loss.visual_softmax).tables(self.vocab)
        self.config = _decoder_config(settings)

    @property
    def bins_per_step(self) -> int:
        return self.settings.train.tokens_per_step // self.settings.data.pack_tokens

    @cached_property
    def used_rows(self) -> int | None:
        """Rows of a foreign embedding that were trained: the ids of the text tokenizer without our specials."""
        folder = self.sources[0].dataset.path / "text_tokenizer"
        if self.vocab.ranges[0].name != "text" or not folder.is_dir():
            return None
        return load_text_tokenizer(folder, specials=()).vocab_size

    def root(self) -> Root:
        """Model and objective, without storage."""
        with torch.device("meta"):
            model = Decoder(self.config, self.vocab)
        apply_trainable(model, self.settings.train.trainable)
        return Root(model, NextToken(self.settings.loss.visual_softmax))

    def composer(self, name: str = "", *, training: bool = True) -> Composer:
        """The composer called `name`, data.composer unless given. Evaluation keeps captions, one of each sample."""
        data = self.settings.data
        name, options = name or data.composer, {"seed": self.settings.run.seed}
        if name == "text_to_image":
            options |= {
                "drop_caption": data.drop_caption if training else 0.0,
                "text_weight": self.settings.loss.text_weight,
                "max_caption_tokens": data.max_caption_tokens,
                "sample_short": data.sample_short and training,
                "prefixes": self.prefixes,
            }
        elif name == "chat":
            options["train_on"] = data.train_on
        return make_composer(name, **options)

    def loader(self, rank: int = 0, world: int = 1, *, pinned: bool = False) -> Loader:
        data = self.settings.data
        return Loader(
            self.sources,
            self.composer(),
            self.vocab,
            pack_tokens=data.pack_tokens,
            bins_per_step=self.bins_per_step,
            max_documents=data.max_documents or None,
            seed=self.settings.run.seed,
            rank=rank,
            world=world,
            overlong=data.overlong,
            prefetch=data.prefetch,
            readahead=data.readahead,
            pool=data.pool,
            tables=self.tables,
            linear_cost=6 * self.config.hidden,
            pinned=pinned,
            # The CPU's kernels need no work lists.
            prepare=kernel_tables(self.vocab, pinned=True) if pinned else None,
        )

    def describe_batch(self, documents: int = 4) -> str:
        """The first packed batch of a run as the model sees it; `documents` of it piece by piece."""
        step = next(iter(self.loader()))
        return describe_batch(step.batches[0], self.sources[0].dataset, [s.name for s in self.sources], documents)

    def describe(self, weights: str = "") -> str:
        """The plan in a few lines, for --dry-run and the start of a run. weights: where they are from if not new."""
        if self.settings.model.init and not weights:
            weights = self._init_in_words()
        c, train = self.config, self.settings.train
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Decoder(c, self.vocab).parameters())
        parameters -= sum(r.rows - r.size for r in self.vocab.ranges) * c.hidden * (1 if c.tied else 2)  # padding
        lines = [
            f"model: {c.layers} layers, hidden {c.hidden}, {c.heads} heads ({c.kv_heads} kv), ffn {c.ffn}, "
            f"{parameters / 1e6:.2f} M parameters" + (f", weights from {weights}" if weights else ""),
            "vocabulary: " + ", ".join(f"{r.name} {r.base}..{r.end - 1}" for r in self.vocab.ranges),
            f"step: {self.bins_per_step} packed batches of {self.settings.data.pack_tokens} tokens; "
            f"{train.steps} steps, {train.steps * train.tokens_per_step / 1e6:.1f} M tokens",
        ]
        for kind, sources in (("train", self.sources), ("eval", self.eval_sources)):
            lines += [f"{kind} source {s.name}: {len(s.dataset)} samples, weight {_weight(s.weight)}" for s in sources]
        return "\n".join(lines)

    def _init_in_words(self) -> str:
        """The folder of the first weights, and the rows that it has not: they begin as the mean of the others."""
        init = self.settings.model.init
        check_vocabulary(init, self.vocab)  # as loading does, but a dry run is to tell it, too
        rows = read_vocabulary(init).size
        kept = kept_rows(rows, self.vocab, self.used_rows)
        new = self.vocab.size - kept
        return f"{init}, rows 0..{kept - 1} of {rows}; their mean for the other {new} ids" if new else init


def check_sequence(plans: Sequence[Plan]) -> None:
    """ConfigError unless each plan can go on where the one before ends: told before hours are spent on that."""
    state = plans[0].loader().state_dict()
    for number, (before, plan) in enumerate(pairwise(plans), 2):
        held = checkpoint.module_tensors(before.root(), "root").shapes()
        if before.settings.optim.ema:
            held |= {name.replace("root.", "ema.", 1): shape for name, shape in held.items()}
        vocabularies = ({"vocabulary": one.vocab.to_json()} for one in (before, plan))
        try:
            wanted = checkpoint.module_tensors(plan.root(), "root").shapes()
            matched(wanted, held, plan.settings.init, resized(*vocabularies))
            loader = plan.loader()
            _go_on(loader, state, restart=plan.settings.data.restart)
        except ValueError as error:
            raise ConfigError(f"stage {number}: {error}") from None
        state = loader.state_dict()


def _go_on(loader: Loader, state: dict, *, restart: bool) -> None:
    """Take up the cursors of the stage before."""
    if restart:
        return
    try:
        loader.load_state_dict(state, strict=False)
    except ValueError as error:
        raise ValueError(
            f"{error}; sources that are not those of the stage before need other names (data.sources.N.name), "
            "or data.restart=true"
        ) from None


class PretrainTask:
    """`vtrain.train.loop.Task` for a decoder on packed batches."""

    kind = "pretrain"
    unit = "tokens"

    def __init__(self, settings: PretrainSettings, world: World, plan: Plan | None = None) -> None:
        self.settings, self.world = settings, world
        self.plan = plan or Plan(settings)
        self.vocab, self.config = self.plan.vocab, self.plan.config
        on_gpu = world.device.type == "cuda"
        self.peak_flops = peak_flops(torch.cuda.get_device_name(world.device)) if on_gpu else None
        self.loader = self.plan.loader(world.rank, world.size, pinned=on_gpu)
        self.steps: Iterator | None = None
        self.pictures: PictureDrawer | None = None
        if settings.sample.every:
            dataset = self.plan.sources[0].dataset
            self.pictures = PictureDrawer(
                settings.sample, dataset, settings.data.prefixes, Path(settings.run.out), settings.run.seed, world
            )
        self.root = self._build()
        o = settings.optim
        adamw = AdamW(self.root.named_parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        self.optimizers = {"adamw": adamw}

    def _build(self) -> Root:
        root = self.plan.root()
        model = root.model
        shard(root, model.layers, self.world, compute_dtype(self.settings.parallel.dtype, self.world))
        root.to_empty(device=self.world.device)
        seed = self.settings.run.seed
        if self.settings.model.init:
            rows = self.plan.used_rows
            copy_parameters(
                model, import_hf(self.settings.model.init, self.config, self.vocab, used_rows=rows, seed=seed)
            )
        else:
            model.init_weights(seed)
        return root

    @property
    def model(self) -> Decoder:
        return self.root.model

    def next_work(self) -> Work:
        if self.steps is None:
            self.steps = iter(self.loader)
        step = next(self.steps, None)
        if step is None:
            raise DataEnded("every source has reached its data.sources.N.max_epochs")
        return Work(
            batches=[b.to(self.world.device) for b in step.batches],
            counts=[b.counts for b in step.batches],
            units=sum(b.tokens for b in step.batches),
            capacity=sum(b.ids.numel() for b in step.batches),
            flops=sum(self._flops(b) for b in step.batches) if self.peak_flops else 0.0,
        )

    def _flops(self, batch: PackedBatch) -> float:
        logits = self.root.objective.logits(batch, self.vocab)
        return train_flops(self.config, self.vocab, batch.lengths, logits / self.vocab.size)

    def terms(self, optimizer: str, batch: PackedBatch) -> tuple[dict, dict]:
        return self.root(batch)

    def end_step(self, step: int, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def show(self, step: int, averaged: Callable[[], AbstractContextManager]) -> None:
        if self.pictures is not None and step % self.settings.sample.every == 0:
            with averaged():
                self.pictures.draw(self.root, self.model, step)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Mean loss per source, in all and per vocabulary range; every sample counts once over all ranks."""
        return {s.name: self._evaluate_source(s.dataset, s.composer) for s in self.plan.eval_sources}

    def _evaluate_source(self, dataset: Dataset, composer: Composer) -> dict[str, float]:
        data, world = self.settings.data, self.world
        batches = sequential_batches(
            dataset,
            composer,
            self.vocab,
            pack_tokens=data.pack_tokens,
            max_documents=data.max_documents or None,
            rank=world.rank,
            world=world.size,
            overlong=data.overlong,
            tables=self.plan.tables,
        )
        limit = self.settings.eval.batches or sys.maxsize  # over all ranks
        names = ("next_token", *self.vocab.names)
        sums = torch.zeros(len(names), dtype=torch.float64)
        counts = np.zeros(len(names))
        for first, batch in zip(range(0, limit, world.size), batches):
            terms, stats = self.root(batch.to(world.device))
            if first + world.rank >= limit:  # this rank only keeps the others company
                continue
            found = {"next_token": terms["next_token"][0], **stats}
            sums += torch.stack([found[n] for n in names]).double().cpu()
            counts += [batch.counts[n] for n in names]
        total = sum_over_ranks([*sums.tolist(), *counts])
        means = {n: s / c for n, s, c in zip(names, total, total[len(names) :]) if c > 0}
        if "next_token" not in means:
            raise ValueError(f"{dataset.path}: no token to evaluate on: all labels have weight 0 or there is no sample")
        return {"loss" if n == "next_token" else n: value for n, value in means.items()}

    def identity(self) -> dict:
        return {"task": self.kind, "model": asdict(self.config), "vocabulary": self.vocab.to_json()}

    def state(self) -> dict:
        return {"loader": self.loader.state_dict()}

    def load_state(self, state: dict) -> None:
        self.loader.load_state_dict(state["loader"], strict=self.settings.data.strict)
        self.steps = None

    def next_stage(self, state: dict) -> None:
        _go_on(self.loader, state["loader"], restart=self.settings.data.restart)

    def export(self, folder: Path) -> None:
        """A Hugging Face style folder with the vocabulary and the tokenizers of the first source beside it."""
        dataset = self.plan.sources[0].dataset
        tensors = ((name, full(p)) for name, p in self.model.named_parameters())
        if not self.world.main:
            for _ in tensors:  # the gathers are collectives
                pass
            return
        schema = dataset.schema
        facts = {"specials": schema.specials, "image": schema.image, "text": schema.text}
        export_hf(tensors, self.config, self.vocab, folder, **facts)
        for asset in ASSETS:
            source = dataset.path / asset
            if source.is_dir():
                copy_folder(source, folder / asset)


def _weight(weight: float | Sequence[tuple[float, float]]) -> str:
    """1.5, or a schedule by tokens: 0: 1, 1e+06: 0.5."""
    return f"{weight:g}" if isinstance(weight, int | float) else ", ".join(f"{at:g}: {w:g}" for at, w in weight)


def _decoder_config(settings: PretrainSettings) -> DecoderConfig:
    model = settings.model
    if model.init:
        return from_hf_config(read_hf_config(model.init), where=str(Path(model.init) / "config.json"))
    overrides = {k: v for k, v in asdict(model).items() if k not in ("preset", "init") and v not in (0, None)}
    return preset(model.preset, **overrides)
