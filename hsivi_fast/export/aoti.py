"""The export as one package that AOTInductor compiles: it needs torch alone, and is run by use.py beside it."""

import math

import torch
from torch import nn

from ..execution import has_compiler
from ..method.class_labels import if_given
from ..ops import reference
from ..sampling.sampler import SMALLEST_CPU_BATCH, of_parameters
from .check import CHECKED, as_samples, check_samples
from .description import write_description

LARGEST_BATCH = 2**16  # that the package takes

# The package rounds otherwise than the run's sampler. This share of the pixels may be one grey level off, measured on
# as many samples as have so many pixels; and so far may a coordinate of a 2-D sample be off.
PIXELS_OFF = 1e-3
CHECKED_PIXELS = 2**14
COORDINATE_OFF = 1e-4

# The texts of use.py. A backslash at the end of a line joins it with the next.
USE_IMAGES = '''\
"""Seeds to a grid of pictures, with torch, numpy and Pillow alone: \
python use.py [FIRST SEED] [HOW MANY] [FILE]{usage}"""
import math
import sys
from pathlib import Path

import torch
import torch._inductor
from PIL import Image

first, count = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 0), (2, 16)))
file = sys.argv[3] if len(sys.argv) > 3 else "grid.png"
sampler = torch._inductor.aoti_load_package(str(Path(__file__).with_name("sampler.pt2")))
seeds = torch.arange(first, first + max(count, {smallest}), device="{device}")  \
# in small batches a CPU rounds otherwise: fill them up
{labels}images = sampler({inputs})[:count].cpu()  # uint8 [count, C, H, W]
columns = math.ceil(math.sqrt(count))
grid = torch.zeros(-(-count // columns) * columns, *images.shape[1:], dtype=torch.uint8)
grid[:count] = images
grid = torch.cat([torch.cat(list(row), dim=2) for row in grid.split(columns)], dim=1)  # [C, rows H, columns W]
Image.fromarray((grid[0] if len(grid) == 1 else grid.permute(1, 2, 0)).numpy()).save(file)
print(f"{{count}} images of the seeds {{first}} to {{first + count - 1}}: {{file}}")
'''

# What it has on top for a network with classes: an argument, and the labels.
OF_CLASSES = {
    "usage": " [CLASS]",
    "labels": "labels = torch.full_like(seeds, int(sys.argv[4]) if len(sys.argv) > 4 else 0)\n",
    "inputs": "seeds, labels",
}
OF_NO_CLASSES = {"usage": "", "labels": "", "inputs": "seeds"}

USE_POINTS = '''\
"""Seeds to points, with torch alone: python use.py [FIRST SEED] [HOW MANY], one point a line"""
import sys
from pathlib import Path

import torch
import torch._inductor

first, count = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 0), (2, 16)))
sampler = torch._inductor.aoti_load_package(str(Path(__file__).with_name("sampler.pt2")))
seeds = torch.arange(first, first + max(count, {smallest}), device="{device}")  \
# in small batches a CPU rounds otherwise: fill them up
for point in sampler(seeds)[:count].tolist():
    print(*point)
'''


class _Standalone(nn.Module):
    """seeds int64 [B] -> samples: the sampler's layers in plain torch. With classes there are labels int64 [B] too.

    Operators of ours are not used: they exist only where hsivi_fast is imported.
    """

    def __init__(self, sampler, context):
        super().__init__()
        self.network, self.layers, self.config = sampler.network, sampler.layers, context.config
        self.to_target = context.decoder if context.config.target is not None else nn.Identity()

    def forward(self, seeds, labels=None):
        layers = self.layers
        rows = layers.rows(self.network.log_scaled_gamma)
        x, noise = self._noise(seeds)
        for current in range(layers.nfe, 0, -1):
            k = torch.full_like(seeds, current)
            eps_hat = self.network(x, layers.tau[k], *if_given(labels))
            c1 = layers.c1 if current in noise else None  # an image's last layer gives its mean
            given = noise.get(current)
            x = reference.affine_noise_step(x, eps_hat, layers.a, layers.b, c1, rows, seeds, k, noise=given)
        return as_samples(self.to_target(x), self.config)

    def _noise(self, seeds):
        """(x_K [B, *event], {k: the noise of layer k}), all drawn at once.

        The arithmetic of counter-based noise is most of what a compiler would read: once, and not once a layer.
        """
        streams = [0, *range(self.layers.nfe, 0 if self.layers.ends_with_noise else 1, -1)]
        each = torch.tensor(streams, device=seeds.device)[:, None].expand(len(streams), len(seeds)).flatten()
        noise = reference.draw_noise(seeds.repeat(len(streams)), each, self.network.event_shape)
        x, *others = noise.unflatten(0, (len(streams), len(seeds)))
        return x, dict(zip(streams[1:], others))


