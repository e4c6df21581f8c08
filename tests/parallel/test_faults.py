"""One of several ranks is lost, hangs, is wrong or is told to stop: a line names it, and the run goes on later."""

import json

import pytest
from ranks import command_on_ranks, free_port, seconds_since_the_kill

RUN = ["smoke", "device=cpu", "train.batch_size=8", "train.steps=6", "log_every=1", "save_every=2"]


def said(output):
    """The lines that the command itself has written, without bars and libraries' remarks."""
    return [line for line in output.splitlines() if line.startswith("hsivi:")]


def on_two_ranks(tmp_path, *overrides, fault=None, **more):
    return command_on_ranks(tmp_path, 2, ["train", *RUN, *overrides, "--outdir", str(tmp_path / "run")], fault, **more)


def newest(tmp_path):
    return max(int(folder.name.removeprefix("step_")) for folder in (tmp_path / "run" / "checkpoints").glob("step_*"))


def test_a_hanging_rank_is_ended_by_the_timeout(tmp_path):
    (code, output), (other_code, other_output) = on_two_ranks(tmp_path, "distributed.timeout=10", fault="hang:1:5")
    assert (code, other_code) == (2, 2)
    (line,) = said(output)
    assert line.startswith("hsivi: rank 1 (")
    assert "hangs: nothing done for 10 s (distributed.timeout), last at step 5" in line
    assert said(other_output) == [] and "Traceback" not in output + other_output
    assert newest(tmp_path) == 4  # and it has ended: `command_on_ranks` waits 90 s


def test_a_nan_on_one_rank_stops_all(tmp_path):
    (code, output), (other_code, other_output) = on_two_ranks(tmp_path, fault="nan:1:5")
    assert (code, other_code) == (2, 2)
    (line,) = said(output)
    assert "the loss is not finite at step 5, layer " in line
    assert " on rank 1; the last good checkpoint is " in line and "step_4" in line
    assert said(other_output) == [] and "Traceback" not in output + other_output
    assert newest(tmp_path) == 4


def test_a_rank_with_another_configuration_is_refused(tmp_path):
    def arguments(rank):
        return ["train", *RUN, *(["train.clip=2.0"] if rank else []), "--outdir", str(tmp_path / "run")]

    (code, output), (other_code, other_output) = command_on_ranks(tmp_path, 2, arguments)
    assert (code, other_code) == (2, 2)
    difference = "train.clip = 1.0, not 2.0 (rank 0's value first)"
    advice = "start every rank with the same configuration and the same code"
    assert said(output) == [f"hsivi: rank 1 has another configuration: {difference}; {advice}"]
    assert said(other_output) == [] and not (tmp_path / "run").exists()


def test_a_rank_with_other_code_is_refused(tmp_path):
    (code, output), (other_code, other_output) = on_two_ranks(tmp_path, fault="code:1:0")
    assert (code, other_code) == (2, 2)
    (line,) = said(output)
    assert line.startswith("hsivi: rank 1 has another code of hsivi_fast (hash): other code, rank 0 has ")
    assert said(other_output) == []


def test_an_error_of_one_rank_ends_all_and_is_told(tmp_path):
    (code, output), (other_code, other_output) = on_two_ranks(tmp_path, fault="error:1:5")
    assert code == 2 and other_code != 0
    (line,) = said(output)
    assert line.startswith("hsivi: rank 1 (") and "KeyError: 'a bug'" in line
    assert newest(tmp_path) == 4


def test_a_checkpoint_of_another_network_is_refused_by_all(tmp_path):
    from checkpoint_files import rewrite
    from safetensors.torch import load_file

    assert [code for code, _ in on_two_ranks(tmp_path, "train.steps=2")] == [0, 0]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_2"
    weights = load_file(checkpoint / "student.safetensors")
    weights["in_conv.weight"] = weights["in_conv.weight"][:1]
    rewrite(checkpoint, "student", weights)
    (code, output), (other_code, other_output) = on_two_ranks(tmp_path)
    assert (code, other_code) == (2, 2)
    shapes = f"of shape {list(weights['in_conv.weight'].shape)}, expected [8, 1, 3, 3]"
    assert said(output) == [f"hsivi: checkpoint: student is of another network, first at in_conv.weight: {shapes}"]
    assert said(other_output) == []


def test_a_lost_master_is_named(tmp_path):
    (code, output), (other_code, other_output) = on_two_ranks(tmp_path, fault="kill:0:5")
    assert (code, other_code) == (-9, 2)
    (line,) = said(other_output)
    assert line.startswith("hsivi: rank 0 (master 127.0.0.1:") and ") is lost; last here: step 5" in line
    assert seconds_since_the_kill(output) < 60


def test_a_signal_to_one_rank_stops_all_after_a_save(tmp_path):
    results = on_two_ranks(tmp_path, fault="term:1:3")
    assert [code for code, _ in results] == [128 + 15] * 2
    assert said(results[0][1]) == [
        f"hsivi: stopped at step 3 of 6; saved in {tmp_path / 'run'}; the same command goes on from there"
    ]
    assert said(results[1][1]) == [] and newest(tmp_path) == 3
    results = on_two_ranks(tmp_path)
    assert [code for code, _ in results] == [0, 0]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "ranks, overrides, message",
    [
        (3, [], "train.batch_size: 8 cannot be split over 3 processes; use a multiple of 3"),
        (
            2,
            ["distributed.accumulation=3"],
            "distributed.accumulation: 3 parts do not fit the 4 samples of a process; use a divisor of 4",
        ),
        (
            2,
            ["distributed.engine=plain"],
            "distributed.engine: 'plain' trains in one process and there are 2; choose auto or deepspeed",
        ),
        (
            2,
            ["distributed.zero=3", "cuda_graphs=true"],
            "cuda_graphs: true does not go with distributed.zero=3, which moves parameters around in every call; "
            "choose stage 0, 1 or 2, or cuda_graphs=false",
        ),
        (
            2,
            ["device=cuda:0"],
            "device: 'cuda:0' is one device and there are several processes; use auto or cuda, which give each its own",
        ),
        (
            2,
            ["distributed.deepspeed=missing.json"],
            "distributed.deepspeed 'missing.json': no such file",
        ),
    ],
)
def test_what_cannot_be_is_said_once(tmp_path, ranks, overrides, message):
    results = command_on_ranks(tmp_path, ranks, ["train", *RUN, *overrides, "--outdir", str(tmp_path / "run")])
    assert [code for code, _ in results] == [2] * ranks
    assert said(results[0][1]) == [f"hsivi: {message}"]
    assert "Traceback" not in results[0][1]
    assert [said(output) for _, output in results[1:]] == [[]] * (ranks - 1)


def test_a_master_that_does_not_answer(tmp_path):
    """Rank 1 alone, with nobody at the address; and rank 0 whose other never comes."""
    port = free_port()
    arguments = ["train", *RUN, "distributed.connect_timeout=2", "--outdir", str(tmp_path / "run")]
    environment = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": str(port)}
    ((code, output),) = command_on_ranks(tmp_path, 1, arguments, environment=environment)
    assert code == 2
    reason = "rank 1 cannot reach it; it did not answer within 2 s (distributed.connect_timeout)"
    assert said(output) == [f"hsivi: rank 1: master 127.0.0.1:{port}: {reason}"]
    ((code, output),) = command_on_ranks(tmp_path, 1, arguments, environment={"WORLD_SIZE": "2"})
    assert code == 2
    (line,) = said(output)
    assert line.endswith(": rank 1 did not come within 2 s (distributed.connect_timeout)")
