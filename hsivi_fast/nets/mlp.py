"""A small fully connected network for 2-D targets."""

import torch
from torch import nn

from .blocks import NoisePredictor, timestep_frequencies


class MLP(NoisePredictor):
    """A correction to a noise prediction in the plane: x [B, 2] float, t [B] integers -> [B, 2].

    The last layer starts at zero, so that a network "exact score + MLP" starts as the exact score.
    Raises ValueError for less than one channel or layer.
    """

    def __init__(self, channels=64, layers=3, time_channels=32):
        super().__init__()
        if channels < 1 or layers < 1:
            raise ValueError(f"network: channels = {channels} and layers = {layers} must be at least 1")
        self.event_shape = (2,)
        self.time_channels = time_channels
        self.layers = nn.Sequential()
        for index in range(layers):
            self.layers.append(nn.Linear(channels if index else 2 + time_channels, channels))
            self.layers.append(nn.SiLU())
        self.layers.append(nn.Linear(channels, 2))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def predict(self, x, t):
        half = self.time_channels // 2
        angles = t.to(torch.float32)[:, None] * timestep_frequencies(half, half, x.device)  # [B, time_channels / 2]
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], dim=1))
