"""Latents are decoded as diffusers' own VAE does it, and pipelines in latents are read with their VAE."""

import json
import shutil

import pytest
import torch
import yaml
from latent_teachers import save_pipeline, small_vae
from safetensors.torch import load_file, save_file

from hsivi_fast.checkpoints.autoencoder import Decoder, load_decoder
from hsivi_fast.checkpoints.convert import convert_checkpoint
from hsivi_fast.checkpoints.formats import read_checkpoint
from hsivi_fast.config import load_config
from hsivi_fast.training.pretrain import train_teacher
from hsivi_fast.training.trainer import train

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl") / "vae"
    small_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    scheduler = {"clip_sample": True, "clip_sample_range": 2.0}
    return save_pipeline(tmp_path_factory.mktemp("ldm") / "ldm", small_vae("VQModel"), **scheduler)


def _changed(folder, to, **changes):
    """A copy of a VAE's folder with other values in its config.json."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


@pytest.mark.parametrize("name, shift", [("AutoencoderKL", None), ("AutoencoderKL", 0.3), ("VQModel", None)])
def test_images_are_those_of_diffusers_own_decode(tmp_path, name, shift):
    vae = small_vae(name, **({} if shift is None else {"shift_factor": shift}))
    vae.save_pretrained(tmp_path / "vae")
    decoder = load_decoder(tmp_path / "vae", 4)
    latents = torch.randn(21, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor + (shift or 0)).sample
    images = decoder(latents)
    assert images.shape == (21, *decoder.image_shape((4, 6, 4))) == (21, 1, 12, 8)
    assert float((images - expected).abs().max()) < 1e-6 and float(images.std()) > 0.01
    assert torch.equal(decoder(latents[3:5]), images[3:5])  # whatever the batch
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


@pytest.mark.parametrize("name, factor", [("AutoencoderKL", 0.18215), ("VQModel", 1.0)])
def test_a_factor_that_is_not_said(tmp_path, name, factor):
    """A VQModel without it is from before there was the key; stable diffusion's VAEs have the usual one."""
    vae = small_vae(name)
    vae.save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    config.pop("scaling_factor")
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    decoder, latents = load_decoder(tmp_path / "vae", 4), torch.ones(16, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(decoder(latents), vae.decode(latents / factor).sample)
    decoder.vae.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["scaling_factor"] == factor


def test_images_of_many_pixels_are_decoded_few_at_a_time():
    decoder, seen = Decoder(small_vae(block_out_channels=(8,) * 4, **_levels(4))), []
    decoder(torch.zeros(3, 4, 32, 32), seen.append)  # 256 x 256: four at a time
    decoder(torch.zeros(2, 4, 64, 64), seen.append)  # 512 x 512: one
    decoder(torch.zeros(17, 4, 1, 1), seen.append)
    assert seen == [3, 1, 1, 16, 1]


def _levels(count):
    return {"down_block_types": ("DownEncoderBlock2D",) * count, "up_block_types": ("UpDecoderBlock2D",) * count}


@pytest.mark.parametrize("kind", ["bin", "fp16", "old names", "old names, convolutions"])
def test_weights_in_other_files_and_under_old_names(vae_folder, tmp_path, kind):
    vae, folder = small_vae(), tmp_path / "vae"
    expected = Decoder(small_vae())(torch.ones(1, 4, 4, 4))
    if kind == "bin":
        vae.save_pretrained(folder, safe_serialization=False)
    elif kind == "fp16":
        vae.half().save_pretrained(folder, variant="fp16")
        expected = Decoder(vae.float())(torch.ones(1, 4, 4, 4))
    else:
        shutil.copytree(vae_folder, folder)
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        stored = {}
        for name, tensor in load_file(folder / WEIGHTS).items():
            for new, other in old.items():
                if new in name:
                    name = name.replace(new, other)
                    tensor = tensor[..., None, None] if "conv" in kind and tensor.dim() == 2 else tensor
            stored[name] = tensor
        assert sum(".query." in name for name in stored) == 4  # weight and bias, of encoder and decoder
        save_file(stored, folder / WEIGHTS)
    assert torch.equal(load_decoder(folder, 4)(torch.ones(1, 4, 4, 4)), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "AutoencoderTiny"}, "is of a AutoencoderTiny; only AutoencoderKL and VQModel can be used"),
        ({"_class_name": ["VQModel"]}, r"is of a \['VQModel'\]; only"),
        ({"latent_channels": 16}, "decodes latents of 16 channels, and network.image_channels is 4; give the VAE of"),
        ({"latents_mean": [0, 0, 0, 0]}, "its config.json has latents_mean, by which latents are not scaled here"),
        ({"out_channels": 4}, "its config.json has out_channels = 4; it needs 1 or 3"),
        ({"scaling_factor": 0}, "its config.json has scaling_factor = 0; it needs a number"),
        ({"scaling_factor": "0.2"}, "scaling_factor = '0.2'"),
        ({"shift_factor": float("nan")}, "shift_factor = nan"),
        ({"norm_num_groups": 7}, "its config.json describes no VAE"),
        ({"block_out_channels": [32, 10**7]}, "is of another VAE than its config.json, it .* expected .10000000"),
        ({"block_out_channels": 3}, "its config.json describes no VAE"),
        ({"layers_per_block": 2}, f"{WEIGHTS} is of another VAE than its config.json, it lacks"),
    ],
)
def test_what_is_no_vae_of_the_run_s_latents_is_one_line(vae_folder, tmp_path, changes, message):
    folder = _changed(vae_folder, tmp_path / "vae", **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_decoder(folder, 4)
    assert str(error.value).startswith(f"teacher.vae: '{folder}': ") and "\n" not in str(error.value)


def test_damaged_folders_are_one_line(vae_folder, tmp_path):
    with pytest.raises(ValueError, match="teacher.vae: 'nowhere': is no folder; say where the VAE is with teacher.vae"):
        load_decoder("nowhere", 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="teacher.vae: .*empty': is a folder without the config.json of a VAE"):
        load_decoder(tmp_path / "empty", 4)
    folder = _changed(vae_folder, tmp_path / "vae")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:1000])
    with pytest.raises(ValueError, match=f"checkpoint .*{WEIGHTS}': not a readable safetensors file"):
        load_decoder(folder, 4)
    stored = load_file(vae_folder / WEIGHTS)
    save_file({**stored, "decoder.conv_in.bias": torch.full((32,), float("nan"))}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"{WEIGHTS}: its tensor decoder.conv_in.bias is not finite"):
        load_decoder(folder, 4)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="has a config.json and no weights"):
        load_decoder(folder, 4)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not readable as JSON"):
        load_decoder(folder, 4)


