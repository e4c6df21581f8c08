"""What decodes latents to images: diffusers' own AutoencoderKL or VQModel, from a folder of its save_pretrained."""

from pathlib import Path

import torch
from torch import nn

from ..data import brief
from .diffusers_format import read_folder, read_json
from .tensor_files import refuse_strange_tensors
from .weights import weights_difference

CLASSES = ("AutoencoderKL", "VQModel")
PIXELS_AT_ONCE, MOST_AT_ONCE = 2**18, 16  # of the images in one call, and images in it
# What a config.json without scaling_factor means. diffusers takes 0.18215 for both classes. But a VQModel's has none
# where it was written before there was the key, and latents were not scaled then: those of CompVis/ldm-celebahq-256
# (huggingface/diffusers, issue 6725).
_UNSAID_SCALING = {"AutoencoderKL": 0.18215, "VQModel": 1.0}
# The names of attention's layers in files that old versions of diffusers wrote.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Decoder(nn.Module):
    """Latents to images by a VAE of diffusers, frozen and in float32.

    vae: an AutoencoderKL or a VQModel, whose configuration says how its latents were scaled.
    """

    def __init__(self, vae):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)

    @property
    def name(self):
        """The VAE's class at diffusers."""
        return type(self.vae).__name__

    @property
    def scaling(self):
        """(scaling_factor, shift_factor): the VAE decodes x / scaling_factor + shift_factor."""
        return self.vae.config.scaling_factor, self.vae.config.get("shift_factor") or 0.0

    def image_shape(self, event_shape):
        """(C, H, W) of the images of latents of a shape (c, h, w): each level of the VAE but one doubles the sides."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return (self.vae.config.out_channels, *(factor * side for side in event_shape[1:]))

    @torch.no_grad()
    def forward(self, latents, on_part=None):
        """Images [B, C, H, W], -1 to 1 but for what the VAE overshoots, of latents [B, c, h, w]; float32.

        The VAE is always called with the same number of images, so that an image does not depend on its batch.
        on_part(n): called after each call with the number of images in it.
        """
        _, height, width = self.image_shape(latents.shape[1:])
        at_once = min(max(PIXELS_AT_ONCE // (height * width), 1), MOST_AT_ONCE)
        scaling_factor, shift_factor = self.scaling
        images = []
        for part in latents.float().split(at_once):
            filled = torch.cat([part, part[-1:].expand(at_once - len(part), -1, -1, -1)])
            images.append(self.vae.decode(filled / scaling_factor + shift_factor).sample[: len(part)])
            if on_part:
                on_part(len(part))
        return torch.cat(images)


def check_vae(folder, image_channels):
    """The configuration of a VAE's folder, {key: value}, for a network of so many `image_channels`.

    Nothing but config.json is read. Raises ValueError, in one line, where the folder is not there or is none of a VAE
    of `CLASSES`, and where its latents have other channels than the network.
    """
    folder, where = Path(folder), f"teacher.vae: {str(folder)!r}"
    if not folder.is_dir():
        raise ValueError(f"{where}: is no folder; say where the VAE is with teacher.vae=FOLDER")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{where}: is a folder without the config.json of a VAE; give the vae/ of a pipeline")
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"{where}: is of a {brief(name, 80)}; only {' and '.join(CLASSES)} can be used")
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ValueError(f"{where}: its config.json has {key}, by which latents are not scaled here")
    for key, fits in (
        ("out_channels", (1, 3).__contains__),
        ("scaling_factor", _is_above_0),
        ("shift_factor", _is_number),
    ):
        if config.get(key) is not None and not fits(config[key]):
            wanted = "1 or 3" if key == "out_channels" else "a number"
            raise ValueError(f"{where}: its config.json has {key} = {brief(repr(config[key]), 80)}; it needs {wanted}")
    channels = config.get("latent_channels", {"AutoencoderKL": 4, "VQModel": 3}[name])
    if channels != image_channels:
        raise ValueError(
            f"{where}: decodes latents of {brief(channels, 40)} channels, and network.image_channels is "
            f"{image_channels}; give the VAE of the teacher's own pipeline"
        )
    return config


def load_decoder(folder, image_channels, device="cpu"):
    """The `Decoder` of a VAE's folder, for a network of so many `image_channels`.

    Raises ValueError, in one line, as `check_vae` does, and where the weights are missing, damaged, or of another
    network than config.json describes.
    """
    config = check_vae(folder, image_channels)
    if config.get("scaling_factor") is None:
        config["scaling_factor"] = _UNSAID_SCALING[config["_class_name"]]
    import diffusers  # here: it takes seconds, and only runs in latents need it

    where = f"teacher.vae: {str(folder)!r}"
    try:
        with torch.device("meta"):  # whatever sizes it says: nothing is allocated
            vae = getattr(diffusers, config["_class_name"]).from_config(config)
    except Exception as error:  # whatever diffusers and torch raise for values that no VAE has
        raise ValueError(f"{where}: its config.json describes no VAE ({brief(error)})") from None
    file, tensors, _ = read_folder(Path(folder))
    weights = {_with_new_names(name): tensor for name, tensor in tensors.items()}
    expected = vae.state_dict()
    for name, tensor in weights.items():  # attention was a 1x1 convolution once
        if name in expected and tensor.dim() == 4 and expected[name].dim() == 2 and tensor.shape[2:] == (1, 1):
            weights[name] = tensor[:, :, 0, 0]
    difference = weights_difference(expected, weights)
    if difference:
        raise ValueError(f"{where}: {file.name} is of another VAE than its config.json, it {difference}")
    refuse_strange_tensors(weights, f"{where}: {file.name}")
    # Copies: a tensor that is mapped from a file would change with the file.
    vae.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}, assign=True)
    return Decoder(vae).to(device)


def _is_number(value):
    return type(value) in (int, float) and abs(value) < 1e6


def _is_above_0(value):
    return _is_number(value) and value > 1e-6


def _with_new_names(name):
    *path, layer, parameter = name.split(".")
    is_old = "attentions" in path and layer in _OLD_NAMES
    return ".".join([*path, _OLD_NAMES[layer], parameter]) if is_old else name
