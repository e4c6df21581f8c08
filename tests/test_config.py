"""Configuration: what a YAML file and overrides become, and the one line for everything that is wrong with them."""

import dataclasses

import pytest
import yaml

from hsivi_fast.config import CONFIGS, config_from_dict, load_config, resolved_dict

RUN = {"network": "digits", "teacher": {"checkpoint": "t.safetensors"}, "nfe": 10}


def _file(tmp_path, values):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_contracts_example_loads(tmp_path):
    path = tmp_path / "cifar.yaml"
    path.write_text("""
network: cifar10
teacher: {checkpoint: cifar10_2040.pt, betas: linear, steps: 1000}
nfe: 10
spacing: quad
eta: 0.2
gamma: {per_step: false, per_pixel: true}
rollout: {mode: pooled, redraw: 1}
backend: auto
precision: fp32
seed: 0
train: {
  steps: 200000, batch_size: 128, f_learning_times: 20, student_lr: 1.6e-5, score_net_lr: 8.0e-5, warmup: 2500,
  lr_rule: decay, clip: 1.0, ema: 0.999
}
""")
    config = load_config(path)
    assert (
        config.network.name == "cifar10"
        and config.train.student_lr == 1.6e-5
        and config.rollout.mode == "pooled"
        and config.name == "cifar"
    )
    assert config.teacher.checkpoint == "cifar10_2040.pt"  # found nowhere: the loader will name it


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_comes_back(path):
    config = load_config(path.stem)
    assert config.name == path.stem
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(resolved_dict(config)))) == config


def test_overrides_go_into_the_tree(tmp_path):
    config = load_config(
        _file(tmp_path, RUN),
        [
            "train.steps=400",
            "network.norm_eps=1e-6",
            "train.student_lr=2e-5",
            "network.attention=[false,true,false]",
            "eval.ddim_nfe=[5]",
        ],
    )
    assert (config.train.steps, config.network.norm_eps, config.train.student_lr) == (400, 1e-6, 2e-5)
    assert (
        config.network.attention == (False, True, False)
        and config.network.name == "digits"
        and config.eval.ddim_nfe == (5,)
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.nfe = 3


def test_checkpoint_is_looked_for_beside_the_file_then_here_then_in_the_package(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    here.mkdir(), beside.mkdir()
    monkeypatch.chdir(here)
    path = _file(beside, RUN)
    (here / "t.safetensors").touch()
    assert load_config(path).teacher.checkpoint == str(here / "t.safetensors")
    (beside / "t.safetensors").touch()
    assert load_config(path).teacher.checkpoint == str(beside / "t.safetensors")
    assert load_config("digits").teacher.checkpoint.endswith("hsivi_fast/assets/digits_teacher.safetensors")


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.stepz=3", "train.stepz: unknown key; did you mean train.steps?"),
        ("trian.steps=3", "trian.steps: unknown key; did you mean train.steps?"),
        ("nonsense=3", "nonsense: unknown key; did you mean seed?"),
        ("nfe=0", "nfe: input should be greater than or equal to 1, got 0"),
        ("nfe=5.5", "nfe: input should be a valid integer, got 5.5"),
        ("eta=-1", "eta: input should be greater than 0, got -1"),
        ("eta=1.5", "eta: input should be less than or equal to 1, got 1.5"),
        ("train.steps=abc", "train.steps: input should be a valid integer, got 'abc'"),
        ("train.steps=true", "train.steps: input should be a valid integer, got True"),
        ("train.student_lr=fast", "train.student_lr: "),
        ("train.student_lr=.inf", "train.student_lr: must be a finite number, got inf"),
        ("train.ema=1.0", "train.ema: input should be less than 1"),
        ("network.multipliers=[1,x]", "network.multipliers.1: input should be a valid integer, got 'x'"),
        ("train=3", "train: "),
        ("rollout.mode=cool", "rollout.mode: input should be 'pooled' or 'fresh', got 'cool'"),
        ("device=gpu", "device: "),
        ("precision=fp16", "precision: input should be 'fp32', 'tf32' or 'bf16', got 'fp16'"),
        ("teacher.target=ring", "teacher: give either a checkpoint or a 2-D target"),
        ("train.steps", "override 'train.steps': expected key=value"),
        ("train.steps=[1", "override 'train.steps=[1'"),
    ],
)
def test_a_bad_override_is_one_line_that_names_it(tmp_path, override, message):
    with pytest.raises(ValueError) as caught:
        load_config(_file(tmp_path, RUN), [override])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_bad_file_is_one_line_that_names_it(tmp_path):
    (tmp_path / "broken.yaml").write_text("network: [digits\n")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    for name, message in (("broken.yaml", "not readable as YAML"), ("list.yaml", "expected keys and values")):
        with pytest.raises(ValueError, match=message) as caught:
            load_config(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="config 'digts': neither a file nor one of celeba64.*digits"):
        load_config("digts")
    with pytest.raises(ValueError, match="trainer: unknown key; did you mean train"):
        load_config(_file(tmp_path, {**RUN, "trainer": {}}))
    with pytest.raises(ValueError, match="nfe: missing"):
        load_config(_file(tmp_path, {key: value for key, value in RUN.items() if key != "nfe"}))


def test_files_are_found_beside_the_yaml_file(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    config = load_config(_file(tmp_path, {**RUN, "distributed": {"deepspeed": "settings.json"}}))
    assert config.distributed.deepspeed == str(tmp_path / "settings.json")
    assert load_config("smoke", ["distributed.deepspeed=deepspeed.json"]).distributed.deepspeed.endswith(
        "configs/deepspeed.json"
    )
