"""What trains one network: backward, clipping, optimizer step, EMA, and its state. The only file that knows whether DeepSpeed does it.

Both engines have the same methods, and the trainer does not know which it has:

    network        the module itself; `predict` is it as a function (x, t) -> noise, as the run executes calls
    frozen()       the same for callers that pull a loss back through it to its input and want no parameter gradients
    graphed(f)     f, a whole update, from a CUDA graph where this engine's steps can be recorded
    backward       cotangents in, parameter gradients out; `accumulation` times for one step, each for its part of the batch
    step(lr)       clip, optimizer, EMA; prepare_step(lr) and apply_step() are its host's and its device's part
    averaged()     {name: tensor}, the EMA
    state, load    the whole state by parameter, whatever the processes and the ZeRO stage, so that any engine loads what another one saved

With several processes each has its part of the batch, and gradients are averaged over them before they are clipped.
"""

import functools
import json
import warnings

import torch

from ..execution import EAGER, frozen_view
from ..parallel.world import ALONE, meet_alone, samples_per_rank
from .optim import EMA, adam

SLOTS = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
)  # Adam's moments with amsgrad, in torch's names; "step" is its counter
PERSISTENT = 100_000  # elements: DeepSpeed's own default of what stage 3 does not cut
OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "amp",
)


