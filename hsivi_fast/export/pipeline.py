"""A run's sampler as a pipeline of diffusers: `HSIVIPipeline.from_pretrained(DIR)`.

DIR is what `hsivi export RUN --format diffusers` made. Randomness is the project's own, by address: each image has a
seed, and all its noise is a function of that. Generators are asked for seeds and for nothing else, so an image depends
on its own generator alone, not on the batch that it is drawn in.
"""

import importlib

import torch
from PIL import Image

try:
    from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
    from diffusers.utils import is_accelerate_available
except ModuleNotFoundError as error:
    if error.name != "diffusers":
        raise
    raise ImportError("diffusers: is not installed; pip install diffusers") from None

from .. import ops
from ..checkpoints.autoencoder import Decoder
from ..checkpoints.weights import load_weights
from ..data import to_uint8
from ..method.class_labels import ClassLabels
from ..method.layers import Layers
from ..method.parametrisation import noise_coefficients
from ..method.schedule import make_schedule, signal_levels
from ..nets import build_unet
from ..nets.prepared import Prepared
from ..sampling.sampler import SMALLEST_CPU_BATCH, check_labels

OUTPUT_TYPES = ("pil", "np", "pt")
SEEDS = 2**63  # there are so many: 0 .. 2^63 - 1

# model_index.json names the module in which a class says to be, and a class is looked up there when a pipeline is
# loaded. The classes name the documented path, so that exported folders do not depend on where this file lies.
PUBLIC_PATH = "hsivi_fast.diffusers"

# The file in an exported folder that diffusers takes the class from.
PIPELINE_FILE = "pipeline.py"

# What UNet2DModel would make of the network's folder is one of random weights, and a warning. It refuses this text in
# the place of its list of blocks, and prints it.
NO_UNET2D = "none: this is no UNet2DModel; load the pipeline with hsivi_fast.diffusers.HSIVIPipeline"


class HSIVINetwork(ModelMixin, ConfigMixin):
    """The student with its learned noise scale, as a model of diffusers.

    network: the full description that `nets.build_unet` takes; log_scaled_gamma: the noise scale's shape; precision,
    channels_last and timestep_scale: how the network computes; prediction, betas, steps: the teacher's, which say how
    noise is made of what it predicts; classes: those that the labels of seeds are drawn from, None for a network
    without. Its weights are float32 and have the names of a run's checkpoint after "student.".
    down_block_types: a text for those who read config.json as another class's.
    """

    __module__ = PUBLIC_PATH

    @register_to_config
    def __init__(
        self,
        network,
        log_scaled_gamma,
        precision="fp32",
        channels_last=False,
        timestep_scale=1.0,
        prediction="epsilon",
        betas="linear",
        steps=1000,
        classes=None,
        down_block_types=NO_UNET2D,
    ):
        super().__init__()
        self.student = build_unet(network)
        self.student.precision, self.student.timestep_scale = precision, timestep_scale
        if prediction != "epsilon":
            self.student.convert_by(noise_coefficients(prediction, signal_levels(betas, steps), timestep_scale))
        self.student.channels_last = channels_last  # of what lies inside; files of weights are row-major
        self.class_labels = ClassLabels(self.student.classes, classes)
        self.student.register_parameter("log_scaled_gamma", torch.nn.Parameter(torch.zeros(tuple(log_scaled_gamma))))

    @property
    def event_shape(self):
        """(C, H, W) of the images."""
        return self.student.event_shape

    def load_student(self, weights):
        """Copy name -> tensor of a run's checkpoint; ValueError where they are of another network."""
        load_weights(self.student, weights, "student")

    def forward(self, sample, timestep, class_labels=None):
        """The noise in sample [B, C, H, W] at timestep [B] int, or an int: [B, C, H, W]; class_labels: [B] int."""
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        return self.student(sample, timestep, class_labels)


