"""The paths, and the one that a config asks for.

To add one, write a subclass of `models.paths.base.NoisePath` and add a line to PATHS.
"""

from typing import Annotated

from models.choice import OneOf
from models.paths.base import NoisePath, PathConfig
from models.paths.ddpm import DDPM
from models.paths.flows import GVP, VP, JiTFlow, LinearFlow

PATHS: dict[str, type[NoisePath]] = {"linear": LinearFlow, "gvp": GVP, "vp": VP, "jit": JiTFlow, "ddpm": DDPM}
CHOICE = OneOf(PATHS, "name", "linear")
ChosenPath = Annotated[PathConfig, CHOICE]
"""The section `path` of a config: the fields of the path that it names, or the name alone."""


def path_config(values: object) -> PathConfig:
    """Return the section `path` from plain values."""
    return CHOICE.read(values)


def make_path(config: PathConfig) -> NoisePath:
    """Return the path between noise and data that a config asks for."""
    return PATHS[config.name](config)
