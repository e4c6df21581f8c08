"""Exports give the run's own samples, in processes that know nothing of the run.

What cannot be exported is refused and leaves nothing behind.
"""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hsivi_fast import load_config, sample, train
from hsivi_fast.checkpoints.convert import convert_checkpoint
from hsivi_fast.checkpoints.run_folder import RunFolder
from hsivi_fast.data import to_uint8
from hsivi_fast.export import export_run, load_exported, safetensors_format
from hsivi_fast.export.check import check_samples
from hsivi_fast.ops import draw_noise
from hsivi_fast.parallel.world import ALONE
from hsivi_fast.sampling.sampler import load_sampler

SEEDS = range(100, 120)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose noise scale differs from layer to layer, so that an export that forgot it is seen."""
    config = load_config("smoke", ["gamma.per_step=true", "train.student_lr=0.05"])
    return train(config, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def pipeline_folder(run, tmp_path_factory):
    return export_run(run, "diffusers", tmp_path_factory.mktemp("pipeline") / "pipeline")


@pytest.fixture
def pipeline(pipeline_folder):
    return _load_pipeline(pipeline_folder)


def _load_pipeline(folder):
    from hsivi_fast.diffusers import HSIVIPipeline  # late: diffusers is optional and takes seconds to import

    pipeline = HSIVIPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pixels(images):
    """uint8 [B, C, H, W] of what output_type="pt" gives."""
    return (images * 255).round().to(torch.uint8)


def _drawn(pipeline, **arguments):
    """uint8 [B, C, H, W] that a pipeline draws."""
    return _pixels(pipeline(output_type="pt", **arguments).images)


def _generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _python(code, *arguments):
    """Run code in a fresh process; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- safetensors -----------------------------------------------------------------------------------------------------


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
    network = {"norm_eps": 1e-5, "channels": 8, "norm_groups": 4, "family": "ddpm"}
    assert description["network"] | network == description["network"]
    assert description["timesteps"] == [0, 89, 356, 800]
    assert (description["nfe"], description["eta"], description["spacing"]) == (3, 0.6, "quad")
    assert description["gamma"] == {"per_step": True, "per_pixel": True}
    assert description["log_scaled_gamma"] == [3, 1, 8, 8]
    assert description["sample"]["shape"] == [1, 8, 8] and description["sample"]["levels"] == 256
    assert description["run"] == {"name": "smoke", "step": 4, "weights": "ema", "data": "digits"}
    assert description["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_card_has_the_run_s_table(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    assert "own table" not in (export_run(copied, "safetensors", tmp_path / "without") / "README.md").read_text()
    row = {
        "sampler": "hsivi_ema",
        "nfe": 3,
        "frechet_distance": 12.345,
        "frechet_std": None,
        "images_per_second": 678.0,
        "num_samples": 9,
    }
    RunFolder(copied).write_json("results.json", [row])
    card = (export_run(copied, "safetensors", tmp_path / "with") / "README.md").read_text()
    assert "| HSIVI (EMA) | 3 | 12.35 | 678 |" in card or "| HSIVI (EMA) | 3 | 12.34 | 678 |" in card
    assert "smoke_teacher.safetensors" in card and "3 network evaluations" in card and str(tmp_path) not in card


def test_an_older_checkpoint_by_its_step(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    shutil.copytree(copied / "checkpoints" / "step_4", copied / "checkpoints" / "step_9")
    folder = export_run(copied, "safetensors", tmp_path / "out", step=4)
    assert json.loads((folder / "config.json").read_text())["run"]["step"] == 4
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
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        load_exported(folder)
    with pytest.raises(ValueError, match="config.json"):
        load_exported(tmp_path)
    (folder / "config.json").write_text('{"kind": "of another program"}')
    with pytest.raises(ValueError, match="config.json"):
        load_exported(folder)


# ---- refusals --------------------------------------------------------------------------------------------------------


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
    raw, _, _ = load_sampler(run, ALONE, "raw")
    monkeypatch.setattr(safetensors_format, "load_exported", lambda *_: raw)
    with pytest.raises(ValueError, match="differs from the run's own sampler"):
        export_run(run, "safetensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_check_has_limits():
    expected = torch.zeros(1000, dtype=torch.uint8)
    one_off, two_off, many = expected.clone(), expected.clone(), expected.clone()
    one_off[0], two_off[0], many[:2] = 1, 2, 1
    check_samples(one_off, expected, pixels_off=1e-3)
    for bad in (two_off, many, expected[:10], expected.float()):
        with pytest.raises(ValueError, match="^export: .*nothing was written"):
            check_samples(bad, expected, pixels_off=1e-3)
    with pytest.raises(ValueError, match="differs"):
        check_samples(torch.tensor([float("nan")]), torch.tensor([0.0]), coordinate_off=1e-4)


def test_without_diffusers_it_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for module in ("hsivi_fast.diffusers", "hsivi_fast.export.pipeline"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ValueError, match="^diffusers: is not installed; pip install diffusers$"):
        export_run(run, "diffusers", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_points_go_out_as_safetensors_and_not_as_a_pipeline(tmp_path):
    run = train(
        load_config(
            "toy2d",
            [
                "start.updates=4",
                "start.trajectories=8",
                "start.score_net_updates=0",
                "train.steps=4",
                "train.batch_size=8",
                "eval.num_samples=0",
                "nfe=2",
            ],
        ),
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


# ---- diffusers -------------------------------------------------------------------------------------------------------

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


def test_a_pipeline_s_folder_names_the_documented_module(pipeline_folder, pipeline):
    """Folders that were exported once are loaded through it, wherever the code lies."""
    from diffusers import DiffusionPipeline  # late: as above

    index = json.loads((pipeline_folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "HSIVIPipeline"]
    assert index["unet"] == ["hsivi_fast.diffusers", "HSIVINetwork"]
    assert index["scheduler"] == ["hsivi_fast.diffusers", "HSIVIScheduler"]
    assert isinstance(pipeline, DiffusionPipeline)
    assert {str(file.relative_to(pipeline_folder)) for file in pipeline_folder.rglob("*") if file.is_file()} == {
        "model_index.json",
        "pipeline.py",
        "config.json",
        "README.md",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }


def test_a_pipeline_in_a_fresh_process_gives_the_run_s_samples(run, pipeline_folder, tmp_path):
    _python(FRESH_PIPELINE, pipeline_folder, tmp_path / "images.npy")
    images = np.load(tmp_path / "images.npy")
    assert images.dtype == np.float32 and images.shape == (20, 8, 8, 1)
    assert np.array_equal((images * 255).round().astype(np.uint8).transpose(0, 3, 1, 2), sample(run, SEEDS).numpy())


FROM_DIFFUSERS = """
import os, sys
os.environ["HF_HOME"] = sys.argv[2]
from diffusers import DiffusionPipeline, UNet2DModel
assert "hsivi_fast" not in sys.modules
folder = sys.argv[1]
def refused(call):
    try:
        call()
    except Exception as error:
        return " ".join(str(error).split())
print(refused(lambda: DiffusionPipeline.from_pretrained(folder)))
print(refused(lambda: UNet2DModel.from_pretrained(folder + "/unet")))
if len(sys.argv) > 3:
    class Hidden:
        def find_spec(name, *others):
            if name.partition(".")[0] == "hsivi_fast":
                raise ModuleNotFoundError(name="hsivi_fast")
    sys.meta_path.insert(0, Hidden)
    print(refused(lambda: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)))
else:
    for words in ({}, {"custom_pipeline": folder}):
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **words)
        pixels = (pipeline(seeds=range(100, 104), output_type="pt").images * 255).round().int()
        print(type(pipeline).__module__, pixels.flatten().tolist())
"""


def test_diffusers_alone_loads_the_folder_when_its_code_may_run(run, pipeline_folder, tmp_path):
    asked, no_unet, first, second = _python(FROM_DIFFUSERS, pipeline_folder, tmp_path / "home").splitlines()
    assert "contains custom code in pipeline.py" in asked and "trust_remote_code=True" in asked
    assert "this is no UNet2DModel; load the pipeline with hsivi_fast.diffusers.HSIVIPipeline" in no_unet
    expected = sample(run, range(100, 104)).flatten().tolist()
    assert first == second == f"hsivi_fast.diffusers {expected}"
    *_, missing = _python(FROM_DIFFUSERS, pipeline_folder, tmp_path / "home", "without").splitlines()
    assert missing.startswith("hsivi_fast: is not installed, and this pipeline is its code; install hsivi_fast ")


def test_a_pipeline_saved_again_and_an_older_folder_load(run, pipeline, pipeline_folder, tmp_path):
    """Older folders name the class alone and have no pipeline.py; a pipeline that is saved anew writes such a one."""
    pipeline.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "pipeline.py").exists()
    expected = _drawn(pipeline, seeds=range(4))
    assert torch.equal(_drawn(_load_pipeline(tmp_path / "again"), seeds=range(4)), expected)


def test_an_image_depends_on_its_own_generator_alone(pipeline):
    batch = _drawn(pipeline, batch_size=17, generator=_generators(*range(17)))
    assert torch.equal(_drawn(pipeline, batch_size=1, generator=_generators(5))[0], batch[5])
    assert torch.equal(_drawn(pipeline, generator=_generators(9, 5))[1], batch[5])
    assert torch.equal(_drawn(pipeline, generator=_generators(5)[0])[0], batch[5])  # one generator: its first image
    assert len({tuple(image.flatten().tolist()) for image in batch}) == 17


def test_one_generator_gives_the_same_images_in_any_batch(pipeline):
    three = _drawn(pipeline, batch_size=3, generator=_generators(5)[0])
    assert torch.equal(_drawn(pipeline, batch_size=18, generator=_generators(5)[0])[:3], three)
    assert not torch.equal(three[0], three[1])


def test_without_a_generator_torch_s_global_one_is_asked(pipeline):
    torch.manual_seed(3)
    before = _drawn(pipeline, batch_size=2)
    assert not torch.equal(_drawn(pipeline, batch_size=2), before)
    torch.manual_seed(3)
    assert torch.equal(_drawn(pipeline, batch_size=2), before)


def test_latents_are_where_the_first_layer_starts(run, pipeline):
    latents = draw_noise(torch.tensor(list(SEEDS)), 0, (1, 8, 8))
    samples = sample(run, SEEDS)
    assert torch.equal(_drawn(pipeline, seeds=SEEDS, latents=latents), samples)
    turned = _drawn(pipeline, seeds=SEEDS, latents=latents.flip(0))
    assert not torch.equal(turned, samples)
    assert not torch.equal(turned, samples.flip(0))  # the layers' noise stays the seeds'
    with pytest.raises(ValueError, match=r"latents: of shape \[2, 3\]"):
        _drawn(pipeline, latents=torch.zeros(2, 3))


def test_forms_of_output(run, pipeline):
    pictures = pipeline(seeds=[100, 101]).images
    assert [picture.mode for picture in pictures] == ["L", "L"]
    assert np.array_equal(np.asarray(pictures[1]), sample(run, [100, 101]).numpy()[1, 0])
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
    pipeline = _load_pipeline(export_run(run, "diffusers", tmp_path / "out"))
    assert torch.equal(_drawn(pipeline, seeds=SEEDS), sample(run, SEEDS))
    with pytest.raises(ValueError, match="torch_dtype"):
        pipeline.to(torch.float16)(seeds=[1])


# ---- AOTInductor -----------------------------------------------------------------------------------------------------

STRANGER = """
import runpy, sys
sys.modules["hsivi_fast"] = None  # as if it were not installed
script, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """(run, folder of its package), compiled once.

    It has two layers, so that one has noise: the plain Philox formulas are compiled with all else, and have to give
    the same integers. Most of the time is theirs, so the network is the smallest and there is no third layer.
    """
    folder = tmp_path_factory.mktemp("package")
    run = train(load_config("smoke", ["nfe=2", "train.steps=2"]), folder / "run")
    return run, export_run(run, "aoti", folder / "out")


def _check_near(images, expected):
    """At most two pixels in a thousand are off, by one grey level; both [B, H, W], ints."""
    off = (images - expected).abs()
    assert int(off.max()) <= 1 and float((off > 0).float().mean()) <= 2e-3


def test_a_package_runs_without_hsivi_fast(package, tmp_path):
    run, folder = package
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "sampler.pt2", "use.py"]
    assert len((folder / "use.py").read_text().splitlines()) <= 25
    assert "25 images of the seeds 7 to 31" in _python(STRANGER, folder / "use.py", 7, 25, tmp_path / "grid.png")
    grid = torch.from_numpy(np.array(Image.open(tmp_path / "grid.png"))).int()
    images = grid.reshape(5, 8, 5, 8).transpose(1, 2).reshape(25, 8, 8)
    _check_near(images, sample(run, range(7, 32))[:, 0].int())


def test_a_package_reads_both_words_of_a_seed(package):
    run, folder = package
    seeds = range(2**40 + 5, 2**40 + 21)
    packaged = torch._inductor.aoti_load_package(str(folder / "sampler.pt2"))
    _check_near(packaged(torch.tensor(seeds)).int(), sample(run, seeds).int())


# ---- networks of diffusers' own --------------------------------------------------------------------------------------


def test_a_run_from_a_unet2dmodel_with_its_defaults_goes_out_in_both_forms(tmp_path):
    """Heads and the ways of its time embedding reach the sampler that is built again of the files."""
    from diffusers import UNet2DModel  # late: as above

    torch.manual_seed(3)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    model.save_pretrained(tmp_path / "model")
    convert_checkpoint(tmp_path / "model", tmp_path / "teacher")
    more = "base: smoke\n" + (tmp_path / "teacher" / "network.yaml").read_text()
    (tmp_path / "teacher" / "run.yaml").write_text(more.replace("network:\n", "network:\n  name: null\n"))
    run = train(load_config(tmp_path / "teacher" / "run.yaml"), tmp_path / "run")
    folder = export_run(run, "safetensors", tmp_path / "tensors")
    described = json.loads((folder / "config.json").read_text())["network"]
    assert described.items() >= {"head_channels": 4, "freq_shift": 0, "middle_norm_groups": 0}.items()
    assert torch.equal(to_uint8(load_exported(folder)(SEEDS)), sample(run, SEEDS))
    pipeline = _load_pipeline(export_run(run, "diffusers", tmp_path / "pipeline"))
    assert torch.equal(_drawn(pipeline, seeds=SEEDS), sample(run, SEEDS))
