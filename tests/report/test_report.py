"""Pages about runs: what stands on them, that nothing is fetched, and that a missing piece is a missing section."""

import html.parser
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from hsivi_fast import load_config, train
from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.report.figures import distances, log_gamma_picture
from hsivi_fast.report.run_report import compare_runs, write_report

QUICK = ["device=cpu", "log_every=1", "eval.num_samples=20", "eval.seeds=2", "eval.every=2", "eval.ddim_nfe=[3,6]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders: two digits runs of one teacher with other evaluations, a run in the plane, and one that was never measured."""
    folder = tmp_path_factory.mktemp("runs")
    choices = {
        "three": ("smoke", QUICK),
        "six": ("smoke", [*QUICK, "nfe=6", "gamma.per_step=true", "eval.num_samples=30"]),
        "plane": ("toy2d", [*QUICK, "train.steps=4", "train.batch_size=8"]),
        "bare": ("smoke", ["device=cpu", "log_every=1", "nfe=2"]),
    }
    return {
        name: train(load_config(config, overrides), folder / name).path for name, (config, overrides) in choices.items()
    }


class Page(html.parser.HTMLParser):
    """Text, tables and what else is looked at, of a page."""

    def __init__(self, path):
        super().__init__()
        (
            self.source,
            self.images,
            self.anchors,
            self.links,
            self.open,
            self.rows,
            self.text,
            self.cell,
            self.headings,
        ) = path.read_text(), [], [], [], [], [], "", None, []
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
        self.anchors += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)

    def row(self, first):
        return next(row for row in self.rows if row[0] == first)


def _checked(path):
    page = Page(path)
    assert (
        page.open == []
        and page.images
        and all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in page.images)
    )
    assert (
        "http" not in page.source
        and "url(" not in page.source
        and {link.removeprefix("#") for link in page.links} <= set(page.anchors)
    )
    for word in ("width=device-width", "prefers-color-scheme: dark", "max-width: 100%"):
        assert word in page.source
    return page


def test_a_page_of_several_runs(runs, tmp_path):
    page = _checked(compare_runs([runs["six"], str(runs["three"])], tmp_path / "new" / "compared.html"))
    assert page.row("run")[:5] == ["run", "data", "NFE", "steps", "batch"]
    assert (
        page.row("six")[:8] == ["six", "digits", "6", "4", "4", "fp32", "pooled", "1"] and page.row("three")[2] == "3"
    )
    records = [json.loads(line) for line in (runs["three"] / "metrics.jsonl").read_text().splitlines()]
    final = next(
        row for row in json.loads((runs["three"] / "results.json").read_text()) if row["sampler"] == "hsivi_ema"
    )["frechet_distance"]
    best = min([final, *(record["metric"] for record in records if "metric" in record)])
    summary = dict(zip(page.row("run"), page.row("three")))
    assert (
        summary["final distance"] == f"{final:.4g}"
        and summary["best distance"] == f"{best:.4g}"
        and summary["seconds"] == f"{records[-1]['seconds']:.0f}"
    )
    assert (
        page.row("nfe") == ["nfe", "6", "3"]
        and page.row("gamma.per_step") == ["gamma.per_step", "true", "false"]
        and page.row("eval.num_samples")[1:] == ["30", "20"]
    )
    assert "eta" not in {row[0] for row in page.rows}  # the same in both
    order = [image["alt"] for image in page.images if "evaluations" in image["alt"] and "against" not in image["alt"]]
    assert order == [
        "DDIM, 3 evaluations",
        "three, step 4, 3 evaluations",
        "DDIM, 6 evaluations",
        "six, step 4, 6 evaluations",
        "teacher (DDIM, 6 evaluations)",
    ]
    assert [link.removeprefix("#") for link in page.links] == page.anchors and len(page.anchors) == 11
    assert "exp(log_gamma), 6 x 1 x 8 x 8" in {
        image["alt"] for image in page.images
    } and "exp(log_gamma), 1 x 8 x 8" in {image["alt"] for image in page.images}
    assert "Measured on 20, 30 samples: distances from different numbers of samples do not compare." in page.text
    assert "no GPU" in page.text and page.source.count("<details>") == 2


