"""A short training improves what it should, and leaves its table, page and pictures."""

import torch

from hsivi_fast import load_config, sample, train


def test_a_short_run_in_the_plane_improves_on_its_start(tmp_path):
    settings = ["start.kind=ddim", "start.score_net_updates=0", "objective.match=knots", "eta=1.0", "train.steps=1000"]
    settings += ["train.f_learning_times=5", "train.student_lr=1e-3", "train.score_net_lr=1e-3"]
    settings += ["train.lr_rule=constant", "eval.num_samples=5000", "eval.every=0"]
    folder = train(load_config("toy2d", [*settings, "eval.ddim_nfe=[5]"]), tmp_path / "run")
    rows = {row["sampler"]: row for row in folder.read_json("results.json")}
    assert set(rows) == {"ddim", "ddim_eta", "hsivi_ema", "hsivi_raw"}
    assert rows["hsivi_ema"]["js_divergence"] < 0.75 * rows["ddim_eta"]["js_divergence"]
    assert rows["hsivi_ema"]["nfe"] == rows["ddim_eta"]["nfe"] == 5
    points = sample(folder, range(10))
    assert points.shape == (10, 2) and torch.allclose(points[3], sample(str(folder.path), [3])[0], atol=1e-5)
    assert (folder.path / "report.html").stat().st_size > 20000
    assert (folder.path / "samples" / "density.png").is_file()


def test_a_start_in_the_plane_is_better_than_the_best_of_ddim_with_ten_evaluations(no_report, tmp_path):
    settings = ["start.updates=1000", "train.steps=10", "start.score_net_updates=10", "eval.num_samples=5000"]
    folder = train(load_config("toy2d", [*settings, "eval.ddim_nfe=[10]", "device=cpu"]), tmp_path / "run")
    rows = {row["sampler"]: row["js_divergence"] for row in folder.read_json("results.json")}
    assert set(rows) == {"ddim", "ddim_eta", "start", "hsivi_ema", "hsivi_raw"}
    assert max(rows["start"], rows["hsivi_ema"]) < rows["ddim"]
