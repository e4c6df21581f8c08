"""Runs of class-conditional teachers: labels go with every seed, and a student learns all classes."""

import json
import shutil

import numpy as np
import pytest
import torch
from commands import hsivi_here
from edm_networks import SONG
from golden_values import fill_by_name
from PIL import Image
from ranks import run_ranks
from run_files import checkpoint
from safetensors.torch import save_file

from hsivi_fast import load_config, ops, sample, train
from hsivi_fast.build import build_context, build_student
from hsivi_fast.checkpoints import run_folder
from hsivi_fast.data import to_uint8
from hsivi_fast.diffusers import HSIVIPipeline
from hsivi_fast.export import export_run, load_exported
from hsivi_fast.method.class_labels import ClassLabels, GuidedTeacher
from hsivi_fast.nets import build_unet
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.sampling.sampler import Sampler, ddim_sampler, load_sampler
from hsivi_fast.training.estimate import estimate_run
from hsivi_fast.training.rollout import build_rollout

pytestmark = pytest.mark.usefixtures("no_report")

CLASSES = 3
NETWORKS = {
    "song": {**SONG, "classes": CLASSES},
    "ddpm": {
        **{"family": "ddpm", "image_channels": 1, "image_size": 8, "channels": 8, "multipliers": [1], "res_blocks": 0},
        **{"attention": [False], "norm_groups": 4, "classes": CLASSES},
    },
}
RUN = [
    *("nfe=3", "eta=0.3", "spacing=quad", "device=cpu", "objective.match=windows", "objective.anchor=0.1"),
    *("start.kind=trajectory", "start.updates=3", "start.trajectories=24", "start.score_net_updates=2"),
    *("train.batch_size=16", "train.f_learning_times=2", "train.warmup=1", "train.steps=4"),
    *("eval.num_samples=0", "log_every=1", "save_every=1"),
]
GUIDED = ["teacher.null_class=-1", "teacher.guidance=2"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """{family: the file of a run}."""
    files = {}
    for family, description in NETWORKS.items():
        folder = tmp_path_factory.mktemp(family)
        network = fill_by_name(build_unet(description))
        save_file(network.state_dict(), folder / "teacher.safetensors")
        lines = [f"  {key}: {json.dumps(value)}" for key, value in description.items()]
        prediction = "denoiser" if family == "song" else "epsilon"
        teacher = f"teacher: {{checkpoint: teacher.safetensors, prediction: {prediction}}}"
        files[family] = folder / "run.yaml"
        files[family].write_text("\n".join(["network:", *lines, teacher]))
    return files


@pytest.fixture(scope="module")
def run(configs, no_report, tmp_path_factory):
    """A guided run whose checkpoints all stay."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_folder, "CHECKPOINTS_KEPT", 100)
        return train(load_config(configs["song"], [*RUN, *GUIDED]), tmp_path_factory.mktemp("run") / "whole")


def test_labels_are_uniform_and_known_values():
    """Philox words at key = seed, counter = (0, 2^32 - 1, 0, 0), as an export's config.json says."""
    seeds = torch.arange(30_000)
    counts = torch.bincount(ClassLabels(10)(seeds), minlength=10)
    assert counts.sum() == 30_000 and (counts - 3000).abs().max() < 250  # 4.8 deviations
    assert ClassLabels(1000, [7, 999])(seeds).unique().tolist() == [7, 999]
    assert ClassLabels()(seeds) is None
    first = ops.integers_of_seeds(torch.tensor([0, 1, 2**62]), 2**31 - 1)
    assert torch.equal(first, ops.integers_of_seeds(torch.tensor([0, 1, 2**62]), 2**31 - 1))
    shifted = ops.draw_noise(torch.arange(30_000), 2**31 - 1, (1,)).flatten()
    assert abs(float(torch.corrcoef(torch.stack([shifted, ClassLabels(10)(seeds).float()]))[0, 1])) < 0.025


def test_guidance_is_a_line_through_both_noises(configs):
    context = build_context(load_config(configs["song"], [*RUN, *GUIDED]), ALONE, teacher=True)
    assert isinstance(context.teacher, GuidedTeacher)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 100, 500, 999]), torch.tensor([0, 1, 2, 0])
    network = context.teacher.network
    with torch.no_grad():
        of_class, of_none = network(x, t, labels), network(x, t)
        expected = 2 * of_class - of_none
        assert (context.teacher(x, t, labels) - expected).norm() < 1e-5 * expected.norm()
    assert (of_class - of_none).norm() > 1e-3 * of_none.norm()


