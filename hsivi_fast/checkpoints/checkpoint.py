"""What was read from a checkpoint, whatever its format."""

import json
from dataclasses import dataclass, field

import torch
from pydantic import TypeAdapter, ValidationError

from ..config import Count, GammaConfig, NetworkConfig, Positive, Spacing, TeacherConfig, settings
from ..data import brief
from .tensor_files import refuse_strange_tensors


@dataclass(frozen=True)
class Checkpoint:
    """What stands in a checkpoint.

    source: its path; format: what it is, in words.
    tensors: {role: {name: tensor}} as stored, under the names of `nets/ddpm.py` or `nets/adm.py`. A role is "teacher",
    "student", "student_ema", "score_net" or "score_net_ema".
    network: the network as `build_unet` takes it, or None where it is none of the UNets.
    stated: the keys of `network` that the file says itself.
    assumed: the keys that neither the file says nor its weights show.
    settings: more of a run's configuration that is known from it: teacher.betas, teacher.steps, nfe, gamma.
    notes: what was seen and left out.
    vae: the folder that stands beside the network in its pipeline and decodes its latents, or None.
    """

    source: str
    format: str
    tensors: dict
    network: dict | None = None
    stated: tuple = ()
    assumed: tuple = ()
    settings: dict = field(default_factory=dict)
    notes: tuple = ()
    vae: str | None = None

    def weights(self, role="teacher"):
        """{name: float32 tensor} of a role, on the CPU.

        Raises ValueError where the file has no such role, and for a tensor that cannot be weights.
        """
        if role not in self.tensors:
            raise ValueError(
                f"checkpoint {self.source!r}: has no {role}; it is {self.format} and has {', '.join(self.tensors)}"
            )
        refuse_strange_tensors(self.tensors[role], f"checkpoint {self.source!r}")
        return {name: _as_float32(tensor) for name, tensor in self.tensors[role].items()}

    def metadata(self):
        """{key: text} for a safetensors file of ours, so that nothing that this checkpoint states is lost in it."""
        stated = {key: self.network[key] for key in self.stated}
        values = {"network": stated, "settings": self.settings}
        return {f"hsivi_{key}": json.dumps(value) for key, value in values.items() if value}


def _as_float32(tensor):
    """A copy in memory: a tensor that is mapped from a file would change with the file."""
    return tensor.detach().to(torch.float32, copy=True)


@settings
class _Settings:
    """What a file of ours may say of a run."""

    teacher: TeacherConfig | None = None
    nfe: Count | None = None
    spacing: Spacing | None = None
    eta: Positive | None = None
    gamma: GammaConfig | None = None


def checked_statements(network, settings, where):
    """(network, settings) of what a file says of itself, as they came.

    Raises ValueError that begins with `where`, in one line, where they are not of the form that `Checkpoint` has.
    """
    try:
        for kind, value in ((NetworkConfig, network), (_Settings, settings)):
            if not isinstance(value, dict):
                raise ValueError(f"expected keys and values, got a {type(value).__name__}")
            TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{where}: says of itself {brief(key)}: {brief(problem['msg'])}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: what it says of itself is not readable ({brief(error)})") from None
    return network, settings
