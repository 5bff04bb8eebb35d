"""Streaming from real shards: every image in its turn, groups in windows, and a stream that goes on from any step."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import cache
from itertools import chain, islice

import numpy as np
import pytest
import torch

from data.batches.batch import Batch
from data.batches.plan import GroupsConfig
from data.batches.steps import Steps
from data.batches.stream import StreamReader, stream_batches
from data.batches.windows import Stream
from data.errors import DataError
from data.randomness import Purpose, draw
from data.sets.streamed_latents import StreamedLatents
from data.stores.shards import agree_on_settings, finish, shard_names, write_shard

SHAPE = (1, 2, 2)
CLASSES = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small arrays are not worth a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Shards:
    """A store of shards with `counts` images, whose latents tell the number of the image. Images are of 7 kinds: those
    of one have a cosine of about 0.9, others of 0; or of 1 and 0, if `pure`."""

    def __init__(self, folder, counts, pure=False, features=True, seed=0):
        rng = np.random.default_rng(seed)
        number = sum(counts)
        self.folder, self.counts, self.opened = folder, counts, {}
        self.shard = np.repeat(np.arange(len(counts)), counts)
        self.label, self.kind = rng.integers(CLASSES, size=number), rng.integers(7, size=number)
        feature = np.eye(8)[self.kind] + (0 if pure else 0.15) * rng.normal(size=(number, 8))
        self.feature = (feature / np.linalg.norm(feature, axis=1, keepdims=True)).astype(np.float16)
        moments = np.empty((number, 2, 2, 2, 2), np.float16)
        moments[:, :, 0] = np.arange(number)[:, None, None, None]
        moments[:, :, 1] = -30
        moments[:, 1, 0] += 2000  # of the mirror image
        agree_on_settings(folder, {"name": "no/vae", "scaling_factor": 1.0, "shift_factor": 0.0})
        for path, shard in zip(shard_names("latents", len(counts)), range(len(counts)), strict=True):
            part = np.flatnonzero(self.shard == shard)
            arrays = {"moments": moments[part]} | ({"feature": self.feature[part]} if features else {})
            keys = [f"{i:05d}" for i in part]
            write_shard(folder / path, keys, self.label[part].tolist(), arrays if len(part) else {}, [])
        finish(folder, "latents", len(counts), CLASSES, 0)

    def open(self, flip=False):
        """As training does."""
        return StreamedLatents(str(self.folder), None, flip, {})

    def open_cached(self, flip=False):
        """So that each window is read only once."""
        if flip not in self.opened:
            source = self.opened[flip] = self.open(flip)
            source.read_shards = cache(source.read_shards)
        return self.opened[flip]

    def stream(self, config, batch, rank=0, world_size=1, window=2, seed=0):
        return Stream(self.open_cached().counts, config, batch, seed, rank, world_size, window)


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """8 shards of 48 images."""
    return Shards(tmp_path_factory.mktemp("even"), [48] * 8)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return Shards(tmp_path_factory.mktemp("uneven"), [48, 64, 80, 32, 64, 48, 80], seed=1)


def batches(shards, stream, last, first=0, micro=None, workers=0, flip=False):
    """[step] lists of batches of one rank."""
    source = shards.open(flip) if workers else shards.open_cached(flip)
    place = stream.rank, stream.world_size
    steps = Steps(stream.config, stream.global_batch, 8, stream.seed, first, last, *place, micro, workers)
    return list(stream_batches(source, stream.window, steps))


def numbers(batch):
    """Which images a batch holds."""
    return batch.x[:, 0, 0, 0].round().long().numpy()


def same(a, b):
    """Whether two lists of steps are bit-identical."""
    assert [len(step) for step in a] == [len(step) for step in b]
    for one, other in zip(chain.from_iterable(a), chain.from_iterable(b), strict=True):
        for name in (field.name for field in fields(Batch)):
            x, y = getattr(one, name), getattr(other, name)
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, name
    return True


SETTINGS = [
    {"variant": "none", "size": 1},
    {"variant": "light", "size": 4, "share": 0.3, "neighbors": 8, "threshold": 0.6},
    {"variant": "light", "size": 2, "share": 0.5, "mixing": "within_step", "query": "class"},
    {"variant": "full", "size": 4, "query": "random", "share": 0.75, "mixing": "within_step"},
    {"variant": "full", "size": 8, "neighbors": 40, "threshold": 0.6},
]
settings_and_worlds = pytest.mark.parametrize(
    ("settings", "world_size"), [(settings, world) for settings in SETTINGS for world in (1, 4)]
)


@settings_and_worlds
def test_all_images_of_a_window_are_used_once_and_groups_are_of_one_window(uneven, settings, world_size):
    """The images in groups come window by window, and so do the single ones. None of a window comes twice."""
    config = GroupsConfig(**settings)
    for rank in range(world_size):
        stream = uneven.stream(config, 32, rank, world_size)
        made = list(chain.from_iterable(batches(uneven, stream, 60 // world_size * 2)))
        grouped, single = (
            np.concatenate([np.empty(0, int), *(numbers(b) for b in made if b.in_groups == kind)])
            for kind in (True, False)
        )
        assert len(grouped) % config.size == 0
        for window in islice(stream.windows(), 5):
            mine = slice(window.total_grouped - window.grouped, window.total_grouped)
            alone = slice(window.total_single - window.single, window.total_single)
            used = np.concatenate([grouped[mine], single[alone]])
            assert len(set(used)) == len(used)
            assert np.isin(uneven.shard[used], window.shards).all()
            whole = window.total_grouped <= len(grouped) and window.total_single <= len(single)
            lost = np.isin(uneven.shard, window.shards).sum() - len(used)
            assert lost >= 0 and (not whole or lost < config.size)


@settings_and_worlds
def test_where_windows_fill_epochs_every_image_comes_exactly_once_in_each(even, settings, world_size):
    config = GroupsConfig(**settings)
    ranks = [batches(even, even.stream(config, 32, rank, world_size, window=2), 36) for rank in range(world_size)]
    for epoch in range(3):
        seen = [numbers(b) for rank in ranks for step in rank[12 * epoch : 12 * (epoch + 1)] for b in step]
        assert sorted(np.concatenate(seen)) == list(range(384))


@settings_and_worlds
def test_no_image_comes_more_often_than_passes_were_begun_or_less_often_than_all_ranks_have_ended(
    uneven, settings, world_size
):
    """Uneven shards let ranks drift apart: one may be in the next pass while another has not ended this one."""
    config, steps = GroupsConfig(**settings), 40
    used, begun, ended = Counter(), 0, 10**9
    for rank in range(world_size):
        stream = uneven.stream(config, 32, rank, world_size)
        made = list(chain.from_iterable(batches(uneven, stream, steps)))
        used.update(chain.from_iterable(numbers(b).tolist() for b in made))
        grouped, single, shards = stream.grouped_before(steps), stream.single_before(steps), 0
        for window in stream.windows():
            if window.total_grouped > grouped or window.total_single > single:
                break
            shards += len(window.shards)
        ended = min(ended, (shards * world_size + rank) // 7)
        opened = shards
        while window.total_grouped - window.grouped < grouped or window.total_single - window.single < single:
            opened += len(window.shards)
            window = next(w for w in stream.windows() if w.number == window.number + 1)
        begun = max(begun, ((opened - 1) * world_size + rank) // 7 + 1)
    times = np.array([used[i] for i in range(416)])
    assert sum(used.values()) == steps * 32
    assert times.max() <= begun
    if config.share < 1:
        assert times.min() >= ended
    assert begun - ended <= 3 and ended >= 1


@settings_and_worlds
def test_from_any_step_on_a_new_reader_gives_the_rest_bit_for_bit(uneven, settings, world_size):
    config, steps = GroupsConfig(spread=0.1, **settings), 16
    stream = uneven.stream(config, 32, world_size - 1, world_size)
    whole = batches(uneven, stream, steps, flip=True)
    assert len(whole) == steps
    for first in range(steps):
        assert same(batches(uneven, stream, steps, first, flip=True), whole[first:])


@settings_and_worlds
def test_ranks_have_the_same_kinds_of_micro_batches_and_all_positions_once(uneven, settings, world_size):
    """Where in the stream an image stands is known by the noise that belongs there."""
    config, batch, steps = GroupsConfig(**settings), 32, 12
    expected = draw(0, Purpose.TRAINING, np.arange(batch * steps), SHAPE, 1, 8, posterior=True, mirrored=True)
    place = {noise.tobytes(): position for position, noise in enumerate(expected.noise)}
    for micro in (None, config.size, 2 * config.size):
        ranks = [
            batches(uneven, uneven.stream(config, batch, rank, world_size), steps, micro=micro)
            for rank in range(world_size)
        ]
        for step in range(steps):
            kinds = [[(b.in_groups, b.group_size, len(b.u)) for b in rank[step]] for rank in ranks]
            assert all(kind == kinds[0] for kind in kinds)
            assert all(length % size == 0 and (micro is None or length <= micro) for _, size, length in kinds[0])
            positions = [place[noise.tobytes()] for rank in ranks for b in rank[step] for noise in b.noise.numpy()]
            assert sorted(positions) == list(range(step * batch, (step + 1) * batch))


@pytest.mark.parametrize("settings", SETTINGS)
def test_labels_stay_with_their_images_and_slots_differ_in_a_group(uneven, settings):
    config = GroupsConfig(**settings)
    for batch in chain.from_iterable(batches(uneven, uneven.stream(config, 32), 20)):
        np.testing.assert_array_equal(batch.label.numpy(), uneven.label[numbers(batch)])
        assert all(len(set(group.tolist())) == batch.group_size for group in batch.slot.view(-1, batch.group_size))


def test_half_of_the_images_are_mirrored_and_none_without_flip(even):
    stream = even.stream(GroupsConfig(variant="none", size=1), 32)
    mirrored = np.concatenate([numbers(b) >= 2000 for b in chain.from_iterable(batches(even, stream, 60, flip=True))])
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / len(mirrored) ** 0.5
    assert all((numbers(b) < 2000).all() for b in chain.from_iterable(batches(even, stream, 60)))


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize(
    "settings", [{"variant": "full", "size": 4}, {"variant": "light", "size": 2, "share": 0.5}], ids=["full", "light"]
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_members_are_neighbors_of_the_anchor_above_the_threshold_or_the_group_counts_as_fallback(
    uneven, settings, threshold, world_size
):
    config = GroupsConfig(threshold=threshold, neighbors=10, **settings)
    rows = uneven.feature.astype(np.float64)
    cosine = rows @ rows.T / np.outer(*[np.linalg.norm(rows, axis=1)] * 2)
    answered = fallbacks = 0
    for rank in range(world_size):
        stream = uneven.stream(config, 32, rank, world_size)
        windows = list(islice(stream.windows(), 40))
        place = 0
        for batch in chain.from_iterable(batches(uneven, stream, 20, micro=config.size)):
            if not batch.in_groups:
                assert batch.fallbacks == 0
                continue
            window = next(w for w in windows if w.total_grouped > place)
            place += config.size
            anchor, *members = numbers(batch)
            near = np.flatnonzero(np.isin(uneven.shard, window.shards))
            near = near[near != anchor]
            near = near[np.argsort(-cosine[anchor, near])[:10]]
            fits = (cosine[anchor, members] >= threshold - 1e-7).all() and np.isin(members, near).all()
            assert fits or batch.fallbacks == 1
            answered, fallbacks = answered + 1 - batch.fallbacks, fallbacks + batch.fallbacks
    assert answered or threshold > 0.9
    assert fallbacks or settings["variant"] == "light"


@pytest.mark.parametrize("query", ["similarity", "class", "random"])
@pytest.mark.parametrize("variant", ["light", "full"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_fallbacks_are_counted_in_the_step_and_micro_batch_that_hold_them(tmp_path, query, variant, world_size):
    """Kinds that are all alike in themselves and not at all to others, with all of them as candidates: as long as a
    kind or class has a group's number of images left it makes one, so that every mixed group is a fallback."""
    shards = Shards(tmp_path / "latents", [32, 48, 16, 32, 48, 64], pure=True, seed=2)
    share = {"light": 0.5, "full": None}[variant]
    config = GroupsConfig(variant=variant, size=4, share=share, query=query, neighbors=400, mixing="within_step")
    kind = {"similarity": shards.kind, "class": shards.label, "random": np.zeros(240)}[query]
    total = 0
    for rank in range(world_size):
        stream = shards.stream(config, 32, rank, world_size)
        for micro in (None, 4, 8):
            for batch in chain.from_iterable(batches(shards, stream, 25, micro=micro)):
                groups = kind[numbers(batch)].reshape(-1, batch.group_size)
                mixed = int((groups != groups[:, :1]).any(axis=1).sum())
                assert batch.fallbacks == mixed
                total += mixed
    assert bool(total) == (query != "random" and variant == "full")


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[3]])
def test_a_worker_changes_nothing(uneven, settings):
    stream = uneven.stream(GroupsConfig(**settings), 32, 1, 2)
    alone = batches(uneven, stream, 20)
    assert same(batches(uneven, stream, 20, workers=1), alone)
    assert same(batches(uneven, stream, 20, first=7, workers=4), alone[7:])


