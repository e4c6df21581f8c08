"""The adapter to a clone of the published code, on a stand-in that has its modules, names and ways of calling.

The stand-in's arithmetic is easily checked.
"""

import sys

import pytest
import torch

from bench.upstream import UpstreamTraining, upstream_sample
from hsivi_fast.method.schedule import make_schedule

# Layers add their noise; the losses are means of the networks' outputs; an update is a plain step of descent.
STAND_IN = {
    "models/ddpm_cifar.py": """
import torch
UNet = None
class SpeedDDPM(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.target_model, self.phinet, self.fnet = UNet(), UNet(), UNet()
        self.target_model.requires_grad_(False)
        lead = (config.n_discrete_steps - 1,) if config.independent_log_gamma == "use" else ()
        event = (config.image_channels, config.image_size, config.image_size) if config.image_gamma == "use" else ()
        self.phinet.register_parameter("log_scaled_gamma", torch.nn.Parameter(torch.zeros(lead + event or (1,))))
    def forward(self, x):
        return x + torch.randn_like(x)
""",
    "models/ema.py": """
class ExponentialMovingAverage:
    def __init__(self, parameters, decay):
        self.count, self.decay, self.updates = len(list(parameters)), decay, 0
    def update(self, parameters):
        assert len([each for each in parameters if each.requires_grad]) == self.count
        self.updates += 1
""",
    "torch_utils/utils.py": """
import torch
def get_optimizer_speedup(config, params):
    assert (config.optimizer, config.weight_decay) == ("Adam", 0)
    return torch.optim.SGD(params, lr=0.0)
def optimization_manager_speedup(config, phi_net=True):
    def optimize(optimizer, params, step, scaler=None, lr=None, grad_clip=config.grad_clip):
        assert config.n_warmup_iters < step < 3000 and config.cosine_lr_decay != "use" and grad_clip == 7.0
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return optimize
""",
    "torch_utils/losses.py": """
import torch
from torch_utils import utils
def get_loss_fn_speedup(diffusion, config):
    def loss(model, training_shape, train_phiNet=False, train_FNet=False):
        steps, size = config.n_discrete_steps, (training_shape[0] // 2 + 1,)
        lowest = steps - torch.randint(low=1, high=steps, size=size).to(model.device)
        x = torch.randn(*training_shape)
        for _ in range(steps - int(torch.minimum(lowest, steps - lowest).min())):
            x = model(x)
        return (model.module.phinet if train_phiNet else model.module.fnet)(x, diffusion.timesteps[lowest]).mean()
    return loss
def get_step_fn_speedup(train, phi_optimize_fn, f_optimize_fn, diffusion, config):
    loss = get_loss_fn_speedup(diffusion, config)
    assert train and not config.autocast_train
    def iterate(state, training_shape, optimization=True):
        state.setdefault("seen", []).append((state["step"], state["step"] % config.f_learning_times == 0))
        network = state["whole_model"].module.fnet.requires_grad_(True)
        value = loss(state["whole_model"], training_shape, train_FNet=True)
        value.backward()
        f_optimize_fn(state["optimizer_fnet"], network.parameters(), step=state["step"])
        state["ema_fnet"].update(network.parameters())
        state["step"] += 1
        return torch.tensor(0.0), value
    return iterate
""",
    "torch_utils/sampling.py": """
import torch
def get_sampling_fn(config, diffusion, sampling_shape):
    @torch.no_grad()
    def sample(model):
        x = torch.randn(*sampling_shape, device=config.device)
        for _ in range(1, config.n_discrete_steps):
            x = model(x)
        return x
    return sample
""",
}


class Scaled(torch.nn.Module):
    """A network of one parameter: its input, scaled."""

    event_shape = (1, 2, 2)

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, x, t):
        return self.weight * x


@pytest.fixture
def clone(tmp_path):
    for name, text in STAND_IN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def _training(path, per_step=False, per_pixel=True, network=Scaled):
    rates = [lambda step: 0.01 * step, lambda step: 0.001 * step]
    return UpstreamTraining(
        path,
        network(2.0),
        network(3.0),
        network(5.0),
        make_schedule("linear", 1000, "quad", 4),
        0.2,
        per_step,
        per_pixel,
        rates,
        clip=7.0,
        ema=0.9,
    )


# K = 4 layers, the fourth sample paired with the first; the lowest is 1, so three layers are rolled.
K = torch.tensor([4, 2, 1, 1])
TOP, NOISE = torch.full((4, 1, 2, 2), 1.0), torch.full((4, 1, 2, 2), 1000.0)
ROLLED = torch.full((3, 4, 1, 2, 2), 10.0)


