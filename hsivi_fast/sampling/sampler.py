"""The few-step sampler: K layers from noise to image, one seed per image. DDIM is the same code with the teacher in it."""

import dataclasses

import torch

from .. import ops
from ..build import build_ddim_layer, build_execution, build_layer, build_network, device_of, prepare_device
from ..checkpoints.run_folder import RunFolder
from ..checkpoints.weights import load_weights
from ..data import to_uint8
from ..execution import EAGER
from ..method.layers import attach_log_gamma
from ..parallel.world import ALONE, connect

WEIGHTS = ("ema", "raw")

# Below this batch the CPU's convolutions and matrix products take other kernels, which round otherwise, and a sampler
# amplifies that 25-fold on its way down. Smaller batches are filled up, so that an image does not depend on its batch.
SMALLEST_CPU_BATCH = 16


class Batches:
    """Seeds in batches of a size that `execution` can take: whole ones where shapes are fixed, and on a CPU none too small."""

    def __init__(self, execution):
        self.execution = execution
        self.size = None  # the batch that was compiled or recorded

    def __call__(self, draw, seeds, device, batch_size, on_batch=None):
        """draw(seeds [B] int64) -> samples [B, *event], of all seeds: see `Sampler.__call__`."""
        if len(seeds) == 0:
            raise ValueError("seeds: none given; ask for at least one image")
        if batch_size < 1:
            raise ValueError(f"batch: {batch_size} must be at least 1")
        seeds = torch.as_tensor(list(seeds), dtype=torch.int64, device=device)
        smallest = SMALLEST_CPU_BATCH if device.type == "cpu" else 1
        if self.execution.fixed_shapes:
            batch_size = smallest = self.size = self.size or max(smallest, min(batch_size, len(seeds)))
        parts = []
        for chunk in seeds.split(batch_size):
            wanted = len(chunk)
            if wanted < smallest:
                chunk = torch.cat([chunk, chunk[-1:].expand(smallest - wanted)])
            parts.append(draw(chunk)[:wanted])
            if on_batch:
                on_batch(wanted)
        return torch.cat(parts)


class Sampler:
    """A noise-prediction network with the layers that it runs through.

    network: (x [B, *event], t [B] int) -> noise, a module with `event_shape`; layer: `Layer`; log_gamma in the layers' shape; execution: eager,
    compiled, and on a CUDA device all layers as one graph. Network and log_gamma may be changed in place between calls.
    """

    def __init__(self, network, layer, log_gamma, execution=EAGER):
        self.network, self.layer, self.log_gamma, self.execution = network, layer, log_gamma, execution
        self.predict = execution.compiled(network)
        self._draw = execution.graphed(self._all_layers)
        self._batches = Batches(execution)

    @torch.no_grad()
    def __call__(self, seeds, batch_size=250, on_batch=None):
        """Draw one sample a seed: seeds, a sequence of ints -> float32 [N, *event] on the network's device.

        A sample depends on its own seed alone, not on the batch that it is drawn in. `on_batch(n)` is called after every
        batch with the number of samples in it. Raises ValueError for no seeds or a batch of none.
        """
        return self._batches(self._draw, seeds, self.layer.tau.device, batch_size, on_batch)

    @torch.no_grad()
    def _all_layers(self, seeds):
        """x_0 of the seeds [B], from x_K through all layers: what is recorded as one graph."""
        x = ops.draw_noise(seeds, 0, self.network.event_shape)
        for current in range(self.layer.nfe, 0, -1):
            k = torch.full_like(seeds, current)
            eps_hat = self.predict(x, self.layer.tau[k])
            # The last layer gives its mean, since noise there would only be seen as noise; DDIM with eta 0 has none anywhere.
            if current == 1 or self.layer.eta == 0:
                x = self.layer.mean(x, eps_hat, k)
            else:
                x = self.layer.step(x, eps_hat, k, self.log_gamma, seeds)
        return x

    @property
    def nfe(self):
        """Network evaluations per sample."""
        return self.layer.nfe


def ddim_sampler(config, teacher, nfe, eta, execution=EAGER):
    """DDIM with `nfe` evaluations of the teacher, at the run's betas and spacing."""
    device = device_of(teacher)
    return Sampler(teacher, build_ddim_layer(config, nfe, eta, device), torch.zeros(1, device=device), execution)


def load_sampler(run, weights="ema", step=None, backend=None, compile=None, cuda_graphs=None, world=ALONE):
    """The sampler of a run's newest checkpoint, or of that of a step: `weights` are the "ema" or the "raw" ones.

    backend ("auto", "torch" or "triton"), compile and cuda_graphs (True or False): in the place of the run's. With several processes every rank gets it,
    and rank 0 reads it. Returns (Sampler, config, step).
    Raises ValueError where the run has no checkpoint, the weights are unknown, or what is asked for cannot run here.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: {weights!r} is unknown; choose ema or raw")
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    config, steps = world.from_first(lambda: (folder.config(), folder.checkpoints()))
    if not steps:
        raise ValueError(f"run {str(folder.path)!r}: has no checkpoint yet; let `hsivi train` get further")
    step = steps[-1] if step is None else step
    choices = {key: value for key, value in (("compile", compile), ("cuda_graphs", cuda_graphs)) if value is not None}
    config = dataclasses.replace(config, **choices)
    device, _ = prepare_device(config, backend, world)
    execution = build_execution(config, device)
    layer = build_layer(config, device)
    student = attach_log_gamma(build_network(config, device), layer).to(device).eval().requires_grad_(False)
    stem = "student_ema" if weights == "ema" else "student"
    load_weights(
        student,
        world.tensors_from_first(lambda: folder.load_tensors(step, stem)),
        folder.checkpoint_path(step) / f"{stem}.safetensors",
    )
    return Sampler(student, layer, student.log_scaled_gamma, execution), config, step


def sample(run, seeds, weights="ema", batch_size=250, on_batch=None, backend=None, compile=None, cuda_graphs=None):
    """Draw images from a run: `run` is what `train` returned or a folder's path, `seeds` a sequence of ints; the rest as of `load_sampler`.

    Returns uint8 [N, C, H, W] on the CPU; for a 2-D target float32 points [N, 2]. Image n of a seed is always the same
    image, whatever the batch. Started once per process by a launcher, each rank draws its part and all have the result.
    Raises ValueError for a path that holds no run, and as `load_sampler`.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    config = folder.config()
    world = connect(config)
    with world.watched(config.distributed.timeout):
        sampler, config, _ = load_sampler(
            folder, weights, backend=backend, compile=compile, cuda_graphs=cuda_graphs, world=world
        )
        if len(seeds) == 0:
            raise ValueError("seeds: none given; ask for at least one image")
        x = sampler(world.share(seeds), batch_size, world.counting(on_batch))
        images = to_uint8(x) if x.ndim == 4 else x
        return world.gather_shares(images, len(seeds)).cpu()