class PlainEngine:
    """One network in one process.

    network: the module; clip: the largest gradient norm; ema: the decay of the average (see `EMA`); execution: how the network is called;
    accumulation: the number of `backward`s before a `step`.
    """

    def __init__(self, network, clip, ema, execution=EAGER, accumulation=1):
        self.network, self.execution = network, execution
        self.predict = execution.compiled(network)
        self.clip, self.accumulation = clip, accumulation
        self.names, self.parameters = zip(*network.named_parameters())
        # What the host sets before a step is a number, or where the step is recorded and replayed, a tensor that it fills.
        recorded = execution.cuda_graphs
        device = self.parameters[0].device
        self.lr, weight = (torch.zeros((), device=device) if recorded else None for _ in range(2))
        self.optimizer = adam(
            self.parameters, self.lr if recorded else 0.0, capturable=recorded and device.type == "cuda"
        )
        self.ema = EMA(network.named_parameters(), ema, weight)

    def frozen(self):
        """The network without parameter gradients, around the same memory."""
        return self.execution.compiled(frozen_view(self.network))

    def graphed(self, function):
        """`function` of tensors, replayed from a graph where the run asks for that: this engine's steps can be recorded."""
        return self.execution.graphed(function)

    def backward(self, outputs, gradients):
        """Accumulate parameter gradients from the cotangents `gradients` of `outputs` (two lists of tensors)."""
        if self.accumulation > 1:
            gradients = [gradient / self.accumulation for gradient in gradients]
        torch.autograd.backward(outputs, gradients)

    def step(self, lr):
        """Clip, update the parameters at this learning rate, clear the gradients, move the EMA."""
        self.prepare_step(lr)
        self.apply_step()

    def prepare_step(self, lr):
        """The host's part of a step: the learning rate and the counters."""
        if self.lr is not None:
            self.lr.fill_(lr)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        self.ema.count()

    def apply_step(self):
        """The device's part of a step, which can be recorded and replayed."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.parameters)

    def averaged(self):
        """{name: tensor}: the averaged parameters."""
        return self.ema.parameters

    def state(self, name):
        """What a checkpoint needs: ({file stem: {name: tensor}}, {key: number}), with stems that start with `name`."""
        optimizer = {
            f"{slot}.{parameter_name}": values[slot]
            for parameter_name, parameter in zip(self.names, self.parameters)
            for values in [self.optimizer.state.get(parameter, {})]
            for slot in values
        }
        tensors = {
            name: dict(zip(self.names, self.parameters)),
            f"{name}_ema": self.averaged(),
            f"{name}_optimizer": optimizer,
        }
        return tensors, {f"{name}_updates": self.ema.updates}

    def load(self, name, read, numbers):
        """The inverse of `state`: read(stem) gives {name: tensor}. Raises ValueError for a checkpoint of another network."""
        weights, average, optimizer = _read_state(name, read, dict(zip(self.names, self.parameters)))
        with torch.no_grad():
            for key, parameter in zip(self.names, self.parameters):
                parameter.copy_(weights[key])
                slots = {}
                for slot in ("step", *SLOTS):
                    if (value := optimizer.get(f"{slot}.{key}")) is not None:
                        # Adam's own layout: the moments lie in memory as the parameter does.
                        slots[slot] = (
                            torch.zeros_like(parameter, memory_format=torch.preserve_format).copy_(value)
                            if slot != "step"
                            else value.to(parameter.device)
                        )
                if slots:
                    self.optimizer.state[parameter] = slots
        self.ema.load(average, numbers[f"{name}_updates"])


class DeepSpeedEngine:
    """One network, trained by DeepSpeed on the processes of a `World`, with ZeRO stage 0, 1, 2 or 3 and the same Adam.

    What DeepSpeed keeps in flat pieces (1, 2: the optimizer's state and a master copy of the parameters; 3: the parameters and their average too) is
    taken apart and put together again here, by parameter, when a run is saved and loaded. The network is always called as the module itself: calls
    through DeepSpeed's engine would let it believe that the other network's backward is its own (wrong gradients in stage 3, without an error).
    """

    def __init__(self, network, clip, ema, execution, world, settings, batch_size):
        self.device = next(network.parameters()).device
        meet_alone(self.device)
        deepspeed = _deepspeed()
        self.world, self.stage, self.accumulation, self.execution = (
            world,
            settings.zero,
            settings.accumulation,
            execution,
        )
        self.names, parameters = zip(*network.named_parameters())
        self.shapes = [parameter.shape for parameter in parameters]
        outside = list(network.parameters(recurse=False))
        for parameter in network.parameters():
            parameter.data = parameter.data.clone(
                memory_format=torch.contiguous_format
            )  # the one layout of weights that DeepSpeed takes
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=network,
            optimizer=adam(parameters),
            dist_init_required=False,
            config=deepspeed_config(
                settings,
                clip,
                batch_size,
                world.size,
                kept_whole=max((parameter.numel() for parameter in outside), default=0),
            ),
        )
        self.network = self.engine.module
        self.parameters = list(self.network.parameters())
        if self.stage < 3:
            # DeepSpeed's timers, which start at every call of the module, of a rollout too, and which torch.compile cannot trace.
            self.engine.module_forward_pre_hook.remove()
            self.engine.module_forward_post_hook.remove()
        elif outside:
            # The network's own parameters (log_gamma) are used outside of its call, so on every rank they stay whole from the start to the end.
            outside[0].all_gather(outside)
            for parameter in outside:
                parameter.is_external_param = True
        self.predict = execution.compiled(self.network)
        self.ema = EMA(zip(self.names, self._averaged_parts()), ema)
        if (
            self.stage in (1, 2)
        ):  # which stretches of which parameters each rank's flat state has: (parameter, start in it, start in the flat state, elements)
            self._stretches = world.all(
                [
                    (
                        index,
                        mapping.lp_fragment_address.start,
                        mapping.hp_fragment_address.start,
                        mapping.hp_fragment_address.numel,
                    )
                    for index, parameter in enumerate(self.parameters)
                    if (mapping := parameter._hp_mapping) is not None
                ]
            )
        self._unfinished = False  # a backward that DeepSpeed has not been told the end of

    def frozen(self):
        """The network for calls that want no parameter gradients. ZeRO-3 fetches parameters by hooks of the module, so there it is the module itself."""
        return self.network if self.stage == 3 else self.execution.compiled(frozen_view(self.network))

    def graphed(self, function):
        """`function` as it is: DeepSpeed's steps decide on the host."""
        return function

    def backward(self, outputs, gradients):
        """Accumulate parameter gradients from the cotangents `gradients` of `outputs` (two lists of tensors), and average them over the processes."""
        if self._unfinished:
            self.engine.step()  # of a part of a batch: counts, and updates nothing
        if self.stage:
            # DeepSpeed's own forward does this. Without it ZeRO-3 takes the next part of a batch for the same one again, and forgets the gradients so far.
            self.optimizer.clear_backward_seen_flag()
        self.world.mark_part("averaging gradients")
        # A number whose gradient at each output is the cotangent: DeepSpeed takes a loss, which it divides by the accumulation.
        self.engine.backward(sum((output * gradient).sum() for output, gradient in zip(outputs, gradients)))
        self._unfinished = True

    def step(self, lr):
        """Clip, update the parameters at this learning rate, clear the gradients, move the EMA."""
        self.prepare_step(lr)
        self.apply_step()

    def prepare_step(self, lr):
        """The host's part of a step: the learning rate and the counters."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.ema.count()

    def apply_step(self):
        """The rest of a step."""
        self.world.mark_part("updating parameters")
        self.engine.step()
        self._unfinished = False
        self.ema.update(self._averaged_parts())

    def averaged(self):
        """{name: tensor}: the averaged parameters; in stage 3 all ranks have to ask."""
        averages = self.ema.parameters.values()
        return dict(zip(self.names, self._wholes(averages) if self.stage == 3 else averages))

    def state(self, name):
        """What a checkpoint needs, as of `PlainEngine`; all ranks have to ask, and rank 0 has it, on the CPU."""
        keep = lambda tensors: {
            key: tensor.detach().to("cpu", torch.float32, copy=True) if self.world.first else None
            for key, tensor in tensors
        }
        optimizer = {}
        step = next((values["step"] for values in self._base_optimizer().state.values()), None)
        if step is not None:
            optimizer.update(keep((f"step.{key}", step) for key in self.names))
            for slot in SLOTS:
                optimizer.update(
                    keep((f"{slot}.{key}", value) for key, value in zip(self.names, self._whole_slots(slot)))
                )
        weights = (
            self._wholes([parameter.ds_tensor for parameter in self.parameters]) if self.stage == 3 else self.parameters
        )
        tensors = {
            name: keep(zip(self.names, weights)),
            f"{name}_ema": keep(self.averaged().items()),
            f"{name}_optimizer": optimizer,
        }
        return tensors, {f"{name}_updates": self.ema.updates}

    def load(self, name, read, numbers):
        """The inverse of `state`; all ranks have to call it, and `read` gives the same on all of them. Raises ValueError for a checkpoint of another network."""
        expected = {key: torch.empty(shape, device="meta") for key, shape in zip(self.names, self.shapes)}
        weights, average, optimizer = _read_state(name, read, expected)
        with torch.no_grad():
            self._set_weights(weights)
            if optimizer:
                self._set_slots(optimizer)
            if self.stage == 3:
                average = {
                    key: self._own_part(parameter, average[key]) for key, parameter in zip(self.names, self.parameters)
                }
            self.ema.load(average, numbers[f"{name}_updates"])

    # The pieces. Stage 0: the optimizer is Adam itself, its state lies by parameter. Stages 1, 2: it is flat, each rank has a stretch of it, and
    # `_stretches` says which of which parameter lies where. Stage 3: each parameter is cut into equal parts, the last one padded.

    def _base_optimizer(self):
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def _averaged_parts(self):
        """What the EMA follows: the parameters or, in stage 3, this rank's parts of them."""
        return [parameter.ds_tensor for parameter in self.parameters] if self.stage == 3 else self.parameters

    def _wholes(self, parts):
        """Stage 3: the whole tensors of all parameters from every rank's parts of them, by one collective."""
        parts = [part.detach() for part in parts]
        gathered = self.world.gather(torch.cat(parts)).split([len(part) for part in parts], dim=1)  # [ranks, part] each
        return [whole.flatten()[: shape.numel()].reshape(shape) for whole, shape in zip(gathered, self.shapes)]

    def _own_part(self, parameter, whole):
        """This rank's part of a parameter-shaped tensor, padded with zeros as DeepSpeed does."""
        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * self.world.size, dtype=whole.dtype)
        padded[: whole.numel()] = whole.flatten()
        return padded[self.world.rank * size : (self.world.rank + 1) * size]

    def _whole_slots(self, slot):
        """A moment of all parameters, in their order and shapes."""
        if self.stage == 0:
            return [self.optimizer.state[parameter][slot] for parameter in self.parameters]
        if self.stage == 3:
            return self._wholes([self._own_slot(parameter, slot) for parameter in self.parameters])
        gathered, wholes = (
            self.world.gather(self._flat_slot(slot)),
            [torch.empty(shape.numel(), device=self.device) for shape in self.shapes],
        )
        for flat, stretches in zip(gathered, self._stretches):
            for index, own, start, count in stretches:
                wholes[index][own : own + count] = flat[start : start + count]
        return [whole.reshape(shape) for whole, shape in zip(wholes, self.shapes)]

    def _flat_slot(self, slot):
        (flat,) = self.optimizer.single_partition_of_fp32_groups
        return self._base_optimizer().state[flat][slot]

    def _own_slot(self, parameter, slot):
        group, start, count = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        return self._base_optimizer().state[self.optimizer.fp32_partitioned_groups_flat[group]][slot][
            start : start + count
        ]

    def _set_weights(self, weights):
        for key, parameter in zip(self.names, self.parameters):
            if self.stage == 3:
                parameter.ds_tensor.copy_(self._own_part(parameter, weights[key]))
                if parameter.shape == parameter.ds_shape:  # it lies here as a whole too
                    parameter.copy_(weights[key])
            else:
                parameter.copy_(weights[key])
        if self.stage:
            self.optimizer.refresh_fp32_params()

    def _set_slots(self, values):
        step = values[f"step.{self.names[0]}"].to(self.device)
        state = self._base_optimizer().state
        if self.stage == 0:
            for key, parameter in zip(self.names, self.parameters):
                state[parameter] = {
                    "step": step.clone(),
                    **{
                        slot: torch.zeros_like(parameter, memory_format=torch.preserve_format).copy_(
                            values[f"{slot}.{key}"]
                        )
                        for slot in SLOTS
                    },
                }
            return
        pieces = (
            self.optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.optimizer.single_partition_of_fp32_groups
        )
        for flat in pieces:
            state[flat] = {"step": step.clone(), **{slot: torch.zeros_like(flat) for slot in SLOTS}}
        for slot in SLOTS:
            if self.stage == 3:
                for key, parameter in zip(self.names, self.parameters):
                    self._own_slot(parameter, slot).copy_(self._own_part(parameter, values[f"{slot}.{key}"]))
            else:
                for index, own, start, count in self._stretches[self.world.rank]:
                    self._flat_slot(slot)[start : start + count] = values[f"{slot}.{self.names[index]}"].flatten()[
                        own : own + count
                    ]