@pytest.mark.parametrize("mode", ["pooled", "fresh"])
@pytest.mark.parametrize("match", ["knots", "windows"])
def test_a_batch_has_the_labels_of_its_trajectories(configs, mode, match):
    """A network that makes an image of its label shows which label each state was made with."""
    config = load_config(configs["song"], [*RUN, f"rollout.mode={mode}", f"objective.match={match}"])
    context = build_context(config, ALONE)

    class ShowsLabel(torch.nn.Module):
        event_shape, classes = (1, 8, 8), CLASSES

        def __init__(self):
            super().__init__()
            self.log_scaled_gamma = torch.nn.Parameter(torch.full((1, 64), -20.0), requires_grad=False)

        def forward(self, x, t, labels):
            # x_{k-1} = a x + b eps is 100 (label + 1) whatever x is
            k = torch.searchsorted(context.layers.tau, t)
            a, b = (table[k].reshape(-1, 1, 1, 1) for table in (context.layers.a, context.layers.b))
            return (100.0 * (labels.reshape(-1, 1, 1, 1) + 1) - a * x) / b

    rollout = build_rollout(context, ShowsLabel())
    rollout.start_cycle(0)
    for step in range(2):
        batch = rollout.score_net_batch(step)
        mean = batch.x.flatten(1).mean(1)
        assert len(set(batch.labels.tolist())) == CLASSES
        if match == "knots":  # a window's mean is between x_k and this
            np.testing.assert_allclose(mean.numpy(), 100 * (batch.labels.numpy() + 1), atol=1)
    batch = rollout.student_batch(2)
    below = context.layers.tau[batch.noise.stream if match == "knots" else context.matching.layer[batch.noise.stream]]
    rolled = below < context.layers.tau[-1]  # the others are x_K
    values = batch.x.flatten(1).mean(1)[rolled]
    np.testing.assert_allclose(values.numpy(), 100 * (batch.labels[rolled].numpy() + 1), atol=1)
    assert rolled.any()


def test_the_student_is_of_the_unguided_network_and_all_its_labels_train(run, configs):
    before = fill_by_name(build_unet(NETWORKS["song"])).state_dict()
    after = run.load_tensors(run.checkpoints()[-1], "student")
    moved = (after["map_label.weight"] - before["map_label.weight"]).abs().amax(0)
    assert len(moved) == CLASSES and (moved > 0).all()
    assert all((after[name] - value).abs().max() < 0.1 for name, value in before.items())
    assert all(np.isfinite(record["loss_score_net"]) for record in run.metrics() if record.get("loss_score_net"))


@pytest.mark.parametrize("stop", [2, 7])  # in the start, in the distillation
def test_it_goes_on_bit_for_bit(run, configs, tmp_path, stop):
    folder = shutil.copytree(run.path, tmp_path / "run")
    for step in run.checkpoints():
        if step > stop:
            shutil.rmtree(folder / "checkpoints" / f"step_{step}")
    train(load_config(configs["song"], [*RUN, *GUIDED]), folder)
    for stem in ("student", "student_ema", "student_optimizer", "score_net", "score_net_ema"):
        own, other = checkpoint(folder, stem, 9), checkpoint(run.path, stem, 9)
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own), stem


def train_on_ranks(config, folder):
    train(load_config(config, [*RUN, *GUIDED, "distributed.zero=3"]), folder)


def test_two_ranks_with_zero_3_train_the_same(run, configs, tmp_path):
    run_ranks(train_on_ranks, 2, configs["song"], tmp_path / "ranks")
    for stem in ("student", "score_net"):
        own, other = checkpoint(tmp_path / "ranks", stem, 9), checkpoint(run.path, stem, 9)
        for name, value in other.items():
            assert (own[name] - value).abs().max() < 2e-5, (stem, name)


@pytest.mark.parametrize("family", NETWORKS)
def test_images_are_of_their_labels(configs, tmp_path, family):
    folder = train(load_config(configs[family], [*RUN, "start.updates=1", "train.steps=1"]), tmp_path / "run")
    seeds = range(6)
    sampler, context, _ = load_sampler(folder, ALONE)
    own = context.class_labels(torch.arange(6)).tolist()
    images = sample(folder, seeds)
    assert torch.equal(images, sample(folder, seeds, labels=own))
    assert torch.equal(sample(folder, seeds, labels=1), sample(folder, seeds, labels=[1] * 6))
    assert torch.equal(sample(folder, seeds, labels=torch.tensor(own)), images)
    assert not torch.equal(sample(folder, [0], labels=0), sample(folder, [0], labels=1))
    with pytest.raises(ValueError, match="the sampler's labels are of another network"):
        Sampler(sampler.network, context.layers, sampler.log_gamma)