def test_other_seeds_and_world_sizes_make_other_streams_and_windows_of_one_shard_do(uneven):
    config = GroupsConfig(**SETTINGS[1])
    first = [numbers(b).tolist() for b in chain.from_iterable(batches(uneven, uneven.stream(config, 32), 10))]
    for change in ({"seed": 1}, {"world_size": 2}, {"window": 1}, {"window": 7}):
        made = batches(uneven, uneven.stream(config, 32, **change), 10)
        assert [numbers(b).tolist() for b in chain.from_iterable(made)] != first


@pytest.mark.parametrize("query", ["class", "random", "similarity"])
def test_the_same_shards_make_other_groups_in_another_order_in_each_pass(tmp_path, query):
    shards = Shards(tmp_path / "latents", [64], seed=4)
    config = GroupsConfig(
        variant="light", size=4, share=0.5, query=query, threshold=0.6, mixing="within_step", splits=1
    )
    made = batches(shards, shards.stream(config, 64), 4)
    groups, single = (
        [np.concatenate([numbers(b) for b in step if b.in_groups == kind]) for step in made] for kind in (True, False)
    )
    members = [{frozenset(group) for group in step.reshape(-1, 4)} for step in groups]
    assert all(len(a & b) < 4 for i, a in enumerate(members) for b in members[:i])
    assert len({tuple(step) for step in single}) == len({frozenset(step) for step in single}) == 4