def test_the_same_seeds_are_drawn_for_all(runs, tmp_path):
    """The picture of a run in a comparison is that of its own report, byte for byte."""
    compared, alone = (
        _checked(compare_runs([runs["six"], runs["three"]], tmp_path / "compared.html")),
        _checked(write_report(RunFolder(runs["three"]))),
    )
    source = {image["alt"]: image["src"] for image in compared.images}
    single = {image["alt"]: image["src"] for image in alone.images}
    assert (
        source["three, step 4, 3 evaluations"] == single["HSIVI, 3 evaluations"]
        and source["DDIM, 3 evaluations"] == single["DDIM, 3 evaluations"]
    )
    assert source["three, step 4, 3 evaluations"] != source["DDIM, 3 evaluations"]


def test_other_data_stand_apart_and_what_is_missing_is_said(runs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(runs["bare"] / "config.yaml", empty)
    page = _checked(compare_runs([runs["plane"], runs["three"], runs["bare"], empty], tmp_path / "page.html"))
    distance = [
        image["alt"] for image in page.images if image["alt"].startswith("distance against network evaluations")
    ]
    assert distance == [
        "distance against network evaluations of plane",
        "distance against network evaluations of three",
    ]
    assert (
        f"run '{empty}': has no checkpoint yet" in page.text
        and page.text.count("not measured yet") == 2
        and page.text.count("no checkpoint yet") == 2
    )
    assert page.row("empty")[3] == "0 of 4" and page.row("empty")[-3:] == ["-", "-", "-"]
    assert any(image["alt"].startswith("density of target; teacher") for image in page.images)


def test_runs_without_anything_have_a_page(runs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(runs["bare"] / "config.yaml", empty)
    page = Page(compare_runs([empty], tmp_path / "page.html"))
    assert (
        page.open == []
        and page.images == []
        and "No run has a table yet" in page.text
        and "No run has records yet." in page.text
    )


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


def test_a_page_of_one_run(runs):
    page = _checked(write_report(RunFolder(runs["three"])))
    names = {file.name for file in (runs["three"] / "samples").iterdir()}
    assert (
        names
        >= {
            "comparison.png",
            "teacher.png",
            "ddim.png",
            "hsivi.png",
            "distance_vs_nfe.png",
            "losses.png",
            "log_gamma.png",
        }
        and "fid_vs_nfe.png" not in names
    )
    assert page.headings == [
        "Samples",
        "Table",
        "Distance against network evaluations",
        "Training",
        "Noise scale",
        "GPU",
        "Configuration",
    ]
    assert len(page.images) == 6 and "no GPU" in page.text and page.row("HSIVI (EMA)")[1] == "3"
    bare = _checked(write_report(RunFolder(runs["bare"])))
    assert "Table" not in bare.headings and "Noise scale" in bare.headings


def test_a_distance_on_inception_is_called_fid_too(runs, tmp_path):
    folder = shutil.copytree(runs["three"], tmp_path / "run")
    (folder / "config.yaml").write_text(
        (folder / "config.yaml").read_text().replace("metric: null", "metric: inception")
    )
    write_report(RunFolder(folder))
    assert (folder / "samples" / "fid_vs_nfe.png").read_bytes() == (
        folder / "samples" / "distance_vs_nfe.png"
    ).read_bytes()


def test_records_of_a_gpu_are_drawn(runs, tmp_path):
    folder = shutil.copytree(runs["three"], tmp_path / "run")
    records = [
        {
            **record,
            "gpu_power_watts": 250.0,
            "gpu_utilisation_percent": 80,
            "gpu_memory_bytes": 4.2e9,
            "joules_per_image": 0.5,
        }
        for record in RunFolder(folder).metrics()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for path in (write_report(RunFolder(folder)), compare_runs([folder, runs["six"]], tmp_path / "page.html")):
        page = _checked(path)
        assert "4.2 GB of memory, 0.5 J per training image" in page.text and any(
            "power and utilisation" in image["alt"] for image in page.images
        )


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
        for sampler in ("ddim", "ddpm", "dpmpp_2m", "unipc")
        for nfe in (5, 10)
    ]
    rows += [{**rows[0], "sampler": sampler, "frechet_std": 0.5} for sampler in ("ddim_eta", "hsivi_ema", "hsivi_raw")]
    pictures = [
        _pixels(distances({"run": rows[:count]}, key))
        for key in ("nfe", "images_per_second")
        for count in (2, len(rows))
    ]
    assert (
        all(picture.std() > 10 for picture in pictures) and pictures[1].shape[0] != pictures[0].shape[0]
    )  # more of them: the legend goes below


def _pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


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
        red = np.abs(after - [103, 0, 31]).sum(axis=2) < 12
        assert red.sum() > 50 and not (np.abs(before - [103, 0, 31]).sum(axis=2) < 12)[:, : before.shape[1] // 2].any()
