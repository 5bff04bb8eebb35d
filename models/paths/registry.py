"""The path that a config asks for."""

from models.paths.base import NoisePath, PathConfig
from models.paths.ddpm import DDPM
from models.paths.flows import GVP, VP, JiTFlow, LinearFlow

PATHS: dict[str, type[NoisePath]] = {path.name: path for path in (LinearFlow, GVP, VP, JiTFlow, DDPM)}


def make_path(config: PathConfig) -> NoisePath:
    """See models.path."""
    return PATHS[config.name](config)
