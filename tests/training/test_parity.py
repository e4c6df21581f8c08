"""The same training whatever the processes and the engine: plain, DeepSpeed with ZeRO 0 to 3, 1, 2 and 4 ranks."""

import json

import numpy as np
import pytest
from ranks import run_ranks
from run_files import checkpoint, distance, losses_of

from hsivi_fast.config import load_config
from hsivi_fast.training.engine import PlainEngine
from hsivi_fast.training.trainer import train
from hsivi_fast.training.zero import DeepSpeedEngine

STEPS = 6
# Not a multiple of 4 trajectories in a pool (22 = ceil(2 * 32 / 3)), and nearly all parameters in pieces in stage 3,
# which keeps small ones whole by itself. Two ranks have the shapes that test_execution.py compiles.
RUN = ["device=cpu", "train.batch_size=32", f"train.steps={STEPS}", "log_every=1"]
VARIANTS = {
    "": [],
    "accumulation": ["distributed.accumulation=2"],
    "fresh": ["rollout.mode=fresh"],
    "redraw": ["rollout.redraw=2"],
    "bf16": ["precision=bf16"],
    "channels_last": ["channels_last=true"],
    "compile": ["compile=true"],
}
LIKE = {"accumulation": "", "compile": ""}  # variants that are compared with another one in one process
STAGES = [("deepspeed", zero, "") for zero in range(4)]
CASES = {  # ranks -> (engine, ZeRO stage, variant)
    1: [*(("plain", 0, variant) for variant in VARIANTS if variant != "compile"), *STAGES],
    2: [
        *STAGES,
        *(("deepspeed", 1, variant) for variant in VARIANTS if variant),
        *(("deepspeed", zero, variant) for zero in (2, 3) for variant in ("accumulation", "channels_last")),
        ("deepspeed", 3, "fresh"),
    ],
    4: [*STAGES, ("deepspeed", 2, "redraw")],
}


def gradients_of(engine):
    """{name: whole gradient} after a backward: what the optimizer is about to see, before clipping."""
    if isinstance(engine, PlainEngine):
        return {name: parameter.grad.numpy().copy() for name, parameter in zip(engine.names, engine.parameters)}
    from deepspeed.utils import safe_get_full_grad

    named = zip(engine.names, engine.parameters)
    return {name: safe_get_full_grad(parameter).numpy().copy() for name, parameter in named}


def train_watched(folder, overrides, settings):
    """Train a run and return the reduced gradients of the first update of each network, by network."""
    gradients = {}

    def watching(apply_step):
        def watched(engine):
            name = "student" if "log_scaled_gamma" in engine.names else "score_net"
            if name not in gradients:
                gradients[name] = gradients_of(engine)
            apply_step(engine)

        return watched

    with pytest.MonkeyPatch.context() as patch:
        for engine in (PlainEngine, DeepSpeedEngine):
            patch.setattr(engine, "apply_step", watching(engine.apply_step))
        train(load_config("smoke", [*RUN, *overrides, *settings]), folder)
    return gradients


def train_cases(folder, size):
    """All cases of a number of ranks, in one set of processes: {case: gradients}."""
    pieces = folder / "pieces.json"
    pieces.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    results = {}
    for engine, zero, variant in CASES[size]:
        settings = [f"distributed.engine={engine}", f"distributed.zero={zero}", f"distributed.deepspeed={pieces}"]
        name = f"{engine}_{zero}_{variant}"
        results[name] = train_watched(folder / name, VARIANTS[variant], settings)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{ranks: (folder, {case: gradients})}."""
    folders = {size: tmp_path_factory.mktemp(f"ranks_{size}") for size in CASES}
    return {size: (folders[size], run_ranks(train_cases, size, folders[size], size)[0]) for size in CASES}


COMPARED = [
    (size, *case)
    for size, cases in CASES.items()
    for case in cases
    if case[0] == "deepspeed" or case[2] == "accumulation"
]


@pytest.mark.parametrize("size, engine, zero, variant", COMPARED)
def test_the_training_is_that_of_one_plain_process(runs, size, engine, zero, variant):
    """Reduced gradients before Adam to 1e-5 of the plain engine's in one process, and losses to 1e-4 (in bfloat16 both
    to 5e-2, its rounding); then parameters, moments, averages and log_gamma. Adam makes steps of full size of gradients
    that are all rounding, so those are compared in norm.
    """
    reference_name = f"plain_0_{LIKE.get(variant, variant)}"
    name = f"{engine}_{zero}_{variant}"
    reference, reference_gradients = runs[1][0] / reference_name, runs[1][1][reference_name]
    folder, gradients = runs[size][0] / name, runs[size][1][name]
    rounding = 1e-5 if variant != "bf16" else 5e-2
    assert gradients.keys() == reference_gradients.keys() == {"student", "score_net"}
    for network, own in gradients.items():
        expected = reference_gradients[network]
        whole = np.linalg.norm(np.concatenate([value.flatten() for value in expected.values()]))
        for name, value in own.items():
            norm = max(np.linalg.norm(expected[name]), 0.1 * whole)  # a bias is a sum that cancels
            assert np.linalg.norm(value - expected[name]) <= rounding * norm, f"{network} {name}"

    rounding = 1e-4 if variant != "bf16" else 5e-2
    assert len(losses_of(folder)) == STEPS + STEPS // 2
    assert losses_of(folder) == pytest.approx(losses_of(reference), rel=rounding)

    for stem in ("student", "score_net"):
        for suffix in ("", "_ema", "_optimizer"):
            file, close = stem + suffix, 1e-6 if variant != "bf16" else 2e-3
            assert distance(checkpoint(folder, file, STEPS), checkpoint(reference, file, STEPS)) < close, file
    if variant != "bf16":  # it starts at 0 and moves by 1e-4, so this is of the movement itself
        for stem in ("student", "student_ema"):
            own, expected = (
                {"log_gamma": checkpoint(where, stem, STEPS)["log_scaled_gamma"]} for where in (folder, reference)
            )
            assert float(expected["log_gamma"].abs().max()) > 1e-5
            assert distance(own, expected) < 1e-2
    state = json.loads((folder / "checkpoints" / f"step_{STEPS}" / "state.json").read_text())
    assert (state["student_updates"], state["score_net_updates"]) == (STEPS // 2, STEPS)


def test_the_record_says_who_trained(runs):
    environment = json.loads((runs[4][0] / "deepspeed_2_" / "environment.json").read_text())
    assert (environment["world_size"], environment["samples_per_rank"], environment["zero"]) == (4, 8, 2)
    environment = json.loads((runs[1][0] / "plain_0_" / "environment.json").read_text())
    assert (environment["world_size"], environment["samples_per_rank"], environment["zero"]) == (1, 32, None)
    (save,) = map(json.loads, (runs[2][0] / "deepspeed_1_" / "saves.jsonl").read_text().splitlines())
    assert save["step"] == STEPS and save["seconds"] > 0
    saved = runs[2][0] / "deepspeed_1_" / "checkpoints" / f"step_{STEPS}"
    assert save["bytes"] == sum(file.stat().st_size for file in saved.iterdir())
