"""What ends a run badly must end it clearly, and never damage what was saved."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from toys import pretrain_settings, write_dataset

from vtrain import config
from vtrain.objectives.next_token import NextToken
from vtrain.pretrain import main
from vtrain.train import checkpoint
from vtrain.train.watchdog import EXIT_CODE, Watchdog

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "train", 100)


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def start(settings, tmp_path: Path, ranks: int = 1, setup: str = "pass") -> list[subprocess.Popen]:
    """`vtrain.pretrain` on fresh processes, one per rank; `setup` is run in each before main."""
    (tmp_path / "run.toml").write_text(config.dump(settings))
    code = f"import sys, os; {setup}\nfrom vtrain.pretrain import *\nrun_command(PretrainSettings, main)"
    port = str(20000 + os.getpid() % 20000)
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, "--cfg", str(tmp_path / "run.toml")],
                env=ENV | (place if ranks > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def logged_steps(out: Path) -> int:
    return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").is_file() else 0


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_signal_saves_and_the_run_goes_on_exactly(data, tmp_path, ranks, number):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    changes = {"train": {"steps": 60, "tokens_per_step": 256}}
    run_ranks(ranks, main, pretrain_settings(straight, data, **changes))
    settings = pretrain_settings(stopped, data, **changes)
    processes = start(settings, tmp_path, ranks)
    wait_for(lambda: logged_steps(stopped) >= 5)
    processes[-1].send_signal(number)  # one rank is told, all stop
    texts = [p.communicate(timeout=60)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * ranks, texts
    assert f"{signal.Signals(number).name}: stopping after this step" in texts[-1]
    step = int(re.search(r"stopped at step (\d+)/60, which is saved", texts[0])[1])
    assert step < 60, "the run was over before the signal came"
    assert not (stopped / "final").exists()
    run_ranks(ranks, main, settings)
    same = ("step", "loss", "loss/text", "loss/visual", "lr", "grad_norm", "tokens", "padding")
    assert [{k: r[k] for k in same} for r in records(stopped)] == [{k: r[k] for k in same} for r in records(straight)]
    mine, theirs = (load_file(out / "final" / "model.safetensors") for out in (stopped, straight))
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_a_second_signal_stops_at_once(tmp_path):
    code = (
        "import os, signal, time\nfrom vtrain.train.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    assert stop.name == 'SIGTERM'\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert "once more stops at once" in done.stderr
    assert "SIGTERM again: stopping at once" in done.stderr


def test_a_second_signal_stops_a_process_that_hangs_in_c(tmp_path):
    """A handler of Python's would wait for the main thread for ever."""
    code = (
        "import ctypes, os, signal, threading, time\nfrom vtrain.train.signals import StopRequest\n"
        "def send():\n"
        "    for _ in range(2):\n        time.sleep(0.2)\n        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "mutex, lock = ctypes.create_string_buffer(128), ctypes.CDLL(None).pthread_mutex_lock\n"
        "with StopRequest():\n"
        "    threading.Thread(target=send, daemon=True).start()\n    lock(mutex)\n    lock(mutex)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGUSR1
    assert "SIGUSR1 again: stopping at once" in done.stderr


def test_a_long_evaluation_is_progress(data, tmp_path, monkeypatch):
    beats = []
    monkeypatch.setattr(Watchdog, "beat", lambda self: beats.append(self.operation))
    evaluation = {"sources": [{"path": str(data)}], "every": 2, "batches": 5}
    main(pretrain_settings(tmp_path / "out", data, train={"steps": 2, "tokens_per_step": 256}, eval=evaluation))
    assert beats.count("evaluating") >= 5


def fail_to_complete(folder: Path) -> None:
    raise OSError(28, "No space left on device", str(folder))


def train_without_room(settings) -> None:
    original, checkpoint.complete = checkpoint.complete, fail_to_complete
    try:
        main(settings)
    finally:
        checkpoint.complete = original


def test_a_checkpoint_that_cannot_be_completed_ends_the_run_soon(data, tmp_path):
    """Not only when the next one is due."""
    settings = pretrain_settings(
        tmp_path / "out", data, train={"steps": 150, "tokens_per_step": 256}, checkpoint={"every": 50}
    )
    with pytest.raises(RuntimeError, match=r"step-00000050: rank 0 cannot write the checkpoint: .*No space left"):
        run_ranks(2, train_without_room, settings)
    assert 50 <= logged_steps(tmp_path / "out") < 100


def test_the_end_of_the_data_loses_nothing(data, tmp_path, capsys):
    out, source = tmp_path / "out", {"path": str(data), "max_epochs": 1}
    changes = {"data": {"sources": [source], "pack_tokens": 64}}
    with pytest.raises(ValueError, match=r"the data ended after step \d+, which is saved.*train.steps=\d+ exports"):
        main(pretrain_settings(out, data, train={"steps": 500, "tokens_per_step": 256}, **changes))
    last = records(out)[-1]["step"]
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    with pytest.raises(ValueError, match="the data ended"):  # again: there is nothing new to save
        main(pretrain_settings(out, data, train={"steps": 500, "tokens_per_step": 256}, **changes))
    main(pretrain_settings(out, data, train={"steps": last, "tokens_per_step": 256}, **changes))
    assert json.loads((out / "final" / "training.json").read_text()) == {"step": last, "trained_steps": last}


def test_a_log_window_survives_a_resume_bitwise(data, tmp_path):
    """A checkpoint in the middle of a window of logged steps: the window's means are those of the whole window."""
    import shutil

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    changes = {"checkpoint": {"every": 5, "keep": 0}, "log": {"every": 4, "sinks": []}}
    changes |= {"train": {"steps": 12, "tokens_per_step": 256}}
    run_ranks(2, main, pretrain_settings(straight, data, **changes))
    run_ranks(2, main, pretrain_settings(resumed, data, **changes))
    for folder in ("checkpoints/step-00000010", "checkpoints/step-00000012", "final"):
        shutil.rmtree(resumed / folder)
    run_ranks(2, main, pretrain_settings(resumed, data, **changes))
    same = ("step", "loss", "loss/text", "tokens", "padding", "grad_norm")
    assert [{k: r[k] for k in same} for r in records(resumed)] == [{k: r[k] for k in same} for r in records(straight)]


def test_a_chain_of_resumes_over_1_3_2_ranks(data, tmp_path):
    import shutil

    straight, chain = tmp_path / "straight", tmp_path / "chain"
    changes = {"checkpoint": {"every": 3, "keep": 0}, "train": {"steps": 9, "tokens_per_step": 256}}
    changes |= {"log": {"every": 2, "sinks": []}}
    main(pretrain_settings(straight, data, **changes))
    for ranks, kept in ((1, 3), (3, 6), (2, 9)):
        run_ranks(ranks, main, pretrain_settings(chain, data, **changes))
        for step in range(kept + 3, 12, 3):  # as if the run had been cut after `kept`
            shutil.rmtree(chain / "checkpoints" / f"step-{step:08d}")
        if kept < 9:
            shutil.rmtree(chain / "final")
    np.testing.assert_allclose([r["loss"] for r in records(chain)], [r["loss"] for r in records(straight)], rtol=1e-6)
    assert [r["tokens"] for r in records(chain)] == [r["tokens"] for r in records(straight)]


def train_with_bad_loss(settings, bad_calls: dict[int, list[int]]) -> None:
    """main(), where on rank r the loss of the calls in bad_calls[r] is not finite."""
    original, calls = NextToken.forward, [0]

    def forward(self, model, batch):
        terms, stats = original(self, model, batch)
        if self.training and torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] in bad_calls.get(int(os.environ["RANK"]), []):
                terms = {name: (total * float("nan"), weight) for name, (total, weight) in terms.items()}
        return terms, stats

    NextToken.forward = forward
    try:
        main(settings)
    finally:
        NextToken.forward = original