class HSIVIScheduler(SchedulerMixin, ConfigMixin):
    """The K semi-implicit layers as a scheduler: layer k maps x_k at timestep tau_k to x_{k-1}.

    num_train_timesteps and betas ("linear", "cosine", "cosine_4000"): the teacher's; nfe: K, fixed by the
    distillation; spacing: as of `method.schedule.knots`; eta: DDIM's; per_step, per_pixel: the noise scale's shape.
    """

    __module__ = PUBLIC_PATH

    @register_to_config
    def __init__(
        self, num_train_timesteps=1000, betas="linear", nfe=10, spacing="quad", eta=0.2, per_step=False, per_pixel=True
    ):
        self.layers = Layers(make_schedule(betas, num_train_timesteps, spacing, nfe), eta, per_step, per_pixel)
        self._knots = self.layers.tau.tolist()
        self.set_timesteps()

    def set_timesteps(self, num_inference_steps=None, device=None):
        """Move the tables to a device and list `timesteps`, tau_K .. tau_1.

        ValueError for another number of steps than the student was trained for.
        """
        nfe = self.layers.nfe
        if num_inference_steps not in (None, nfe):
            raise ValueError(
                f"num_inference_steps: {num_inference_steps!r} is not the number that the sampler was distilled for; "
                f"use {nfe}, or leave it out"
            )
        self.layers.to(device)
        self.num_inference_steps = nfe
        self.timesteps = self.layers.tau[1:].flip(0)

    def step(self, model_output, timestep, sample, log_gamma, seeds, return_dict=True):
        """x_{k-1} from x_k = sample [B, C, H, W] and the network's noise in it, at timestep tau_k.

        log_gamma: the network's `log_scaled_gamma`; seeds [B] int64 address the layer's noise. The last layer gives its
        mean, as the run's sampler does.
        """
        current = self._knots.index(int(timestep))
        k = torch.full_like(seeds, current)
        if current == 1:
            previous = self.layers.mean(sample, model_output, k)
        else:
            previous = self.layers.step(sample, model_output, log_gamma, ops.Noise(seeds, k))
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)


