"""A small fully connected network, for points and not for images."""

import torch
from torch import nn

from .blocks import NoisePredictor, timestep_frequencies


class MLP(NoisePredictor):
    """A correction to a noise prediction: x [B, dim] float, t [B] integers -> [B, dim].

    The last layer starts at zero, so that a network "exact score + MLP" starts as the exact score.
    Raises ValueError for less than one channel, layer or dimension.
    """

    def __init__(self, channels=64, layers=3, time_channels=32, dim=2):
        super().__init__()
        if min(channels, layers, dim) < 1:
            problem = f"channels = {channels}, layers = {layers} and dim = {dim} must be at least 1"
            raise ValueError(f"network: {problem}")
        self.event_shape = (dim,)
        self.time_channels = time_channels
        self.layers = nn.Sequential()
        for index in range(layers):
            self.layers.append(nn.Linear(channels if index else dim + time_channels, channels))
            self.layers.append(nn.SiLU())
        self.layers.append(nn.Linear(channels, dim))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def predict(self, x, t):
        half = self.time_channels // 2
        angles = t.to(torch.float32)[:, None] * timestep_frequencies(half, half, x.device)  # [B, time_channels / 2]
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], dim=1))
