"""The path that a config asks for."""

from models.paths.base import Path, PathConfig
from models.paths.ddpm import DDPM
from models.paths.flows import GVP, VP, JiTFlow, LinearFlow

PATHS: dict[str, type[Path]] = {path.name: path for path in (LinearFlow, GVP, VP, JiTFlow, DDPM)}


def make_path(config: PathConfig) -> Path:
    """See models.path."""
    return PATHS[config.name](config)
