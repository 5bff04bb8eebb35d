"""The path that a config asks for."""

from models.ddpm import DDPM
from models.flows import GVP, VP, JiTFlow, LinearFlow
from models.path import Path, PathConfig

PATHS: dict[str, type[Path]] = {path.name: path for path in (LinearFlow, GVP, VP, JiTFlow, DDPM)}


def make_path(config: PathConfig) -> Path:
    """See models.path."""
    return PATHS[config.name](config)
