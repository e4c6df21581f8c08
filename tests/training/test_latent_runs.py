"""A run in latents: it trains and goes on, and its pictures, measurements and pipeline are of decoded images."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from latent_teachers import save_pipeline, small_vae
from PIL import Image
from ranks import run_ranks
from run_files import checkpoint, without_times

from hsivi_fast import evaluate, load_config, sample, train
from hsivi_fast.checkpoints.convert import convert_checkpoint
from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.data import to_uint8
from hsivi_fast.diffusers import HSIVIPipeline
from hsivi_fast.export import export_run, load_exported
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.report.comparison import compare_runs
from hsivi_fast.report.run_report import write_report
from hsivi_fast.sampling.sampler import load_sampler, sample_in_batches

RUN = """
nfe: 2
eta: 0.3
device: cpu
data: digits
train: {batch_size: 16, f_learning_times: 2, warmup: 1, steps: 4}
eval: {num_samples: 70, seeds: 1, every: 2, ddim_nfe: [2]}
log_every: 1
save_every: 2
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a run whose latents [4, 4, 4] are decoded to images [1, 8, 8]: `hsivi convert` wrote what it starts with."""
    folder = tmp_path_factory.mktemp("latents")
    save_pipeline(folder / "ldm", small_vae("VQModel"))
    small_vae(shift_factor=0.1).save_pretrained(folder / "ldm" / "vae")  # it goes before a vqvae/
    convert_checkpoint(folder / "ldm", folder / "ours")
    file = folder / "ours" / "network.yaml"
    file.write_text(file.read_text() + RUN)
    return load_config(file)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("run") / "latents")


def test_a_sample_is_the_decoded_latent(run, config):
    sampler, context, _ = load_sampler(run, ALONE)
    latents = sampler(range(20))
    vae = AutoencoderKL.from_pretrained(config.teacher.vae)
    with torch.no_grad():
        expected = to_uint8(vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample)
    images = sample(run, range(20), batch_size=7)
    assert latents.shape == (20, 4, 4, 4) and images.shape == (20, 1, 8, 8) and images.float().std() > 1
    assert torch.equal(images, expected)
    assert context.image_shape((4, 4, 4)) == (1, 8, 8) and torch.equal(to_uint8(context.images(latents)), images)
    told = []
    sample_in_batches(run, range(3), lambda seeds, batch: None, check=told.append)
    assert told == [(1, 8, 8)]  # what disk and memory are asked for


def test_it_is_measured_and_shown_by_its_images(run, tmp_path):
    rows = {row["sampler"]: row for row in run.read_json("results.json")}
    measured = evaluate(run, 70, save_images=tmp_path / "images.npz")
    assert measured["frechet_distance"] == rows["hsivi_ema"]["frechet_distance"]
    saved = np.load(tmp_path / "images.npz")["arr_0"]  # on the digits' 17 levels
    assert saved.shape == (70, 8, 8, 1)
    sampler, context, _ = load_sampler(run, ALONE)
    assert np.array_equal(saved, to_uint8(context.images(sampler(range(70))), 17).permute(0, 2, 3, 1).numpy())
    scale = 6  # of an image 8 wide in a grid
    for stem in ("hsivi", "teacher", "ddim", "step_0000004"):
        shown = np.asarray(Image.open(run.path / "samples" / f"{stem}.png"))
        assert shown.shape == (scale * (8 * 9 + 1),) * 2, stem
    first = np.asarray(Image.open(run.path / "samples" / "hsivi.png"))[
        scale : scale * 9 : scale, scale : scale * 9 : scale
    ]
    assert np.array_equal(first, sample(run, range(64))[0, 0].numpy())


def test_a_page_about_runs_shows_images(run, tmp_path):
    page = compare_runs([run], tmp_path / "page.html").read_text()
    assert page.count("data:image/png") > 4 and "must be" not in page


def test_it_goes_on_bit_for_bit(run, config, tmp_path):
    folder = shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step_4")
    (folder / "results.json").unlink()
    train(config, folder)
    for stem in ("student", "student_ema", "score_net", "score_net_ema"):
        own, other = checkpoint(folder, stem, 4), checkpoint(run.path, stem, 4)
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own), stem
    rows = [[without_times(row) for row in each.read_json("results.json")] for each in (RunFolder(folder), run)]
    assert rows[0] == rows[1]


def _train_draw_and_measure(config, folder):
    run = train(config, folder)
    return sample(run, range(21)).numpy(), evaluate(run, 70)["frechet_distance"]


def test_two_ranks_decode_a_share_each(config, no_report, tmp_path):
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=0, num_samples=0))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    (images, distance), others = run_ranks(_train_draw_and_measure, 2, config, tmp_path / "run")
    assert np.array_equal(images, others[0]) and distance == others[1]
    assert np.array_equal(images, sample(tmp_path / "run", range(21)).numpy())
    assert distance == pytest.approx(evaluate(tmp_path / "run", 70)["frechet_distance"], rel=1e-6)


def test_another_vae_is_another_run(run, config, tmp_path):
    folder = shutil.copytree(run.path, tmp_path / "run")
    moved = shutil.copytree(config.teacher.vae, tmp_path / "vae")
    teacher = dataclasses.replace(config.teacher, vae=str(moved))
    assert RunFolder.check(folder, dataclasses.replace(config, teacher=teacher)) is not None  # the same files
    (moved / "more").touch()
    with pytest.raises(ValueError, match="its run has teacher.vae = "):
        RunFolder.check(folder, dataclasses.replace(config, teacher=teacher))


def test_a_run_from_before_there_was_the_key_goes_on(tmp_path):
    config = load_config("smoke")
    run = RunFolder.start(tmp_path / "run", config)
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("  vae: null\n", ""))
    assert "vae" not in run.config_dict()["teacher"] and run.config() == config
    assert RunFolder.check(run.path, config)["teacher"]["vae"] is None


# ---- exports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [False, True])
def test_the_pipeline_holds_the_vae_and_draws_the_same_images(run, config, tmp_path, trusted):
    folder = export_run(run, "diffusers", tmp_path / "pipeline")
    assert json.loads((folder / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    if trusted:
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    else:
        pipeline = HSIVIPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = sample(run, range(5))
    drawn = pipeline(seeds=range(5), output_type="pt").images
    assert torch.equal((drawn * 255).round().to(torch.uint8), images)
    assert np.array_equal(np.asarray(pipeline(seeds=[3]).images[0]), images[3, 0].numpy())
    assert "uint8 [1, 8, 8], 256 levels" in (folder / "README.md").read_text()


def test_a_folder_that_was_exported_before_there_was_a_vae_is_loaded(tmp_path):
    smoke = train(load_config("smoke", ["eval.num_samples=0"]), tmp_path / "smoke")
    folder = export_run(smoke, "diffusers", tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    assert index.pop("vae") == [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = HSIVIPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(seeds=range(3), output_type="pt").images
    assert pipeline.vae is None and torch.equal((drawn * 255).round().to(torch.uint8), sample(smoke, range(3)))


def test_safetensors_give_latents_and_name_the_vae(run, tmp_path):
    folder = export_run(run, "safetensors", tmp_path / "export")
    sampler, context, _ = load_sampler(run, ALONE)
    latents = load_exported(folder, "cpu")(range(20))
    assert torch.equal(latents, sampler(range(20)))
    description = json.loads((folder / "config.json").read_text())
    assert "vae" not in description["teacher"] and str(tmp_path.parent) not in json.dumps(description)
    described = description["sample"]
    assert described["shape"] == [4, 4, 4] and described["type"] == "float32"
    assert described["latents"].items() >= {
        "vae": "ldm/vae", "class": "AutoencoderKL", "scaling_factor": 0.4, "shift_factor": 0.1
    }.items()  # fmt: skip
    assert described["latents"]["image"]["shape"] == [1, 8, 8] and described["latents"]["image"]["type"] == "uint8"
    card = (folder / "README.md").read_text()
    assert "| samples | latents, float32 [4, 4, 4], of the AutoencoderKL ldm/vae, scaling_factor 0.4; `config" in card
    assert "# float32 [16, 4, 4, 4], latents, which the VAE decodes" in card


def test_a_package_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="format: 'aoti' holds no VAE, and this run makes latents; choose safetens"):
        export_run(run, "aoti", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_report_is_drawn_again(run, tmp_path):
    folder = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    (folder.path / "samples" / "hsivi.png").unlink()
    write_report(folder)
    assert (folder.path / "samples" / "hsivi.png").read_bytes() == (run.path / "samples" / "hsivi.png").read_bytes()


def test_a_run_whose_vae_is_gone_says_so(run, config, tmp_path):
    folder = shutil.copytree(run.path, tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(config.teacher.vae, "/nowhere/vae"))
    for command in (lambda: sample(folder, range(2)), lambda: evaluate(folder, 4)):
        with pytest.raises(ValueError, match="teacher.vae: '/nowhere/vae': is no folder"):
            command()
