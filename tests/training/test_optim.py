"""Learning rates and the EMA against the published implementation's values."""

import pytest
import torch
from golden_values import load_golden

from hsivi_fast.training.optim import EMA, learning_rate


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
