"""What it costs that the ranks vote in every step whether to stop: two ranks on this machine, beside a DiT-S/2 step."""

import os
import statistics
import time
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue

import torch

from benchmarks import Figures, Targets
from benchmarks.group import step_seconds
from benchmarks.network import dit
from slurm.tasks import free_port
from trainer.engines.stop_vote import StopVote
from trainer.ranks import process_group

RANKS, VOTES, IMAGES = 2, 2000, 8


def measure() -> tuple[Figures, Targets]:
    """Nothing is computed between the votes: none of their time is hidden, as it is in training."""
    step = statistics.median(step_seconds(dit("S"), IMAGES, (1,), 7)[1])
    context = get_context("spawn")
    answers, port = context.SimpleQueue(), free_port()
    ranks = [context.Process(target=_vote, args=(rank, port, answers)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    vote = max(answers.get() for _ in ranks)
    for rank in ranks:
        rank.join()
    figures: Figures = {"step_seconds": step, "vote_seconds": vote, "vote_over_step": vote / step}
    return figures, {"vote_over_step": ("<", 0.005)}


def _vote(rank: int, port: int, answers: SimpleQueue) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    with process_group():
        vote = StopVote(lambda: False, timeout=60)
        start = time.perf_counter()
        for _ in range(VOTES):
            vote.begin()
            vote.decided()
        answers.put((time.perf_counter() - start) / VOTES)
