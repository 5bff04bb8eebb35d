"""Evaluation while training, on real ranks: what it measures, and that training does not notice."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer import detectors
from tests.trainer.detectors import Plain, save_images
from tests.trainer.forked import TINY, train_tiny
from trainer.build import open_data
from trainer.checkpoints.weights import WeightSource
from trainer.config.tree import check_world, load_config
from trainer.errors import RunError
from trainer.evaluation.by_detector import evaluate_images, open_detector
from trainer.evaluation.classifier import evaluate
from trainer.evaluation.image_sets import open_image_set
from trainer.loop import train
from trainer.periodic import evaluation_config
from trainer.ranks import process_group
from trainer.sampling.samples import make_samples, write_samples
from trainer.sinks import _continue_rows

ENGINES = {  # name -> (ranks, overrides)
    "single": (1, ["engine=single"]),
    "fsdp": (2, ["engine=fsdp", "activation_checkpointing=1"]),
    "zero3": (2, ["engine=deepspeed", "zero=3"]),
}
RUN = ["groups.size=4", "groups.splits=4", "train.images=192", "checkpoint.every=64"]
LOOKS = ["train.sample_every=64", "evaluate.every=64"]
DIVERGED = ["sample.sampler=sde", "sample.diffusion=constant", "sample.diffusion_norm=1e300"]  # beyond fp32
FIGURES = ("fid", "kid", "precision", "recall")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A detector, and images to compare with."""
    folder = tmp_path_factory.mktemp("looks")
    detectors.save(Plain(6), folder / "plain.pt")
    save_images(folder / "real.npz", 230, seed=2)
    return folder


@pytest.fixture(scope="module")
def runs(module_ranks, there):
    """Of each engine a run that is evaluated at 64, 128 and 192 images by a detector, and one that is not; and one by
    the classifier."""
    detector = [f"evaluate.detector={there}/plain.pt", f"evaluate.reference={there}/real.npz", "evaluate.per_class=3"]
    of_engines = [
        (ranks, [*RUN, *overrides, f"run={there}/{name}-{how}", *evaluation])
        for name, (ranks, overrides) in ENGINES.items()
        for how, evaluation in (("evaluated", ["evaluate.every=64", *detector]), ("plain", []))
    ]
    of_engines.append((2, [*RUN, "engine=ddp", f"run={there}/classified", "evaluate.every=128"]))
    of_engines.append((2, [*RUN, *ENGINES["fsdp"][1], f"run={there}/fsdp-diverged", *LOOKS, *DIVERGED]))
    for world in (1, 2):
        module_ranks.run_many(world, train_tiny, *(run for ranks, run in of_engines if ranks == world))
    return there