@pytest.mark.parametrize("query", ["class", "random", "similarity"])
@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "full", "size": 3, "share": 0.9},
        {"variant": "light", "size": 3, "share": 0.1},
        {"variant": "light", "size": 5, "share": 0.96, "mixing": "within_step", "splits": 1},
        {"variant": "full", "size": 7},
    ],
)
def test_groups_of_a_size_that_no_window_is_a_multiple_of(tmp_path, settings, query):
    shards = Shards(tmp_path / "latents", [16, 10, 16, 25, 16], seed=3)
    config = GroupsConfig(query=query, threshold=0.6, neighbors=9, **settings)
    batch = 5 * 7 * 3
    stream = shards.stream(config, batch, window=1)
    made = batches(shards, stream, 30)
    assert [sum(len(b.u) for b in step) for step in made] == [batch] * 30
    for group in chain.from_iterable(numbers(b).reshape(-1, config.size) for b in chain(*made) if b.in_groups):
        assert len(set(group)) == config.size and len(set(uneven_shard := shards.shard[group])) == 1, uneven_shard
    assert same(batches(shards, stream, 30, first=17), made[17:])


def rewritten(shards, number, without):
    """Shard `number`, with the last images left away."""
    path = shards.folder / f"latents-{number:06d}.tar"
    part = np.flatnonzero(shards.shard == number)[:-without]
    moments = np.zeros((len(part), 2, 2, 2, 2), np.float16)
    arrays = {"moments": moments, "feature": shards.feature[part]}
    write_shard(path, [f"{i:05d}" for i in part], shards.label[part].tolist(), arrays, [])
    return path


