"""Save while training: the state is copied while the next gradients are computed, then written."""

import threading
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from data.sets.form import ImageForm
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.folder import CHECKPOINTS
from trainer.checkpoints.retention import prune

States = dict[str, dict[str, dict]]


class Saver:
    """Writes the checkpoints and snapshots of a run. All ranks create one and make the same calls.

    One position is written at a time, from one copy in host memory (pinned, where there are GPUs), by a thread with a
    process group of its own; another thread makes the copy. An error there is raised by the next `save` or `wait`;
    `failed` says whether there was one.
    """

    def __init__(self, run: Path, config: CheckpointConfig, timeout: float) -> None:
        self._run, self._config = run, config
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        assert isinstance(group, dist.ProcessGroup)  # all ranks are in it
        self._group = group
        cuda = torch.cuda.is_available()
        self._device = torch.cuda.current_device() if cuda else None
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=cuda
            )
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, position: int, states: States, config: str, images: ImageForm, metrics: dict[str, float]) -> None:
        """Start writing `states` (folder in the run -> state) of `position` once earlier ones are written. The tensors
        in them may change as soon as `wait_for_copy` returns."""
        self.wait()
        if self._config.asynchronous:
            if torch.accelerator.is_available():  # the copy's stream is not the update's
                torch.accelerator.current_stream().synchronize()
            copied = self._stager.stage(states)
        else:
            copied = states
        # a daemon, so that a failing process does not wait for it
        arguments = (position, copied, config, images, metrics)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.start()
        if not self._config.asynchronous:
            self.wait()

    def wait_for_copy(self) -> None:
        """Wait until the state being saved may change."""
        self._stager.synchronize_staging()

    def _write(
        self,
        position: int,
        states: States | Future[States],
        config: str,
        images: ImageForm,
        metrics: dict[str, float],
    ) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # a new thread starts with the first GPU
            if isinstance(states, Future):
                states = states.result()
            for name, state in states.items():
                checkpoint.save(self._run / name, position, state, config, images, metrics, self._group)
            if dist.get_rank() == 0:
                prune(self._run / CHECKPOINTS, self._config)
        except BaseException as error:
            self._error = error

    def failed(self) -> bool:
        """Return whether a checkpoint could not be written; `wait` raises the reason."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until every save that was started is on disk. Raise RunError if one could not be written."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: object) -> None:
        try:
            self.wait()
        except Exception as ours:
            if error is None:
                raise
            error.add_note(f"and a checkpoint failed: {ours}")
        finally:
            self._stager.close()
            del self._stager  # and the copy with it
