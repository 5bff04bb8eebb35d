import numpy as np
import pytest

from trainer.ablation.gains import gain, shown


def test_what_a_seed_does_to_both_runs_is_not_in_the_paired_error():
    """Distances of seed s: 2 + s's share, and that less 0.3 +- what is left."""
    rng = np.random.default_rng(0)
    seeds, left = rng.normal(2, 0.5, 9), rng.normal(0, 0.01, 9)
    found = gain(seeds.tolist(), (seeds - 0.3 - left).tolist())
    assert found["mean"] == pytest.approx(0.3 + left.mean())
    assert found["paired"] == pytest.approx(left.std(ddof=1) / 3)
    assert found["unpaired"] == pytest.approx(np.sqrt((seeds.var(ddof=1) + (seeds - left).var(ddof=1)) / 9), rel=1e-12)
    assert found["unpaired"] > 20 * found["paired"]


def test_of_runs_that_have_nothing_in_common_both_errors_agree():
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(200):
        found = gain(rng.normal(2, 0.4, 20).tolist(), rng.normal(1, 0.3, 20).tolist())
        ratios.append(found["paired"] / found["unpaired"])
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)


def test_one_seed_has_no_errors():
    found = gain([2.0], [1.5])
    assert found == {"mean": 0.5, "paired": None, "unpaired": None} and shown(found) == "0.50"


def test_a_gain_is_shown_with_both_errors():
    assert shown({"mean": 0.324, "paired": 0.0109, "unpaired": 0.0433}) == "0.32 ± 0.011 (0.043)"
    assert shown({"mean": -0.324, "paired": 0.0109, "unpaired": 0.0433}, 3) == "-0.324 ± 0.0109 (0.0433)"