def rows(run):
    return [json.loads(line) for line in (run / "measures.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_leaves_training_as_it_is_bit_for_bit(runs, same, engine):
    same(runs / f"{engine}-evaluated", runs / f"{engine}-plain", engine, "checkpoints/000000000192")


@pytest.mark.parametrize("engine", ENGINES)
def test_it_measures_what_the_tools_measure_of_the_checkpoint(runs, tmp_path, engine):
    """The samples of the averaged weights in the checkpoint of that position, made by one process."""
    run = runs / f"{engine}-evaluated"
    found = {row["position"]: row for row in rows(run)}
    assert list(found) == [64, 128, 192]
    config = evaluation_config(load_config(run / "config.yaml"))
    for position in (64, 192):
        pixels, label, record = make_samples(WeightSource(run / "checkpoints" / f"{position:012d}"), config)
        write_samples(tmp_path, pixels, label, record, config.sample.group_size)
        with process_group() as ranks:
            detector = open_detector(str(runs / "plain.pt"), ranks)
            expected = evaluate_images(detector, tmp_path / "samples.npz", runs / "real.npz", None, ranks)
        for name in FIGURES:
            assert found[position][name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3), (position, name)
        assert found[position]["images"]["images"] == len(open_image_set(tmp_path / "samples.npz")) == 30
        assert found[position]["samples"]["position"] == position
        for name in ("guidance", "seed", "steps", "uncond_group_size", "per_class"):
            assert found[position]["samples"][name] == json.loads(json.dumps(record))[name], name
        assert [found[position][name] for name in ("reference", "detector")] == [
            expected[name] for name in ("reference", "detector")
        ]


def test_tensorboard_shows_the_figures(runs):
    run = runs / "fsdp-evaluated"
    events = EventAccumulator(str(run)).Reload()
    for name in FIGURES:
        shown = [(event.step, event.value) for event in events.Scalars(f"evaluate/{name}")]
        assert shown == [(row["position"], pytest.approx(row[name], rel=1e-6)) for row in rows(run)]


def test_without_a_detector_the_classifier_measures(runs):
    (row,) = rows(runs / "classified")
    config = evaluation_config(load_config(runs / "classified" / "config.yaml"))
    pixels, label, _ = make_samples(WeightSource(runs / "classified" / "checkpoints" / "000000000128"), config)
    splits = [open_data(config, split) for split in ("train", "heldout")]
    expected = evaluate(pixels.reshape(-1, *pixels.shape[2:]), label.ravel(), *splits)
    assert row["images"] == expected["images"] == 100
    for name in ("frechet", "class_accuracy", "heldout_accuracy"):
        assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=0.02), name


def test_where_samples_are_not_finite_the_run_goes_on_without_them(runs, same):
    """On both ranks, to the same weights."""
    same(runs / "fsdp-diverged", runs / "fsdp-plain", "", "checkpoints/000000000192")
    assert rows(runs / "fsdp-diverged") == []
    events = EventAccumulator(str(runs / "fsdp-diverged")).Reload()
    assert "samples" not in events.Tags()["images"]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("settings", [DIVERGED, ["sample.sampler=dopri5", "sample.guidance=1e39"]])
def test_it_says_so_in_a_line(tmp_path, capsys, settings):
    train_tiny(*RUN, "engine=single", f"run={tmp_path}/run", *LOOKS, *settings)
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    when = "in dopri5" if "sample.sampler=dopri5" in settings else "after step 1 of 2"
    for position in (64, 128, 192):
        for missing in ("samples", "evaluation"):
            line = said.pop(0)
            start = f"error: no {missing} at {position} images: weights=ema: image 0 is not finite {when}; "
            assert line.startswith(start), line
    assert not said and rows(tmp_path / "run") == []


def test_a_run_that_goes_on_from_an_older_checkpoint_has_each_evaluation_once(runs, ranks, tmp_path):
    run = tmp_path / "run"
    settings = [*RUN, "engine=single", f"run={run}", "evaluate.every=64", "checkpoint.every=128"]
    ranks.run(1, train_tiny, *settings)
    whole = rows(run)
    assert [row["position"] for row in whole] == [64, 128, 192]
    newest = run / "checkpoints" / "000000000192"
    newest.rename(tmp_path / "lost")  # as if the run had been killed before it
    ranks.run(1, train_tiny, *settings)
    assert rows(run) == whole


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluate.every=64", "evaluate.detector=x.pt"], ["evaluate.reference=None", "both or none"]),
        (["evaluate.every=64", "data.name=latents", "data.latents=x"], ["evaluate.detector=null", "latents"]),
        (["evaluate.every=64", "sample.sampler=dopri5"], ["dopri5", "evaluate.every=0"]),
        (["evaluate.every=64", "sample.small=runs/x"], ["sample.small=runs/x", "evaluate.every=0"]),
        (["evaluate.per_class=0"], ["evaluate.per_class"]),
    ],
)
def test_bad_settings_are_one_line(overrides, words):
    with pytest.raises(RunError) as raised:
        check_world(load_config(TINY, overrides), 2)
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value), raised.value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluate.detector=none.pt", "evaluate.reference={}/real.npz"], "none.pt: cannot be loaded"),
        (["evaluate.detector={}/plain.pt", "evaluate.reference={}/none.npz"], "none.npz: not there"),
        (["evaluate.detector={}/plain.pt", "evaluate.reference={}/real.npz", "evaluate.metrics=[is]"], "offers"),
    ],
)
def test_what_would_fail_in_an_evaluation_fails_before_the_first_step(there, tmp_path, settings, message):
    settings = [setting.format(there) for setting in settings]
    with pytest.raises(RunError, match=message):
        train(load_config(TINY, [*RUN, "engine=single", f"run={tmp_path / 'run'}", "evaluate.every=64", *settings]))
    assert not (tmp_path / "run").exists()


def test_told_to_stop_a_run_saves_first_and_makes_the_evaluation_that_was_due_when_it_goes_on(runs, tmp_path):
    run = tmp_path / "run"
    config = load_config(TINY, [*RUN, "engine=single", f"run={run}", "evaluate.every=64", "checkpoint.every=640"])
    steps = iter(range(100))
    assert train(config, lambda: next(steps) == 3) == "stopped"  # told in the fourth step, after which one is due
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["000000000128"]
    assert [row["position"] for row in rows(run)] == [64]
    assert train(config) == "finished"
    assert [row["position"] for row in rows(run)] == [64, 128, 192]
    assert train(config) == "finished"
    assert [row["position"] for row in rows(run)] == [64, 128, 192]


def test_a_line_of_measures_that_was_cut_off_anywhere_keeps_no_run_from_going_on(runs, tmp_path):
    whole = (runs / "classified/measures.jsonl").read_text()
    (tmp_path / "run").mkdir()
    for cut in range(len(whole)):
        if whole[cut - 1] in "}\n" or cut % 50 == 0:
            path = tmp_path / "run/measures.jsonl"
            path.write_text(whole[:cut])
            _continue_rows(path, 10**6).close()
            assert path.read_text() == "".join(line for line in whole[: cut + 1].splitlines(True) if line[-1] == "\n")
