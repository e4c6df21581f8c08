"""Distances, seeds and kinds of operators as the benchmarks measure them; and the pages show the committed figures."""

import pytest
import torch
from bench_cases import ROOT, committed
from contexts import context_with_teacher

from bench import (
    ablation,
    breakdown,
    density,
    fid,
    neighbours,
    quality,
    recipe,
    report,
    sampling,
    solvers,
    time_to_quality,
    train_step,
)
from bench import all as run_all
from bench.measure import read_records
from bench.published import cycle_work
from bench.tables import filled, table_names
from hsivi_fast import load_config


def test_the_distance_is_checked_and_timed_without_its_features(monkeypatch):
    row = fid.measure("fid_64", images=150, rounds=2, facts={}).record()
    assert row["distance"] == pytest.approx(row["published_distance"], rel=1e-6) and row["distance"] > 1
    assert row["ratio"] == pytest.approx(row["published"] / row["ours"]) and row["feature_seconds"]["ours"] > 0
    assert row.keys() == committed("fid_cpu")[0].keys()
    monkeypatch.setattr(fid, "EQUAL", -1.0)
    failed = fid.measure("fid_64", images=150, rounds=1, facts={}).record()
    assert "distances differ" in failed["failed"]


def test_a_summary_of_seeds_is_paired():
    common = {"study": "ring", "metric": "js_divergence", "steps": 10, "start": 0.2}
    rows = []
    for variant, values in (("fresh", (0.1, 0.2)), ("pooled", (0.11, 0.24))):
        for seed, value in enumerate(values):
            rows.append({**common, "variant": variant, "seed": seed, "value": value})
    fresh, pooled = quality.summary(rows)
    assert fresh["difference"] is None and fresh["value"] == pytest.approx((0.15, 0.05))
    assert pooled["reference"] == "fresh" and pooled["difference"] == pytest.approx((15.0, 5.0))


def test_a_mean_of_several_seeds_is_shown_with_its_error():
    several, one = quality.mean_and_error([1.0, 2.0, 3.0]), quality.mean_and_error([1.0])
    assert (f"{several:.3f}", f"{several:+.1f} %") == ("2.000 +- 0.577", "+2.0 +- 0.6 %")
    assert (f"{one:.3f}", one.error) == ("1.000", None)


def test_the_runs_of_the_quality_study_are_those_of_the_committed_rows():
    runs = quality.all_runs()
    wanted = {("digits", "pooled, bf16"), ("swiss_roll", "pooled, redraw 4")}
    assert {(study, variant) for study, variant, _ in runs} >= wanted
    assert len(runs) == 3 * 3 * 5 + 4 * 3
    rows = committed("quality")
    assert [(row["study"], row["variant"], row["seed"]) for row in rows] == runs
    assert list(rows[0]) == list(quality.Outcome.__dataclass_fields__)


def test_operators_are_of_the_first_kind_that_fits():
    assert breakdown.kind_of("hsivi_fast::draw_noise") == "the method's own"
    assert breakdown.kind_of("aten::mkldnn_convolution") == "convolution"
    assert breakdown.kind_of("aten::bmm") == breakdown.kind_of("aten::_softmax_backward_data") == "attention"
    assert breakdown.kind_of("aten::something") == "all else"
    for row in committed("breakdown_cpu"):
        assert list(row["shares"]) == [*breakdown.KINDS, breakdown.REST]
        assert sum(row["shares"].values()) == pytest.approx(1)


