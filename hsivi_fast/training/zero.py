"""What trains one network on several processes: DeepSpeed, with ZeRO stage 0 to 3. No other file calls DeepSpeed.

`engine.py` says what both engines offer. With several processes each has its share of the batch, and gradients are
averaged over them before they are clipped. `build_engine` chooses between the two.
"""

import functools
import json
import warnings
from itertools import accumulate

import torch

from ..config import uses_deepspeed
from ..data import regular_file
from ..nets.prepared import Prepared
from ..parallel.world import meet_alone, samples_per_rank
from .engine import PlainEngine, read_state
from .optim import EMA, SLOTS, adam, forget_moments, laid_out_as, set_rate

PERSISTENT = 100_000  # elements: DeepSpeed's own default of what stage 3 does not cut

# Settings of DeepSpeed's that the run's own keys say.
TAKEN = (
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
# Timers of DeepSpeed's own forward, which a run does not call, and gradients that no layer of ours has.
UNSUPPORTED = ("wall_clock_breakdown", "sparse_gradients")
TAKEN_OF_ZERO = ("stage", "offload_optimizer", "offload_param", "cpu_offload")


class DeepSpeedEngine:
    """One network, trained by DeepSpeed on the processes of a `World`, with ZeRO stage 0, 1, 2 or 3 and the same Adam.

    DeepSpeed keeps some tensors in flat pieces: in stages 1 and 2 the optimizer's state and a master copy of the
    parameters, in stage 3 the parameters and their average too. When a run is saved and loaded, they are taken apart
    and put together again here, by parameter.

    The network is always called as the module itself. Calls through DeepSpeed's engine would let it believe that the
    other network's backward is its own: wrong gradients in stage 3, without an error.
    """

    def __init__(self, context, network):
        config, world = context.config, context.world
        settings = config.distributed
        self.world, self.execution, self.device = world, context.execution, context.device
        self.stage, self.accumulation = settings.zero, settings.accumulation
        meet_alone(self.device)
        self.names, parameters = zip(*network.named_parameters())
        self.shapes = [parameter.shape for parameter in parameters]
        # The network's own parameters (log_gamma) are used outside of its call.
        outside = list(network.parameters(recurse=False))
        largest_outside = max((parameter.numel() for parameter in outside), default=0)
        for parameter in parameters:  # row-major, which DeepSpeed sends and flattens
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self.engine, self.optimizer, _, _ = _deepspeed().initialize(
            model=network,
            optimizer=adam(zip(self.names, parameters), config.train.beta1, own_rates(config)),
            dist_init_required=False,
            config=deepspeed_config(config, world.size, kept_whole=largest_outside),
        )
        self.network = self.engine.module
        if self.stage == 0 and network.channels_last:
            self.network.in_channels_last()  # the other stages keep views of flat pieces, which stay row-major
        self.parameters = list(self.network.parameters())
        if self.stage < 3:
            # DeepSpeed's timers. They start at every call of the module, of a rollout too, and torch.compile cannot
            # trace them.
            self.engine.module_forward_pre_hook.remove()
            self.engine.module_forward_post_hook.remove()
        elif outside:
            # On every rank they stay whole from the start to the end.
            outside[0].all_gather(outside)
            for parameter in outside:
                parameter.is_external_param = True
        self.predict = self.execution.compiled(self.network)
        self.ema = EMA(zip(self.names, self._averaged_tensors()), config.train.ema)
        if self.stage in (1, 2):
            self._stretches = world.all(self._stretches_of_this_rank())
        self._unfinished = False  # a backward that DeepSpeed has not been told the end of

    def frozen(self):
        """The network for calls that want no parameter gradients.

        ZeRO-3 fetches parameters by hooks of the module, so there it is the module itself.
        """
        return Prepared(self.network, whole=self.stage < 3)

    records = False  # see `graphed`

    def graphed(self, function):
        """`function` as it is: DeepSpeed's steps decide on the host."""
        return function

    def backward(self, outputs, gradients):
        """Accumulate parameter gradients from the cotangents `gradients` of `outputs`, and average them over ranks.

        outputs, gradients: two lists of tensors.
        """
        if self._unfinished:
            self.engine.step()  # of a micro-batch: counts, and updates nothing
        if self.stage:
            # DeepSpeed's own forward does this. Without it ZeRO-3 takes the next micro-batch for the same one again,
            # and forgets the gradients so far.
            self.optimizer.clear_backward_seen_flag()
        self.world.mark_detail("averaging gradients")
        # DeepSpeed takes a loss, which it divides by the accumulation: here a number whose gradient at each output is
        # the cotangent.
        self.engine.backward(sum((output * gradient).sum() for output, gradient in zip(outputs, gradients)))
        self._unfinished = True

    def step(self, lr):
        """Clip, update the parameters at this learning rate, clear the gradients, move the EMA."""
        self.prepare_step(lr)
        self.apply_step()

    def prepare_step(self, lr):
        """What the host does of a step: the learning rate and the counters."""
        set_rate(self.optimizer, lr)
        self.ema.count()

    def apply_step(self):
        """The rest of a step."""
        self.world.mark_detail("updating parameters")
        self.engine.step()
        self._unfinished = False
        self.ema.update(self._averaged_tensors())

    def restart(self):
        """Forget the moments and the average: the next step is the first one, from the present parameters."""
        forget_moments(self._base_optimizer())
        self.ema.restart(self._averaged_tensors())

    def averaged(self):
        """{name: tensor}: the averaged parameters; in stage 3 all ranks have to ask."""
        averages = self.ema.parameters.values()
        return dict(zip(self.names, self._joined(averages) if self.stage == 3 else averages))

    def state(self, name):
        """What a checkpoint needs, as of `PlainEngine`; all ranks have to ask, and rank 0 has it, on the CPU."""
        optimizer = {}
        step = next((values["step"] for values in self._base_optimizer().state.values()), None)
        if step is not None:
            optimizer.update(self._kept((f"step.{key}", step) for key in self.names))
            for slot in SLOTS:
                moments = zip(self.names, self._whole_moments(slot))
                optimizer.update(self._kept((f"{slot}.{key}", moment) for key, moment in moments))
        weights = self.parameters
        if self.stage == 3:
            weights = self._joined([parameter.ds_tensor for parameter in self.parameters])
        tensors = {
            name: self._kept(zip(self.names, weights)),
            f"{name}_ema": self._kept(self.averaged().items()),
            f"{name}_optimizer": optimizer,
        }
        return tensors, {f"{name}_updates": self.ema.updates}

    def _kept(self, named_tensors):
        """{name: float32 copy on the CPU} on rank 0, {name: None} on the others."""
        if not self.world.is_main:
            return {name: None for name, _ in named_tensors}
        return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in named_tensors}

    def load(self, name, read, numbers):
        """The inverse of `state`; all ranks have to call it, and `read` gives the same on all of them.

        Raises ValueError for a checkpoint of another network.
        """
        expected = {key: torch.empty(shape, device="meta") for key, shape in zip(self.names, self.shapes)}
        weights, average, optimizer = read_state(name, read, expected)
        with torch.no_grad():
            self._set_weights(weights)
            if optimizer:
                self._set_moments(optimizer)
            if self.stage == 3:
                named = zip(self.names, self.parameters)
                average = {key: self._shard_of(average[key], parameter) for key, parameter in named}
            self.ema.load(average, numbers[f"{name}_updates"])

    # Where the pieces are. Stage 0: the optimizer is Adam itself, and its state lies by parameter. Stages 1 and 2: it
    # is flat, one tensor a group of parameters, each rank has a stretch of each, and `_stretches` says which of which
    # parameter lies where. Stage 3: each parameter is cut into equal shards, the last one padded.

    def _base_optimizer(self):
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def _averaged_tensors(self):
        """What the EMA follows: the parameters or, in stage 3, this rank's shards of them."""
        return [parameter.ds_tensor for parameter in self.parameters] if self.stage == 3 else self.parameters

    def _stretches_of_this_rank(self):
        """Stages 1 and 2, what its flat state holds: (parameter, start in it, start in the flat state, elements).

        The groups of the flat state are counted on, one after the other.
        """
        pieces = self.optimizer.single_partition_of_fp32_groups
        starts = list(accumulate((flat.numel() for flat in pieces), initial=0))
        group_of = {id(p): number for number, group in enumerate(self.optimizer.bit16_groups) for p in group}
        stretches = []
        for index, parameter in enumerate(self.parameters):
            mapping = parameter._hp_mapping
            if mapping is not None:
                flat, before = mapping.hp_fragment_address, starts[group_of[id(parameter)]]
                stretches.append((index, mapping.lp_fragment_address.start, before + flat.start, flat.numel))
        return stretches

    def _joined(self, shards):
        """Stage 3: the whole tensors of all parameters from every rank's shards of them, by one collective."""
        shards = [shard.detach() for shard in shards]
        sizes = [len(shard) for shard in shards]
        gathered = self.world.gather(torch.cat(shards)).split(sizes, dim=1)  # [ranks, shard] each
        return [whole.flatten()[: shape.numel()].reshape(shape) for whole, shape in zip(gathered, self.shapes)]

    def _shard_of(self, whole, parameter):
        """Stage 3: this rank's shard of a parameter-shaped tensor, padded with zeros as DeepSpeed does."""
        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * self.world.size, dtype=whole.dtype)
        padded[: whole.numel()] = whole.flatten()
        return padded[self.world.rank * size : (self.world.rank + 1) * size]

    def _whole_moments(self, slot):
        """A moment of all parameters, in their order and shapes."""
        if self.stage == 0:
            return [self.optimizer.state[parameter][slot] for parameter in self.parameters]
        if self.stage == 3:
            return self._joined([self._moment_shard(parameter, slot) for parameter in self.parameters])
        state, pieces = self._base_optimizer().state, self.optimizer.single_partition_of_fp32_groups
        gathered = self.world.gather(torch.cat([state[flat][slot] for flat in pieces]))
        wholes = [torch.empty(shape.numel(), device=self.device) for shape in self.shapes]
        for flat, stretches in zip(gathered, self._stretches):
            for index, start, flat_start, count in stretches:
                wholes[index][start : start + count] = flat[flat_start : flat_start + count]
        return [whole.reshape(shape) for whole, shape in zip(wholes, self.shapes)]

    def _moment_shard(self, parameter, slot):
        """Stage 3: this rank's shard of a moment of one parameter."""
        group, start, count = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        flat = self.optimizer.fp32_partitioned_groups_flat[group]
        return self._base_optimizer().state[flat][slot][start : start + count]

    def _set_weights(self, weights):
        for key, parameter in zip(self.names, self.parameters):
            if self.stage == 3:
                parameter.ds_tensor.copy_(self._shard_of(weights[key], parameter))
                if parameter.shape == parameter.ds_shape:  # it lies here as a whole too
                    parameter.copy_(weights[key])
            else:
                parameter.copy_(weights[key])
        if self.stage:
            self.optimizer.refresh_fp32_params()

    def _set_moments(self, values):
        """values: {"slot.parameter": tensor}."""
        step = values[f"step.{self.names[0]}"].to(self.device)
        state = self._base_optimizer().state
        if self.stage == 0:
            for key, parameter in zip(self.names, self.parameters):
                moments = {slot: laid_out_as(parameter, values[f"{slot}.{key}"]) for slot in SLOTS}
                state[parameter] = {"step": step.clone(), **moments}
            return
        if self.stage == 3:
            pieces = self.optimizer.fp32_partitioned_groups_flat
        else:
            pieces = self.optimizer.single_partition_of_fp32_groups
        for flat in pieces:
            state[flat] = {"step": step.clone(), **{slot: torch.zeros_like(flat) for slot in SLOTS}}
        for slot in SLOTS:
            if self.stage == 3:
                for key, parameter in zip(self.names, self.parameters):
                    shard = self._shard_of(values[f"{slot}.{key}"], parameter)
                    self._moment_shard(parameter, slot).copy_(shard)
            else:
                moment = torch.zeros(sum(flat.numel() for flat in pieces), device=self.device)
                for index, start, flat_start, count in self._stretches[self.world.rank]:
                    whole = values[f"{slot}.{self.names[index]}"].flatten()
                    moment[flat_start : flat_start + count] = whole[start : start + count]
                for flat, part in zip(pieces, moment.split([flat.numel() for flat in pieces])):
                    state[flat][slot].copy_(part)