@pytest.mark.parametrize("kind", ["safetensors", "diffusers"])
def test_an_export_draws_the_same_images_of_each_class(run, tmp_path, kind):
    export_run(run, kind, tmp_path / "export")
    labels = [0, 2, 1, 1]
    images, of_labels = sample(run, range(4)), sample(run, range(4), labels=labels)
    if kind == "safetensors":
        exported = load_exported(tmp_path / "export", "cpu")
        drawn, drawn_of_labels = to_uint8(exported(range(4))), to_uint8(exported(range(4), labels=labels))
    else:
        pipeline = HSIVIPipeline.from_pretrained(tmp_path / "export")
        pipeline.set_progress_bar_config(disable=True)

        def draw(**more):
            return (pipeline(seeds=range(4), output_type="pt", **more).images * 255).round().to(torch.uint8)

        drawn, drawn_of_labels = draw(), draw(class_labels=labels)
        assert torch.equal(draw(class_labels=2), sample(run, range(4), labels=2))
        with pytest.raises(ValueError, match="labels: 3 is none of the network's 3 classes; use 0 to 2"):
            pipeline(seeds=range(4), class_labels=3)
    assert torch.equal(images, drawn) and torch.equal(of_labels, drawn_of_labels)
    described = json.loads((tmp_path / "export" / "config.json").read_text())
    assert described["classes"] == [0, 1, 2] and described["teacher"]["guidance"] == 2
    assert "labels=3" in (card := (tmp_path / "export" / "README.md").read_text()) or "class_labels=3" in card


def test_some_classes_alone(configs):
    config = load_config(configs["song"], [*RUN, "classes=[0,2]"])
    context = build_context(config, ALONE, teacher=True)
    assert set(context.class_labels(torch.arange(100)).tolist()) == {0, 2}
    rollout = build_rollout(context, build_student(context))
    rollout.start_cycle(0)
    assert set(rollout.student_batch(2).labels.tolist()) == {0, 2}
    drawn = ddim_sampler(context, 2, 0.0)([5, 6], labels=1)  # others can be asked for
    assert drawn.shape == (2, 1, 8, 8) and torch.isfinite(drawn).all()


def test_the_command_takes_one_label_or_several(run, tmp_path, capsys):
    options = "--seeds", "0-4", "--labels", "1-2", "--outdir", tmp_path / "out"
    assert hsivi_here(capsys, "sample", run.path, *options).returncode == 0
    images = sample(run, range(5), labels=[1, 2, 1, 2, 1])
    for seed in range(5):
        written = np.asarray(Image.open(next((tmp_path / "out").glob(f"*{seed}.png"))))
        assert np.array_equal(written, images[seed, 0].numpy())


def test_guidance_is_counted(configs):
    plain, guided = (
        estimate_run(load_config(configs["song"], [*RUN, *more])) for more in (["teacher.null_class=-1"], GUIDED)
    )
    more = guided["training_flops"] - plain["training_flops"]
    # 24 paths of 3 x 4 steps, twice the forward and its backward in 2 updates of 16 images, 2 calls of the head start
    assert more == (24 * 12 + 2 * 2 * 16 + 2 * 16) * plain["forward_flops"]


@pytest.mark.parametrize(
    ("family", "change", "problem"),
    [
        ("song", "classes=[3]", "classes: 3 is none of the network's 3; use 0 to 2"),
        ("song", "classes=[1,1]", "classes: [1, 1] names one twice"),
        ("song", "teacher.guidance=2", "teacher.guidance: 2.0 needs a teacher that has learned what no class is; say"),
        ("song", "teacher.null_class=0", "teacher.null_class: 0 is no label of the network; use -1 for one of EDM's"),
        ("ddpm", "teacher.null_class=-1", "teacher.null_class: -1 is no label of the network; use a row of its table"),
        ("ddpm", "teacher.null_class=3", "teacher.null_class: 3 is no label of the network; use a row of its table"),
    ],
)
def test_what_does_not_fit_is_one_line(configs, tmp_path, family, change, problem):
    with pytest.raises(ValueError) as error:
        train(load_config(configs[family], [*RUN, change]), tmp_path / "run")
    assert str(error.value).startswith(problem)
    assert not (tmp_path / "run").exists()


def test_a_null_class_is_no_class(configs):
    config = load_config(configs["ddpm"], [*RUN, "teacher.null_class=2", "teacher.guidance=1.5"])
    assert set(build_context(config, ALONE).class_labels(torch.arange(50)).tolist()) == {0, 1}
    with pytest.raises(ValueError, match="classes: 2 is teacher.null_class, which is no class"):
        build_context(load_config(configs["ddpm"], [*RUN, "teacher.null_class=2", "classes=[2]"]), ALONE, teacher=True)


@pytest.mark.parametrize("key", ["classes=[1]", "teacher.guidance=2", "teacher.null_class=-1"])
def test_a_network_without_classes_has_none(tmp_path, key):
    with pytest.raises(ValueError, match="and the network has no classes; leave it out"):
        train(load_config("smoke", [key, "eval.num_samples=0"]), tmp_path / "run")


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ("7", "labels: 7 is none of the network's 3 classes; use 0 to 2"),
        ("x", "labels: 'x' is not understood; write 0-63 or 1,5,9-12"),
        ("2-1", "labels: '2-1' runs backwards; write 1-2"),
    ],
)
def test_a_wrong_label_is_one_line(run, tmp_path, capsys, labels, problem):
    arguments = ("sample", run.path, "--seeds", "0-4", "--labels", labels, "--outdir", tmp_path / "out")
    result = hsivi_here(capsys, *arguments)
    assert result.returncode == 2 and problem in result.stderr and not (tmp_path / "out").exists()
