"""A Loader inside a Hugging Face `Trainer`: packed micro-batches in its form, and exact resume with its checkpoints.

    batches = TrainerBatches(loader)

    class PackedTrainer(Trainer):
        def get_train_dataloader(self):
            return batches

    PackedTrainer(model, args, train_dataset=batches, callbacks=[batches.callback()]).train()

Needs `pip install 'vtrain[huggingface]'`. The Trainer's own DataLoader is left out on purpose: it would add worker
processes, and on several ranks deal the micro-batches a second time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vtrain.batch import IGNORE, PackedBatch
from vtrain.data.loader import Loader
from vtrain.files import write_durably

STATE_FILE = "vtrain_loader.json"  # in every checkpoint-<step> of the Trainer


class TrainerBatches:
    """The micro-batches of a Loader, one after another, as keyword arguments of a causal language model.

    Each is {input_ids, labels, position_ids}, int64 [1, T], and use_cache. Models of transformers >= 5 see from the
    position ids where documents begin and keep them apart. labels stand at their own token (the model shifts them). A
    Loader step is one optimizer step: `gradient_accumulation_steps` must be ceil(bins_per_step / world), its batches
    per rank.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in self.loader:
            for batch in step.batches:
                yield model_inputs(batch)

    def state_dict(self) -> dict[str, Any]:
        """The Loader's state after the last step of which a batch was handed out."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)

    def callback(self) -> Any:
        """A `TrainerCallback` that saves the state with every checkpoint and takes it up when one is resumed."""
        return _callback(self)


def model_inputs(batch: PackedBatch) -> dict[str, Any]:
    """The keyword arguments of one batch (see TrainerBatches); ValueError where these cannot say what it holds."""
    if batch.weights is not None and not ((batch.weights == 0) | (batch.weights == 1) | (batch.labels < 0)).all():
        raise ValueError("packed batch: loss weights other than 0 and 1; a Hugging Face model takes none")
    if batch.kv_hi is not None or batch.kv_lo is not None:
        raise ValueError("packed batch: attention spans (kv_lo, kv_hi); a Hugging Face model takes none")
    labels = torch.full_like(batch.labels, IGNORE)
    labels[1:] = batch.labels[:-1]  # the label of row i is that of token i + 1
    inputs = {"input_ids": batch.ids.clamp(min=0), "labels": labels, "position_ids": batch.positions}
    rows = {name: values.long().unsqueeze(0) for name, values in inputs.items()}
    return {**rows, "use_cache": False}  # with a cache transformers does not look for documents: they would mix


def _callback(batches: TrainerBatches) -> Any:
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise ImportError("transformers is not installed: pip install 'vtrain[huggingface]'") from None

    class LoaderState(TrainerCallback):
        def on_train_begin(self, args, state, control, **_) -> None:
            expected = -(-batches.loader.bins_per_step // batches.loader.world)
            if args.gradient_accumulation_steps != expected:
                raise ValueError(
                    f"gradient_accumulation_steps is {args.gradient_accumulation_steps}; expected {expected}, the "
                    "batches of a rank in one step of the loader"
                )
            if not args.ignore_data_skip:
                raise ValueError("ignore_data_skip is false; expected true: the loader resumes by its own state")
            if state.global_step:
                batches.load_state_dict(json.loads(_state_file(args, state).read_bytes()))

        def on_save(self, args, state, control, **_) -> None:
            if state.is_world_process_zero:
                write_durably(_state_file(args, state), json.dumps(batches.state_dict()).encode())

    return LoaderState()


def _state_file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
