"""The launchers as users start them: one node, two nodes, Slurm; a rank that is killed; measuring on several ranks."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import command_on_ranks, free_port, run_ranks, seconds_since_the_kill

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = ["smoke", "device=cpu", "train.batch_size=8", "train.steps=6", "log_every=1", "save_every=2"]
DEEPSPEED = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or shutil.which("deepspeed")
needs_deepspeed = pytest.mark.skipif(DEEPSPEED is None, reason="needs the deepspeed launcher")


def environment(**more):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        **os.environ,
        "PATH": path,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}",
        **more,
    }


def start(command, folder, name, **more):
    """A process whose output goes to a file of its own."""
    with open(folder / name, "wb") as file:
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment(**more),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def launch(folder, script, *arguments, **more):
    """(exit code, output) of two ranks under the deepspeed launcher."""
    process = start(
        [DEEPSPEED, "--num_gpus", 2, "--master_port", free_port(), ROOT / script, *arguments],
        folder,
        "launch.txt",
        **more,
    )
    code = process.wait(120)
    return code, (folder / "launch.txt").read_text().replace("\r", "\n")


def losses(run):
    return [
        (record["step"], record["loss_student"], record["loss_score_net"])
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of two ranks without a launcher: what launched ones are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = ["train", *RUN, "eval.num_samples=30", "--outdir", str(folder / "run")]
    results = command_on_ranks(folder, 2, arguments)
    assert [code for code, _ in results] == [0, 0], results[0][1]
    return folder / "run"


@needs_deepspeed
def test_a_killed_rank_is_named_and_the_run_goes_on_to_the_same_end(tmp_path, undisturbed):
    arguments = [*RUN, "eval.num_samples=30", "--outdir", tmp_path / "run"]
    code, output = launch(tmp_path, "tests/support/faulty_rank.py", *arguments, FAULT="kill:1:5")
    assert code != 0 and seconds_since_the_kill(output) < 60
    (line,) = [line for line in output.splitlines() if line.startswith("hsivi:")]
    lost = r"hsivi: rank 1 \(.*\) is lost: no sign of life for \d+ s, last seen at .*"
    assert re.match(f"{lost}; the run goes on from its newest checkpoint", line)
    assert sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_2", "step_4"]

    results = command_on_ranks(tmp_path, 2, ["train", *map(str, arguments)])
    assert [code for code, _ in results] == [0, 0], results[0][1]
    assert losses(tmp_path / "run") == losses(undisturbed)
    for file in (undisturbed / "checkpoints" / "step_6").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "run" / "checkpoints" / "step_6" / file.name).read_bytes(), file.name
    tables = [json.loads((run / "results.json").read_text()) for run in (tmp_path / "run", undisturbed)]
    assert [row["frechet_distance"] for row in tables[0]] == [row["frechet_distance"] for row in tables[1]]


@needs_deepspeed
def test_evaluation_and_sampling_on_two_ranks_are_those_of_one(tmp_path, undisturbed):
    from hsivi_fast import evaluate, sample

    expected = evaluate(undisturbed, 61)  # an odd number: the last rank draws one more, which does not count
    code, output = launch(tmp_path, "launch/evaluate.py", undisturbed, "--num-samples", 61)
    assert code == 0, output
    (row,) = [line.split() for line in output.splitlines() if line.startswith("HSIVI (EMA)")]
    assert row[3] == f"{expected['frechet_distance']:.2f}"

    arguments = ["sample", str(undisturbed), "--seeds", "0-6", "--outdir", str(tmp_path / "pictures")]
    (code, output), (other_code, _) = command_on_ranks(tmp_path, 2, arguments)
    assert (code, other_code) == (0, 0), output
    images = sample(undisturbed, range(7)).numpy()
    for seed, image in enumerate(images):
        drawn = np.array(Image.open(tmp_path / "pictures" / f"{seed:06d}.png")).astype(int)
        assert np.abs(drawn - image[0].astype(int)).max() <= 1


def distance_on_ranks(run, count):
    from hsivi_fast import evaluate

    return evaluate(run, count)["frechet_distance"]


def test_the_distance_on_ranks_is_that_of_one_process(undisturbed):
    """To 1e-6, for counts that ranks share evenly, unevenly, and that leave some without any."""
    for ranks, count in ((2, 60), (4, 61), (4, 5)):
        values = run_ranks(distance_on_ranks, ranks, undisturbed, count)
        assert values == [pytest.approx(distance_on_ranks(undisturbed, count), rel=1e-6)] * ranks


@needs_deepspeed
def test_two_nodes_without_ssh_are_one_run(tmp_path):
    """2 x 2 ranks, as two machines would start them."""
    command = ["launch/multinode.sh", *RUN, "distributed.zero=2", "--outdir", tmp_path / "run"]
    shared = {"IP_ADDR": "127.0.0.1", "NUM_NODES": "2", "GPUS": "2", "PORT": str(free_port())}
    nodes = [start(command, tmp_path, f"node_{node}.txt", NODE_RANK=str(node), **shared) for node in (0, 1)]
    codes = [process.wait(150) for process in nodes]
    assert codes == [0, 0], (tmp_path / "node_0.txt").read_text() + (tmp_path / "node_1.txt").read_text()
    assert [step for step, _, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (recorded["world_size"], recorded["samples_per_rank"], recorded["zero"]) == (4, 2, 2)


def test_slurm_starts_one_launcher_a_node_and_tells_it_who_it_is(tmp_path):
    """With stand-ins for Slurm's commands and for deepspeed, which writes down how it was called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "scontrol": "echo gpu-07; echo gpu-09\n",
        "srun": 'shift 2\nfor id in 0 1; do SLURM_NODEID=$id "$@"; done\n',
        "deepspeed": """while [ $# -gt 0 ]; do
            if [ "$1" = --hostfile ]; then echo "hosts:" $(cat "$2"); shift 2; else echo "$1"; shift; fi
        done | tr "\\n" " "; echo\n""",
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}")
        (programs / name).chmod(0o755)
    variables = {
        "SLURM_JOB_NODELIST": "gpu-[07,09]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_GPUS_ON_NODE": "8",
    }
    result = subprocess.run(
        ["launch/slurm.sh", "cifar10", "--outdir", "runs/a b"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", **variables},
    )
    assert result.returncode == 0, result.stderr
    hosts, script = "hosts: node-0 slots=8 node-1 slots=8", f"{ROOT}/launch/train.py cifar10 --outdir runs/a b "
    assert result.stdout.splitlines() == [
        f"--no_ssh --node_rank {rank} --master_addr gpu-07 --master_port 20077 {hosts} {script}" for rank in (0, 1)
    ]


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"IP_ADDR": ""}, "IP_ADDR: not set; give the address of machine 0"),
        ({"NODE_RANK": ""}, "NODE_RANK: not set; give this machine's number, from 0"),
        ({"NODE_RANK": "2"}, "NODE_RANK: 2 is not below the number of machines, 2"),
        ({"NODE_RANK": "one"}, "NODE_RANK: 'one' is not a number from 0 on"),
        ({"NUM_NODES": "0"}, "NUM_NODES: '0' is not a number from 1 on"),
        ({"HOSTFILE": "missing"}, "HOSTFILE: missing cannot be read"),
        ({"HOSTFILE": "empty"}, "HOSTFILE: empty names no machine"),
        ({"HOSTFILE": "wrong"}, "HOSTFILE: wrong, machine 2:b slot=8: expected a line like 'name slots=8'"),
        ({"HOSTFILE": "twice"}, "HOSTFILE: twice names a twice"),
    ],
)
@needs_deepspeed
def test_wrong_settings_of_a_node(tmp_path, variables, message):
    for name, text in {
        "empty": "# nobody\n",
        "wrong": "a slots=8\nb slot=8\n",
        "twice": "a slots=8\na slots=8\n",
    }.items():
        (tmp_path / name).write_text(text)
    result = subprocess.run(
        [ROOT / "launch" / "multinode.sh", "smoke"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(**{"IP_ADDR": "127.0.0.1", "NUM_NODES": "2", "NODE_RANK": "0", "GPUS": "2", **variables}),
    )
    assert (result.returncode, result.stderr) == (2, f"multinode.sh: {message}\n")
