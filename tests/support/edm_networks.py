"""A small network of EDM's, and what makes an NCSN++ of it."""

SONG = {
    "family": "song",
    "image_channels": 1,
    "image_size": 8,
    "channels": 8,
    "multipliers": [1, 2],
    "res_blocks": 1,
    "attention": [4],
}
FOURIER = {
    "embedding": "fourier",
    "noise_multiplier": 2,
    "encoder": "residual",
    "resample_filter": [1.0, 3.0, 3.0, 1.0],
}