def test_the_nearest_trained_image_of_each():
    trained = torch.stack([torch.full((1, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    distances, which = neighbours.nearest(trained[[2, 0]] * 0.75, trained)
    assert which.tolist() == [2, 0] and distances.tolist() == pytest.approx([0.5, 0.5])
    assert neighbours.row_of("samples", torch.arange(11.0), 2.5) == {
        **{"images": "samples", "count": 11, "frechet_distance": 2.5, "least": 0.0, "tenth": 1.0, "median": 5.0}
    }
    images = torch.zeros(40, 1, 8, 8)
    assert neighbours.picture(images, images, torch.arange(40.0), torch.arange(40))[:4] == b"\x89PNG"


def test_when_a_recipe_is_as_good_as_another_ends():
    """For good: a distance that was reached once and lost again does not count."""
    courses = {
        "published": [[[1000, 1.0, 3.0], [9000, 9.0, 0.5]], [[1000, 1.0, 3.0], [9000, 11.0, 0.7]]],
        "shipped": [[[500, 1.0, 0.5], [1000, 2.0, 0.9], [2000, 4.0, 0.4]]],
    }
    rows = [
        {"study": "digits", "variant": name, "seed": seed, "course": course}
        for name, own in courses.items()
        for seed, course in enumerate(own)
    ]
    shipped, published = time_to_quality.summary(rows)
    assert published["value"] == pytest.approx((0.6, 0.1)) and published["seconds"] == 10 and published["work"] == 9
    assert (published["to published"], published["to shipped"]) == (9, None)
    assert (shipped["to published"], shipped["to shipped"]) == (2, 2)
    solver = {"sampler": "best", "nfe": 5, "frechet_distance": 0.6}
    assert time_to_quality.picture(rows, [solver])[:4] == b"\x89PNG"


def test_students_stand_beside_the_best_solvers_on_the_same_images():
    """The best solver was chosen on the first set of images, so both are shown on the other sets."""
    study, variant = recipe.FEWER[5]
    common = {"study": study, "variant": variant, "evaluations": 1000, "start": 1.0, "ahead": None}
    rows = [{**common, "seed": seed, "value": 0.1, "others": others} for seed, others in enumerate((0.25, 0.75))]
    best = {"sampler": "best", "nfe": 5, "frechet_distance": 0.625, "frechet_std": 0.25}
    best |= {"solver": "unipc", "spacing": "karras"}
    titles, lines = recipe.by_evaluations(rows, [best])
    at = titles.index("5 evaluations")
    assert [line[at] for line in lines] == ["0.625 +- 0.250 (UniPC, Karras)", "0.500 +- 0.250"]
    assert recipe.summary(rows)[0]["value"] == (pytest.approx(0.1), pytest.approx(0))


def test_draws_of_a_target_are_a_line_a_sampler_over_the_seeds():
    rows = []
    for seed, distance in enumerate((0.2, 0.4)):
        values = dict.fromkeys(density.COLUMNS_KEPT, distance)
        of_run = {
            "hsivi_ema": {**values, "gradient_evaluations": 3000},
            "base": {**values, "gradient_evaluations": None},
        }
        rows.append({"study": "banana", "variant": "K = 5", "seed": seed, "rows": of_run})
    student, base = density.summary(rows)
    assert (student["sampler"], student["seeds"], student["gradients"]) == ("HSIVI, K = 5", 2, 3.0)
    assert student["sliced_wasserstein"] == pytest.approx((0.3, 0.1)) and base["gradients"] is None
    assert ("banana", "K = 5", 0) in density.all_runs() and ("banana", "K = 1", 0) not in density.all_runs()


def test_solvers_are_a_line_each_with_a_column_a_number_of_evaluations():
    rows = []
    for sampler, spacing, nfe, distance, extras in (
        ("ddim", "run", 5, 2.0, {}),
        ("unipc", "karras", 5, 0.5, {}),
        ("best", "karras", 5, 0.625, {"solver": "unipc", "frechet_std": 0.25}),
        ("unipc", "karras", 10, 0.25, {}),
        ("best", "logsnr", 10, 0.25, {"solver": "deis", "frechet_std": 0.125}),
    ):
        row = {"sampler": sampler, "spacing": spacing, "nfe": nfe, "frechet_distance": distance, "frechet_std": None}
        rows.append({**row, **extras})
    lines = report.table("solvers", rows).splitlines()
    assert lines[0] == "| sampler | spacing | 5 evaluations | 10 evaluations |"
    assert lines[2:4] == ["| DDIM | run's spacing | 2.000 |  |", "| UniPC | Karras | 0.500 | 0.250 |"]
    best = "0.625 +- 0.250 (UniPC, Karras) | 0.250 +- 0.125 (DEIS, log-SNR)"
    assert lines[4] == f"| best solver | the best | {best} |"


def test_a_search_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """A row that is there is not measured again, and the best of more solvers takes the place of the best of some."""
    context = context_with_teacher(load_config("toy2d", ["teacher.target=ring", "device=cpu", "spacing=quad"]))
    file, asked = tmp_path / "solvers.jsonl", []
    distances = {"ddim": 3.0, "ddpm": 4.0, "unipc": 2.0, "ipndm": 1.0, "best": 1.5}

    def measured(name, sampler, metric, images, sets, world, nfe, first_set):
        asked.append((name, sets, first_set))
        return {"sampler": name, "nfe": nfe, "frechet_distance": distances[name], "num_samples": images}

    monkeypatch.setattr(solvers, "measure_row", measured)
    solvers.Measured(file, context, 10, 1).measure(3, [("unipc", "run")])
    assert asked == [("ddim", 1, 0), ("ddpm", 1, 0), ("unipc", 1, 0), ("best", 3, 1)]
    asked.clear()
    solvers.Measured(file, context, 10, 1).measure(3, [("unipc", "run"), ("ipndm", "run")])
    assert asked == [("ipndm", 1, 0), ("best", 3, 1)]
    rows = read_records(file)
    assert [row["sampler"] for row in rows] == ["ddim", "ddpm", "unipc", "ipndm", "best"]
    assert (rows[-1]["solver"], rows[-1]["spacing"]) == ("ipndm", "run")
    with pytest.raises(ValueError, match="its rows are of 10 images"):
        solvers.Measured(file, context, 20, 1)


def test_the_page_has_the_tables_of_the_results():
    page = report.README.read_text()
    files = {file.stem for file in report.RESULTS.glob("*.jsonl")} - {"aot", "aot_subset"}  # of kernels/README.md
    assert set(table_names(page)) == files | {"digits", "mnist", "mnist_edm", "evaluations"}
    assert filled(page, report.table_of_results) == page, "run python -m bench.report"


def test_a_file_of_no_kind_has_no_table():
    with pytest.raises(ValueError, match="must begin with one of train_step"):
        report.table("other", [])


def test_the_headline_of_the_readme_has_the_figures_of_the_results():
    students = {(line["study"], line["variant"]): line["others"] for line in recipe.summary(committed("recipe"))}
    digits = {nfe: students[key][0] for nfe, key in recipe.FEWER.items()}
    best = {row["nfe"]: row["frechet_distance"] for row in committed("solvers") if row["sampler"] == "best"}
    cycles = {row["case"]: row["ratio"] for row in committed("train_step_cpu")}
    drawing = [
        row["ratio"]
        for name in ("sampling_avx512", "sampling_cpu")
        for row in committed(name)
        if row["case"] == "sampling_bf16"
    ]
    (trained,) = [row for row in committed("train_step_h200") if row["batch"] == 128 and "graphs" in row["case"]]
    (drawn,) = [row for row in committed("sampling_h200") if row["images"] == 512]
    drawn = f"{drawn['ours_images_per_second']:.0f} images/s, {drawn['ratio']:.1f} times as fast"
    wanted = {
        "fewer-evaluations": f"at 1 evaluation | {digits[1]:.2f} | best solver: {best[1]:.2f} |",
        "": f"at 2 evaluations | {digits[2]:.2f} | best solver: {best[2]:.2f} |",
        " ": f"at 5 evaluations | {digits[5]:.2f} | best solver: {best[5]:.2f}; with 10: {best[10]:.2f} |",
        "training": f"bfloat16 | {cycles['train_cycle_bf16']:.2f} times as fast |",
        "sampling": f"{drawing[0]:.1f} to {drawing[1]:.1f} times as fast |",
        "on-a-gpu": f"cycle, batch 128 (2) | {trained['ratio']:.1f} times as fast | published, TF32 | one H200 |",
        "on-a-gpu) ": f"512 images (2) | {drawn} | published, TF32 | one H200 |",
    }
    headline = (ROOT / "README.md").read_text().partition("## What it gets you")[2].partition("\n## ")[0]
    lines = [line for line in headline.splitlines() if line.startswith("|")][2:]
    assert len(lines) == len(wanted)
    for line, (section, figures) in zip(lines, wanted.items()):
        section = section.rstrip(") ")
        assert (f"](bench/README.md#{section})" in line or not section) and figures in line


def test_every_file_that_the_jobs_of_a_machine_write_can_be_printed():
    for job in [*run_all.gpu_jobs("h100"), *run_all.cpu_jobs("cpu")]:
        if job.module != "pytest":
            rows = committed("trace_h200" if job.module == "trace" else f"{job.module}_cpu")
            assert report.table(job.name, rows).count("\n") == 2 + len(rows)
    on_a_gpu = [{**row, "share_of_copy": 0.91, "gigabytes_per_second": 3000.4} for row in committed("ops_cpu")]
    assert report.table("ops_h100", on_a_gpu).splitlines()[2].endswith("| 3950 | 3000 | 91% |")


FACTS = {"case", "ours", "published", "ratio", "unit", "counted_ratio", "commit", "device", "versions"}


@pytest.mark.parametrize(
    "name", ["train_step_cpu", "sampling_cpu", "sampling_avx512", "fid_cpu", "train_step_h200", "sampling_h200"]
)
def test_no_committed_case_failed(name):
    rows = committed(name)
    assert rows
    for row in rows:
        assert "failed" not in row and row.keys() >= FACTS


# Measured ratios are facts of one machine and day. What a test can hold: the gates of today, work that is known, and
# figures of a row that have to fit each other.


@pytest.mark.parametrize("row", committed("train_step_cpu") + committed("train_step_h200"), ids=lambda row: row["case"])
def test_a_committed_cycle_is_the_sum_of_its_parts_and_its_work_is_the_known_one(row):
    for side in ("ours", "published"):
        parts = {part.removeprefix(f"{side} "): value for part, value in row["parts"].items() if part.startswith(side)}
        assert row[side] == pytest.approx(train_step.cycle_sum(parts, row["f_learning_times"]))
        low, high = row[f"{side}_quartiles"]
        assert low <= row[side] <= high
    batch, nfe, updates = row["batch"], row["nfe"], row["f_learning_times"]
    redraw = train_step.CASES[row["case"]].get("rollout", {}).get("redraw", 1)
    trajectories = -(-updates * batch // (nfe * redraw))
    ours = nfe * trajectories / batch + 3 * updates + 7
    # Upsampling in frozen calls takes 4/9, which is up to a tenth of all.
    assert 0.97 < row["counted_ratio"] / (cycle_work(nfe, batch, updates) / ours) < 1.1
    assert row["counted_ratio"] == pytest.approx(row["published_flops"] / row["ours_flops"])
    assert row["ours_images_per_second"] == pytest.approx(batch * updates / row["ours"])


@pytest.mark.parametrize(
    "row",
    [row for name in ("cpu", "avx512", "h200") for row in committed(f"sampling_{name}")],
    ids=lambda row: row["case"],
)
def test_committed_samples_are_as_equal_as_is_asked_today_and_took_no_more_work(row):
    precision = sampling.CASES[row["case"]].get("precision", "fp32")
    assert row["difference"] <= sampling.EQUAL[precision] and 0.999 < row["counted_ratio"] < 1.1
    for side in ("ours", "published"):
        low, high = row[f"{side}_range"]
        assert low <= row[side] <= high
    assert row["ours_images_per_second"] == pytest.approx(row["images"] / row["ours"])


@pytest.mark.parametrize("row", committed("fid_cpu"), ids=lambda row: row["case"])
def test_committed_distances_are_equal(row):
    assert row["distance"] == pytest.approx(row["published_distance"], rel=fid.EQUAL)
    for side in ("ours", "published"):
        low, high = row[f"{side}_range"]
        assert low <= row[side] <= high


def test_committed_techniques_are_set_against_the_rows_that_are_there():
    """A row is timed in turn with what it is added to and with the published side: what that gains is of two turns."""
    rows = {row["case"]: row for row in committed("ablation_cpu")}
    of_parts = {"training": ablation.TRAINING, "sampling": ablation.SAMPLING, "call": ablation.CALL}
    for what, techniques in of_parts.items():
        for name, (against, *_) in techniques.items():
            if f"{what}: {name}" in rows:
                row, other = rows[f"{what}: {name}"], rows[f"{what}: {against}"]
                assert row["against"] == against
                if against == "published":
                    assert row["ratio_against"] == row["ratio"]
                assert row["ratio"] / row["ratio_against"] == pytest.approx(other["ratio"], rel=0.15)


def test_the_page_of_the_kernels_shows_the_committed_figures():
    table = (ROOT / "bench" / "results" / "aot.md").read_text()
    assert table in (ROOT / "kernels" / "README.md").read_text()
    rows = read_records(ROOT / "bench" / "results" / "aot.jsonl")
    assert {row["sm"] for row in rows} == {80, 90, 100}
    assert all(row["stack"] == 0 and row["local"] == 0 and row["problems"] == [] for row in rows)
    assert {row["dtype"] for row in rows} == {"fp32", "bf16", "fp16", "int64"}
