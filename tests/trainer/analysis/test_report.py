"""The results page: it holds everything itself, shows what the run has, and nothing of it can break the page."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.trainer.forked import TINY
from trainer.analysis.report import POINTS, render, table, thinned
from trainer.config.tree import load_config
from trainer.errors import RunError
from trainer.run_folder import write_config


class Page(HTMLParser):
    """Texts, pictures and tags of a page; whether tags are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.images, self.tags, self.open = [], [], [], []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def make_run(folder, rng, name="run", measures=True):
    """What a run and the tools leave there."""
    run = folder / name
    write_config(load_config(TINY, [f"run={run}"]))
    rows = [
        {"position": 32 * i, "loss": float(rng.random()), "grad_norm": 1.0, "lr": 1e-3, "grouped": 0.5}
        for i in range(1, 21)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = Image.fromarray(rng.integers(256, size=(9, 7), dtype=np.uint8))
    picture.save(run / "samples.png")
    if measures:
        (run / "report.json").write_text(json.dumps({"frechet": 1.2345678, "samples": {"guidance": [1.5, 2.0]}}))
        rows = [{"position": p, "fid": p / 7, "images": {"images": 30}} for p in (64, 128)]
        (run / "measures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "attention" / "similarity").mkdir(parents=True)
        picture.save(run / "attention" / "similarity" / "attention_score.png")
    return run


def test_the_page_needs_no_other_file_and_its_pictures_are_those_of_the_run(tmp_path):
    run = make_run(tmp_path, np.random.default_rng(0))
    text = render([run])
    page = Page(text)
    assert not re.search(r'(src|href)="(?!data:)', text) and "script" not in page.tags and "link" not in page.tags
    kinds = [image.split(";")[0] for image in page.images]
    assert kinds == ["data:image/svg+xml", "data:image/png", "data:image/png"]
    stored = base64.b64decode(page.images[1].split(",")[1])
    assert stored == (run / "samples.png").read_bytes()


def test_it_shows_measures_config_and_what_samples_were_made_with(tmp_path):
    texts = Page(render([make_run(tmp_path, np.random.default_rng(1))])).texts
    for shown in ("frechet", "1.2346", "1.5, 2.0", "fid", f"{128 / 7:.5g}", "30"):
        assert shown in texts, shown
    assert any("global_batch: 32" in text for text in texts)


def test_curves_hold_all_runs(tmp_path):
    rng = np.random.default_rng(2)
    runs = [make_run(tmp_path, rng, name, measures=name == "b") for name in ("a", "b")]
    curves = base64.b64decode(Page(render(runs)).images[0].split(",")[1]).decode()
    written = {text.replace("\\", "") for text in re.findall(r"<!-- (.*) -->", curves)}  # text is drawn, and noted so
    assert {*map(str, runs), "loss", "grad_norm", "fid", "images"} <= written


def test_an_ablation_is_a_table_and_its_plot(tmp_path):
    best = {"frechet": [1.5, 0.25], "guidance": [1.0, 0.0]}
    row = {
        "axis": "groups.size",
        "value": "<b>4</b>",
        "seeds": 3,
        "best": best,
        "curve": [best],
        "matched": [1.75, 0.5],
        "s_cross": [0.01, 0.002],
    }
    (tmp_path / "ablation.json").write_text(
        json.dumps({"rows": [row, {**row, "s_cross": None}], "s_cross_frechet_r": {"w=1.5": -0.5}})
    )
    (tmp_path / "ablation.svg").write_text("<svg></svg>")
    page = Page(render([tmp_path]))
    assert {"groups.size", "<b>4</b>", "1.5 ± 0.25", "1.75 ± 0.5", "0.01 ± 0.002"} <= set(page.texts), (
        "and its names are no tags"
    )
    assert any("-0.50 at w=1.5" in text for text in page.texts) and len(page.images) == 1


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    run = make_run(tmp_path, np.random.default_rng(4))
    whole = render([run])
    with (run / "measures.jsonl").open("a") as file:
        file.write('{"position": 192, "fid": 1')
    assert Page(render([run])).texts == Page(whole).texts


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    write_config(load_config(TINY, [f"run={tmp_path / 'run'}"]))
    assert Page(render([tmp_path / "run"])).images


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(RunError, match=f"{tmp_path}: neither a run"):
        render([tmp_path])


def test_thinned_curves_keep_the_mean_and_the_end():
    rng = np.random.default_rng(3)
    for number in (1, 7, POINTS, 5 * POINTS, 12_345):
        points = list(zip(range(number), rng.random(number).tolist(), strict=True))
        x, y = thinned(points)
        assert len(x) == min(number, POINTS) and x[-1] == number - 1
        if number % POINTS == 0 or number < POINTS:
            assert y.mean() == pytest.approx(np.mean([value for _, value in points]))
    assert len(thinned([])[0]) == 0


def test_a_table_has_a_column_for_each_name_and_gaps_for_what_is_not_there():
    texts = Page(table([{"a": 1, "b": "<"}, {"b": 0.5, "c": True}])).texts
    assert texts == ["a", "b", "c", "1", "<", "0.5", "True"]