# ---- pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "unet"])
def test_a_converted_pipeline_names_its_vae(pipeline, tmp_path, inside):
    convert_checkpoint(pipeline / inside, tmp_path / "ours")
    text = (tmp_path / "ours" / "network.yaml").read_text()
    settings = yaml.safe_load(text)
    assert settings["teacher"]["vae"] == str((pipeline / "vqvae").resolve())
    assert settings["network"]["image_channels"] == 4 and settings["network"]["image_size"] == 4
    assert "# It makes latents, which teacher.vae decodes. The folder stays where it is, and is not copied.\n" in text
    assert (
        "# Of its scheduler not used: clip_sample = True (to -2.0 .. 2.0), since neither the layers nor DDIM and "
        in text
    )
    assert "timestep_spacing = leading, since the run's spacing says where the layers' timesteps are.\n" in text
    stated = read_checkpoint(tmp_path / "ours" / "teacher.safetensors")
    assert stated.vae is None and "vae" not in stated.settings["teacher"]  # a path says nothing of the weights


def test_a_scheduler_that_does_not_clip_is_not_told_of(tmp_path):
    pipeline = save_pipeline(tmp_path / "ldm", small_vae("VQModel"))
    file = pipeline / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    config.pop("timestep_spacing")
    file.write_text(json.dumps(config))
    assert read_checkpoint(pipeline).notes == ()


def test_a_pipeline_whose_vae_cannot_be_used_is_refused_before_anything_is_written(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "ldm")
    _changed(pipeline / "vqvae", tmp_path / "ldm" / "vae", _class_name="AsymmetricAutoencoderKL")
    with pytest.raises(ValueError, match="teacher.vae: .*ldm/vae': is of a AsymmetricAutoencoderKL; only"):
        convert_checkpoint(tmp_path / "ldm", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer_2", "bert"])
@pytest.mark.parametrize("said_by", ["folder", "list"])
def test_a_pipeline_that_reads_a_text_is_refused(pipeline, tmp_path, part, said_by):
    shutil.copytree(pipeline, tmp_path / "ldm")
    index = tmp_path / "ldm" / "model_index.json"
    if said_by == "folder":
        (tmp_path / "ldm" / part).mkdir()
        index.unlink()
    else:
        index.write_text(json.dumps({**json.loads(index.read_text()), part: ["transformers", "Any"]}))
    for source in (tmp_path / "ldm", tmp_path / "ldm" / "unet"):
        with pytest.raises(ValueError, match=f"ldm': is a pipeline with a {part}, whose images are of a text; a teach"):
            convert_checkpoint(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# ---- runs ------------------------------------------------------------------------------------------------------------


def _run(pipeline, tmp_path, *overrides):
    file = tmp_path / "run.yaml"
    if not file.exists():
        convert_checkpoint(pipeline, tmp_path / "teacher")
        settings = yaml.safe_load((tmp_path / "teacher" / "network.yaml").read_text())
        settings["teacher"]["checkpoint"] = str(tmp_path / "teacher" / "teacher.safetensors")
        file.write_text(yaml.safe_dump({**settings, "nfe": 2, "eval": {"num_samples": 0}, "device": "cpu"}))
    return load_config(file, overrides)


def test_a_run_is_refused_before_its_folder_is_made(pipeline, tmp_path):
    for overrides, message in (
        (["teacher.vae=/nowhere/vae"], "teacher.vae: '/nowhere/vae': is no folder"),
        (
            ["teacher.vae=/nowhere/vae", "teacher.checkpoint=/nowhere/t.pt"],
            "2 files are missing or not right; .*vae.*t.pt",
        ),
        ([f"teacher.vae={pipeline / 'unet'}"], "is of a UNet2DModel; only AutoencoderKL"),
        (["data=mnist"], r"teacher.vae: .* decodes to images \[1, 8, 8\], and those of data=mnist are \[1, 32, 32\]"),
        (["teacher.vae=null", f"teacher.checkpoint={pipeline}"], "teacher.vae: missing; .*; set teacher.vae=.*vqvae$"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            train(_run(pipeline, tmp_path, *overrides), tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="teacher.vae: .* is of latents; a teacher is trained on images here"):
        train_teacher(_run(pipeline, tmp_path, "data=digits"), tmp_path / "run")
    with pytest.raises(ValueError, match="teacher.vae: 'a' decodes a checkpoint's latents; a 2-D target has none"):
        load_config("toy2d", ["teacher.vae=a"])


def test_a_vae_is_looked_for_beside_the_yaml_file(pipeline, tmp_path):
    shutil.copytree(pipeline / "vqvae", tmp_path / "mine")
    assert _run(pipeline, tmp_path, "teacher.vae=mine").teacher.vae == str((tmp_path / "mine").resolve())
