"""Build the data, the network and the loss of a config, and check that the config fits its data."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data.batches.batch import InWindow
from data.batches.plan import needs_neighbors
from data.sets.form import ImageForm, form_of
from data.sets.images import Images
from data.sets.registry import Split, open_images
from models.backbones.base import Backbone
from models.backbones.registry import make_network
from models.objectives.objective import Objective, make_objective
from models.paths.base import NoisePath
from models.paths.registry import make_path
from models.sampling.guidance import Interval, inside
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.weights import WeightSource, find_weights, read_weights, start_from
from trainer.config.tree import Config
from trainer.errors import RunError
from trainer.ranks import from_rank_0


def open_data(config: Config, split: Split = "train") -> Images:
    """Return the images of a config. Raise DataError if they are missing, RunError if they do not fit the config."""
    images = open_images(config.data, split)
    known = images.max_neighbors() if needs_neighbors(config.groups) else None
    n, side = len(images), images.shape[-1]
    if split == "train" and config.train.global_batch > n:
        raise RunError(f"train.global_batch={config.train.global_batch}: more than there are images; set {n} or less")
    if known is not None and config.groups.neighbors > known:
        raise RunError(f"groups.neighbors={config.groups.neighbors}: {known} are known of each image; set that or less")
    if side % config.model.patch:
        raise RunError(f"model.patch={config.model.patch}: must divide the side of the images, {side}")
    return images


def find_form(config: Config, source: WeightSource) -> ImageForm:
    """Return the form of the images that these weights generate: from their checkpoint or file or, if it does not say,
    from the data. `data.vae` replaces the VAE. Raise DataError if data are needed and missing."""
    form = source.form()
    vae = config.data.vae or (form.vae if form else None)
    if form is None or (config.data.name == "latents" and vae is None):
        form = form_of(open_data(config))
    return replace(form, vae=vae or form.vae)


def data_are_here(config: Config) -> bool:
    """Return whether the folder that a config's images come from exists, if they come from one."""
    folder = getattr(config.data, config.data.name, None)
    return folder is None or Path(folder).is_dir()


def form_from_config(config: Config, num_classes: int) -> ImageForm:
    """Return the form that a config states for images that are not here. Raise RunError if it states none."""
    data = config.data
    if data.channels is None or data.side is None:
        field = "channels" if data.channels is None else "side"
        raise RunError(f"data.{field}=null: {getattr(data, data.name)} is not here to tell it; set data.{field}")
    return ImageForm((data.channels, data.side, data.side), num_classes, data.vae)


def shares_attention(config: Config) -> InWindow | None:
    """Return where groups share attention, a function of quantiles of time and the images seen; None: everywhere."""
    return partial(_in_window, make_path(config.path), config.groups.window) if config.groups.window else None


def _in_window(path: NoisePath, window: Interval, u: Tensor, position: int) -> Tensor:
    """Return whether the log-SNRs at quantiles of time `u` are in the window, with `position` images seen."""
    log_snr = path.log_snr(path.timestep(u, position)).tolist()
    return torch.tensor([inside(value, window) for value in log_snr], dtype=torch.bool)


def build_network(config: Config, images: ImageForm) -> Backbone:
    """Return the network for these images, initialised from the run's seed alone."""
    channels, side, _ = images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return make_network(config.model, channels, side, images.num_classes, config.path.predictions * channels)


def initial_network(config: Config, images: ImageForm) -> nn.Module:
    """Return the network of a new run, with the weights `init_from` if the config has them. All ranks call it."""
    network = build_network(config, images)
    start = config.init_from
    if start:
        # one answer for all ranks: that run may still be training and keep writing newer checkpoints
        source = from_rank_0(lambda: find_weights(start))
        start_from(network, read_weights(source), str(source))
    return network


def build_objective(config: Config, network: nn.Module, images: Images) -> Objective:
    """Return the loss terms of a run, built for its network before it is distributed over the ranks. Raise RunError if
    a term does not fit the network, or the images lack what it needs."""
    try:
        return make_objective(config.loss, network, images.extra, config.seed)
    except ValueError as error:
        raise RunError(f"loss.{error}") from None


def check_start(config: Config, images: ImageForm) -> None:
    """Raise RunError if the weights to start from are missing or of another model. Read only their shapes."""
    started, _ = checkpoint.find(Path(config.run) / checkpoint.CHECKPOINTS)
    if config.init_from and not started:
        with torch.device("meta"):
            network = build_network(config, images)
        start_from(network, read_weights(config.init_from, values=False), config.init_from)
