"""How to add a sink, a place that a run reports to: a class, and one line in SINKS."""

import pytest

from tests.trainer.forked import TINY
from trainer.config.tree import load_config
from trainer.errors import RunError
from trainer.loop import train
from trainer.sinks import SINKS, Sink


class Diary(Sink):
    """A text file in the run folder, with a line for each thing that is reported."""

    def __init__(self, folder, position, images):
        self._file = (folder / "diary.txt").open("a")
        self._file.write(f"begin at {position} of {images}\n")

    def rows(self, rows):
        self._file.writelines(f"step {row['step']}: loss {row['loss']:.4f}\n" for row in rows)

    def picture(self, name, picture, position):
        self._file.write(f"picture {name} at {position}: {picture.shape[2]} channels\n")

    def evaluation(self, row):
        self._file.write(f"evaluation at {row['position']}: accuracy {row['class_accuracy']:.2f}\n")

    def text(self, message):
        self._file.write(f"said: {message}\n")

    def close(self):
        self._file.write("end\n")
        self._file.close()


def run(folder, *overrides):
    train(load_config(TINY, [f"run={folder}", "engine=single", "train.images=64", *overrides]))


def test_a_sink_of_ones_own_takes_all_that_a_run_reports(monkeypatch, tmp_path):
    monkeypatch.setitem(SINKS, "diary", Diary)
    run(tmp_path, "train.sinks=[diary]", "train.sample_every=64", "evaluate.every=64", "train.images=64")
    run(tmp_path, "train.sinks=[diary,metrics]", "train.images=96")
    lines = (tmp_path / "diary.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *("begin at 0 of 64", "step 0", "step 1", "picture samples at 64", "evaluation at 64", "end"),
        *("begin at 64 of 96", "said", "step 2", "end"),
    ]
    assert not list(tmp_path.glob("events.*"))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1, "the steps since it was asked for"


def test_a_sink_that_does_not_exist_is_refused_in_one_line(tmp_path):
    with pytest.raises(RunError, match=r"train.sinks=\['diary'\]: diary is none of metrics, tensorboard, progress"):
        run(tmp_path, "train.sinks=[diary]")