def refuse_aoti(config):
    """ValueError where a run of this configuration cannot be compiled, or this machine has no compiler."""
    if config.teacher.vae is not None:
        raise ValueError("format: 'aoti' holds no VAE, and this run makes latents; choose safetensors or diffusers")
    if config.precision != "fp32":
        raise ValueError(
            f"format: 'aoti' computes in float32 and the run's precision is {config.precision}; "
            "choose safetensors or diffusers"
        )
    if not has_compiler():
        raise ValueError(
            "format: 'aoti' needs a C++ compiler, and neither g++ nor clang++ nor $CXX is there; "
            "install one or choose safetensors or diffusers"
        )


def write_aoti(sampler, context, description, folder):
    """Write sampler.pt2, use.py and config.json, and check the package; returns what config.json holds."""
    config, device = context.config, sampler.layers.tau.device
    smallest = SMALLEST_CPU_BATCH if device.type == "cpu" else 1
    file = folder / "sampler.pt2"
    _compile(_Standalone(sampler, context), sampler.class_labels, device, file)
    _check(file, sampler, context, device)
    use = USE_IMAGES if config.teacher.checkpoint is not None else USE_POINTS
    has_classes = sampler.class_labels.classes is not None
    words = OF_CLASSES if has_classes else OF_NO_CLASSES
    (folder / "use.py").write_text(use.format(smallest=smallest, device=device.type, **words))
    of_labels = ", labels int64 [B]" if has_classes else ""
    compiled = {
        "torch": torch.__version__,
        "device": device.type,
        "input": f"seeds int64 [B]{of_labels}, B in 1 .. {LARGEST_BATCH}",
        "smallest_batch": smallest,
    }
    return write_description(folder, {**description, "compiled": compiled}, file)


def _inputs(class_labels, seeds):
    """What a package is called with: the seeds, and with classes their labels."""
    return (seeds,) if class_labels.classes is None else (seeds, class_labels(seeds))


def _compile(module, class_labels, device, file):
    """Write the package of a module that takes seeds [B] on a device, and with classes their labels."""
    from torch._inductor import aoti_compile_and_package  # late: it takes a second, and only this format needs it

    inputs = _inputs(class_labels, torch.arange(SMALLEST_CPU_BATCH, device=device))
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad():
        exported = torch.export.export(module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=True)
    settings = {
        "cpp.dynamic_threads": True,  # or the number of threads of this process would be compiled in
        "aot_inductor.precompile_headers": False,  # for two source files they cost more time than they save
    }
    aoti_compile_and_package(exported, package_path=str(file), inductor_configs=settings)


def _check(file, sampler, context, device):
    """ValueError where a package's samples are not the sampler's.

    The batch has another size than the one that was traced: the check is of the dynamic shape too.
    """
    from torch._inductor import aoti_load_package  # late: as above

    count = max(CHECKED, -(-CHECKED_PIXELS // math.prod(sampler.network.event_shape)))
    packaged = aoti_load_package(str(file))(*_inputs(sampler.class_labels, torch.arange(count, device=device)))
    expected = as_samples(of_parameters(sampler, context)(range(count), batch_size=count), context.config)
    check_samples(packaged, expected, PIXELS_OFF, COORDINATE_OFF)
