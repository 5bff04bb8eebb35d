"""Batches in order: a group-aware sampler deals each step's images to ranks, a dataset turns them into batches."""

from collections.abc import Callable, Iterator

from torch.utils.data import Dataset, Sampler

from data.batches.batch import Batch, InWindow, MicroBatch, make_batch
from data.batches.plan import GroupsConfig, Plan, make_planner, steps_per_epoch
from data.batches.pool import Pool
from data.batches.steps import OnPlan, Steps
from data.workers import Loader


class GroupSampler(Sampler[list[MicroBatch]]):
    """This rank's part of the steps from `first_step` to before `last_step`, each a list of micro-batches.

    A rank takes a contiguous slice of a step's group part and another of its single part, each cut into micro-batches
    of at most `micro_batch` images. So a group never straddles ranks or micro-batches, and all ranks have micro-batches
    of the same kinds and sizes in the same order: no rank waits for another with costlier ones.
    """

    def __init__(
        self,
        plan_of_epoch: Callable[[int], Plan],
        steps_per_epoch: int,
        first_step: int,
        last_step: int,
        rank: int,
        world_size: int,
        micro_batch: int | None,
    ) -> None:
        self.plan_of_epoch, self.steps_per_epoch = plan_of_epoch, steps_per_epoch
        self.first_step, self.last_step = first_step, last_step
        self.rank, self.world_size, self.micro_batch = rank, world_size, micro_batch

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        epoch, plan = -1, None
        for step in range(self.first_step, self.last_step):
            if plan is None or step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                plan = self.plan_of_epoch(epoch)
            row = step % self.steps_per_epoch
            images, grouped = plan.images[row], int(plan.grouped[row])
            fallback = plan.fallback[int(plan.grouped[:row].sum()) // plan.group_size :]  # of the groups from here on
            position = step * len(images)
            yield [
                MicroBatch(
                    position + start,
                    images[start:stop],
                    in_groups,
                    int(fallback[start // plan.group_size : stop // plan.group_size].sum()) if in_groups else 0,
                    position,
                )
                for begin, end, in_groups in ((0, grouped, True), (grouped, len(images), False))
                for start, stop in rank_pieces(begin, end, self.rank, self.world_size, self.micro_batch)
            ]


def rank_pieces(begin: int, end: int, rank: int, world_size: int, micro_batch: int | None) -> Iterator[tuple[int, int]]:
    """Return (start, stop) of each micro-batch of a rank, which has a contiguous slice of the places `begin` to
    `end`."""
    length = (end - begin) // world_size
    start = begin + rank * length
    stop = start + length
    size = micro_batch or max(length, 1)
    return ((i, min(i + size, stop)) for i in range(start, stop, size))


class BatchDataset(Dataset[list[Batch]]):
    """A dataset whose keys are lists of micro-batches and whose items are lists of batches, made in the loader's
    workers."""

    def __init__(
        self,
        images: Pool,
        config: GroupsConfig,
        max_group_size: int,
        seed: int,
        in_window: InWindow | None = None,
        extra: tuple[str, ...] = (),
    ) -> None:
        self.images, self.settings = images, (config, max_group_size, seed)
        self.in_window, self.extra = in_window, extra

    def __getitem__(self, micro_batches: list[MicroBatch]) -> list[Batch]:
        return [make_batch(self.images, *self.settings, micro, self.in_window, self.extra) for micro in micro_batches]


def load_batches(dataset: BatchDataset, sampler: GroupSampler, workers: int) -> Loader:
    """Return a loader of the batches of each of the sampler's steps, in order; pinned if there is a GPU."""
    return Loader(dataset, workers, sampler=sampler)


def planned_batches(images: Pool, steps: Steps, on_plan: OnPlan) -> Loader:
    """Return a loader of the batches of a rank's steps, by the plans of their epochs. Call `on_plan` when an epoch
    begins."""
    plan_of_epoch = make_planner(steps.groups, images, steps.global_batch, steps.seed)
    epoch_steps = steps_per_epoch(len(images.label), steps.global_batch)

    def planned(epoch: int) -> Plan:
        on_plan(epoch, epoch * epoch_steps * steps.global_batch, plan_of_epoch(epoch))
        return plan_of_epoch(epoch)

    span = steps.first, steps.last, steps.rank, steps.world_size
    sampler = GroupSampler(planned, epoch_steps, *span, steps.micro_batch)
    dataset = BatchDataset(images, steps.groups, steps.max_group_size, steps.seed, steps.in_window, steps.extra)
    return load_batches(dataset, sampler, steps.workers)
