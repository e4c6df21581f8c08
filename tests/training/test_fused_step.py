"""The optimizer step in one kernel against torch's operators, from the gradients to the checkpoint."""

import pytest
import torch
from devices import KERNEL_DEVICE

from hsivi_fast import ops
from hsivi_fast.training.engine import PlainEngine
from hsivi_fast.training.optim import FusedStep, PlainStep

OWN_RATES = {"log_scaled_gamma": 20.0}
STEPS = {"torch": PlainStep, "triton": FusedStep}


class _Network(torch.nn.Module):
    """Odd sizes, a channels_last weight, and a parameter of its own rate."""

    def __init__(self):
        super().__init__()
        self.log_scaled_gamma = torch.nn.Parameter(torch.zeros(1, 7))
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.linear = torch.nn.Linear(5, 7)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.linear(self.conv(x).mean((2, 3))) * self.log_scaled_gamma.exp()


def _engine(backend, clip, accumulation=1):
    ops.choose_backend(backend, KERNEL_DEVICE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _Network().to(KERNEL_DEVICE)
    engine = PlainEngine(network, clip, 0.99, accumulation=accumulation, beta1=0.5, own_rates=OWN_RATES)
    assert type(engine.optimizer) is STEPS[backend]
    return engine


def _train(engine, steps):
    """Steps of these numbers: the rate and the batch are functions of them."""
    for step in steps:
        for part in range(engine.accumulation):
            generator = torch.Generator().manual_seed(10 * step + part)
            x, target = torch.randn(4, 3, 6, 6, generator=generator), torch.randn(4, 7, generator=generator)
            output = engine.network(x.to(KERNEL_DEVICE))
            engine.backward([output], [output.detach() - target.to(KERNEL_DEVICE)])
        engine.step(1e-2 / step)
        assert all(parameter.grad is None for parameter in engine.parameters)


def _state(engine):
    """A copy of what a checkpoint holds."""
    tensors, numbers = engine.state("network")
    return {
        stem: {name: value.detach().cpu().clone() for name, value in values.items()} for stem, values in tensors.items()
    }, numbers


def _assert_close(first, second):
    """Tensors, layouts apart, and counters of two checkpoints."""
    (first, first_numbers), (second, second_numbers) = first, second
    assert first_numbers == second_numbers and first.keys() == second.keys()
    for stem, values in first.items():
        assert values.keys() == second[stem].keys()
        for name, value in values.items():
            torch.testing.assert_close(value, second[stem][name], rtol=2e-5, atol=1e-6, msg=f"{stem} {name}")


@pytest.mark.parametrize("clip, accumulation", [(0.5, 1), (1e6, 2)], ids=["clipped", "accumulated"])
def test_twenty_steps_and_a_restart_are_torch_s(clip, accumulation):
    plain, fused = (_engine(backend, clip, accumulation) for backend in STEPS)
    places = [tensor.data_ptr() for tensor in fused.parameters]
    for steps in (range(1, 21), range(1, 4)):
        for engine in (plain, fused):
            _train(engine, steps)
        _assert_close(_state(fused), _state(plain))
        assert float(_state(plain)[0]["network_optimizer"]["step.conv.weight"]) == len(steps)
        for engine in (plain, fused):
            engine.restart()
    assert places == [tensor.data_ptr() for tensor in fused.parameters]
    assert fused.averaged()["conv.weight"].stride() == fused.network.conv.weight.stride() == (27, 1, 9, 3)


@pytest.mark.parametrize("first, second", [("torch", "triton"), ("triton", "torch"), ("triton", "triton")])
def test_one_goes_on_where_the_other_stopped(first, second):
    """Through a checkpoint, in an engine that has stepped before. A checkpoint of no steps forgets them."""
    straight, stopped, resumed = _engine("torch", 0.5), _engine(first, 0.5), _engine(second, 0.5)
    before = _state(stopped)
    _train(straight, range(1, 13))
    _train(stopped, range(1, 6))
    _train(resumed, range(20, 22))
    tensors, numbers = _state(stopped)
    resumed.load("network", tensors.__getitem__, numbers)
    _train(resumed, range(6, 13))
    _assert_close(_state(resumed), _state(straight))
    if second == "triton":
        resumed.load("network", before[0].__getitem__, before[1])
        assert _state(resumed)[0]["network_optimizer"] == {}
        _train(resumed, range(1, 6))
        _assert_close(_state(resumed), (tensors, numbers))


def test_gradients_of_another_layout_and_none_at_all():
    """A row-major gradient of a channels_last weight; a parameter that never has a gradient stays where it is.

    torch's fused Adam goes by the order in memory, so its gradient is laid out as the weight.
    """
    engines = [_engine(backend, 1e6) for backend in STEPS]
    gradient = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0)).to(KERNEL_DEVICE)
    for engine in engines:
        for step in (1, 2):
            weight = engine.network.conv.weight
            weight.grad = torch.empty_like(weight).copy_(gradient) if engine is engines[0] else gradient.clone()
            engine.step(1e-2 / step)
    plain, fused = (_state(engine)[0] for engine in engines)
    for stem in ("network", "network_ema"):
        for name, value in plain[stem].items():
            torch.testing.assert_close(fused[stem][name], value, rtol=2e-5, atol=1e-6)
    assert torch.equal(engines[1].network.linear.weight, _engine("triton", 1e6).network.linear.weight)
