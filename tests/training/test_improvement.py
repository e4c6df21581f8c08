"""A short training improves what it should, and leaves its table, page and pictures."""

import torch

from hsivi_fast import load_config, sample, train


def test_a_short_run_in_the_plane_improves_on_its_start(tmp_path):
    settings = ["train.steps=1000", "train.lr_rule=constant", "eval.num_samples=5000", "eval.every=0"]
    folder = train(load_config("toy2d", [*settings, "eval.ddim_nfe=[5]"]), tmp_path / "run")
    rows = {row["sampler"]: row for row in folder.read_json("results.json")}
    assert set(rows) == {"ddim", "ddim_eta", "hsivi_ema", "hsivi_raw"}
    assert rows["hsivi_ema"]["js_divergence"] < 0.75 * rows["ddim_eta"]["js_divergence"]
    assert rows["hsivi_ema"]["nfe"] == rows["ddim_eta"]["nfe"] == 5
    points = sample(folder, range(10))
    assert points.shape == (10, 2) and torch.allclose(points[3], sample(str(folder.path), [3])[0], atol=1e-5)
    assert (folder.path / "report.html").stat().st_size > 20000
    assert (folder.path / "samples" / "density.png").is_file()
