"""Whether an export gives the samples of the run's own sampler."""

from ..data import to_uint8

CHECKED = 24  # seeds that an export is compared on


def as_samples(x, config):
    """What is compared of a sampler's x: points, draws and latents as they are, images as uint8."""
    makes_images = config.teacher.checkpoint is not None and config.teacher.vae is None
    return to_uint8(x) if makes_images else x


def check_samples(exported, expected, pixels_off=0.0, coordinate_off=0.0):
    """ValueError where an export's samples are not those that the run's own sampler gives.

    pixels_off: the share of uint8 values that may differ by one grey level; coordinate_off: how far float values may
    be from each other. Samples that are not numbers never pass.
    """
    if exported.shape != expected.shape or exported.dtype != expected.dtype:
        raise ValueError(
            f"export: gives {exported.dtype} {list(exported.shape)} where the run's own sampler gives "
            f"{expected.dtype} {list(expected.shape)}; nothing was written"
        )
    difference = (exported.cpu().float() - expected.cpu().float()).abs()
    largest, share = float(difference.max()), float((difference > 0).double().mean())
    if expected.is_floating_point():
        fits = largest <= coordinate_off
    else:
        fits = share <= pixels_off and largest <= 1
    if not fits:
        raise ValueError(
            f"export: differs from the run's own sampler, by up to {largest:.4g} in {share:.2%} of the values; "
            "nothing was written"
        )