def test_a_bad_loss_on_one_rank_skips_the_step_on_all(data, tmp_path):
    out = tmp_path / "out"
    settings = pretrain_settings(out, data, optim={"lr": 1e-2, "warmup": 2, "ema": 0.9})
    run_ranks(2, train_with_bad_loss, settings, {1: [3]})  # 2 micro-batches a step: the first of step 2
    lines = records(out)
    assert [r.get("bad_steps", 0) for r in lines] == [0, 1, 1, 1, 1, 1]
    assert lines[1]["loss"] == "nan"
    assert all(isinstance(r["loss"], float) for r in lines if r["step"] != 2)
    assert lines[5]["loss"] < lines[0]["loss"]
    assert all(t.isfinite().all() for t in load_file(out / "final" / "model.safetensors").values())


def test_a_skipped_step_changes_nothing(data, tmp_path):
    """Two runs of two steps whose second one is bad and of one step: the same weights."""
    two, one = tmp_path / "two", tmp_path / "one"
    changes = {"optim": {"lr": 1e-2, "warmup": 0, "schedule": "constant"}, "data": {"pack_tokens": 256}}
    for out, steps, bad in ((two, 2, {0: [2]}), (one, 1, {})):
        settings = pretrain_settings(
            out, data, **{**changes, "data": {"sources": [{"path": str(data)}], "pack_tokens": 256}},
            train={"steps": steps, "tokens_per_step": 256},
        )  # fmt: skip
        run_ranks(1, train_with_bad_loss, settings, bad)
    mine, theirs = (load_file(out / "final" / "model.safetensors") for out in (two, one))
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_too_many_bad_steps_end_the_run(data, tmp_path):
    out = tmp_path / "out"
    settings = pretrain_settings(out, data, train={"steps": 6, "tokens_per_step": 256, "max_bad_steps": 1})
    with pytest.raises(RuntimeError, match=r"step 4: 2 steps had a loss .* not finite .*train.max_bad_steps is 1"):
        run_ranks(2, train_with_bad_loss, settings, {0: [1, 7]})