@pytest.mark.parametrize("without", [1, 15])
def test_a_shard_with_fewer_images_than_the_manifest_says_is_an_error_that_names_it(tmp_path, without):
    shards = Shards(tmp_path / "latents", [16] * 4)
    path = rewritten(shards, 2, without)
    stream = shards.stream(GroupsConfig(variant="none", size=1), 8, window=2)
    with pytest.raises(DataError, match=rf"{path.name}: holds {16 - without} images, should be 16") as error:
        batches(shards, stream, 12)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("window", [1, 2])
def test_a_shard_of_which_no_image_could_be_read_is_passed_over(tmp_path, window):
    """Of tar shards, one whose images are all rejected makes a shard of none."""
    shards = Shards(tmp_path / "latents", [16, 0, 16, 16])
    stream = shards.stream(GroupsConfig(variant="none", size=1), 8, window=window)
    made = batches(shards, stream, 18)
    times = Counter(chain.from_iterable(numbers(b).tolist() for b in chain.from_iterable(made)))
    assert len(times) == 48 and set(times.values()) <= {2, 3, 4}


def test_similar_groups_need_features_and_other_queries_do_not(tmp_path):
    shards = Shards(tmp_path / "latents", [32, 32], features=False)
    with pytest.raises(DataError, match=r"holds no features.*cluster_latents"):
        shards.open().max_neighbors()
    config = GroupsConfig(variant="full", size=4, query="class")
    assert len(batches(shards, shards.stream(config, 16), 8)) == 8


def test_memory_holds_the_images_of_a_few_windows_whatever_the_length_of_the_stream(uneven):
    """What is open at once: the images that are left over, and those of one window more."""
    for settings in SETTINGS:
        config = GroupsConfig(**settings)
        stream = uneven.stream(config, 32)
        with ThreadPoolExecutor(1) as background:
            reader = StreamReader(uneven.open_cached(), stream, 0, background)
            largest = 0
            for step in range(300):
                grouped = stream.grouped_at(step)
                reader.take(grouped, 32 - grouped)
                largest = max(largest, len(reader.pool.label))
        assert largest <= 3 * 160, settings
