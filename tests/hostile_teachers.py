"""Bad inputs of hostile.py: EDM's pickles, references and runs with classes, each with something wrong in it."""

import collections
import json
import pickle

import numpy as np
import torch

from hsivi_fast.nets import build_unet

from .hostile_inputs import QUICK, SHAPES, Input, _Code, _damaged
from .support import nvlabs_pickles

SONG = {
    **{"family": "song", "image_channels": 1, "image_size": 8, "channels": 8, "multipliers": [1, 2], "res_blocks": 1},
    **{"attention": [4], "classes": 3},
}
KEYS = (
    *("teacher.guidance=2", "teacher.null_class=-1", "teacher.null_class=2", "classes=[0]", "classes=[3]"),
    *("teacher.guidance=-1", "teacher.guidance=.nan", "classes=[]", "classes=[-1]", "classes=3", "network.classes=2"),
    *(
        "network.classes=null",
        "teacher.prediction=v",
        "teacher.prediction=epsilon",
        "teacher.betas=edm",
        "spacing=angle",
    ),
    *("teacher.betas=linear", "nfe=900", "teacher.steps=7", "eval.reference=a.pkl", "network.image_size=16"),
)
LABELS = ("0", "0-2", "3", "-1", "x", "", "0-", "0,1", "9" * 30, "0-9999999999", "1.5")


def _tensors():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_unet(SONG)
    return {f"model.{name}": tensor.detach() for name, tensor in network.state_dict().items()}


def _wrong_tensors(rng, tensors):
    """The same with something wrong with one of them, or nothing."""
    name = rng.choice(list(tensors))
    one = tensors[name]
    wrong = rng.choice(
        (one, one.to(torch.int32), one * float("nan"), one[None], torch.empty(0), one.to(torch.complex64), one.double())
    )
    changed = {**tensors, name: wrong}
    return rng.choice((tensors, changed, changed, {key: value for key, value in tensors.items() if key != name}))


def _snapshot(rng):
    """The bytes of a pickle in EDM's layout, or in one that is not."""
    tensors = _wrong_tensors(rng, _tensors())
    made_with = rng.choice(({}, {"encoder_type": "skip"}, {"label_dropout": "x"}, {"channel_mult_emb": 3}, {3: 3}))
    around = rng.choice(({}, {"sigma_data": 1.0}, {"sigma_min": [1]}, {"sigma_max": None}, {"use_fp16": True}))
    content = nvlabs_pickles.snapshot_of(tensors, rng.choice(("SongUNet", "DhariwalUNet")), made_with, **around)
    network = content["ema"]
    others = (
        *({"ema": None}, {"ema": 3}, {"ema": [network]}, {"net": network}, {"ema": network, "code": _Code()}),
        *([network], network, {"ema": network.model}, {"ema": tensors}, {"ema": _Code()}, collections.OrderedDict()),
    )
    value = content if rng.random() < 0.5 else rng.choice(others)
    data = nvlabs_pickles.pickled(value, rng.choice((2, 4, 5)))
    return data if rng.random() < 0.6 else _damaged(rng, data)


def _statistics(rng):
    """The bytes of a pickle of statistics as EDM2's, with anything in it."""
    n = rng.choice((0, 1, 64, 2048))
    mu, sigma = np.zeros(n), np.eye(n)
    if rng.random() < 0.5 and n:
        mu[0] = rng.choice((float("nan"), float("inf"), 1e300))
    value = rng.choice(
        (
            *(
                {"fid": {"mu": mu, "sigma": sigma}},
                {"fid": {"mu": mu}},
                {"fid": {"mu": sigma, "sigma": mu}},
                {"fid": 3},
            ),
            *({"mu": mu, "sigma": sigma}, {"fid": {"mu": mu.astype(object), "sigma": sigma}}, [mu], _Code(), {}),
        )
    )
    data = pickle.dumps(value)
    return data if rng.random() < 0.6 else _damaged(rng, data)


def teachers(rng, folder, fixtures):
    """An EDM pickle that is converted or trained from, a reference, labels for a run without classes."""
    (folder / "a.pkl").write_bytes(_statistics(rng) if rng.random() < 0.3 else _snapshot(rng))
    lines = [f"  {key}: {json.dumps(value)}" for key, value in SONG.items()]
    (folder / "run.yaml").write_text(
        "\n".join(["network:", *lines, "teacher: {checkpoint: a.pkl, prediction: denoiser}", "nfe: 3"])
    )
    if rng.random() < 0.1:
        (folder / "run.yaml").write_text(rng.choice(SHAPES))
    measured = ["data=digits", "eval.metric=digits", "eval.reference=a.pkl", "eval.num_samples=4", "eval.seeds=1"]
    words = rng.choice(
        (
            ["convert", "a.pkl", "--to", "out"],
            ["convert", "a.pkl", "--to", "out"],
            ["train", "run.yaml", *QUICK, "--outdir", "out"],
            ["train", "run.yaml", *QUICK, rng.choice(KEYS), "--outdir", "out"],
            ["train", "run.yaml", *QUICK, rng.choice(KEYS), "--dry-run"],
            ["train", "smoke", *QUICK, rng.choice(KEYS), "--outdir", "out"],
            ["train", "smoke", *QUICK, *measured, "--outdir", "out"],
            ["eval", fixtures.run, "--num-samples", "4", "--ref", "a.pkl"],
            ["sample", fixtures.run, "--seeds", "0-3", "--labels", rng.choice(LABELS), "--outdir", "out"],
        )
    )
    return Input("teachers", words)
