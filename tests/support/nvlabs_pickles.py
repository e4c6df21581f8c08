"""Pickles in the layout of NVlabs' snapshots, written here with stand-ins for the modules that wrote the real ones."""

import contextlib
import pickle
import sys
import types

import numpy as np
import torch


class _Persistent(torch.nn.Module):
    """Pickled as their decorator has it: a call of one function, with a dict of the class's source and the state."""

    module_src = "import os"

    def __init__(self, *args, **kwargs):
        super().__init__()
        self._init_args, self._init_kwargs = args, kwargs
        self.made(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.module_src,
            "class_name": type(self).__name__,
            "state": self.__dict__,
        }
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


class Linear(_Persistent):
    def made(self, in_features, out_features, bias=True, init_weight=1.0):
        self.weight = torch.nn.Parameter(torch.randn(out_features, in_features) * float(init_weight))
        self.bias = torch.nn.Parameter(torch.randn(out_features)) if bias else None


class Conv2d(_Persistent):
    def made(self, in_channels, out_channels, kernel, up=False):
        self.weight = torch.nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel)) if kernel else None
        self.register_buffer("resample_filter", torch.rand(1, 1, 2, 2) if up else None)


class GroupNorm(_Persistent):
    def made(self, channels, eps=1e-5):
        self.eps = eps
        self.weight, self.bias = torch.nn.Parameter(torch.ones(channels)), torch.nn.Parameter(torch.zeros(channels))


class UNetBlock(_Persistent):
    def made(self, channels, skip_scale):
        self.skip_scale = skip_scale
        self.norm0, self.conv0 = GroupNorm(channels), Conv2d(channels, channels, 3)
        self.affine = Linear(8, out_features=channels, init_weight=np.sqrt(1 / 3))


class FourierEmbedding(_Persistent):
    def made(self, channels):
        self.register_buffer("freqs", torch.randn(channels))
        self.register_buffer("forgotten", torch.ones(3), persistent=False)


class SongUNet(_Persistent):
    def made(self, img_resolution, in_channels, model_channels=4, channel_mult=(1, 2), shared=False):
        self.map_noise, self.map_layer0 = FourierEmbedding(8), Linear(8, 8)
        self.map_label = None
        self.enc = torch.nn.ModuleDict()
        self.enc["8x8_conv"] = Conv2d(in_channels, model_channels, 3)
        self.enc["8x8_block0"] = UNetBlock(model_channels, skip_scale=np.sqrt(0.5))
        self.dec = torch.nn.ModuleDict({"8x8_up": Conv2d(model_channels, model_channels, 0, up=True)})
        if shared:
            self.enc["again"] = self.enc["8x8_block0"].norm0
            self.map_layer0.bias = self.map_layer0.bias if self.enc is None else self.enc["8x8_block0"].affine.bias


class DhariwalUNet(SongUNet):
    pass


class EDMPrecond(_Persistent):
    def made(self, img_resolution, img_channels, label_dim=0, model_type="SongUNet", dtype=torch.float32, **kwargs):
        self.sigma_data = 0.5
        self.register_buffer("u", torch.zeros([], dtype=torch.float64))
        self.model = SongUNet(img_resolution, in_channels=img_channels, **kwargs)


class EDMLoss(_Persistent):
    def made(self, P_mean=-1.2):
        self.P_mean = P_mean


class EasyDict(dict):
    """A dict whose items are attributes too."""

    __getattr__ = dict.__getitem__
    __module__ = "dnnlib.util"


EasyDict.__qualname__ = "EasyDict"


def reconstruct(meta):
    raise AssertionError("it was run")


reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"


@contextlib.contextmanager
def stand_ins():
    """Have modules of the names that NVlabs' pickles hold; they are gone afterwards, so that no reader can use them."""
    modules = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib.util")}
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct
    modules["dnnlib.util"].EasyDict = EasyDict
    modules["dnnlib"] = types.ModuleType("dnnlib")
    modules["torch_utils"].persistence, modules["dnnlib"].util = (
        modules["torch_utils.persistence"],
        modules["dnnlib.util"],
    )
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def pickled(value, protocol=4):
    """The bytes of a pickle that may hold the classes of this module."""
    with stand_ins():
        return pickle.dumps(value, protocol)


def snapshot(network):
    """What a snapshot of EDM's training holds."""
    options = EasyDict(class_name="training.dataset.ImageFolderDataset", resolution=8, use_labels=False)
    return {"ema": network, "loss_fn": EDMLoss(P_mean=-1.2), "augment_pipe": None, "dataset_kwargs": options}


def network(dtype=torch.float32, shared=False):
    """A small network in EDM's layout."""
    made = EDMPrecond(img_resolution=8, img_channels=3, label_dim=0, shared=shared, channel_mult=[1, 2])
    return made.eval().requires_grad_(False).to(dtype)


class Layer(_Persistent):
    def made(self):
        pass


def snapshot_of(tensors, model="SongUNet", made_with=None, **preconditioning):
    """A snapshot whose network has these tensors, {name: tensor} with the names of EDMPrecond's state dict.

    made_with: the arguments of the network inside; preconditioning: those of EDMPrecond.
    """
    outer = _bare(EDMPrecond, preconditioning)
    outer.model = _bare({"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}[model], made_with or {})
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = outer
        for depth, part in enumerate(path):
            if part not in module._modules:
                module.add_module(
                    part, torch.nn.ModuleDict() if path[:depth] == ["model"] and part in ("enc", "dec") else Layer()
                )
            module = module._modules[part]
        if last in ("resample_filter", "freqs"):
            module.register_buffer(last, tensor)
        else:
            module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    return snapshot(outer.eval().requires_grad_(False))


def _bare(kind, arguments):
    """A module of a class with these arguments on record, and nothing in it."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    module._init_args, module._init_kwargs = (), dict(arguments)
    return module