def test_updates_run_the_clone_on_given_networks_layers_and_noise(clone):
    training = _training(clone)
    assert training.update_student(2, K, TOP, NOISE, ROLLED) == pytest.approx(2 * 1031)
    assert float(training.student.weight.detach()) == pytest.approx(2 - 0.02 * 1031)
    assert training.state["ema_phinet"].updates == 1
    assert training.update_score_net(5, K, TOP, NOISE, ROLLED) == pytest.approx(3 * 1031)
    assert float(training.score_net.weight.detach()) == pytest.approx(3 - 0.005 * 1031)
    assert training.state["ema_fnet"].updates == 1
    assert training.state["seen"] == [(5, False)] and training.state["ema_phinet"].updates == 1
    assert float(training.teacher.weight) == 5 and not training.teacher.weight.requires_grad
    schedule = make_schedule("linear", 1000, "quad", 4)
    assert training.nfe == 4 and training.tau.tolist() == schedule.timesteps.tolist()
    alpha_bar = 1 - training.diffusion.one_minus_alpha_bars.double()
    torch.testing.assert_close(alpha_bar, torch.from_numpy(schedule.alpha_bar), rtol=0, atol=1e-7)


def test_without_given_noise_the_clone_draws_itself(clone):
    training = _training(clone)
    values = [training.update_student(1, *training.draw(4)) for _ in range(2)]
    assert values[0] != values[1] and all(abs(value) < 100 for value in values)
    assert training.draw(3)[0].shape == (3,) and training.draw(3)[1].shape == (3, 1, 2, 2)


def test_a_cycle_is_iterations_of_which_one_is_the_student_s(clone):
    training = _training(clone)
    training.cycle(7, 4, 3)
    assert training.state["seen"] == [(7, False), (8, False), (9, True)]


def test_the_sampler(clone):
    training = _training(clone)
    for _ in range(2):
        assert upstream_sample(training, 4, TOP, ROLLED).flatten().tolist() == [31.0] * 16
    assert upstream_sample(training, 6).shape == (6, 1, 2, 2) and training.samplers.keys() == {4, 6}
    for x, noise in ((TOP, None), (None, ROLLED), (TOP, ROLLED[:2])):
        with pytest.raises(ValueError, match="together or not at all"):
            upstream_sample(training, 4, x, noise)


@pytest.mark.parametrize(
    "per_step, per_pixel, shape",
    [(False, False, (1,)), (True, False, (4,)), (False, True, (1, 2, 2)), (True, True, (4, 1, 2, 2))],
)
def test_the_clone_shapes_log_gamma(clone, per_step, per_pixel, shape):
    training = _training(clone, per_step, per_pixel)
    assert training.log_gamma.shape == shape and training.log_gamma is training.student.log_scaled_gamma


def test_draws_that_the_clone_cannot_make_are_refused(clone):
    training = _training(clone)
    with pytest.raises(ValueError, match="antithetic pairs"):
        training.update_student(1, torch.tensor([4, 2, 1, 2]), TOP, NOISE, ROLLED)
    with pytest.raises(ValueError, match="3 layers are rolled, not 2"):
        training.update_score_net(1, K, TOP, NOISE, ROLLED[:2])


def test_the_import_leaves_nothing_behind(clone, monkeypatch):
    mine = object()
    monkeypatch.setitem(sys.modules, "models", mine)
    path = list(sys.path)
    _training(clone)
    assert sys.path == path and sys.modules["models"] is mine and "torch_utils" not in sys.modules


def _refused(path, **changes):
    with pytest.raises(ValueError) as error:
        _training(path, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_clone_is_told_in_one_line(clone, tmp_path):
    assert "has no models/ddpm_cifar.py" in _refused(tmp_path / "nowhere")
    (clone / "torch_utils" / "sampling.py").write_text("import no_such_module")
    assert "No module named 'no_such_module'" in _refused(clone)
    (clone / "torch_utils" / "sampling.py").write_text("get_other_fn = None")
    assert "torch_utils.sampling has no get_sampling_fn" in _refused(clone)
    (clone / "torch_utils" / "sampling.py").unlink()
    assert str(clone) in _refused(clone) and "has no torch_utils/sampling.py" in _refused(clone)


def test_events_are_square_images(clone):
    class Flat(Scaled):
        event_shape = (2,)

    assert "takes images [channels, size, size], not [2]" in _refused(clone, network=Flat)
