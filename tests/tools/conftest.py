"""Images for the preprocessing tools, and how these are started."""

import os
import random
import runpy
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.patience import PATIENCE
from tests.published import make


def start(name, *arguments, **options):
    """A tool as a process of one thread."""
    command = [sys.executable, f"tools/{name}.py", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="session")
def tool():
    """Run a tool to its end; the exit code must be `code`."""

    def run(name, *arguments, code=0, **options):
        process = start(name, *arguments, **options)
        process.out, process.err = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, process.out + process.err
        return process

    return run


@pytest.fixture(scope="session")
def start_tool():
    """Start a tool."""
    return start


@pytest.fixture(scope="session")
def vae(save_vae):
    return save_vae()


@pytest.fixture(scope="session")
def encoder(save_encoder):
    return save_encoder("dinov2")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """96 random JPEGs, smooth ones, in three class folders."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(96):
        small = Image.fromarray(rng.integers(256, size=(4, 5, 3), dtype=np.uint8))
        path = folder / f"class{i % 3}/{i:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        small.resize((int(rng.integers(33, 90)), int(rng.integers(33, 90))), Image.BICUBIC).save(path)
    return folder


@pytest.fixture
def published(random_weights):
    """Make random weights as a format's files name them."""
    return lambda name, **changes: make(name, random.SystemRandom().randrange(2**31), random_weights, **changes)[1]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a tool in this process, which has all imported: what it prints."""

    def run(name, *arguments):
        monkeypatch.syspath_prepend("tools")
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, arguments)])
        runpy.run_path(f"tools/{name}.py", run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def error(call, tmp_path):
    """The one line of a conversion that fails, and leaves nothing."""

    def of(*arguments):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit) as caught:
            call("convert_weights", *arguments)
        assert str(caught.value.code).startswith("error: ") and "\n" not in caught.value.code
        assert sorted(tmp_path.iterdir()) == before
        return caught.value.code

    return of