class HSIVIPipeline(DiffusionPipeline):
    """Images in a few network evaluations: `HSIVIPipeline.from_pretrained(DIR)(batch_size=16).images`.

    vae: an AutoencoderKL or VQModel that decodes what a network in latents makes; other folders have none.
    """

    __module__ = PUBLIC_PATH
    _optional_components = ["vae"]

    def __init__(self, unet, scheduler, vae=None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    @classmethod
    def load_config(cls, *arguments, **options):
        """model_index.json, where the class is this one.

        There it is [file, class], for those who load the folder by `DiffusionPipeline`. To take it from that file is to
        run the file, for which they have to be asked; whoever imported this class need not be.
        """
        loaded = super().load_config(*arguments, **options)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if config.get("_class_name") == [PIPELINE_FILE.removesuffix(".py"), cls.__name__]:
            config["_class_name"] = cls.__name__
        return loaded

    @classmethod
    def from_pretrained(cls, folder, **options):
        """The pipeline of an exported folder; options as of `DiffusionPipeline.from_pretrained`."""
        importlib.import_module(PUBLIC_PATH)  # diffusers looks classes up in modules that are imported already
        # Without accelerate diffusers would do the same, and advise to install it.
        options.setdefault("low_cpu_mem_usage", is_accelerate_available())
        return super().from_pretrained(folder, **options)

    @torch.no_grad()
    def __call__(
        self,
        batch_size=None,
        generator=None,
        seeds=None,
        latents=None,
        class_labels=None,
        num_inference_steps=None,
        output_type="pil",
        return_dict=True,
    ):
        """Draw images.

        batch_size: how many, by default as many as there are seeds, generators or latents, or else 1.
        seeds: one int an image, 0 <= seed < 2^63; image by image what `hsivi sample` draws for them.
        generator: in their place a torch.Generator, which is asked for one seed an image in turn, or a list of one
        generator an image, each asked for one; torch's global generator by default. So the same generator state gives
        the same image, alone or in any place of any batch.
        latents: float [B, c, h, w] in the place of x_K, the noise that the first layer starts from; the layers' own
        noise still comes from the seeds.
        class_labels: of a network with classes, one int for all images or one for each; by default each seed has its
        own label, as in `hsivi sample`.
        num_inference_steps: may be given, but the number is fixed by the distillation.
        output_type: "pil", a list of pictures; or pixels / 255 in 0 .. 1, as "np", float32 [B, H, W, C], or as "pt",
        float32 [B, C, H, W] on the device.

        Returns ImagePipelineOutput(images=...), or the tuple (images,) without return_dict. Raises ValueError for
        arguments that do not fit.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: {output_type!r} is unknown; choose pil, np or pt")
        if self.unet.dtype != torch.float32:
            raise ValueError(
                f"torch_dtype: the weights are {self.unet.dtype} and have to be torch.float32; the precision is the "
                f"run's own, {self.unet.config.precision}"
            )
        device = self.unet.device
        self.scheduler.set_timesteps(num_inference_steps, device)
        count = self._count(batch_size, generator, seeds, latents)
        if class_labels is not None:
            class_labels = list(check_labels(class_labels, count, self.unet.class_labels.classes))
        seeds = torch.tensor(self._seeds(count, generator, seeds), dtype=torch.int64, device=device)
        if device.type == "cpu" and count < SMALLEST_CPU_BATCH:  # it is filled up, as the run's sampler does
            seeds = torch.cat([seeds, seeds[-1:].expand(SMALLEST_CPU_BATCH - count)])
        labels = self.unet.class_labels(seeds)
        if class_labels is not None:
            labels[:count] = torch.tensor(class_labels)
        x = ops.draw_noise(seeds, 0, self.unet.event_shape)
        if latents is not None:
            x[:count] = latents
        # As the run's sampler calls it: it rounds as that does.
        predict = Prepared(self.unet.student).at(self.scheduler.timesteps)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            noise = predict(x, timestep.expand(len(x)), labels)
            x = self.scheduler.step(noise, timestep, x, self.unet.student.log_scaled_gamma, seeds, return_dict=False)[0]
        images = _as(output_type, to_uint8(x[:count] if self.vae is None else Decoder(self.vae)(x[:count])))
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _count(self, batch_size, generator, seeds, latents):
        """How many images are asked for: all arguments that say it have to agree."""
        counts = {}  # {argument: how many it says}
        if batch_size is not None:
            counts["batch_size"] = batch_size
        if seeds is not None:
            counts["seeds"] = len(seeds)
        if latents is not None:
            counts["latents"] = len(latents)
        if isinstance(generator, (list, tuple)):
            counts["generator"] = len(generator)
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} says {count}" for name, count in counts.items())
            raise ValueError(f"batch_size: {said}; one of each an image")
        count = next(iter(counts.values()), 1)
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"batch_size: {count!r} must be a whole number, at least 1")
        if latents is not None and tuple(latents.shape) != (count, *self.unet.event_shape):
            raise ValueError(f"latents: of shape {list(latents.shape)}, expected {[count, *self.unet.event_shape]}")
        return count

    def _seeds(self, count, generator, seeds):
        """One seed an image, as ints."""
        if seeds is None:
            generators = generator if isinstance(generator, (list, tuple)) else [generator] * count
            return [_draw_seed(each) for each in generators]
        if generator is not None:
            raise ValueError("seeds: given beside generator; give one of them")
        seeds = [int(seed) for seed in seeds]
        for seed in seeds:
            if not 0 <= seed < SEEDS:
                raise ValueError(f"seeds: {seed} is not a seed; use whole numbers from 0 to 2^63 - 1")
        return seeds


def _draw_seed(generator):
    """A seed of a torch.Generator, or of torch's global one where it is None."""
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(SEEDS - 1, (1,), generator=generator, device=device))


def _as(output_type, images):
    """uint8 [B, C, H, W] in the form that was asked for."""
    if output_type == "pt":
        return images.float() / 255
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return pixels.astype("float32") / 255
    return [Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image) for image in pixels]
