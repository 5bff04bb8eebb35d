import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from data.randomness import Purpose, draw, generators, step_noise

SEEDS = st.integers(0, 2**63 - 2)
POSITIONS = st.integers(0, 2**62)


def numbers(seed, purpose, position):
    return next(generators(seed, purpose, [position])).random(8)


@given(SEEDS, st.sampled_from(Purpose), POSITIONS)
def test_numbers_are_a_pure_function_of_seed_purpose_and_position(seed, purpose, position):
    assert (numbers(seed, purpose, position) == numbers(seed, purpose, position)).all()


@given(SEEDS, st.sampled_from(Purpose), POSITIONS)
def test_another_seed_purpose_or_position_gives_other_numbers(seed, purpose, position):
    own = numbers(seed, purpose, position)
    others = [numbers(seed, other, position) for other in Purpose if other != purpose]
    others += [numbers(seed + 1, purpose, position), numbers(seed, purpose, position + 1)]
    others += [numbers(position, purpose, seed)] if seed != position else []
    assert all((other != own).all() for other in others)


@given(SEEDS, st.sampled_from(Purpose), POSITIONS)
def test_a_position_has_2_to_the_192_numbers_before_the_next_begins(seed, purpose, position):
    rng = next(generators(seed, purpose, [position]))
    rng.bit_generator.advance(2**192)
    assert (rng.random(8) == numbers(seed, purpose, position + 1)).all()


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, 2**64 - 2])
def test_seeds_of_64_bits_are_told_apart(seed):
    assert (numbers(seed, Purpose.TRAINING, 0) != numbers(seed + 1, Purpose.TRAINING, 0)).all()


def test_numbers_of_neighbouring_positions_are_unrelated():
    table = np.array([numbers(0, Purpose.TRAINING, position) for position in range(5000)])
    correlation = np.corrcoef(np.concatenate([table[:-1], table[1:]], axis=1).T) - np.eye(16)
    assert abs(correlation).max() < 5 / 5000**0.5


@given(SEEDS, st.lists(POSITIONS, max_size=5), st.integers(0, 5))
def test_a_moved_generator_is_as_good_as_a_new_one(seed, positions, used):
    key = np.array([seed, Purpose.SAMPLING], np.uint64)
    for position, rng in zip(positions, generators(seed, Purpose.SAMPLING, positions), strict=True):
        new = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, position]))
        for each in (rng, new):
            each.standard_normal(used, dtype=np.float32)  # an odd number leaves half a word behind
        assert (rng.random(8) == new.random(8)).all()
        assert (rng.standard_normal(3, dtype=np.float32) == new.standard_normal(3, dtype=np.float32)).all()


@given(SEEDS, st.integers(1, 32), st.integers(0, 31))
def test_slots_of_a_group_are_distinct_rows_of_the_table(seed, rows, others):
    size = 1 + others % rows
    for slots in draw(seed, Purpose.TRAINING, np.arange(3 * size), (1,), size, rows).slot.reshape(3, size):
        assert len(set(slots.tolist())) == size
        assert set(slots.tolist()) <= set(range(rows))


@given(SEEDS, POSITIONS, st.booleans())
def test_without_a_sample_embedding_numbers_are_those_of_one_row_and_slots_are_0(seed, position, more):
    """So that samples of a network are the same when its row is folded."""
    none, one = (draw(seed, Purpose.SAMPLING, position + np.arange(3), (2,), 1, rows, more, more) for rows in (0, 1))
    assert all(np.array_equal(value, getattr(one, name)) for name, value in vars(none).items())
    assert none.slot.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("size", "rows"), [(1, 16), (4, 16), (3, 3), (16, 16)])
def test_each_image_of_a_group_takes_any_slot_with_equal_chance(size, rows):
    slots = draw(7, Purpose.TRAINING, np.arange(200 * rows * size), (1,), size, rows).slot.reshape(-1, size)
    for column in slots.T:
        assert chisquare(np.bincount(column, minlength=rows)).pvalue > 1e-4


@given(SEEDS, POSITIONS, st.integers(1, 16), st.booleans(), st.booleans())
def test_the_numbers_of_an_image_come_in_this_order_whatever_else_is_drawn_for_it(
    seed, position, rows, posterior, mirrored
):
    """Uniform ones first, that of the mirror image last; then noise, then the posterior's: runs that go on need it."""
    drawn = draw(seed, Purpose.TRAINING, np.array([position]), (2, 3), 1, rows, posterior, mirrored)
    key = np.array([seed, Purpose.TRAINING], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, position]))
    uniform = rng.random(3 + rows + mirrored)
    assert (drawn.uniform[0] == uniform[:3]).all()
    assert drawn.slot[0] == uniform[3 : 3 + rows].argmin()
    assert (drawn.noise[0] == rng.standard_normal((2, 3), np.float32)).all()
    assert (drawn.posterior is None) != posterior and (drawn.flip is None) != mirrored
    if posterior:
        assert (drawn.posterior[0] == rng.standard_normal((2, 3), np.float32)).all()
    if mirrored:
        assert drawn.flip[0] == (uniform[-1] < 0.5)


@given(SEEDS, st.lists(POSITIONS, min_size=1, max_size=5), st.integers(0, 999))
def test_the_noise_of_a_step_belongs_to_the_sample_and_the_step(seed, positions, step):
    positions = np.array(positions)
    noise = step_noise(seed, positions, (2, 3), step)
    assert noise.dtype == np.float32 and noise.shape == (len(positions), 2, 3)
    for position, own in zip(positions, noise, strict=True):
        assert (step_noise(seed, np.array([position]), (2, 3), step)[0] == own).all()
        others = [step_noise(seed, np.array([position]), (2, 3), step + 1)[0]]
        others += [step_noise(seed, np.array([position + 1]), (2, 3), step)[0]]
        others += [step_noise(seed + 1, np.array([position]), (2, 3), step)[0]]
        others += [draw(seed, purpose, np.array([position]), (2, 3), 1, 4).noise[0] for purpose in Purpose]
        assert all((other != own).all() for other in others)


def test_the_noise_of_steps_is_standard_normal_and_unrelated_between_steps_and_to_the_start():
    positions = np.arange(300)
    noise = np.stack([step_noise(1, positions, (8, 8), step) for step in range(4)])
    noise = np.concatenate([noise, draw(1, Purpose.SAMPLING, positions, (8, 8), 1, 4).noise[None]]).reshape(5, -1)
    assert abs(noise.mean(axis=1)).max() < 5 / noise.shape[1] ** 0.5
    assert abs(np.cov(noise) - np.eye(5)).max() < 8 / noise.shape[1] ** 0.5


@given(SEEDS, POSITIONS, st.integers(0, 2**40))
def test_a_part_of_a_position_has_2_to_the_128_numbers_before_the_next_begins(seed, position, part):
    rng = next(generators(seed, Purpose.SAMPLING, [position], part))
    rng.bit_generator.advance(2**128)
    assert (rng.random(8) == next(generators(seed, Purpose.SAMPLING, [position], part + 1)).random(8)).all()
