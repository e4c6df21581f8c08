"""A run whose teacher is one of EDM's denoisers: it trains, goes on, and its exports draw its images."""

import shutil

import pytest
import torch
from edm_networks import FOURIER, SONG
from golden_values import fill_by_name
from run_files import checkpoint
from safetensors.torch import save_file

from hsivi_fast import load_config, sample, train
from hsivi_fast.checkpoints import run_folder
from hsivi_fast.data import to_uint8
from hsivi_fast.diffusers import HSIVIPipeline
from hsivi_fast.export import export_run, load_exported
from hsivi_fast.nets import build_unet

pytestmark = pytest.mark.usefixtures("no_report")

NETWORK = {**SONG, **FOURIER}
RUN = [
    *("nfe=3", "eta=0.3", "spacing=quad", "device=cpu", "objective.match=windows", "objective.anchor=0.1"),
    *("start.kind=trajectory", "start.updates=4", "start.trajectories=24", "start.score_net_updates=2"),
    *("train.batch_size=16", "train.f_learning_times=2", "train.warmup=1", "train.steps=6"),
    *("eval.num_samples=0", "log_every=1", "save_every=1"),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """(the file, the network)."""
    folder = tmp_path_factory.mktemp("teacher")
    network = fill_by_name(build_unet(NETWORK))
    save_file(network.state_dict(), folder / "teacher.safetensors")
    lines = [f"  {key}: {value}" for key, value in NETWORK.items()]
    (folder / "run.yaml").write_text(
        "\n".join(["network:", *lines, "teacher: {checkpoint: teacher.safetensors, prediction: denoiser}"])
    )
    return folder / "run.yaml", network


@pytest.fixture(scope="module")
def run(teacher, no_report, tmp_path_factory):
    """A run whose checkpoints all stay."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_folder, "CHECKPOINTS_KEPT", 100)
        return train(load_config(teacher[0], RUN), tmp_path_factory.mktemp("run") / "whole")


def test_it_trains_and_the_frequencies_stay(run, teacher):
    before = teacher[1].state_dict()
    step = run.checkpoints()[-1]
    for stem in ("student", "student_ema", "score_net"):
        after = run.load_tensors(step, stem)
        assert torch.equal(after["map_noise.freqs"], before["map_noise.freqs"])
        moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
        assert len(moved) == len(before) - 1  # all but the frequencies
    assert all(record["loss_start"] > 0 for record in run.metrics() if record.get("loss_start") is not None)


@pytest.mark.parametrize("stop", [2, 8])  # in the start, in the distillation
def test_it_goes_on_bit_for_bit(run, teacher, tmp_path, stop):
    folder = shutil.copytree(run.path, tmp_path / "run")
    for step in run.checkpoints():
        if step > stop:
            shutil.rmtree(folder / "checkpoints" / f"step_{step}")
    train(load_config(teacher[0], RUN), folder)
    for stem in ("student", "student_ema", "student_optimizer", "score_net", "score_net_ema"):
        own, other = checkpoint(folder, stem, 12), checkpoint(run.path, stem, 12)
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own), stem


@pytest.mark.parametrize("kind", ["safetensors", "diffusers"])
def test_an_export_draws_the_same_images(run, tmp_path, kind):
    images = sample(run, range(4))
    assert images.float().std() > 10
    export_run(run, kind, tmp_path / "export")
    if kind == "safetensors":
        drawn = to_uint8(load_exported(tmp_path / "export", "cpu")(range(4)))
    else:
        pipeline = HSIVIPipeline.from_pretrained(tmp_path / "export")
        pipeline.set_progress_bar_config(disable=True)
        drawn = (pipeline(seeds=range(4), output_type="pt").images * 255).round().to(torch.uint8)
    assert torch.equal(images, drawn)


def test_another_prediction_than_the_networks_is_refused(teacher, tmp_path):
    problem = "teacher.prediction: 'epsilon' is not what the network predicts, which is one of EDM's; set teacher.predi"
    with pytest.raises(ValueError, match=problem):
        train(load_config(teacher[0], [*RUN, "teacher.prediction=epsilon"]), tmp_path / "run")
    with pytest.raises(ValueError, match="which is shown timesteps; set teacher.prediction=epsilon, x_0 or v"):
        train(load_config("smoke", ["teacher.prediction=denoiser"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="teacher.prediction: 'v' is of a checkpoint; a 2-D target has none"):
        load_config("toy2d", ["teacher.prediction=v"])