def uses_deepspeed(config, size):
    """Whether the networks of a run on `size` processes are trained by DeepSpeed."""
    return config.distributed.engine == "deepspeed" or config.distributed.engine == "auto" and size > 1


def check_distribution(config, size):
    """Whether `size` processes can train the run as it says: raises ValueError for `plain` with several, a batch that cannot be cut so, what ZeRO-3 cannot do."""
    settings = config.distributed
    if settings.engine == "plain" and size > 1:
        raise ValueError(
            f"distributed.engine: 'plain' trains in one process and there are {size}; choose auto or deepspeed"
        )
    samples = samples_per_rank("train.batch_size", config.train.batch_size, size)
    if samples % settings.accumulation:
        raise ValueError(
            f"distributed.accumulation: {settings.accumulation} parts do not fit the {samples} samples of a process; use a divisor of {samples}"
        )
    key = "cuda_graphs" if config.cuda_graphs else "compile" if config.compile else None
    if settings.zero == 3 and key and uses_deepspeed(config, size):
        raise ValueError(
            f"{key}: true does not go with distributed.zero=3, which moves parameters around in every call; choose stage 0, 1 or 2, or {key}=false"
        )


def build_engine(config, network, execution=EAGER, world=ALONE):
    """The engine that the configuration asks for; raises ValueError for a settings file of DeepSpeed's that does not fit."""
    settings, train = config.distributed, config.train
    if not uses_deepspeed(config, world.size):
        return PlainEngine(network, train.clip, train.ema, execution, settings.accumulation)
    return DeepSpeedEngine(network, train.clip, train.ema, execution, world, settings, train.batch_size)


def deepspeed_config(settings, clip, batch_size, world_size, kept_whole=0):
    """DeepSpeed's own configuration of one network: the file that `distributed.deepspeed` names, under what the run says. Parameters up to the size
    `kept_whole` stay whole on every rank in stage 3.

    Raises ValueError for a file that is not there, is no JSON object, or sets what the run sets.
    """
    given, zero = {}, {}
    if settings.deepspeed is not None:
        try:
            with open(settings.deepspeed) as file:
                given = json.load(file)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"distributed.deepspeed {settings.deepspeed!r}: not readable as JSON: {' '.join(str(error).split())}"
            ) from None
        if not isinstance(given, dict) or not isinstance(given.get("zero_optimization", {}), dict):
            raise ValueError(f"distributed.deepspeed {settings.deepspeed!r}: expected an object with settings")
        zero = given.get("zero_optimization", {})
        taken = [key for key in OURS if key in given] + [
            f"zero_optimization.{key}"
            for key in ("stage", "offload_optimizer", "offload_param", "cpu_offload")
            if key in zero
        ]
        if taken:
            raise ValueError(
                f"distributed.deepspeed {settings.deepspeed!r}: sets {taken[0]}, which the run's own keys say (offloading is not possible with amsgrad); remove it"
            )
    accumulation = settings.accumulation
    return {
        **given,
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            **zero,
            "stage3_param_persistence_threshold": max(
                zero.get("stage3_param_persistence_threshold", PERSISTENT), kept_whole
            ),
            "stage": settings.zero,
        },
    }


@functools.cache
def _deepspeed():
    """The package, with what it would do by itself on a CPU left out."""
    import deepspeed

    # A collective in shared memory that serves inference alone, compiled for 40 s at the first start and wrong for more than one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # it still calls collectives by their older names
    return deepspeed


def _read_state(name, read, expected):
    """(weights, average, optimizer state) of a checkpoint; ValueError where a tensor of `expected` {name: tensor} is missing or has another shape."""
    weights, average, optimizer = read(name), read(f"{name}_ema"), read(f"{name}_optimizer")
    for stem, values in ((name, weights), (f"{name}_ema", average)):
        different = [key for key, own in expected.items() if key not in values or values[key].shape != own.shape]
        if different:
            raise ValueError(f"checkpoint: {stem} is of another network, first at {different[0]}")
    return weights, average, optimizer