def test_a_source_that_fails_on_one_rank_ends_all_and_is_named(data, tmp_path):
    setup = (
        "from vtrain.data.assemble import Assembler\n"
        "assemble, calls = Assembler.__call__, []\n"
        "def fail(*args):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 4: raise OSError('the disk of the shards is gone')\n"
        "    return assemble(*args)\n"
        "Assembler.__call__ = fail\n"
    )
    settings = pretrain_settings(tmp_path / "out", data, train={"steps": 50, "tokens_per_step": 256})
    processes = start(settings, tmp_path, 2, setup)
    texts = [p.communicate(timeout=60)[0] for p in processes]
    assert all(p.returncode not in (0, None) for p in processes)
    assert re.search(r"rank 1, step \d+, loading data: OSError: the disk of the shards is gone", texts[1]), texts[1]
    assert re.search(r"rank 0, step \d+, summing counts over ranks", texts[0]), texts[0]


def test_a_hang_is_named_and_ended(data, tmp_path):
    setup = (
        "import time\nfrom vtrain.data.loader import Loader\n"
        "original = Loader.__iter__\n"
        "def stuck(self):\n"
        "    for n, step in enumerate(original(self)):\n"
        "        if self.rank == 1 and n == 3: time.sleep(1000)\n"
        "        yield step\n"
        "Loader.__iter__ = stuck\n"
    )
    settings = pretrain_settings(
        tmp_path / "out", data, train={"steps": 50, "tokens_per_step": 256}, run={"timeout_s": 3.0}
    )
    processes = start(settings, tmp_path, 2, setup)
    texts = [p.communicate(timeout=90)[0] for p in processes]
    assert processes[1].returncode == EXIT_CODE
    assert re.search(r"error: rank 1, step 3: no progress for \d+ s in: loading data", texts[1]), texts[1]
    assert "time.sleep" in texts[1] or "in stuck" in texts[1]
    assert processes[0].returncode not in (0, None)
    assert "summing counts over ranks" in texts[0]


