from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.plan import GroupsConfig, group_quantum, plan_epoch, steps_per_epoch
from data.neighbors.exact import nearest_neighbors


@st.composite
def cases(draw, **fixed):
    """(config, kind of data, number of images, global batch, seed): any setting that world sizes to 8 can train."""
    size = draw(st.integers(1, 16))
    query = fixed.get("query") or draw(st.sampled_from(["similarity", "class", "random"]))
    variant = fixed.get("variant") or draw(st.sampled_from(["none", "light", "full"]))
    size = 1 if variant == "none" else size
    config = GroupsConfig(
        variant=variant,
        size=size,
        share=draw(st.none() | st.integers(1, 100).map(lambda p: p / 100)) if variant != "none" else None,
        query=query,
        threshold=draw(st.sampled_from([-1.0, 0.0, 0.5, 0.7, 0.9, 1.0])),
        neighbors=draw(st.integers(max(size - 1, 1), 32)),
        mixing=draw(st.sampled_from(["by_step", "within_step"])),
    )
    batch = 8 * size * draw(st.integers(1, 1 + 24 // size))
    number = batch * draw(st.integers(1, 3)) + draw(st.integers(0, batch - 1))
    return config, draw(st.sampled_from(["scattered", "clustered", "tied"])), number, batch, draw(st.integers(0, 2**40))


def prepare(random_images, case):
    """The data set of a case, its graph, and its plan as a function of (seed, epoch)."""
    config, kind, number, batch, seed = case
    images = random_images(kind, number, 6, seed % 1000)
    neighbors = min(config.neighbors, number - 1)
    graph = nearest_neighbors(images.features, neighbors) if config.query == "similarity" else None
    return images, graph, lambda seed, epoch: plan_epoch(config, images.label, graph, batch, seed, epoch)


def groups_of(plan):
    """All groups of an epoch, in order, (m, size)."""
    parts = [row[:grouped] for row, grouped in zip(plan.images, plan.grouped, strict=True)]
    return np.concatenate(parts).reshape(-1, plan.group_size)


EXAMPLES = settings(max_examples=200, deadline=None)
EPOCHS = st.integers(0, 10_000)


@given(cases(), EPOCHS)
@EXAMPLES
def test_no_image_comes_twice_and_less_than_a_batch_is_left_out(random_images, case, epoch):
    config, _, number, batch, seed = case
    plan = prepare(random_images, case)[2](seed, epoch)
    assert plan.images.shape == (steps_per_epoch(number, batch), batch)
    assert 0 <= number - plan.images.size < batch
    assert len(np.unique(plan.images)) == plan.images.size
    assert plan.images.min() >= 0
    assert plan.images.max() < number
    assert plan.group_size == config.size
    assert plan.images.dtype == np.int32


@given(cases(), EPOCHS)
@EXAMPLES
def test_every_step_can_be_dealt_to_eight_ranks_in_whole_groups(random_images, case, epoch):
    config, _, _, batch, seed = case
    plan = prepare(random_images, case)[2](seed, epoch)
    assert (plan.grouped >= 0).all()
    assert (plan.grouped <= batch).all()
    assert not (plan.grouped % (8 * config.size)).any()
    assert not ((batch - plan.grouped) % 8).any()
    if config.mixing == "by_step":
        assert set(plan.grouped) <= {0, batch}


@given(cases(), EPOCHS)
@EXAMPLES
def test_every_group_that_is_no_fallback_is_as_the_query_asks(random_images, case, epoch):
    config, _, _, _, seed = case
    images, graph, plan_of = prepare(random_images, case)
    plan = plan_of(seed, epoch)
    groups = groups_of(plan)
    assert plan.fallback.shape == (len(groups),)
    answered = groups[~plan.fallback]
    if config.query == "class":
        assert (images.label[answered] == images.label[answered[:, :1]]).all()
        possible = sum(n // config.size for n in np.bincount(images.label))
        assert len(answered) == min(len(groups), possible)
    elif config.query == "random" or config.size == 1:
        assert not plan.fallback.any()
    else:
        for anchor, *members in answered:
            near = graph.ids[anchor][graph.similarities[anchor] >= np.float32(config.threshold)]
            assert set(members) <= set(near)


@given(cases(variant="full", query="similarity"), EPOCHS)
@EXAMPLES
def test_a_fallback_is_made_only_where_no_anchor_has_enough_free_candidates(random_images, case, epoch):
    config, _, number, _, seed = case
    _, graph, plan_of = prepare(random_images, case)
    plan = plan_of(seed, epoch)
    if plan.fallback.any():
        free = np.setdiff1d(np.arange(number), groups_of(plan)[~plan.fallback])
        enough = graph.similarities[free] >= np.float32(config.threshold)
        assert ((np.isin(graph.ids[free], free) & enough).sum(axis=1) < config.size - 1).all()


@given(cases(), EPOCHS)
@EXAMPLES
def test_a_plan_is_a_pure_function_of_seed_and_epoch_and_differs_between_them(random_images, case, epoch):
    seed = case[-1]
    plan_of = prepare(random_images, case)[2]
    plan, again = plan_of(seed, epoch), prepare(random_images, case)[2](seed, epoch)
    for name in ("images", "grouped", "fallback"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(again, name))
    for other in (plan_of(seed, epoch + 1), plan_of(seed + 1, epoch), plan_of(epoch, seed)):
        assert (other.images != plan.images).any() or seed == epoch


@given(cases(), st.integers(1, 6))
@EXAMPLES
def test_after_any_number_of_steps_the_share_is_met_within_a_quantum(random_images, case, epochs):
    config, _, _, batch, seed = case
    plan_of = prepare(random_images, case)[2]
    grouped = np.concatenate([plan_of(seed, epoch).grouped for epoch in range(epochs)]).tolist()
    share, quantum = Fraction(str(config.share)), group_quantum(config, batch)
    assert quantum <= batch
    so_far = 0
    for step, images in enumerate(grouped, start=1):
        so_far += images
        assert abs(so_far - share * batch * step) <= quantum


@pytest.mark.parametrize("share", [0.1, 0.25, 0.29, 0.35, 0.7, 0.95])
@pytest.mark.parametrize("batch", [8, 24, 96, 256])
def test_a_share_that_comes_out_even_is_met_exactly(share, batch):
    """After 100 steps of this run, whatever its epochs are."""
    config = GroupsConfig(variant="light", size=2, share=share, query="random")
    for images in (batch, 3 * batch + 5, 100 * batch):
        label, steps = np.zeros(images, np.int64), images // batch
        epochs = [plan_epoch(config, label, None, batch, 0, epoch).grouped for epoch in range(-(-100 // steps))]
        assert np.concatenate(epochs)[:100].sum() == round(share * 100) * batch


@pytest.mark.parametrize(("variant", "share"), [("none", 0), ("light", 0.1), ("full", 1)])
def test_the_variant_gives_the_share(variant, share):
    assert GroupsConfig(variant=variant, size=1).share == share
    assert GroupsConfig(variant=variant, size=1, share=None).share == share
    if variant != "none":
        assert GroupsConfig(variant=variant, size=4, share=0.3).share == 0.3


@pytest.mark.parametrize("query", ["similarity", "class", "random"])
@pytest.mark.parametrize("mixing", ["by_step", "within_step"])
def test_plain_diffusion_has_no_groups_and_needs_no_graph(query, mixing):
    plan = plan_epoch(GroupsConfig(variant="none", size=1, query=query, mixing=mixing), np.zeros(45), None, 8, 3, 2)
    assert not plan.grouped.any()
    assert plan.fallback.shape == (0,)
    assert len(np.unique(plan.images)) == 40


@pytest.mark.parametrize("query", ["similarity", "class", "random"])
def test_small_data_in_full_has_fallbacks_where_the_query_can_be_missed(graph_of, query):
    images, graph = graph_of("scattered", 70, 10, seed=1)
    config = GroupsConfig(variant="full", size=8, query=query, threshold=0.7, neighbors=10)
    plans = [plan_epoch(config, images.label, graph, 64, 0, epoch) for epoch in range(20)]
    assert all(plan.fallback.any() == (query != "random") for plan in plans)
    assert all((plan.grouped == 64).all() for plan in plans)


@pytest.mark.parametrize(
    ("query", "threshold"), [("similarity", 0.5), ("similarity", 0.99), ("class", 0), ("random", 0)]
)
@pytest.mark.parametrize("variant", ["light", "full"])
def test_every_image_has_its_turn(graph_of, query, threshold, variant):
    """Those left out are others in each epoch: over many epochs, all are seen."""
    images, graph = graph_of("clustered", 70, 10, seed=2)
    config = GroupsConfig(variant=variant, size=4, query=query, threshold=threshold, neighbors=10)
    seen = [plan_epoch(config, images.label, graph, 64, 0, epoch).images for epoch in range(200)]
    assert len(np.unique(seen)) == 70


@pytest.mark.parametrize("query", ["class", "random"])
def test_images_of_all_classes_are_left_out_equally_often(query):
    label = np.arange(100) % 10
    config = GroupsConfig(variant="full", size=4, query=query)
    left_out = np.zeros(10)
    for epoch in range(250):  # 4 of 100 images are left out
        plan = plan_epoch(config, label, None, 96, 0, epoch)
        left_out += np.bincount(label[np.setdiff1d(np.arange(100), plan.images)], minlength=10)
    assert abs(left_out - 100).max() < 50


def test_groups_that_the_query_could_not_fill_come_anywhere_in_the_epoch():
    """8 of 16 groups in each of 200 epochs: every place holds one in half of them."""
    label = np.repeat(np.arange(40), [32] + [1] * 32 + [0] * 7)  # one class fills 8 groups of 4, the others none
    config = GroupsConfig(variant="full", size=4, query="class")
    fallback = np.array([plan_epoch(config, label, None, 8, 0, epoch).fallback for epoch in range(200)])
    assert (fallback.sum(axis=1) == 8).all()
    assert abs(fallback.sum(axis=0) - 100).max() < 5 * 50**0.5


def test_groups_and_images_alone_take_any_place_in_the_epoch():
    """Image 0 of 64 in 400 epochs: its step is one of 8 with equal chance, for either kind."""
    config = GroupsConfig(variant="light", size=2, share=0.5, query="random")
    plans = [plan_epoch(config, np.zeros(64), None, 8, seed, 0) for seed in range(400)]
    steps = np.bincount([int(np.argwhere(plan.images == 0)[0, 0]) for plan in plans], minlength=8)
    assert abs(steps - 50).max() < 35


def test_a_batch_larger_than_the_data_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"global_batch=64.*\b63\b"):
        plan_epoch(GroupsConfig(query="random"), np.zeros(63), None, 64, 0, 0)
    assert steps_per_epoch(64, 64) == 1
    assert steps_per_epoch(127, 64) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "none", "size": 4}, "size=4"),
        ({"variant": "none"}, "size=4"),
        ({"variant": "none", "size": 1, "share": 0.1}, "share=0.1"),
        ({"variant": "light", "share": 0}, "share=0"),
        ({"variant": "full", "share": 0}, "share=0"),
        ({"variant": "light", "share": 1.1}, "share"),
        ({"size": 8, "neighbors": 6}, "neighbors=6.*7"),
        ({"size": 17}, "size"),
        ({"variant": "heavy"}, "variant"),
        ({"query": "clip"}, "query"),
        ({"spread": 1.5}, "spread"),
        ({"groupsize": 4}, "groupsize"),
    ],
)
def test_an_impossible_setting_is_an_error_that_names_it(values, message):
    with pytest.raises(ValueError, match=message):
        GroupsConfig(**values)