def build_engine(context, network):
    """The engine that the configuration asks for.

    Raises ValueError for a settings file of DeepSpeed's that does not fit.
    """
    config = context.config
    if uses_deepspeed(config, context.world.size):
        return DeepSpeedEngine(context, network)
    accumulation = config.distributed.accumulation
    settings = config.train
    return PlainEngine(
        network, settings.clip, settings.ema, context.execution, accumulation, settings.beta1, own_rates(config)
    )


def own_rates(config):
    """{name: factor} of the parameters that have a rate of their own, as of `adam`."""
    settings = config.train
    return {} if settings.log_gamma_lr is None else {"log_scaled_gamma": settings.log_gamma_lr / settings.student_lr}


def check_distribution(config, size):
    """Whether `size` processes can train the run as it says.

    Raises ValueError for `plain` with several, for a batch that cannot be cut so, and for what ZeRO-3 cannot do.
    """
    settings = config.distributed
    if settings.engine == "plain" and size > 1:
        problem = f"'plain' trains in one process and there are {size}"
        raise ValueError(f"distributed.engine: {problem}; choose auto or deepspeed")
    batches = {"train.batch_size": config.train.batch_size}
    if config.start.kind == "trajectory":
        batches["start.batch_size"] = config.start.batch_size or config.train.batch_size
    if config.objective.anchor:
        batches["objective.anchor_batch"] = config.objective.anchor_batch or config.train.batch_size
    for key, batch_size in batches.items():
        samples = samples_per_rank(key, batch_size, size)
        if samples % settings.accumulation:
            which = "" if key == "train.batch_size" else f" ({key})"
            problem = f"{settings.accumulation} parts do not fit the {samples} samples of a process{which}"
            raise ValueError(f"distributed.accumulation: {problem}; use a divisor of {samples}")
    key = "cuda_graphs" if config.cuda_graphs else "compile" if config.compile else None
    if settings.zero == 3 and key and uses_deepspeed(config, size):
        problem = "true does not go with distributed.zero=3, which moves parameters around in every call"
        raise ValueError(f"{key}: {problem}; choose stage 0, 1 or 2, or {key}=false")


