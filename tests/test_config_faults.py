"""Numbers and values that no run can have: each is refused in one line that names the key, before torch is loaded."""

import pytest
import yaml

from hsivi_fast.config import load_config

RUN = {"network": "digits", "teacher": {"checkpoint": "t.safetensors"}, "nfe": 10}
HUGE = "1" + "0" * 400  # more than a float holds


@pytest.mark.parametrize(
    "override, message",
    [
        # too large for what it multiplies or allocates
        ("train.batch_size=1000000000000", "train.batch_size: input should be less than or equal to 100000, got 1000"),
        ("teacher_train.batch_size=1000000", "teacher_train.batch_size: input should be less than or equal to 100000"),
        ("train.f_learning_times=1000000000", "train.f_learning_times: input should be less than or equal to 1000000"),
        (f"train.warmup=1{'0' * 23}", "train.warmup: input should be less than or equal to 1000000000"),
        ("teacher.steps=1000000000", "teacher.steps: input should be less than or equal to 1000000"),
        ("teacher.steps=1000000000000000", "teacher.steps: input should be less than or equal to 1000000"),
        ("network.channels=1000000000", "network.channels: input should be less than or equal to 65536"),
        ("network.image_size=100000", "network.image_size: input should be less than or equal to 4096"),
        ("network.res_blocks=1000000", "network.res_blocks: input should be less than or equal to 16"),
        ("network.multipliers=[1,1,1,1,1,1,1,1,1,1,1]", "network.multipliers: tuple should have at most 10 items"),
        ("rollout.redraw=1000000000", "rollout.redraw: input should be less than or equal to 1000"),
        ("nfe=1000000", "nfe: input should be less than or equal to 10000"),
        ("eval.num_samples=100000000", "eval.num_samples: input should be less than or equal to 10000000"),
        ("distributed.timeout=1e300", "distributed.timeout: input should be less than or equal to 1000000"),
        ("train.student_lr=1e30", "train.student_lr: input should be less than or equal to 1000"),
        (f"train.student_lr={HUGE}", "train.student_lr: must be a finite number, got 1000"),
        (f"train.steps={HUGE}", "train.steps: input should be less than or equal to 1000000000, got 1000"),
        (f"train.steps=1{'0' * 5000}", "override 'train.steps=1000"),  # more digits than Python reads
        (
            "device=cuda:9999999999999999999",
            "device: must be auto, cpu, cuda or cuda:N, got 'cuda:9999999999999999999'",
        ),
        # accepted without a word before
        ("nfe=???", "nfe: '???' is no value"),
        ("teacher.checkpoint=???", "teacher.checkpoint: '???' is no value"),
        ("teacher={}", "teacher: {} changes nothing"),
        ("train={}", "train: {} changes nothing"),
        ("distributed.zero=true", "distributed.zero: must be a number, got True"),
        ("train=[1,2]", "train: input should be a dictionary or an instance of TrainConfig, got [1, 2]"),
        ("teacher=[]", "override 'teacher=[]': teacher: expected keys and values, got []"),
        ("init_step=0", "init_step: must be newest, best, or the step of a checkpoint, got 0"),
        ("init_step=last", "init_step: must be newest, best, or the step of a checkpoint, got 'last'"),
        # names that are places
        ("name=..", "name: must be a plain file name"),
        ("name=a/b", "name: must be a plain file name"),
        (f"name={'a' * 300}", "name: must be a plain file name"),
    ],
)
def test_a_value_that_no_run_has_is_one_short_line(tmp_path, override, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    with pytest.raises(ValueError) as caught:
        load_config(path, [override])
    said = str(caught.value)
    assert said.startswith(message) and "\n" not in said and len(said) < 300


@pytest.mark.parametrize(
    "text, message",
    [
        ("base: digits\ntrain: [1, 2]\n", "train: expected keys and values, got [1, 2]"),
        ("base: digits\neval: {ddim_nfe: {a: 1}}\n", "eval.ddim_nfe: expected a list, got {'a': 1}"),
        ("base: digits\nteacher: {}\n", "teacher: {} changes nothing of digits"),
        ("base: digits\nnfe: ???\n", "nfe: '???' is no value"),
        ("base: digits\ntrain:\n  steps: ???\n", "train.steps: '???' is no value"),
        ("base: [digits]\n", "config \"['digits']\": neither a file nor one of"),
    ],
)
def test_a_file_over_its_base_is_checked_by_key(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_words_of_yaml_1_1_are_booleans():
    """yes, no, on and off are true and false in OmegaConf's YAML, and the resolved configuration says so."""
    assert load_config("digits", ["gamma.per_step=yes"]).gamma.per_step is True
    with pytest.raises(ValueError, match="gamma.per_step: input should be a valid boolean, got 'ja'"):
        load_config("digits", ["gamma.per_step=ja"])
