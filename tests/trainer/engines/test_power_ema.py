import random
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from trainer.engines.ema import EMA
from trainer.engines.power_ema import EXACT, coefficients, combine, coordinates, exponent, power_decay, width
from trainer.errors import RunError

TRACKED = (0.05, 0.10)


def recurrence(std: float, step: int, steps: int) -> np.ndarray:
    """The profile (std, step) over `steps` steps, from the betas one after another."""
    profile = np.zeros(steps)
    for tau in range(1, step + 1):
        beta = (1 - 1 / tau) ** (exponent(std) + 1)
        profile *= beta
        profile[tau - 1] = 1 - beta
    return profile


def walk(seed: int, steps: int) -> torch.Tensor:
    """Weights after each of `steps` steps, (steps, 4, 8), far from 0 as weights are from where they began."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 4, 8, generator=rng, dtype=torch.float64).cumsum(0) + 20


def tracked(history: torch.Tensor, stds, steps) -> dict[tuple[float, int], dict[str, torch.Tensor]]:
    """The averages of `stds` at each of `steps` of a network with this history, none but its own before the first."""
    weights = {"weight": torch.full_like(history[0], 1e6)}
    emas = {std: EMA(weights, power_decay(std)) for std in stds}
    found = {}
    for step, now in enumerate(history, start=1):
        weights["weight"].copy_(now)
        for std, ema in emas.items():
            ema.update(step)
            if step in steps:
                found[std, step] = {name: average.clone() for name, average in ema.average.items()}
    return found


def reconstruction_error(history: torch.Tensor, every: int, std: float, step: int) -> float:
    """Of the average (std, step) from snapshots of TRACKED, relative to the largest weight of the average."""
    found = tracked(history, {*TRACKED, std}, {*range(every, len(history) + 1, every), step})
    expected = found[std, step]["weight"]
    snapshots = [(s, end) for s, end in found if s in TRACKED and end % every == 0]
    random.Random(every).shuffle(snapshots)
    result = combine((found[snapshot] for snapshot in snapshots), coefficients(snapshots, std, step))
    return ((result["weight"] - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("seed", range(5))
def test_the_exponent_has_the_std_it_was_made_from(seed):
    rng = np.random.default_rng(seed)
    for std in [*rng.uniform(0.001, 0.2886, 20), 10 ** rng.uniform(-9, -1)]:
        gamma = exponent(std)
        assert gamma > 0
        assert np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)) == pytest.approx(std, rel=1e-12)


def test_exponents_of_the_paper():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("std", [0.0, -0.1, 12**-0.5, 0.3, 5.0, float("nan"), float("inf")])
def test_a_std_that_no_profile_has_is_refused_in_one_line(std):
    for refused in (lambda: exponent(std), lambda: power_decay(std), lambda: coefficients([(0.1, 5)], std, 5)):
        with pytest.raises(RunError, match=rf"^std={std}: must be over 0 and under .*0\.28867$"):
            refused()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_average_is_the_sum_of_the_history_by_profile(seed, dtype, tolerance):
    rng = np.random.default_rng(seed)
    std, steps = rng.uniform(0.01, 0.28), int(rng.integers(1, 200))
    history = walk(seed, steps).to(dtype)
    average = tracked(history, [std], {steps})[std, steps]["weight"]
    tau, power = np.arange(1, steps + 1), exponent(std) + 1
    profile = (1 - (1 - 1 / tau) ** power) * (tau / steps) ** power
    expected = torch.einsum("t,tij->ij", torch.tensor(profile), history.double())
    assert average.dtype == dtype
    assert torch.allclose(average.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("std", [0.02, 0.05, 0.10, 0.20, 0.28])
def test_a_profile_is_a_mean_and_its_std_tends_to_its_name(std):
    gaps = []
    for steps in (300, 3000):
        profile, tau = recurrence(std, steps, steps), np.arange(1, steps + 1)
        assert profile.min() >= 0 and profile.sum() == pytest.approx(1, abs=1e-12)
        mean = profile @ tau
        gaps.append(abs(np.sqrt(profile @ (tau - mean) ** 2) / steps - std))
    assert gaps[1] < 1e-3 * std and gaps[1] < gaps[0]


@pytest.mark.parametrize("chunk", [3, 1 << 16])
@pytest.mark.parametrize("seed", range(5))
def test_inner_products_are_those_of_the_whole_profiles(seed, chunk, monkeypatch):
    monkeypatch.setattr("trainer.engines.power_ema.CHUNK", chunk)
    rng = np.random.default_rng(seed)
    steps, stds = 150, rng.uniform(0.01, 0.28, 3)
    profiles = [(rng.choice(stds), int(rng.integers(1, steps + 1))) for _ in range(25)]
    dense = np.stack([recurrence(std, step, steps) for std, step in profiles], axis=1)
    columns = coordinates(profiles)
    assert len(columns) <= 3 * len({step for _, step in profiles})
    assert np.allclose(columns.T @ columns, dense.T @ dense, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_the_coefficients_are_those_of_dense_least_squares_divided_by_their_sum(seed, monkeypatch):
    """Without snapshots after the one that follows the step: they would not change the sum."""
    monkeypatch.setattr("trainer.engines.power_ema.MISFIT", 9)
    monkeypatch.setattr("trainer.engines.power_ema.EXACT", 9)
    rng = np.random.default_rng(seed)
    steps, ends = 120, sorted(rng.choice(np.arange(5, 121), 6, replace=False).tolist())
    step, std = int(rng.integers(ends[2], ends[-1] + 1)), rng.uniform(0.06, 0.14)
    snapshots = [(tracked_std, end) for end in ends for tracked_std in TRACKED]
    found = coefficients(snapshots, std, step)
    dense = np.stack([recurrence(*snapshot, steps) for snapshot in snapshots], axis=1)
    expected = np.linalg.lstsq(dense, recurrence(std, step, steps), rcond=None)[0]
    assert found.dtype == np.float64 and found.shape == (12,)
    assert np.allclose(dense @ found, dense @ expected / expected.sum(), rtol=0, atol=1e-9)
    following = min(end for end in ends if end >= step)
    assert all((factor == 0) == (end > following) for factor, (_, end) in zip(found, snapshots, strict=True))


def test_millions_of_steps_with_hundreds_of_snapshots():
    """The profiles themselves would take 4 GB. A finer run of the same shape has the same coefficients, nearly."""
    found = []
    for steps in (25_000, 2_500_000):
        snapshots = [(std, k * steps // 100) for k in range(1, 101) for std in TRACKED]
        found.append(coefficients(snapshots, 0.15, steps))
    assert np.isfinite(found).all() and found[1].sum() == pytest.approx(1, abs=1e-5)
    assert np.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_tracked_average_comes_back_as_it_is(seed):
    history = walk(seed, 200)
    for std in TRACKED:
        for step in (20, 100, 200):
            assert reconstruction_error(history, 20, std, step) < 1e-6


def test_a_tracked_profile_is_its_snapshot_alone():
    snapshots = [(std, end) for end in range(1000, 100_001, 1000) for std in TRACKED]
    index = random.Random(0).randrange(len(snapshots))
    expected = np.zeros(len(snapshots))
    expected[index] = 1
    assert np.allclose(coefficients(snapshots, *snapshots[index]), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("std", [0.075, 0.15])
def test_dense_snapshots_give_untracked_averages(seed, std):
    """Two stds at every second step span all profiles, so any step is exact; at a snapshot, every fourth will do."""
    history = walk(seed, 480)
    for every, step in [(2, 480), (2, 366), (2, 287), (4, 480)]:
        assert reconstruction_error(history, every, std, step) < 1e-6


@pytest.mark.filterwarnings("ignore:std=")
@pytest.mark.parametrize("std", [0.075, 0.15, 0.20])
def test_more_snapshots_give_untracked_averages_more_exactly(std):
    """With ten times as many the error is a hundred times smaller at a snapshot, some ten times between two."""
    history = walk(7, 480)
    few, some, many = (reconstruction_error(history, every, std, 480) for every in (120, 40, 12))
    assert few < 0.04 and some < few / 5 and many < some / 5 and many < few / 100
    few, some, many = (reconstruction_error(history, every, std, 366) for every in (40, 12, 4))
    assert few < 0.03 and some < few / 3 and many < some / 2


@pytest.mark.parametrize("step", [-3, 0, 9, 41])
def test_a_step_outside_of_the_snapshots_is_refused_in_one_line(step):
    snapshots = [(std, end) for end in (10, 20, 40) for std in TRACKED]
    with pytest.raises(RunError, match=rf"^step={step}: not among .* from 10 to 40$"):
        coefficients(snapshots, 0.07, step)


def test_without_snapshots_there_is_nothing_to_combine():
    for snapshots in ([], [(0.1, 0)]):
        with pytest.raises(RunError, match=r"^step=5: .* there are none$"):
            coefficients(snapshots, 0.07, 5)


def test_a_snapshot_from_before_the_first_step_has_no_part():
    assert coefficients([(0.05, 0), (0.05, 30)], 0.05, 30).tolist() == [0, pytest.approx(1)]


def test_a_profile_far_from_all_snapshots_is_refused_in_one_line():
    snapshots = [(std, end) for end in (500, 1000) for std in TRACKED]
    with pytest.raises(RunError, match=r"^std=0\.28: at step 1000 the snapshots miss it by \d\d%; [^\n]*$"):
        coefficients(snapshots, 0.28, 1000)


def snapshots_of(number: int, steps: int) -> list[tuple[float, int]]:
    return [(std, steps * k // number) for k in range(1, number + 1) for std in TRACKED]


@pytest.mark.filterwarnings("ignore:std=")
@pytest.mark.parametrize("std", [0.06, 0.15, 0.2])
def test_of_constant_weights_every_average_is_those_weights(std):
    """However few the snapshots are, at any step among them."""
    snapshots = snapshots_of(4, 1000)
    weights = {"weight": torch.randn(500, generator=torch.Generator().manual_seed(0)) * 1e3}
    for step in (1000, 500, 990):
        factors = coefficients(snapshots, std, step)
        assert factors.sum() == pytest.approx(1, abs=1e-12)
        assert torch.equal(combine([weights] * len(snapshots), factors)["weight"], weights["weight"])


def test_an_average_that_the_tracked_widths_miss_is_warned_of_with_the_residual_and_the_width_it_has():
    """Four snapshots of 0.05 and 0.10 cannot make 0.2; fifty can. Both against profiles of every step."""
    steps, std = 1000, 0.2
    expected, tau = recurrence(std, steps, steps), np.arange(1, steps + 1)
    for number, warned in ((4, True), (50, False)):
        snapshots = snapshots_of(number, steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            factors = coefficients(snapshots, std, steps)
        profile = np.stack([recurrence(*snapshot, steps) for snapshot in snapshots], axis=1) @ factors
        residual = np.linalg.norm(profile - expected) / np.linalg.norm(expected)
        spread = np.sqrt(profile @ tau**2 - (profile @ tau) ** 2) / steps
        assert width(snapshots, factors) / steps == pytest.approx(spread, rel=1e-3)
        assert (residual > EXACT) == warned == bool(caught) == (abs(spread / std - 1) > 0.01)
        if warned:
            (line,) = (str(one.message) for one in caught)
            assert line.startswith(f"std=0.2: at step 1000 the snapshots miss it by {residual:.0%}: this average has")
            assert f"std={width(snapshots, factors) / steps:.3g};" in line and "\n" not in line


@pytest.mark.parametrize("seed", range(3))
def test_combine_sums_in_float64(seed):
    """Large parts that cancel: float32 would leave nothing of the small one."""
    rng = torch.Generator().manual_seed(seed)
    large, small = torch.randn(2, 50, generator=rng)
    parts = [{"a": large * 2**20, "b": small}, {"a": small, "b": small}, {"a": large * 2**20, "b": small}]
    result = combine(iter(parts), np.array([1.0, 0.3, -1.0]))
    assert result["a"].dtype == torch.float32
    for weight in result.values():
        assert torch.allclose(weight, 0.3 * small, rtol=1e-6, atol=1e-9)


def test_combine_holds_one_part_at_a_time_and_ignores_those_of_no_weight():
    made = []

    def load(value: float) -> dict[str, torch.Tensor]:
        assert all(earlier() is None for earlier in made)
        weight = torch.full((3,), value)
        made.append(weakref.ref(weight))
        return {"weight": weight}

    parts = map(load, (1.0, 2.0, float("nan")))
    assert combine(parts, [0.5, 2, 0])["weight"].tolist() == [4.5] * 3
    assert len(made) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_combine_wants_a_part_for_each_coefficient(count):
    with pytest.raises(ValueError, match="coefficients"):
        combine(({"weight": torch.ones(2)} for _ in range(count)), [0.5, 0.5])


def compare_sharded(rank: int, store: str, seed: int) -> None:
    """On each of two ranks: the averages of shards, put together, are those of the whole tensors."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    rng = torch.Generator().manual_seed(seed)
    shapes = {"even": (4, 3), "uneven": (11, 5), "on one rank only": (1, 2), "vector": (7,)}
    whole = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    sharded = {name: distribute_tensor(weight, mesh, [Shard(0)]) for name, weight in whole.items()}
    emas = [EMA(whole, power_decay(0.1)), EMA(sharded, power_decay(0.1))]
    for step in range(1, 20):
        for name, weight in whole.items():
            weight.add_(torch.randn(weight.shape, generator=rng))
            sharded[name].copy_(distribute_tensor(weight, mesh, [Shard(0)]))
        for ema in emas:
            ema.update(step)
    for name, expected in emas[0].average.items():
        average = emas[1].average[name]
        assert isinstance(average, DTensor) and average.placements == (Shard(0),)
        torch.testing.assert_close(average.full_tensor(), expected, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(expected, whole[name], atol=0.1)
    dist.destroy_process_group()


def test_sharded_averages_are_those_of_the_whole_weights(tmp_path):
    mp.spawn(compare_sharded, (str(tmp_path / "store"), 0), nprocs=2)
