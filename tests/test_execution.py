"""Compiled and recorded calls against their eager twins.

What needs a CUDA graph runs here on recorded operators (operator_recording.py), and for real where there is a GPU.
"""

import contextlib
import copy
import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from operator_recording import OperatorRecording, RunAgain
from pretended_gpu import pretended_gpu
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from hsivi_fast import build, load_config, ops, train
from hsivi_fast.build import build_context, build_score_net, build_student, load_teacher
from hsivi_fast.execution import EAGER, WARM_UP, CudaRecording, Execution, GraphedCall
from hsivi_fast.nets import build_unet
from hsivi_fast.parallel.world import ALONE, connect
from hsivi_fast.sampling.sampler import Sampler, ddim_sampler
from hsivi_fast.training.engine import PlainEngine
from hsivi_fast.training.rollout import build_rollout
from hsivi_fast.training.start import Paths
from hsivi_fast.training.updates import Updates
from hsivi_fast.training.zero import build_engine

# 16 is the sampler's own batch too, and that of a rank's share of the pool: one shape less to compile.
SMOKE = ["train.batch_size=16", "train.f_learning_times=3"]
RECORDED = [
    pytest.param("cpu", OperatorRecording, id="operators"),
    pytest.param("cuda", CudaRecording, id="cuda", marks=pytest.mark.gpu),
]


def _context(execution, device="cpu", settings=(), world=ALONE):
    config = load_config("smoke", [*SMOKE, f"device={device}", *settings])
    return dataclasses.replace(build_context(config, world, teacher=True), execution=execution)


def _training(execution, device="cpu", settings=(), world=ALONE):
    """(student, score_net, rollout, updates) of a small run."""
    context = _context(execution, device, settings, world)
    student = build_engine(context, build_student(context))
    score_net = build_engine(context, build_score_net(context))
    return student, score_net, build_rollout(context, student.network), Updates(context, student, score_net)


def _iterate(steps, student, score_net, rollout, updates):
    """Losses of the first steps, as `train` makes them; learning rates that change from step to step."""
    losses = []
    rollout.start_cycle(0)
    for step in range(1, steps + 1):
        if step % 3 == 0:
            losses.append(updates.student(rollout.student_batch(step), 1e-3 / step)[0])
            rollout.start_cycle(step // 3)
        losses.append(updates.score_net(rollout.score_net_batch(step), 2e-3 / step)[0])
    return torch.stack(losses)


def _state(*engines):
    return {
        f"{index} {stem} {name}": value.detach().clone()
        for index, engine in enumerate(engines)
        for stem, values in engine.state("network")[0].items()
        for name, value in values.items()
    }


@pytest.mark.parametrize("device, recording", RECORDED)
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["rollout.redraw=2", "gamma.per_step=true"],
        ["rollout.mode=fresh"],
        # The float32 rate moves weights by one unit in the last place. With this seed none of them rounds to another
        # bfloat16 for it, which would be another run.
        ["precision=bf16", "seed=10"],
        pytest.param(["backend=torch"], marks=pytest.mark.gpu),  # a CPU's in all others
    ],
)
def test_recorded_training_is_the_eager_one(device, recording, settings):
    """Rollout and both updates as a whole, through rates, averages and weights that change: 15 steps, most of them
    replayed.
    """
    eager = _training(EAGER, device, settings)
    expected = _iterate(15, *eager)
    execution = Execution(device, cuda_graphs=True, recording=recording)
    recorded = _training(execution, device, settings)
    losses = _iterate(15, *recorded)
    torch.testing.assert_close(losses, expected, rtol=5e-4, atol=1e-5)  # the rate is a float32 there
    first, second = _state(*eager[:2]), _state(*recorded[:2])
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=2e-4, atol=2e-6, msg=name)
    assert execution.recorded == (2 if "rollout.mode=fresh" in settings else 3) and execution.seconds > 0
    # Two of the student's five updates are replayed, from the score network's weights to its own step.
    follow, pull_back = recorded[3]._follow, recorded[3]._pull_back
    assert follow.calls == 5 and follow.outputs is not None and not isinstance(pull_back, GraphedCall)


