"""Learning rates and the EMA against the published implementation's values."""

import pytest
import torch
from golden_values import load_golden

from hsivi_fast.training.optim import EMA, adam, learning_rate, set_rate


@pytest.mark.parametrize("rule", ["decay", "cosine"])
@pytest.mark.parametrize("network", ["phi", "f"])
def test_learning_rates_are_the_published_ones(rule, network):
    golden = load_golden("learning_rate")
    base = float(golden[f"base.{network}"])
    for step, expected in zip(golden["steps"], golden[f"{rule}.{network}.lr"]):
        assert learning_rate(rule, base, int(step), warmup=2500, total=200000) == pytest.approx(expected, rel=1e-12)


def test_linear_and_constant_rules():
    assert [learning_rate("linear", 1.0, step, 2, 6) for step in (1, 2, 4, 6)] == [0.5, 1.0, 0.5, 0.0]
    assert [learning_rate("constant", 1.0, step, 2, 6) for step in (1, 2, 6)] == [0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match="lr_rule: 'step'"):
        learning_rate("step", 1.0, 3, 2, 6)


def test_ema_is_the_published_one():
    golden = load_golden("ema")
    network = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(float(golden["start"]))
        average = EMA(network.named_parameters(), float(golden["decay"]))
        for value, expected in zip(golden["values"], golden["ema"]):
            network.weight.fill_(float(value))
            average.count()
            average.update(network.parameters())
            assert float(average.parameters["weight"]) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("recorded_on", [None, torch.device("cpu")])
def test_a_parameter_moves_at_its_own_rate(recorded_on):
    """Adam's first step is as long as the rate, whatever the gradient."""
    parameters = {name: torch.nn.Parameter(torch.zeros(3)) for name in ("a", "log_scaled_gamma", "b")}
    optimizer = adam(parameters.items(), own_rates={"log_scaled_gamma": 20.0}, recorded_on=recorded_on)
    for parameter in parameters.values():
        parameter.grad = torch.tensor([1.0, -2.0, 3.0])
    set_rate(optimizer, 0.01)
    optimizer.step()
    for name, rate in (("a", 0.01), ("log_scaled_gamma", 0.2), ("b", 0.01)):
        torch.testing.assert_close(parameters[name].detach(), torch.tensor([-rate, rate, -rate]))
