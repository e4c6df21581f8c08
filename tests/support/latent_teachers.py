"""Pipelines in latents, as diffusers writes them: a small UNet, and a VAE that makes 8x8 images of 4x4 latents."""

import torch


def small_vae(name="AutoencoderKL", **changes):
    """A VAE of diffusers with random weights: latents [B, 4, h, w] to images [B, 1, 2 h, 2 w]."""
    import diffusers  # late: it takes seconds to import

    torch.manual_seed(5)
    settings = {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "scaling_factor": 0.4,
    }
    return getattr(diffusers, name)(**{**settings, **changes}).eval()


def save_pipeline(folder, vae, **scheduler):
    """Write an unconditional pipeline in latents [4, 4, 4] with this VAE; returns the folder."""
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel  # late: as above

    torch.manual_seed(6)
    unet = UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    LDMPipeline(vae, unet, DDIMScheduler(**{**betas, "clip_sample": False, **scheduler})).save_pretrained(folder)
    return folder
