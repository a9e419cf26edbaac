"""The loader inside a real Hugging Face Trainer: same loss as documents one at a time, exact resume."""

import numpy as np
import pytest
import torch
from memory_dataset import VOCAB, texts
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from vtrain.batch import Document, PackedBatch
from vtrain.data import Loader, Source, make_composer
from vtrain.data.huggingface import STATE_FILE, TrainerBatches, model_inputs


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB.size, num_key_value_heads=2, **shape))


def batches(**changed) -> TrainerBatches:
    lengths = np.random.default_rng(0).integers(1, 30, 40).tolist()
    options = {"pack_tokens": 64, "bins_per_step": 2, "seed": 3} | changed
    return TrainerBatches(Loader([Source(texts(lengths))], make_composer("language_model"), VOCAB, **options))


class PackedTrainer(Trainer):
    def get_train_dataloader(self):
        return self.train_dataset


def trainer(folder, steps: int, source: TrainerBatches, **changed) -> PackedTrainer:
    options = {"gradient_accumulation_steps": 2, "ignore_data_skip": True, "save_steps": 3} | changed
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, logging_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, **options,
    )  # fmt: skip
    return PackedTrainer(small_model(), arguments, train_dataset=source, callbacks=[source.callback()])


def losses(made: PackedTrainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in made.state.log_history if "loss" in entry}


def test_the_model_sees_documents_apart():
    """A packed batch gives the loss of its documents one at a time, computed with nothing of ours but the ids."""
    draw = np.random.default_rng(1)
    documents = [Document(draw.integers(0, VOCAB.size, n).astype(np.int32)) for n in (7, 1, 12, 2)]
    documents.append(Document(draw.integers(0, VOCAB.size, 9).astype(np.int32), loss=np.repeat([0.0, 1.0], [5, 4])))
    model = small_model().double()
    packed = model(**model_inputs(PackedBatch.build(documents, VOCAB, pack_tokens=40))).loss
    total, scored = 0.0, 0
    for document in documents:
        ids = torch.from_numpy(document.ids).long()[None]
        logits = model(input_ids=ids).logits[0, :-1]
        kept = torch.ones(len(document)) if document.loss is None else torch.from_numpy(document.loss)
        each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none") * kept[1:]
        total, scored = total + each.sum(), scored + int(kept[1:].sum())
    torch.testing.assert_close(packed.double(), total / scored, atol=1e-6, rtol=1e-6)  # the loss itself is float32


def test_a_trainer_resumes_exactly(tmp_path):
    whole = trainer(tmp_path, 6, batches())
    whole.train()
    assert (tmp_path / "checkpoint-3" / STATE_FILE).is_file()
    second = trainer(tmp_path, 6, batches())
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(whole) == losses(second)
    assert len(losses(whole)) == 6
    for a, b in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)


def test_what_a_trainer_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 1; expected 2"):
        trainer(tmp_path, 1, batches(), gradient_accumulation_steps=1).train()
    with pytest.raises(ValueError, match="ignore_data_skip is false"):
        trainer(tmp_path, 1, batches(), ignore_data_skip=False).train()
    half = PackedBatch.build([Document(np.arange(4, dtype=np.int32), loss=np.full(4, 0.5))], VOCAB)
    with pytest.raises(ValueError, match="loss weights other than 0 and 1"):
        model_inputs(half)