STARTED = [
    *("start.kind=trajectory", "start.updates=6", "start.trajectories=24", "start.batch_size=8", "train.beta1=0.5"),
    *("objective.match=windows", "objective.gamma_min=0.2", "objective.alpha=1.0"),
    *("objective.anchor=0.5", "objective.anchor_batch=8"),
]


def _start_and_iterate(student, score_net, rollout, updates, context):
    """Losses of a start, of a head start, and of the distillation with an anchor after it."""
    paths, losses = Paths(context), []
    for update in range(1, 7):
        paths.prepare(update)
        losses.append(updates.start(paths.batch(update), 1e-3 / update)[0].mean())
    student.restart()
    rollout.start_cycle(0)
    for step in range(1, 19):
        if step % 3 == 0 and step > 3:
            anchored = paths.anchor_batch(step)
            losses.append(updates.student(rollout.student_batch(step), 1e-3 / step, anchored)[0].mean())
            rollout.start_cycle(step // 3)
        batch = rollout.score_net_batch(step)
        losses += [updates.teacher(batch)[0].mean(), updates.score_net(batch, 2e-3 / step)[0].mean()]
    return torch.stack(losses)


@pytest.fixture(scope="module")
def of_three_classes(tmp_path_factory):
    """Settings of the small run with a teacher that has learned three classes."""
    file = tmp_path_factory.mktemp("classes") / "teacher.safetensors"
    config = load_config("smoke", ["device=cpu", "network.classes=3"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_unet(config.network)
    network.load_state_dict(load_file(config.teacher.checkpoint), strict=False)
    save_file(network.state_dict(), file)
    return ["network.classes=3", f"teacher.checkpoint={file}"]


@pytest.mark.parametrize("device, recording", RECORDED)
@pytest.mark.parametrize("classes", [False, True])
def test_a_recorded_start_with_what_follows_is_the_eager_one(device, recording, classes, of_three_classes):
    execution = Execution(device, cuda_graphs=True, recording=recording)
    results, settings = [], [*STARTED, *of_three_classes] if classes else STARTED
    for way in (EAGER, execution):
        trained = _training(way, device, settings)
        results.append((_start_and_iterate(*trained, _context(way, device, settings)), _state(*trained[:2])))
    (expected, first), (losses, second) = results
    torch.testing.assert_close(losses, expected, rtol=5e-4, atol=1e-5)
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=2e-4, atol=2e-6, msg=name)
    # The teacher of the paths, the update on them, the teacher's losses, the score network's update, the student's, the
    # rollout.
    assert execution.recorded == 6


def _fit_ones(engine, x):
    """One update of a network towards ones. Returns its outputs before it."""
    y = engine.network(x)
    engine.backward([y], [y.detach() - 1])
    engine.apply_step()
    return y.detach()


@pytest.mark.parametrize("device, recording", RECORDED)
def test_a_recorded_fused_step_is_the_plain_one(device, recording):
    """The addresses of the gradients are those that it was recorded with; rates, counters and weights change."""
    states, execution = [], Execution(device, cuda_graphs=True, recording=recording)
    for backend, way in (("torch", EAGER), ("triton", execution)):
        ops.choose_backend(backend, device)
        network = torch.nn.Linear(3, 5).to(device)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
        engine = PlainEngine(network, 1.0, 0.9, way)
        call, outputs = engine.graphed(functools.partial(_fit_ones, engine)), []
        for step in range(1, WARM_UP + 6):
            engine.prepare_step(1e-2 / step)
            outputs.append(call(torch.linspace(-step, 1, 6, device=device).reshape(2, 3)))
        states.append({**_state(engine), "outputs": torch.stack(outputs)})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value.cpu() if "step" in name else value, rtol=1e-5, atol=1e-6)
    assert execution.recorded == 1


def recorded_and_eager_on_ranks(settings):
    """(losses recorded, losses eager, calls recorded, whether weights are row-major) on one of several ranks."""
    world = connect(load_config("smoke", [*SMOKE, "device=cpu", *settings]))
    execution = Execution("cpu", cuda_graphs=True, recording=OperatorRecording)
    expected = _iterate(15, *_training(EAGER, "cpu", settings, world))
    training = _training(execution, "cpu", settings, world)
    losses = _iterate(15, *training).tolist()
    row_major = all(parameter.is_contiguous() for parameter in training[0].parameters)
    return losses, expected.tolist(), execution.recorded, row_major


@pytest.mark.parametrize("zero", [0, 2])
def test_with_deepspeed_the_rollout_and_the_pull_back_are_recorded(zero):
    """Its own steps decide on the host, so they are not; its parameters stay where they are in memory, so what is
    recorded sees them. Where it cuts them into pieces they stay row-major, under `channels_last` too.
    """
    settings = [f"distributed.zero={zero}", "channels_last=true"]
    for recorded, eager, calls, row_major in run_ranks(recorded_and_eager_on_ranks, 2, settings):
        torch.testing.assert_close(torch.tensor(recorded), torch.tensor(eager), rtol=5e-4, atol=1e-5)
        assert calls == 2 and row_major == (zero > 0)


@pytest.mark.parametrize("device, recording", RECORDED)
def test_a_recorded_sampler_is_the_eager_one_and_follows_its_weights(device, recording):
    contexts = [
        _context(execution, device) for execution in (EAGER, Execution(device, cuda_graphs=True, recording=recording))
    ]
    layers, network = contexts[0].layers, copy.deepcopy(contexts[0].teacher)
    log_gamma = torch.full(layers.log_gamma_shape(network.event_shape), 0.1, device=device)
    eager, recorded = (Sampler(network, layers, log_gamma, context.execution) for context in contexts)
    seeds = list(range(16 * (WARM_UP + 3) - 5))  # the last batch is filled up
    torch.testing.assert_close(recorded(seeds, 16), eager(seeds, 16), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.97)
        log_gamma.fill_(-0.2)
    changed = recorded(range(40, 50), 16)
    torch.testing.assert_close(changed, eager(range(40, 50), 16), rtol=1e-5, atol=1e-5)
    assert float((changed - recorded(seeds, 16)[40:50]).abs().max()) == 0.0
    eager, recorded = (ddim_sampler(context, 3, 0.0) for context in contexts)
    torch.testing.assert_close(recorded(seeds, 16), eager(seeds, 16), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings, timed", [([], False), (["cuda_graphs=true"], True), (["compile=true"], True), ([], False)]
)
def test_cudnn_times_its_algorithms_where_shapes_are_fixed(settings, timed, monkeypatch):
    """On a GPU alone. A context without fixed shapes takes the mode of the one before it back."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not timed)
    on_cpu = [setting for setting in settings if setting != "cuda_graphs=true"]
    build_context(load_config("smoke", [*on_cpu, "device=cpu"]), ALONE)
    assert torch.backends.cudnn.benchmark is not timed
    monkeypatch.setattr(build, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(ops, "choose_backend", lambda backend, device: "torch")
    for name in ("_set_float32_mode", "build_class_labels", "build_decoder", "build_layers"):
        monkeypatch.setattr(build, name, lambda *arguments: None)
    with pretended_gpu():
        build_context(load_config("smoke", settings), ALONE)
    assert torch.backends.cudnn.benchmark is timed


def test_a_recorded_call_keeps_to_its_arguments():
    total = torch.zeros(3)

    def function(x, scale):
        total.add_(x)
        return total * (1 if scale is None else scale), x + 1

    call = GraphedCall(function, OperatorRecording())
    results = [call(torch.full((3,), float(n)), None) for n in range(1, WARM_UP + 4)]
    for n, (running, plus) in enumerate(results, start=1):  # results of earlier calls are still theirs
        assert running.tolist() == [n * (n + 1) / 2] * 3 and plus.tolist() == [n + 1.0] * 3
    assert call.recording.replays == 3
    for wrong in ((torch.zeros(4), None), (torch.zeros(3), torch.ones(3)), (torch.zeros(3, dtype=torch.float64), None)):
        with pytest.raises(ValueError, match="cuda_graphs: recorded for"):
            call(*wrong)


def test_a_call_works_on_the_same_memory_from_the_first_time_on():
    """Triton compiles a kernel for tensors that begin at a multiple of 16 bytes, and another for those that do not. So
    no other alignment may first be met in the recording.
    """
    places = []

    def function(x):
        places.append(x.data_ptr())
        return x + 1

    call, memory = GraphedCall(function, RunAgain()), torch.arange(16.0)
    for start in (1, 2, 3, 0, 3):
        assert call(memory[start : start + 8]).tolist() == [start + 1.0 + n for n in range(8)]
    assert len(set(places)) == 1 and places[0] % 16 == 0
    assert memory.tolist() == list(range(16))
    with pytest.raises(ValueError, match=r"recorded for \[8\] torch.float32, called with \[7\] torch.float32"):
        call(memory[:7])


def test_results_are_not_changed_by_later_calls_from_the_first_on():
    call = GraphedCall(lambda x: x, RunAgain())
    results = [call(torch.full((2,), float(n))) for n in range(WARM_UP + 3)]
    assert [result.tolist() for result in results] == [[float(n)] * 2 for n in range(WARM_UP + 3)]


def test_other_threads_may_use_the_device_during_a_recording(monkeypatch):
    """NCCL's asks for its events all the time, which ends a recording of torch's default kind."""
    asked = {}

    @contextlib.contextmanager
    def graph(graph, **options):
        asked.update(options)
        yield

    for name in ("Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: "it")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    assert CudaRecording("cuda").record(lambda: 5) == 5
    assert asked == {"stream": "it", "capture_error_mode": "thread_local"}


@pytest.mark.parametrize(
    "function",
    [lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x if x.sum() > 0 else -x],
    ids=["item", "nonzero", "condition"],
)
def test_the_stand_in_refuses_what_capture_refuses(function):
    call = GraphedCall(function, OperatorRecording())
    for _ in range(WARM_UP):
        call(torch.ones(3))
    with pytest.raises(AssertionError, match="makes the host wait"):
        call(torch.ones(3))


@pytest.fixture(scope="module")
def compiled():
    return Execution("cpu", compile=True)


def _check_compiled(compiled, settings, of_losses, of_movement, of_samples):
    """All calls of a run: rollout, student, score network, pull-back, sampler; the bounds are relative errors."""
    eager, ours = _training(EAGER, settings=settings), _training(compiled, settings=settings)
    losses, expected = _iterate(4, *ours), _iterate(4, *eager)
    assert float((losses - expected).norm() / expected.norm()) < of_losses
    start = _training(EAGER, settings=settings)[0].network.state_dict()
    moved, expected = (
        torch.cat([(value - start[name]).flatten() for name, value in training[0].network.state_dict().items()])
        for training in (ours, eager)
    )
    assert float((moved - expected).norm() / expected.norm()) < of_movement
    layers, network = _context(EAGER).layers, copy.deepcopy(eager[0].network).requires_grad_(False)
    samples = [
        Sampler(network, layers, network.log_scaled_gamma, execution)(range(21), 16) for execution in (compiled, EAGER)
    ]
    assert float((samples[0] - samples[1]).norm() / samples[1].norm()) < of_samples


def test_compiled_training_and_sampling_are_the_eager_ones(compiled):
    _check_compiled(compiled, [], 1e-5, 1e-2, 1e-5)
    assert compiled.seconds > 0


def test_traced_training_and_sampling_in_bfloat16_are_the_eager_ones(traced_only):
    """In the layout and arithmetic of the speed figures, on what the compiler is given, run without it."""
    _check_compiled(Execution("cpu", compile=True), ["precision=bf16", "channels_last=true"], 0.05, 0.5, 0.1)
    assert len(traced_only) > 3


def test_copies_of_a_network_share_what_was_compiled(compiled):
    """The averaged weights of a run, its raw ones and a later checkpoint cost no new compilation."""
    context = _context(EAGER)
    layers, teacher = context.layers, context.teacher
    log_gamma = torch.zeros(layers.log_gamma_shape(teacher.event_shape))
    Sampler(teacher, layers, log_gamma, compiled)(range(16))
    before = compiled.seconds
    copied = Sampler(copy.deepcopy(teacher), layers, log_gamma, compiled)(range(16))
    assert compiled.seconds == before
    torch.testing.assert_close(copied, Sampler(teacher, layers, log_gamma)(range(16)), rtol=1e-4, atol=1e-4)


def test_channels_last_is_a_layout_and_nothing_else():
    config = load_config("digits")
    plain, laid_out = (load_teacher(dataclasses.replace(config, channels_last=value), "cpu") for value in (False, True))
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([3, 90, 400, 999])
    weight = laid_out.downsamples["level_1"][0][0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    results = [network(x, t) for network in (plain, laid_out)]
    assert results[1].is_contiguous()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_seconds_of_compiling_our_kernels_are_no_seconds_of_training(monkeypatch):
    """Triton tells of every kernel. Inductor's are in its own count already."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    execution = Execution("cuda")
    for module, microseconds in (("hsivi_fast.kernels.philox", 250_000), ("torch._inductor.abc", 7_000_000)):
        kernel = SimpleNamespace(fn=SimpleNamespace(fn=SimpleNamespace(__module__=module)))
        triton.knobs.compilation.listener(
            src=kernel, metadata={}, metadata_group={}, times=SimpleNamespace(total=microseconds), cache_hit=False
        )
    assert execution.seconds == pytest.approx(0.25) and Execution("cuda").seconds == 0


def test_the_calls_before_a_call_is_at_its_speed():
    """On a GPU the first one sets libraries up, and with graphs the first ones run eagerly, then one is recorded."""
    graphs = Execution("cpu", cuda_graphs=True, recording=OperatorRecording)
    assert (EAGER.warm_up_calls, Execution("cuda").warm_up_calls, graphs.warm_up_calls) == (0, 1, WARM_UP + 1)


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="cuda_graphs: true needs a CUDA device, the device is cpu"):
        Execution("cpu", cuda_graphs=True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="compile: true needs a C.. compiler on a CPU"):
        Execution("cpu", compile=True)


def test_a_compiled_run_trains_and_says_what_compiling_took(no_report, tmp_path):
    """A pool of a shape that is new in this process: at least that has to be compiled."""
    settings = [*SMOKE, "train.f_learning_times=2", "train.steps=2"]
    compiled, eager = (
        train(load_config("smoke", [*settings, f"compile={value}"]), tmp_path / value) for value in ("true", "false")
    )
    records = [folder.metrics() for folder in (compiled, eager)]
    assert records[0][0]["preparing_seconds"] > 0.1 and "preparing_seconds" not in records[1][0]
    for ours, expected in zip(*records):
        assert ours["loss_score_net"] == pytest.approx(expected["loss_score_net"], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_step_between_log_steps_makes_the_host_wait(backend):
    """Torch raises at every synchronising call; a cycle after the first, with and without graphs."""
    for execution in (EAGER, Execution("cuda", cuda_graphs=True)):
        training = _training(execution, "cuda", [f"backend={backend}"])
        _iterate(15, *training)
        torch.cuda.set_sync_debug_mode("error")
        try:
            _iterate(6, *training)
        finally:
            torch.cuda.set_sync_debug_mode("default")