def deepspeed_config(config, world_size, kept_whole=0):
    """DeepSpeed's own configuration of one network: the file that `distributed.deepspeed` names, under the run's keys.

    Parameters up to the size `kept_whole` stay whole on every rank in stage 3.
    Raises ValueError for a file that is not there, is no JSON object, or sets what the run sets.
    """
    settings, batch_size = config.distributed, config.train.batch_size
    given = _settings_file(settings.deepspeed) if settings.deepspeed is not None else {}
    zero = given.get("zero_optimization", {})
    persistent = max(zero.get("stage3_param_persistence_threshold", PERSISTENT), kept_whole)
    return {
        **given,
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // world_size // settings.accumulation,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": config.train.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            **zero,
            "stage3_param_persistence_threshold": persistent,
            "stage": settings.zero,
        },
    }


def _settings_file(path):
    """DeepSpeed's settings from a JSON file, without what the run's own keys say."""
    where = f"distributed.deepspeed {path!r}"
    try:
        given = json.loads(regular_file(path, where).read_text())
    except (OSError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: not readable as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization", {}), dict):
        raise ValueError(f"{where}: expected an object with settings")
    zero = given.get("zero_optimization", {})
    for settings, prefix in ((given, ""), (zero, "zero_optimization.")):
        for key, value in settings.items():
            if value is None:
                raise ValueError(f"{where}: {prefix}{key} is null; give it a value, or leave it out")
    for key in UNSUPPORTED:
        if given.get(key):
            raise ValueError(f"{where}: sets {key}, which does not go with how a run calls its networks; remove it")
    persistent = zero.get("stage3_param_persistence_threshold", 0)
    if isinstance(persistent, bool) or not isinstance(persistent, (int, float)) or not 0 <= persistent < 2**62:
        name = "zero_optimization.stage3_param_persistence_threshold"
        raise ValueError(f"{where}: {name}: {persistent!r} is not a number of elements")
    taken = [key for key in TAKEN if key in given]
    taken += [f"zero_optimization.{key}" for key in TAKEN_OF_ZERO if key in zero]
    if taken:
        reason = "which the run's own keys say (offloading is not possible with amsgrad)"
        raise ValueError(f"{where}: sets {taken[0]}, {reason}; remove it")
    return given


@functools.cache
def _deepspeed():
    """The package, with what it would do by itself on a CPU left out."""
    import deepspeed  # here: it takes seconds, and one process does not need it

    # A collective in shared memory that serves inference alone. It is compiled for 40 s at the first start, and wrong
    # for more than one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It still calls collectives by their older names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed
