"""Exports give the run's own samples, in processes that know nothing of the run; what cannot be exported is refused and leaves nothing behind."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hsivi_fast import load_config, sample, train
from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.data import to_uint8
from hsivi_fast.export import export, export_run, load_exported
from hsivi_fast.sampling.sampler import load_sampler

SEEDS = range(100, 120)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose noise scale differs from layer to layer, so that an export that forgot it is seen."""
    return train(
        load_config("smoke", ["gamma.per_step=true", "train.student_lr=0.05"]), tmp_path_factory.mktemp("run") / "run"
    )


@pytest.fixture(scope="module")
def pipeline_folder(run, tmp_path_factory):
    return export_run(run, "diffusers", tmp_path_factory.mktemp("pipeline") / "pipeline")


@pytest.fixture
def pipeline(pipeline_folder):
    from hsivi_fast.diffusers import HSIVIPipeline

    pipeline = HSIVIPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pixels(images):
    """uint8 [B, C, H, W] of what output_type="pt" gives."""
    return (images * 255).round().to(torch.uint8)


def _python(code, *arguments):
    """Run code in a fresh process; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- safetensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_safetensors_give_the_run_s_samples(run, tmp_path, weights):
    folder = export_run(run, "safetensors", tmp_path / "out", weights)
    exported = load_exported(folder)
    assert exported.nfe == 3 and float(exported.log_gamma.abs().max()) > 0.01
    assert torch.equal(to_uint8(exported(SEEDS)), sample(run, SEEDS, weights))
    other = sample(run, SEEDS, "raw" if weights == "ema" else "ema")
    assert not torch.equal(sample(run, SEEDS, weights), other)


def test_the_description_is_whole(run, tmp_path):
    folder = export_run(run, "safetensors", tmp_path / "out")
    description = json.loads((folder / "config.json").read_text())
    assert (
        description["network"] | {"norm_eps": 1e-5, "channels": 8, "norm_groups": 4, "family": "ddpm"}
        == description["network"]
    )
    assert description["timesteps"] == [0, 89, 356, 800] and (
        description["nfe"],
        description["eta"],
        description["spacing"],
    ) == (3, 0.6, "quad")
    assert description["gamma"] == {"per_step": True, "per_pixel": True} and description["log_scaled_gamma"] == [
        3,
        1,
        8,
        8,
    ]
    assert description["sample"]["shape"] == [1, 8, 8] and description["sample"]["levels"] == 256
    assert description["run"] == {"name": "smoke", "step": 4, "weights": "ema", "data": "digits"}
    assert description["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_card_has_the_run_s_table(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    assert "own table" not in (export_run(copied, "safetensors", tmp_path / "without") / "README.md").read_text()
    RunFolder(copied).write_json(
        "results.json",
        [
            {
                "sampler": "hsivi_ema",
                "nfe": 3,
                "frechet_distance": 12.345,
                "frechet_std": None,
                "images_per_second": 678.0,
                "num_samples": 9,
            }
        ],
    )
    card = (export_run(copied, "safetensors", tmp_path / "with") / "README.md").read_text()
    assert "| HSIVI (EMA) | 3 | 12.35 | 678 |" in card or "| HSIVI (EMA) | 3 | 12.34 | 678 |" in card
    assert "smoke_teacher.safetensors" in card and "3 network evaluations" in card and str(tmp_path) not in card


def test_an_older_checkpoint_by_its_step(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    shutil.copytree(copied / "checkpoints" / "step_4", copied / "checkpoints" / "step_9")
    assert (
        json.loads((export_run(copied, "safetensors", tmp_path / "out", step=4) / "config.json").read_text())["run"][
            "step"
        ]
        == 4
    )
    with pytest.raises(ValueError, match="step: 7 has no checkpoint; the run has 4, 9"):
        export_run(copied, "safetensors", tmp_path / "other", step=7)


def test_a_changed_export_is_not_loaded(run, tmp_path):
    folder = export_run(run, "safetensors", tmp_path / "out")
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(description | {"timesteps": [0, 1, 2, 3]}))
    with pytest.raises(ValueError, match="timesteps"):
        load_exported(folder)
    (folder / "config.json").write_text(json.dumps(description))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="sha256"):
        load_exported(folder)
    with pytest.raises(ValueError, match="config.json"):
        load_exported(tmp_path)
    (folder / "config.json").write_text('{"kind": "of another program"}')
    with pytest.raises(ValueError, match="config.json"):
        load_exported(folder)


# ---- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_requests_are_named(run, tmp_path):
    for arguments, message in (
        (("onnx", tmp_path / "out"), "format: 'onnx'.*safetensors, diffusers, aoti"),
        (("safetensors", tmp_path / "out", "best"), "weights: 'best'"),
    ):
        with pytest.raises(ValueError, match=message):
            export_run(run, *arguments)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        export_run(run, "safetensors", tmp_path / "file")
    with pytest.raises(ValueError, match="not empty"):
        export_run(run, "safetensors", tmp_path)
    with pytest.raises(ValueError, match="no config.yaml"):
        export_run(tmp_path, "safetensors", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    assert (export_run(run, "safetensors", tmp_path / "empty") / "model.safetensors").is_file()


def test_an_export_that_differs_leaves_nothing_behind(run, tmp_path, monkeypatch):
    raw = load_sampler(run, "raw")[0]
    monkeypatch.setattr(export, "load_exported", lambda *_: raw)
    with pytest.raises(ValueError, match="differs from the run's own sampler"):
        export_run(run, "safetensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_check_has_limits():
    own = torch.zeros(1000, dtype=torch.uint8)
    one_off, two_off, many = own.clone(), own.clone(), own.clone()
    one_off[0], two_off[0], many[:2] = 1, 2, 1
    export._check(one_off, own, pixels_off=1e-3)
    for bad in (two_off, many, own[:10], own.float()):
        with pytest.raises(ValueError, match="^export: .*nothing was written"):
            export._check(bad, own, pixels_off=1e-3)
    with pytest.raises(ValueError, match="differs"):
        export._check(torch.tensor([float("nan")]), torch.tensor([0.0]), coordinate_off=1e-4)


def test_without_diffusers_it_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "hsivi_fast.diffusers", raising=False)
    with pytest.raises(ValueError, match="^diffusers: is not installed; pip install diffusers$"):
        export_run(run, "diffusers", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_points_go_out_as_safetensors_and_not_as_a_pipeline(tmp_path):
    run = train(
        load_config("toy2d", ["train.steps=4", "train.batch_size=8", "eval.num_samples=0", "eval.every=0", "nfe=2"]),
        tmp_path / "run",
    )
    folder = export_run(run, "safetensors", tmp_path / "out")
    assert torch.equal(load_exported(folder)(SEEDS), sample(run, SEEDS))
    with pytest.raises(ValueError, match="image runs only"):
        export_run(run, "diffusers", tmp_path / "pipeline")


def test_a_package_needs_float32_and_a_compiler(run, tmp_path, monkeypatch):
    copied = shutil.copytree(run, tmp_path / "run")
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace("precision: fp32", "precision: bf16"))
    with pytest.raises(ValueError, match="precision is bf16"):
        export_run(copied, "aoti", tmp_path / "out")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"g\+\+"):
        export_run(run, "aoti", tmp_path / "out")


# ---- diffusers --------------------------------------------------------------------------------------------------------

FRESH_PIPELINE = """
import sys
sys.modules["transformers"] = sys.modules["accelerate"] = None  # as if they were not installed
import hsivi_fast.export
assert "diffusers" not in sys.modules, "diffusers is imported before it is asked for"
import numpy as np
from hsivi_fast.diffusers import HSIVIPipeline
images = HSIVIPipeline.from_pretrained(sys.argv[1])(seeds=range(100, 120), output_type="np").images
np.save(sys.argv[2], images)
"""


def test_a_pipeline_in_a_fresh_process_gives_the_run_s_samples(run, pipeline_folder, tmp_path):
    assert {str(file.relative_to(pipeline_folder)) for file in pipeline_folder.rglob("*") if file.is_file()} == {
        "model_index.json",
        "config.json",
        "README.md",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    _python(FRESH_PIPELINE, pipeline_folder, tmp_path / "images.npy")
    images = np.load(tmp_path / "images.npy")
    assert images.dtype == np.float32 and images.shape == (20, 8, 8, 1)
    assert np.array_equal((images * 255).round().astype(np.uint8).transpose(0, 3, 1, 2), sample(run, SEEDS).numpy())


def test_an_image_depends_on_its_own_generator_alone(pipeline):
    generators = lambda *numbers: [torch.Generator().manual_seed(number) for number in numbers]
    draw = lambda **arguments: _pixels(pipeline(output_type="pt", **arguments).images)
    batch = draw(batch_size=17, generator=generators(*range(17)))
    assert torch.equal(draw(batch_size=1, generator=generators(5))[0], batch[5])
    assert torch.equal(draw(generator=generators(9, 5))[1], batch[5])
    assert torch.equal(draw(generator=generators(5)[0])[0], batch[5])  # one generator: its first image
    assert len({tuple(image.flatten().tolist()) for image in batch}) == 17
    one = draw(batch_size=3, generator=generators(5)[0])
    assert torch.equal(draw(batch_size=18, generator=generators(5)[0])[:3], one) and not torch.equal(one[0], one[1])
    torch.manual_seed(3)
    first = draw(batch_size=2)
    assert not torch.equal(draw(batch_size=2), first)
    torch.manual_seed(3)
    assert torch.equal(draw(batch_size=2), first)


def test_latents_are_where_the_first_layer_starts(run, pipeline):
    from hsivi_fast import ops

    draw = lambda **arguments: _pixels(pipeline(output_type="pt", **arguments).images)
    own = ops.draw_noise(torch.tensor(list(SEEDS)), 0, (1, 8, 8))
    assert torch.equal(draw(seeds=SEEDS, latents=own), sample(run, SEEDS))
    turned = draw(seeds=SEEDS, latents=own.flip(0))
    assert not torch.equal(turned, sample(run, SEEDS)) and not torch.equal(
        turned, sample(run, SEEDS).flip(0)
    )  # the layers' noise stays the seeds'
    with pytest.raises(ValueError, match=r"latents: of shape \[2, 3\]"):
        draw(latents=torch.zeros(2, 3))


def test_forms_of_output(run, pipeline):
    pictures = pipeline(seeds=[100, 101]).images
    assert [picture.mode for picture in pictures] == ["L", "L"] and np.array_equal(
        np.asarray(pictures[1]), sample(run, [100, 101]).numpy()[1, 0]
    )
    (tensor,) = pipeline(seeds=[100], output_type="pt", return_dict=False, num_inference_steps=3)
    assert torch.equal(_pixels(tensor), sample(run, [100])) and tensor.dtype == torch.float32
    assert len(pipeline().images) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 50}, "num_inference_steps: 50 .* use 3"),
        ({"output_type": "jpeg"}, "output_type: 'jpeg'"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": 2, "seeds": [1]}, "batch_size says 2, seeds says 1"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "batch_size says 2, generator says 1"),
        ({"seeds": [1], "generator": torch.Generator()}, "seeds: given beside generator"),
        ({"seeds": [-1]}, "seeds: -1"),
    ],
)
def test_bad_calls_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipeline(**arguments)
    assert "\n" not in str(error.value)


def test_a_pipeline_keeps_the_run_s_precision(tmp_path):
    run = train(load_config("smoke", ["precision=bf16", "channels_last=true", "train.steps=2"]), tmp_path / "run")
    from hsivi_fast.diffusers import HSIVIPipeline

    pipeline = HSIVIPipeline.from_pretrained(export_run(run, "diffusers", tmp_path / "out"))
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(_pixels(pipeline(seeds=SEEDS, output_type="pt").images), sample(run, SEEDS))
    with pytest.raises(ValueError, match="torch_dtype"):
        pipeline.to(torch.float16)(seeds=[1])


# ---- AOTInductor ------------------------------------------------------------------------------------------------------

STRANGER = """
import runpy, sys
sys.modules["hsivi_fast"] = None  # as if it were not installed
script, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def test_a_package_runs_without_hsivi_fast(tmp_path):
    """Two layers, so that one has noise: the plain Philox formulas are compiled with all else, and have to give the same integers."""
    run = train(load_config("smoke", ["nfe=2", "train.steps=2"]), tmp_path / "run")
    folder = export_run(run, "aoti", tmp_path / "out")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "sampler.pt2", "use.py"]
    assert len((folder / "use.py").read_text().splitlines()) <= 25
    assert "25 images of the seeds 7 to 31" in _python(STRANGER, folder / "use.py", 7, 25, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png")).reshape(5, 8, 5, 8).transpose(0, 2, 1, 3).reshape(25, 8, 8)
    off = np.abs(grid.astype(int) - sample(run, range(7, 32)).numpy()[:, 0].astype(int))
    assert off.max() <= 1 and (off > 0).mean() <= 2e-3
    large = 2**40 + 5  # both words of a seed count
    got = torch._inductor.aoti_load_package(str(folder / "sampler.pt2"))(torch.arange(large, large + 16))
    off = (got.int() - sample(run, range(large, large + 16)).int()).abs()
    assert int(off.max()) <= 1 and float((off > 0).float().mean()) <= 2e-3
