"""A configuration that starts from another one, `base`: where that is looked for, and the paths in it."""

import pytest

from hsivi_fast.config import load_config


def test_a_base_is_found_beside_the_file_and_among_the_names(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: cifar10\nnfe: 7\ntrain: {steps: 3}\n")
    (tmp_path / "yours.yaml").write_text("base: mine\neta: 0.5\nnetwork: digits\n")
    mine, yours = load_config(tmp_path / "mine.yaml"), load_config(tmp_path / "yours.yaml", ["nfe=8"])
    assert (mine.nfe, mine.train.steps, mine.train.batch_size, mine.name) == (7, 3, 128, "mine")
    assert (yours.nfe, yours.eta, yours.train.steps, yours.network.name) == (8, 0.5, 3, "digits")
    (tmp_path / "cifar10.yaml").write_text("base: cifar10\nnfe: 3\n")  # with its name the shipped one is meant
    config = load_config(tmp_path / "cifar10.yaml")
    assert (config.nfe, config.train.batch_size) == (3, 128)
    (tmp_path / "one.yaml").write_text("base: two\n")
    (tmp_path / "two.yaml").write_text("base: one\n")
    with pytest.raises(ValueError, match="base leads back"):
        load_config(tmp_path / "one.yaml")


def test_a_path_in_a_base_is_looked_for_beside_the_base(tmp_path, monkeypatch):
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "t.safetensors").touch()
    (tmp_path / "teachers" / "network.yaml").write_text("network: digits\nteacher: {checkpoint: t.safetensors}\n")
    (tmp_path / "run.yaml").write_text("base: teachers/network\nnfe: 5\n")
    assert load_config(tmp_path / "run.yaml").teacher.checkpoint == str(tmp_path / "teachers" / "t.safetensors")
    (tmp_path / "cifar10").mkdir()  # a folder of that name does not hide the published teacher
    monkeypatch.chdir(tmp_path)
    assert load_config("cifar10").teacher.checkpoint == "cifar10"
