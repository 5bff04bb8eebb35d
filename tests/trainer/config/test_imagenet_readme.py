"""The tables in the READMEs of the ImageNet configs say what the configs say: each config has a row, and its columns up
to the guidance are derived from it. The others hold what was published, with its source."""

import re
from pathlib import Path

import pytest

from trainer.config.tree import load_config

FOLDERS = [Path("configs/imagenet256"), Path("configs/imagenet512")]
EPOCH = 1_281_167


def rows(folder):
    """Cells of each row of the README by the file that its first cell links."""
    found = {}
    for line in (folder / "README.md").read_text().splitlines():
        if line.startswith("| ["):
            link, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            name, target = re.fullmatch(r"\[(.+)\]\((.+)\)", link).groups()
            assert Path(target).stem == name and folder / target not in found
            found[folder / target] = cells
    return found


def length(images, batch):
    if images % EPOCH:
        return f"{images // batch:,} steps"
    return f"{images // EPOCH} epochs"


def described(config):
    """Groups, optimizer, batch, length, sampler and guidance of a config."""
    groups, optim, sample, batch = config.groups, config.optim, config.sample, config.train.global_batch
    kinds = (
        f"{groups.variant}-{groups.size}, {config.model.max_group_size} rows, spread {groups.spread:g}, {groups.mixing}"
    )
    rule = " on matrices" if optim.weight_decay and optim.decay == "matrices" else ""
    settings = [
        f"AdamW {optim.lr:.0e}".replace("e-0", "e-"),
        f"betas {optim.betas[0]:g} {optim.betas[1]:g}",
        f"decay {optim.weight_decay:g}{rule}",
        f"clip {optim.clip:g}" if optim.clip else "no clip",
        f"EMA {' and '.join(f'{decay:g}' for decay in optim.ema)}",
        *([f"warm-up {length(optim.warmup, batch)}"] if optim.warmup else []),
    ]
    guidance = [f"{weight:g}" for weight in sample.guidance]
    guidance += [f"{sample.guided_channels} channels"] if sample.guided_channels else []
    if sample.interval:
        low, high = sample.interval
        guidance.append(f"log-SNR {low:.1f}" + (" up" if high is None else f" to {high:.1f}"))
    protocol = [f"slots {sample.slots}"] if sample.slots != "fixed" else []
    protocol += [f"{sample.labels} labels"] if sample.labels != "balanced" else []
    return [
        "" if groups.variant == "none" else kinds,
        ", ".join(settings),
        str(batch),
        length(config.train.images, batch),
        ", ".join([f"{sample.sampler} {sample.steps}", *protocol]),
        ", ".join(guidance),
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_config_has_a_row_that_agrees_with_it(folder):
    listed = rows(folder)
    shared = {path for path in folder.glob("*.yaml") if path.stem in ("latents", "pixels")} | {*folder.glob("groups/*")}
    assert set(listed) == {*folder.glob("**/*.yaml")} - shared
    for path, cells in listed.items():
        assert cells[1:7] == described(load_config(path)), path


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_published_figures_have_a_dated_source(folder):
    text = (FOLDERS[0] / "README.md").read_text()
    sources = dict(re.findall(r"^- ([A-Za-z]+): .*arXiv \d{4}\.\d{5}, (\w+ 20\d\d)", text, re.MULTILINE))
    for path, cells in rows(folder).items():
        assert len(cells) == 10, path
        assert cells[0].split()[0] in sources, path
        for figure in cells[7:9]:
            assert not figure or figure.rpartition(" ")[2].strip("()") in sources, (path, figure)
