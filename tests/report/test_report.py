"""Pages about runs: what stands on them, that nothing is fetched, and that a missing piece is a missing section."""

import dataclasses
import html.parser
import io
import json
import re
import shutil
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from hsivi_fast import load_config, train
from hsivi_fast.checkpoints import records
from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.metrics.table import SAMPLERS
from hsivi_fast.report.comparison import compare_runs
from hsivi_fast.report.figures import STYLES, distance_curves, log_gamma_picture
from hsivi_fast.report.run_report import write_report
from hsivi_fast.sampling.solvers import NAMES
from hsivi_fast.training import trainer

QUICK = ["device=cpu", "log_every=1", "eval.num_samples=20", "eval.seeds=2", "eval.every=2", "eval.ddim_nfe=[3,6]"]
CHOICES = {
    "three": ("smoke", QUICK),
    "six": ("smoke", [*QUICK, "nfe=6", "gamma.per_step=true", "eval.num_samples=30"]),
    "plane": ("toy2d", [*QUICK, "start.kind=ddim", "start.score_net_updates=0", "train.steps=4", "train.batch_size=8"]),
    "bare": ("smoke", ["device=cpu", "log_every=1", "nfe=2"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs by name.

    "three" and "six" are digits runs of one teacher with other evaluations, "plane" is a run in the plane, and "bare"
    was never measured. Their reports are left to the tests.
    """
    folder = tmp_path_factory.mktemp("runs")
    with mock.patch.object(trainer, "write_report"):
        return {
            name: train(load_config(config, overrides), folder / name).path
            for name, (config, overrides) in CHOICES.items()
        }


@pytest.fixture
def empty(runs, tmp_path):
    """The folder of a run that has a configuration and nothing else."""
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(runs["bare"] / "config.yaml", folder)
    return folder


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """The page of "six" and "three"."""
    outfile = tmp_path_factory.mktemp("page") / "new" / "compared.html"
    return _checked(compare_runs([runs["six"], str(runs["three"])], outfile))


@pytest.fixture(scope="module")
def page_of_three(runs):
    """The page of "three", whose pictures are drawn into its folder."""
    return _checked(write_report(RunFolder(runs["three"])))


class Page(html.parser.HTMLParser):
    """Text, tables and what else is looked at, of a page."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.text = ""
        self.open = []  # tags
        self.images = []  # their attributes
        self.anchors, self.links, self.headings = [], [], []
        self.rows = []  # of all tables: lists of cells
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if "id" in attributes:
            self.anchors.append(attributes["id"])
        if "href" in attributes:
            self.links.append(attributes["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)

    def row(self, name):
        """The cells of the first row that starts with this one."""
        return next(row for row in self.rows if row[0] == name)

    @property
    def descriptions(self):
        """The alternative texts of all images."""
        return [image["alt"] for image in self.images]

    @property
    def sources(self):
        """{alternative text: the image}"""
        return {image["alt"]: image["src"] for image in self.images}


def _checked(path):
    """The page at a path, which is well-formed, holds pictures and fetches nothing."""
    page = Page(path)
    assert page.open == [] and page.images
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in page.images)
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.source)  # a picture's bytes may spell anything
    assert "http" not in words and "url(" not in words
    assert {link.removeprefix("#") for link in page.links} <= set(page.anchors)
    for word in ("width=device-width", "prefers-color-scheme: dark", "max-width: 100%"):
        assert word in page.source
    return page


def _pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


# ---- several runs ----------------------------------------------------------------------------------------------------


def test_a_page_of_several_runs(runs, compared):
    assert compared.row("run")[:5] == ["run", "data", "NFE", "steps", "batch"]
    assert compared.row("six")[:8] == ["six", "digits", "6", "4", "4", "fp32", "pooled", "1"]
    assert compared.row("three")[2] == "3"
    order = [text for text in compared.descriptions if "evaluations" in text and "against" not in text]
    assert order == [
        "DDIM, 3 evaluations",
        "three, step 4, 3 evaluations",
        "DDIM, 6 evaluations",
        "six, step 4, 6 evaluations",
        "teacher (DDIM, 50 evaluations)",
    ]
    assert [link.removeprefix("#") for link in compared.links] == compared.anchors and len(compared.anchors) == 11
    assert {"exp(log_gamma), 6 x 1 x 8 x 8", "exp(log_gamma), 1 x 8 x 8"} <= set(compared.descriptions)
    assert "Measured on 20, 30 samples: distances from different numbers of samples do not compare." in compared.text
    assert "no GPU" in compared.text and compared.source.count("<details>") == 2


def test_the_summary_is_what_was_recorded_and_measured(runs, compared):
    records = [json.loads(line) for line in (runs["three"] / "metrics.jsonl").read_text().splitlines()]
    rows = json.loads((runs["three"] / "results.json").read_text())
    final = next(row for row in rows if row["sampler"] == "hsivi_ema")["frechet_distance"]
    best = min([final, *(record["metric"] for record in records if "metric" in record)])
    summary = dict(zip(compared.row("run"), compared.row("three")))
    assert summary["final distance"] == f"{final:.4g}" and summary["best distance"] == f"{best:.4g}"
    assert summary["seconds"] == f"{records[-1]['seconds']:.0f}"


def test_only_the_keys_that_differ_are_listed(compared):
    assert compared.row("nfe") == ["nfe", "6", "3"]
    assert compared.row("gamma.per_step") == ["gamma.per_step", "true", "false"]
    assert compared.row("eval.num_samples")[1:] == ["30", "20"]
    assert "eta" not in {row[0] for row in compared.rows}  # the same in both


def test_the_same_seeds_are_drawn_for_all(compared, page_of_three):
    """The picture of a run in a comparison is that of its own report, byte for byte."""
    together, single = compared.sources, page_of_three.sources
    assert together["three, step 4, 3 evaluations"] == single["HSIVI, 3 evaluations"]
    assert together["DDIM, 3 evaluations"] == single["DDIM, 3 evaluations"]
    assert together["three, step 4, 3 evaluations"] != together["DDIM, 3 evaluations"]


def test_other_data_stand_apart_and_what_is_missing_is_said(runs, empty, tmp_path):
    page = _checked(compare_runs([runs["plane"], runs["three"], runs["bare"], empty], tmp_path / "page.html"))
    assert [text for text in page.descriptions if text.startswith("distance against network evaluations")] == [
        "distance against network evaluations of plane",
        "distance against network evaluations of three",
    ]
    assert f"run '{empty}': has no checkpoint yet" in page.text
    assert page.text.count("not measured yet") == 2 and page.text.count("no checkpoint yet") == 2
    assert page.row("empty")[3] == "0 of 4" and page.row("empty")[-3:] == ["-", "-", "-"]
    assert any(text.startswith("density of target; teacher") for text in page.descriptions)


def test_runs_without_anything_have_a_page(empty, tmp_path):
    page = Page(compare_runs([empty], tmp_path / "page.html"))
    assert page.open == [] and page.images == []
    assert "No run has a table yet" in page.text and "No run has records yet." in page.text


def test_what_cannot_be_compared_is_one_line(runs, tmp_path):
    for folders, message in (
        ([], "runs: none given"),
        ([tmp_path], "no config.yaml there"),
        ([runs["three"], f"{runs['three']}/"], "is given twice"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            compare_runs(folders, tmp_path / "page.html")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


# ---- one run ---------------------------------------------------------------------------------------------------------


def test_a_page_of_one_run(runs, page_of_three):
    names = {file.name for file in (runs["three"] / "samples").iterdir()}
    stems = ("comparison", "teacher", "ddim", "hsivi", "distance_vs_nfe", "losses", "log_gamma")
    assert names >= {f"{stem}.png" for stem in stems} and "fid_vs_nfe.png" not in names
    assert page_of_three.headings == [
        "Samples",
        "Table",
        "Distance against network evaluations",
        "Training",
        "Noise scale",
        "GPU",
        "Where and when",
        "Configuration",
    ]
    assert len(page_of_three.images) == 6 and "no GPU" in page_of_three.text
    assert page_of_three.row("HSIVI (EMA)")[1] == "3"


def test_a_run_that_was_not_measured_has_no_table(runs):
    page = _checked(write_report(RunFolder(runs["bare"])))
    assert "Table" not in page.headings and "Noise scale" in page.headings


def test_a_distance_on_inception_is_called_fid_too(runs, tmp_path):
    folder = shutil.copytree(runs["three"], tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("metric: null", "metric: inception"))
    write_report(RunFolder(folder))
    samples = folder / "samples"
    assert (samples / "fid_vs_nfe.png").read_bytes() == (samples / "distance_vs_nfe.png").read_bytes()


def test_records_of_a_gpu_are_drawn(runs, tmp_path):
    folder = shutil.copytree(runs["three"], tmp_path / "run")
    gpu = {
        "gpu_power_watts": 250.0,
        "gpu_utilisation_percent": 80,
        "gpu_memory_bytes": 4.2e9,
        "joules_per_image": 0.5,
    }
    records = [{**record, **gpu} for record in RunFolder(folder).metrics()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for path in (write_report(RunFolder(folder)), compare_runs([folder, runs["six"]], tmp_path / "page.html")):
        page = _checked(path)
        assert "4.2 GB of memory, 0.5 J per training image" in page.text
        assert any("power and utilisation" in text for text in page.descriptions)


SMALL_FILES = {"results.json": records.Row, "metrics.jsonl": records.Record, "environment.json": records.Environment}


@pytest.mark.parametrize("name", SMALL_FILES)
def test_what_a_record_need_not_have_is_drawn_without(runs, tmp_path, name):
    """Keys of a run's small files that have a default in records.py may be missing, or null where they may be that."""
    folder = RunFolder(shutil.copytree(runs["three"], tmp_path / "run"))
    fields = [field for field in dataclasses.fields(SMALL_FILES[name]) if field.name != "frechet_distance"]
    optional = {field.name for field in fields if field.default is not dataclasses.MISSING}
    nullable = {field.name for field in fields if field.default is None}
    whole = folder.metrics() if name == "metrics.jsonl" else folder.read_json(name)
    records_of_file = whole if isinstance(whole, list) else [whole]
    assert any(optional & record.keys() for record in records_of_file)
    missing = [{key: value for key, value in record.items() if key not in optional} for record in records_of_file]
    null = [record | dict.fromkeys(nullable) for record in records_of_file]
    for written in (missing, null):
        text = json.dumps(written if isinstance(whole, list) else written[0])
        if name == "metrics.jsonl":
            text = "".join(json.dumps(record) + "\n" for record in written)
        (folder.path / name).write_text(text)
        _checked(write_report(folder))
        _checked(compare_runs([folder, runs["six"]], tmp_path / "page.html"))


def test_no_page_shows_a_password(runs, tmp_path):
    folder = shutil.copytree(runs["three"], tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    assert "wandb: null" in config
    (folder / "config.yaml").write_text(config.replace("wandb: null", "wandb: https://anna:s3cret@host/x?token=s3cret"))
    for path in (write_report(RunFolder(folder)), compare_runs([folder, runs["six"]], tmp_path / "page.html")):
        page = Page(path).source
        assert "https://***@host/x?***" in page and "s3cret" not in page


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_every_sampler_has_a_style():
    assert set(STYLES) == set(SAMPLERS)


def test_every_baseline_is_drawn():
    rows = [
        {
            "sampler": sampler,
            "nfe": nfe,
            "frechet_distance": 9.0 / nfe,
            "frechet_std": None,
            "images_per_second": 100 / nfe,
            "num_samples": 20,
        }
        for sampler in NAMES.values()
        for nfe in (5, 10)
    ]
    rows += [{**rows[0], "sampler": sampler, "frechet_std": 0.5} for sampler in ("ddim_eta", "hsivi_ema", "hsivi_raw")]
    for key in ("nfe", "images_per_second"):
        few, all_samplers = (_pixels(distance_curves({"run": rows[:count]}, key)) for count in (2, len(rows)))
        assert few.std() > 10 and all_samplers.std() > 10
        assert few.shape[0] != all_samplers.shape[0]  # more of them: the legend goes below


@pytest.mark.parametrize(
    "shape, per_step, per_pixel",
    [
        ((1,), False, False),
        ((4,), True, False),
        ((2,), False, True),
        ((4, 2), True, True),
        ((3, 8, 8), False, True),
        ((1, 8, 8), False, True),
        ((4, 3, 8, 8), True, True),
        ((7, 1, 8, 8), True, True),
    ],
)
def test_the_noise_scale_in_every_shape(shape, per_step, per_pixel):
    start, learned = np.zeros(shape), np.zeros(shape)
    learned.flat[-1] = np.log(2.0)
    before, after = (_pixels(log_gamma_picture(values, per_step, per_pixel)) for values in (start, learned))
    assert before.std() > 5 and not (before.shape == after.shape and np.array_equal(before, after))
    if len(shape) >= 3:  # one pixel, the last one, at the far end of the colours: dark red
        assert _is_dark_red(after).sum() > 50
        assert not _is_dark_red(before)[:, : before.shape[1] // 2].any()


def _is_dark_red(pixels):
    return np.abs(pixels - [103, 0, 31]).sum(axis=2) < 12
