"""A small network of each family, with every kind of layer and several heads; its weights depend on names alone."""

from golden_values import fill_by_name

from hsivi_fast.nets import build_unet

SMALL = {"image_channels": 3, "image_size": 8, "res_blocks": 1, "multipliers": (1, 2)}
FAMILIES = {
    "ddpm": {**SMALL, "family": "ddpm", "channels": 32, "attention": (False, True), "head_channels": 16},
    "adm": {**SMALL, "family": "adm", "channels": 32, "attention": (2,), "heads": 4},
    "song": {**SMALL, "family": "song", "channels": 16, "attention": (4,)},
    "dhariwal": {**SMALL, "family": "dhariwal", "channels": 64, "attention": (4,)},
}


def small_network(family, **settings):
    """A network of `FAMILIES` that wants no gradient; settings: in the place of its own."""
    return fill_by_name(build_unet({**FAMILIES[family], **settings})).requires_grad_(False)
