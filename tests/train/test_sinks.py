"""Metrics on disk and on the console: what a resume cuts, what a line shows, which trackers are refused; the curve."""

import json
import sys

import pytest

from vtrain.train import sinks
from vtrain.train.sinks import Jsonl, console_line, open_sinks

TRAIN = {
    "step": 120,
    "steps": 600,
    "kind": "train",
    "unit": "tokens",
    "loss": 2.34567,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_s": 12345.0,
    "padding": 0.0123,
    "data_wait": 0.2,
    "memory_gb": 1.234,
    "eta_s": 3725.4,
}


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_and_readable_before_close(tmp_path):
    sink = Jsonl(tmp_path / "metrics.jsonl", 0)
    sink.write({"step": 1, "loss": 0.5})
    sink.write({"step": 2, "loss": float("nan"), "grad_norm": float("inf"), "best": True})
    sink.sync()
    assert written(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": "nan", "grad_norm": "inf", "best": True},  # JSON has no numbers for these
    ]
    sink.close()


@pytest.mark.parametrize(
    "tail",
    ['{"step": 4, "lo', '{"step": 3, "loss": 1.0}', '{"loss": 1.0}\n', "7\n", "\n", '{"step": 5}\n{"step": 4}\n'],
)
def test_resume_cuts_what_is_past_the_checkpoint_or_broken(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 1}\n{"step": 3, "kind": "train"}\n{"step": 3, "kind": "eval"}\n'
    path.write_text(kept + tail)
    sink = Jsonl(path, 3)
    assert path.read_text() == kept
    sink.write({"step": 4})
    sink.close()
    assert path.read_text() == kept + '{"step": 4}\n'


def test_resume_drops_a_line_that_is_not_text(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x00\x80\n')
    Jsonl(path, 3).close()
    assert path.read_text() == '{"step": 1}\n'


def test_console_line():
    assert console_line(TRAIN) == (
        "step 120/600 | loss 2.3457 | lr 1.00e-03 | grad_norm 0.500 | 12.3k tokens/s | padding 1.2% | data wait 20.0% "
        "| mem 1.23 GB | eta 1:02:05"
    )
    more = {"loss/text": 0.51, "loss/visual": 2.61, "mfu": 0.42, "stat/codes_used": 63.0, "eta_s": 59.6}
    line = console_line(TRAIN | more)
    assert "| loss 2.3457 (text 0.5100, visual 2.6100) |" in line
    assert line.endswith("| mfu 42.0% | codes_used 63 | eta 1:00")


@pytest.mark.parametrize(("rate", "shown"), [(0.4, "0"), (999.0, "999"), (1e3, "1.0k"), (2.5e6, "2.5M"), (3e9, "3.0G")])
def test_rates_are_short(rate, shown):
    assert f"| {shown} tokens/s |" in console_line(TRAIN | {"tokens_per_s": rate})


def test_console_line_of_an_evaluation():
    record = {"step": 20, "steps": 30, "kind": "eval", "eval/digits": 1.5, "eval/digits/text": 0.25, "best": False}
    assert console_line(record) == "step 20/30 | eval | digits 1.5000, digits/text 0.2500"
    assert console_line(record | {"best": True}).endswith(" | best so far")


def test_console_writes_a_line(tmp_path, capsys):
    for sink in open_sinks(("console",), tmp_path, "", 0):
        sink.write(TRAIN)
        sink.sync()
        sink.close()
    assert capsys.readouterr().out == console_line(TRAIN) + "\n"
    assert written(tmp_path / "metrics.jsonl") == [TRAIN]


def test_unknown_tracker(tmp_path):
    with pytest.raises(ValueError, match=r"log\.sinks: 'wanbd', expected some of console, tensorboard, wandb"):
        open_sinks(("wanbd",), tmp_path, "", 0)


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_tracker_without_its_package(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)  # its import fails
    with pytest.raises(ValueError, match=rf"log\.sinks: '{name}' needs a package: pip install 'vtrain\[trackers\]'"):
        open_sinks((name,), tmp_path, "", 0)


def test_every_known_sink_is_a_choice_of_the_settings():
    from vtrain.settings import Log

    assert Log.__dataclass_fields__["sinks"].metadata["choices"] == sinks.SINKS


@pytest.mark.parametrize("smallest", [0.5, 0.0])
def test_the_curve_draws_every_loss_and_nothing_else(tmp_path, monkeypatch, smallest):
    pytest.importorskip("matplotlib")
    from vtrain.train import curve

    drawn = {}
    figures = []
    real = curve.plt.subplots

    def subplots(**options):
        figure, axes = real(**options)
        figures.append(axes)
        return figure, axes

    monkeypatch.setattr(curve.plt, "subplots", subplots)
    sink = Jsonl(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        sink.write(TRAIN | {"step": step, "loss": 3.0 / step, "loss/text": smallest})
    sink.write(TRAIN | {"step": 4, "loss": float("nan"), "loss/text": 1.0})
    sink.write({"step": 4, "kind": "eval", "eval/digits": 1.25, "best": True})
    sink.close()
    curve.plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    (axes,) = figures
    for line in axes.get_lines():
        drawn[line.get_label()] = [list(line.get_xdata()), list(line.get_ydata())]
    assert drawn == {
        "loss": [[1, 2, 3], [3.0, 1.5, 1.0]],  # a loss that is not finite leaves a gap
        "loss/text": [[1, 2, 3, 4], [smallest] * 3 + [1.0]],
        "eval/digits": [[4], [1.25]],
    }
    assert axes.get_yscale() == ("log" if smallest else "linear")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_of_a_run_without_metrics(tmp_path, recwarn):
    pytest.importorskip("matplotlib")
    from vtrain.train.curve import plot_losses

    (tmp_path / "metrics.jsonl").write_text("")
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()
    assert not recwarn.list
