"""The shipped recipes of SimpleAR's training: they resolve at their real size, and the one of two stages joins two."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from toys import write_dataset

from vtrain import config
from vtrain.models.presets import preset, to_hf_config
from vtrain.pretrain import main
from vtrain.settings import PretrainSettings
from vtrain.vocab import Vocabulary


@pytest.mark.parametrize(("size", "parameters"), [("0.5B", "551.14 M"), ("1.5B", "1641.61 M")])
def test_the_recipe_of_simplear_resolves_at_its_real_size(size, parameters, tmp_path, monkeypatch, capsys):
    """Datasets and config.json of the real shape; no weights are read for a plan."""
    vocab = Vocabulary.of(text=151_672, visual=64_000)
    for name, side in (("simplear512", 32), ("simplear1024", 64)):
        write_dataset(tmp_path / "shards" / name, 12, side=side, vocab=vocab, image={"resolution": side * 16})
    init = tmp_path / "models" / f"Qwen2.5-{size}-Instruct"
    init.mkdir(parents=True)
    shape = to_hf_config(preset(f"qwen2.5-{size.lower()}"), Vocabulary.of(text=151_936))
    (init / "config.json").write_text(json.dumps(shape))
    monkeypatch.chdir(tmp_path)
    overrides = [f"model.init={init.relative_to(tmp_path)}", "data.prefixes=[]"]  # the datasets have no tokenizer
    settings = config.load_stages(PretrainSettings, "simplear/grow", overrides)
    main(*settings, dry_run=True)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 250, "4,096 codes are not written out"
    assert f"{parameters} parameters, weights from {settings[0].model.init}, rows 0..151671 of 151936; their " in shown
    assert f"{parameters} parameters, weights from stage 1\n" in shown
    assert shown.count("vocabulary: text 0..151671, visual 151672..215671") == 2
    assert "step: 32 packed batches of 18432 tokens; 84000 steps" in shown
    assert "step: 64 packed batches of 33792 tokens; 29000 steps" in shown


def test_growing_in_one_run_is_pretraining_and_then_tuning():
    """simplear/grow has the keys of the two recipes that it joins."""
    for name, stage in zip(("pretrain512", "sft1024"), config.load_stages(PretrainSettings, "simplear/grow")):
        alone = config.load(PretrainSettings, f"simplear/{name}")
        assert replace(stage, run=alone.run, model=alone.model) == alone