@pytest.mark.parametrize("what", ["a file", "vanishes"])
def test_an_output_folder_that_cannot_be_written(data, tmp_path, what):
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("in the way")
        with pytest.raises((OSError, ValueError), match="out"):
            main(pretrain_settings(out, data))
        assert out.read_text() == "in the way"
        return
    settings = pretrain_settings(out, data, train={"steps": 200, "tokens_per_step": 256}, checkpoint={"every": 5})
    (process,) = start(settings, tmp_path)
    wait_for(lambda: logged_steps(out) >= 12)
    out.rename(tmp_path / "moved away")
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 2, text
    assert re.search(r"error: .*checkpoints.*", text), text
    assert list((tmp_path / "moved away" / "checkpoints").glob("step-*")), "the earlier checkpoints are still there"


def test_averaged_weights_are_evaluated_exported_and_resumed(data, tmp_path):
    import shutil

    plain, averaged, resumed = (tmp_path / name for name in ("plain", "averaged", "resumed"))
    changes = {"checkpoint": {"every": 3, "keep": 0}}
    optim = {"lr": 1e-2, "warmup": 2}
    main(pretrain_settings(plain, data, optim=optim, **changes))
    for out in (averaged, resumed):
        run_ranks(2, main, pretrain_settings(out, data, optim=optim | {"ema": 0.5}, **changes))
    for folder in ("checkpoints/step-00000006", "final"):
        shutil.rmtree(resumed / folder)
    run_ranks(2, main, pretrain_settings(resumed, data, optim=optim | {"ema": 0.5}, **changes))
    raw, mean, again = (load_file(out / "final" / "model.safetensors") for out in (plain, averaged, resumed))
    assert all(torch.equal(mean[k], again[k]) for k in mean)
    assert not torch.equal(raw["lm_head.weight"], mean["lm_head.weight"])
    assert [r["loss"] for r in records(averaged)] == pytest.approx([r["loss"] for r in records(plain)], rel=1e-5)


def test_a_rank_that_holds_nothing_of_what_is_trained(data, tmp_path):
    """Four rows on three ranks: two, two, none."""
    model = {"preset": "digits", "layers": 1, "hidden": 4, "heads": 1, "kv_heads": 1, "ffn": 8}
    changes = {"train": {"steps": 3, "tokens_per_step": 256, "trainable": ["*norm*"]}, "model": model}
    changes |= {"optim": {"lr": 1e-2, "ema": 0.5}, "checkpoint": {"trainable_only": True}}
    one, three = tmp_path / "one", tmp_path / "three"
    run_ranks(1, main, pretrain_settings(one, data, **changes))
    run_ranks(3, main, pretrain_settings(three, data, **changes))
    mine, theirs = (load_file(out / "final" / "model.safetensors") for out in (three, one))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_looking_at_averaged_weights_does_not_touch_the_training(data, tmp_path, ranks):
    quiet, watched = tmp_path / "quiet", tmp_path / "watched"
    optim = {"lr": 1e-2, "warmup": 2, "ema": 0.5}
    run_ranks(ranks, main, pretrain_settings(quiet, data, optim=optim))
    evaluation = {"sources": [{"path": str(data)}], "every": 1}
    run_ranks(ranks, main, pretrain_settings(watched, data, optim=optim, eval=evaluation, checkpoint={"best": False}))
    trained = [r for r in records(watched) if r["kind"] == "train"]
    assert [r["loss"] for r in trained] == [r["loss"] for r in records(quiet)]
    assert len([r for r in records(watched) if r["kind"] == "eval"]) == 6
