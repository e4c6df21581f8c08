"""The bad inputs of hostile.py, by kind.

A kind is a function (rng, folder, fixtures) -> Input, which may write to the folder that the command will run in.
"""

import gzip
import io
import json
import math
import os
import pickle
import shlex
import shutil
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from hsivi_fast.config import ASSETS, CONFIGS, known_keys

QUICK = (
    *("device=cpu", "train.steps=1", "eval.num_samples=0", "log_every=1"),
    *("start.updates=2", "start.trajectories=8", "start.score_net_updates=0"),
)
NUMBERS = (0, -1, 1, 2, 3, 7, 0.5, 1e-30, 1e30, 10**6, 10**9, 10**12, 10**15, 10**23, 2**31, 2**63, 2**64, -(10**12))
WORDS = (
    *(
        "null",
        "~",
        "",
        "true",
        "yes",
        "no",
        "auto",
        "text",
        ".nan",
        ".inf",
        "-.inf",
        "???",
        "${seed}",
        "${x}",
        "${oc.env:HOME}",
    ),
    *(
        "[]",
        "{}",
        "[1]",
        "[0]",
        "[null]",
        "{a: 1}",
        "[[1]]",
        "'",
        '"',
        "[",
        "{",
        "&a",
        "*a",
        "!!python/object:os.system",
    ),
    *(
        "0x10",
        "1_000",
        "1e",
        "1e400",
        "9" * 400,
        "x" * 5000,
        "é",
        "日本",
        "a b",
        "..",
        "/",
        "~/x",
        ".",
        "-",
        "--",
        "%s",
        "\\",
    ),
    *(
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        "/proc/self/mem",
        "/proc/self/environ",
        "/etc/passwd",
        "http://127.0.0.1:9/x",
    ),
    *(
        "file:///nowhere",
        "http://[",
        "https://user:secret@127.0.0.1:9/x",
        "cifar10",
        "digits_teacher.safetensors",
        "cuda:99",
    ),
    "cuda:9999999999999999999",
)


class Input:
    """One call of the command.

    arguments: its words; environment: {name: value}, None to take one away; streams: {descriptor: "closed", "full" or
    "pipe"}; keeps: whether a refusal has to leave the folder as it was, which a training that had begun need not.
    """

    def __init__(self, kind, arguments, environment=None, streams=None, keeps=True):
        self.kind, self.arguments, self.keeps = kind, [str(word) for word in arguments], keeps
        self.environment, self.streams = environment or {}, streams or {}

    def __str__(self):
        words = [f"{name}={shlex.quote(str(value))}" for name, value in self.environment.items()]
        redirections = [f"{descriptor}>{what}" for descriptor, what in self.streams.items()]
        return " ".join([*words, "hsivi", *map(_shown, self.arguments), *redirections])


def _shown(word):
    word = word if len(word) < 200 else f"{word[:200]}..."
    return shlex.quote(word.encode("unicode_escape").decode() if not word.isprintable() else word)


def _value(rng):
    return str(rng.choice(NUMBERS)) if rng.random() < 0.5 else rng.choice(WORDS)


def overrides(rng, folder, fixtures):
    """Keys of the configuration with values that do not fit, or fit and are too large."""
    given = list(QUICK)
    for _ in range(rng.choice((1, 1, 1, 2))):
        key = rng.choice([*known_keys(), "train.stepz", "", "=", "a.b.c", "network.multipliers[0]", "base"])
        given.append(f"{key}={_value(rng)}")
    config = rng.choice(("smoke", "smoke", "smoke", "toy2d", "digits", "mnist", "imagenet64"))
    dry = ["--dry-run"] if config in ("digits", "mnist", "imagenet64") or rng.random() < 0.5 else []
    if rng.random() < 0.1:
        return Input("overrides", ["teacher", "smoke", "teacher_train.steps=1", *given, "--outdir", "out"])
    return Input("overrides", ["train", config, *given, "--outdir", "out", *dry])


def yaml(rng, folder, fixtures):
    """YAML files that are damaged, of another shape, or written to confuse."""
    text = (CONFIGS / f"{rng.choice(('smoke', 'toy2d', 'digits'))}.yaml").read_text()
    data = text.encode()
    spot = rng.randrange(len(data))
    texts = (
        *(data[:spot], data[:spot] + bytes([rng.randrange(256)]) + data[spot + 1 :], data[spot:], data + data),
        *(
            b"",
            b"\0",
            b"null",
            b"3",
            b"[]",
            b"- a",
            b"a",
            b"{}",
            b"a: [",
            b"a: &a [*a]",
            b"? [a, b]\n: 1",
            b"\xff\xfe\x00",
            b"\t: 1",
        ),
        *(
            b"base: run",
            b"base: [smoke]",
            b"base: {a: 1}",
            b"base: 3",
            b"base: null",
            b"base: nowhere",
            b"base: ../run",
        ),
        *(
            b"base: smoke\nnetwork: 3",
            b"base: smoke\nnetwork: [a]",
            b"base: smoke\nteacher: smoke",
            b"base: smoke\ntrain: 4",
        ),
        *(
            b"base: smoke\nteacher: {}",
            b"base: smoke\ntrain: []",
            b"base: smoke\n1: 2",
            b"base: smoke\n[a]: 2",
            b"base: smoke\nnull: 2",
        ),
        *(
            b"base: smoke\nnfe: ???",
            b"base: smoke\nnfe: ${nfe}",
            b"base: smoke\nnfe: ${seed}",
            b"base: smoke\nname: ../../x",
        ),
        *(
            b"base: smoke\nname: [a]",
            b"base: smoke\nname: ''",
            b"base: smoke\nseed: !!python/name:os.system x",
            b"base: smoke\nseed: 1\nseed: 2",
        ),
        b"[" * rng.choice((100, 2000, 100_000)),
        b"a: " + b"{a: " * rng.choice((100, 2000)) + b"1",
        b"a: &a [1,1]\n" + b"".join(b"%c: &%c [*%c,*%c,*%c,*%c]\n" % (98 + n, 98 + n, *[97 + n] * 4) for n in range(9)),
        bytes(rng.randrange(256) for _ in range(rng.choice((1, 20, 2000)))),
    )
    file = folder / rng.choice(("run.yaml", "run", "smoke.yaml", "r u n.yaml"))
    file.write_bytes(rng.choice(texts))
    command = ["train", file.name, *QUICK, "--outdir", "out", *rng.choice(([], ["--dry-run"]))]
    return Input("yaml", command)


# What a file becomes: bytes -> bytes, or a text.
def _damaged(rng, data):
    spot = rng.randrange(max(len(data), 1))
    flipped = bytearray(data or b"x")
    flipped[min(spot, len(flipped) - 1)] ^= 1 << rng.randrange(8)
    return rng.choice(
        (b"", data[:spot], bytes(flipped), b"\0" * len(data), data + b"x", data[: len(data) // 2], b"null", b"{}", b"3")
    )


SHAPES = (
    "null",
    "[]",
    "{}",
    "3",
    '"a"',
    "[null]",
    "[3]",
    "[[]]",
    "true",
    "NaN",
    '{"step": 1}',
    '{"step": "1"}',
    '{"step": null}',
)
RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "saves.jsonl",
    "results.json",
    "environment.json",
    "wandb.json",
    "inputs.json",
)


def run_files(rng, folder, fixtures):
    """A run's folder in which one file is damaged, of another shape, another kind of thing, or gone."""
    run = folder / "run"
    shutil.copytree(rng.choice((fixtures.run, fixtures.run, fixtures.plane)), run)
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    inside = sorted(checkpoint.iterdir())
    file = rng.choice(
        [
            *(run / name for name in RUN_FILES),
            *inside,
            checkpoint / "state.json",
            checkpoint / "state.json",
            run / ".lock",
        ]
    )
    what = rng.choice(("damaged", "damaged", "shape", "shape", "gone", "folder", "fifo", "link", "more"))
    data = file.read_bytes() if file.is_file() else b'{"step": 1}'
    file.unlink(missing_ok=True)
    if what == "damaged":
        file.write_bytes(_damaged(rng, data))
    elif what == "shape":
        file.write_text(rng.choice(SHAPES) + "\n")
        if file.suffix == ".json" and file.parent == checkpoint:
            state = json.loads(data)
            state[rng.choice(list(state))] = rng.choice((None, "x", -1, 10**30, [], {}, 1.5, True))
            file.write_text(json.dumps(state))
    elif what == "folder":
        file.mkdir()
    elif what == "fifo":
        os.mkfifo(file)
    elif what == "link":
        outside = folder.parent / "outside"  # which is looked for: nothing may be made there
        file.symlink_to(rng.choice((file, outside, "/dev/zero", "/dev/null")))
    elif what == "more":
        (
            run / "checkpoints" / rng.choice(("step_x", "step_", "step_99", "step_-1", "step_" + "9" * 30, "step_٣"))
        ).mkdir()
        file.write_bytes(data)
    config = (
        "toy2d"
        if (run / "config.yaml").is_file() and b"target: checker" in (run / "config.yaml").read_bytes()
        else "smoke"
    )
    words = rng.choice(
        (
            ["train", config, *QUICK, "train.steps=3", "save_every=1", "train.batch_size=4", "--outdir", "run"],
            ["train", config, *QUICK, "train.steps=2", "save_every=1", "--outdir", "run"],
            ["sample", "run", "--seeds", "0-1"],
            ["eval", "run", "--num-samples", "4"],
            ["report", "run"],
            ["report", "run", str(fixtures.plane), "--out", "page.html"],
            ["convert", "run", "--to", "a.pt"],
            ["export", "run", "--format", rng.choice(("safetensors", "diffusers")), "--outdir", "out"],
            ["train", "smoke", *QUICK, "init=run", "--outdir", "out"],
        )
    )
    return Input("run files", words)


class _Code:
    """Pickled code, which must never run: it would leave a file."""

    def __reduce__(self):
        return os.system, ("touch planted",)


def _objects(rng, tensors):
    first = next(iter(tensors))
    other = {
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "meta": torch.empty(3, device="meta"),
        "complex": torch.ones(3, dtype=torch.complex64),
        "empty": torch.empty(0),
        "scalar": torch.tensor(1.0),
        "nan": torch.full_like(tensors[first], float("nan")),
        "ints": tensors[first].to(torch.int8),
        "half": tensors[first].half(),
        "double": tensors[first].double(),
        "shape": torch.ones(2, 3, 4),
        "none": None,
        "text": "text",
        "list": [1.0, 2.0],
        "number": 3,
        "dict": {"a": torch.ones(1)},
    }
    replaced = {**tensors, first: rng.choice(list(other.values()))}
    without = {name: tensor for name, tensor in tensors.items() if name != first}
    nested = {"a": tensors}
    for _ in range(rng.choice((1, 5, 500))):
        nested = {"a": nested}
    return (
        *(None, 3, "text", [], {}, [tensors], (tensors,), tensors[first], {3: tensors[first]}, {None: 1}, nested),
        *(
            replaced,
            replaced,
            replaced,
            without,
            {**tensors, "more": torch.ones(1)},
            {**tensors, "../x": torch.ones(1)},
        ),
        *(
            {"state_dict": tensors},
            {"model": tensors},
            {"ema": 3},
            {"ema": {"shadow": tensors}},
            {"ema": {"shadow": 3}},
            {"model": replaced},
        ),
        *(
            {"whole_model": tensors},
            {"student_ema": [tensors]},
            {"phinet": tensors, "fnet": 3},
            {"phinet": tensors, "fnet": tensors},
        ),
        *(
            {**tensors, first: torch.nn.Parameter(tensors[first])},
            torch.nn.Linear(2, 2),
            _Code(),
            {"model": _Code()},
            {**tensors, "a": _Code()},
        ),
    )


def checkpoints(rng, folder, fixtures):
    """Files of weights that are damaged, of another kind, of another network, or hold code."""
    from safetensors.torch import load_file

    tensors = load_file(rng.choice((fixtures.checkpoint, ASSETS / "digits_teacher.safetensors")))
    name = rng.choice(("a.pt", "a.pth", "a.safetensors", "a", "a.bin"))
    file, form = (
        folder / name,
        rng.choice(("torch", "torch", "old", "pickle", "safetensors", "bytes", "damaged", "diffusers", "published")),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = rng.choice(_objects(rng, tensors))
        if form in ("torch", "old"):
            try:
                torch.save(value, file, _use_new_zipfile_serialization=form == "torch")
            except (NotImplementedError, RuntimeError, RecursionError):
                file.write_bytes(b"PK\x03\x04")
        elif form == "pickle":
            file.write_bytes(pickle.dumps(rng.choice((_Code(), {"a": _Code()}, 3, [1], {"a": np.ones(3)}, b"x" * 100))))
        elif form == "safetensors":
            kept = {key: tensor for key, tensor in tensors.items() if rng.random() < 0.9} or tensors
            changed = {
                **kept,
                next(iter(kept)): rng.choice(
                    (torch.ones(0), torch.ones(3, dtype=torch.bool), torch.ones(2, 3).to(torch.float8_e4m3fn))
                ),
            }
            said = rng.choice(
                (
                    "null",
                    "3",
                    "[]",
                    "{",
                    '{"family": 3}',
                    '{"family": "ddpm", "channels": -1}',
                    "[" * 5000,
                    '{"family": ["ddpm"]}',
                )
            )
            save_file(
                rng.choice((kept, changed, tensors)),
                file,
                rng.choice((None, {"hsivi_network": said}, {"hsivi_settings": said})),
            )
        elif form == "bytes":
            header = rng.choice(
                (
                    b"{}",
                    b"null",
                    b"[" * 1000,
                    b'{"a": 3}',
                    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
                )
            )
            size = rng.choice((len(header), 0, 2**63, 2**40, len(header) + 5))
            file.write_bytes(
                rng.choice(
                    (struct.pack("<Q", size) + header, rng.randbytes(300), b"", b"PK\x03\x04" + rng.randbytes(100))
                )
            )
        elif form == "diffusers":
            _diffusers(rng, file, tensors)
        else:
            source = (
                fixtures.published if form == "published" else rng.choice((fixtures.checkpoint, fixtures.published))
            )
            file.write_bytes(_damaged(rng, source.read_bytes()))
    words = rng.choice(
        (
            ["convert", name, "--to", "out"],
            ["convert", name, "--to", "out"],
            ["train", "smoke", *QUICK, f"teacher.checkpoint={name}", "--outdir", "out"],
            ["train", "smoke", *QUICK, f"init={name}", "--outdir", "out"],
            [
                "train",
                "smoke",
                *QUICK,
                f"eval.inception={name}",
                "eval.metric=inception",
                "eval.num_samples=4",
                "data=digits",
                "--outdir",
                "out",
            ],
            ["train", "smoke", *QUICK, f"teacher.checkpoint={name}", "--dry-run"],
            ["eval", fixtures.run, "--num-samples", "4", "--metric", "inception", "--inception", name],
        )
    )
    return Input("checkpoints", words)


def _diffusers(rng, folder, tensors):
    folder.mkdir()
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
    }
    for _ in range(rng.choice((0, 1, 2))):
        config[rng.choice(list(config))] = rng.choice(
            (None, "text", -1, 0, 10**9, [], [0], {}, True, 1.5, ["x"], [10**9], "UNet2DConditionModel")
        )
    (folder / "config.json").write_text(
        rng.choice((json.dumps(config), json.dumps(config), rng.choice(SHAPES), "{", "[" * 5000))
    )
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "scheduler").mkdir()
    betas = rng.choice(([], [0.1] * 1000, ["x"], [None], [2.0], "linear", 3))
    scheduler = {
        "_class_name": rng.choice(("DDPMScheduler", "EDMEulerScheduler", 3)),
        "trained_betas": betas,
        "num_train_timesteps": rng.choice((1000, -1, "x", 10**12)),
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(rng.choice((json.dumps(scheduler), "null", "[]", "{")))


def arrays(rng, folder, fixtures):
    """Statistics and images in npz files, of every type, shape and number."""
    n = rng.choice((0, 1, 2, 3, 64))
    images = rng.choice(
        (
            (4, 8, 8, 1),
            (4, 1, 8, 8),
            (4, 8, 8),
            (0, 8, 8, 1),
            (4, 8, 8, 2),
            (4, 9, 7, 1),
            (4,),
            (),
            (1, 1, 1, 1),
            (4, 8, 8, 3),
        )
    )
    types = ("u1", "i1", "u2", "f4", "f8", "c16", "?", "M8[s]", "U3", "S3", "f2", "V8", "i8", "O")
    kind = np.dtype(rng.choice(types))

    def array(shape, kind):
        try:
            return (np.arange(int(np.prod(shape))).reshape(shape) % 200).astype(kind)
        except (TypeError, ValueError):
            return np.zeros(shape, kind)

    value = rng.choice((float("nan"), float("inf"), 1e300, -1.0, 0.0, 1.0))
    mu, sigma = np.full(n, value), np.diag(np.full(n, value)) if n else np.zeros((0, 0))
    lopsided = np.eye(64) + np.triu(np.ones((64, 64)), 1)
    holds = rng.choice(
        (
            {"mu": mu, "sigma": sigma},
            {"mu": np.zeros(64), "sigma": rng.choice((lopsided, -np.eye(64), np.full((64, 64), value), np.eye(64)))},
            {"mu": array((64,), kind), "sigma": array((64, 64), kind)},
            {"mu": np.zeros(64)},
            {"arr_0": array(images, kind)},
            {"a": np.zeros(3), "arr_0": array(images, "u1")},
            {"arr_0": array(images, "u1")},
            {"arr_0": np.zeros(3, [("a", "u1"), ("b", "f4")])},
            {},
        )
    )
    file = folder / rng.choice(("a.npz", "a", "a.npy"))
    stream = io.BytesIO()
    np.savez(stream, **holds)
    data = stream.getvalue()
    odd = io.BytesIO()
    with zipfile.ZipFile(odd, "w", zipfile.ZIP_DEFLATED) as archive:
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
        shape = rng.choice(("(1000000, 1000, 1000, 3)", "(-1,)", "(10,", "x", "(4, 8, 8, 1)"))
        head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        archive.writestr(rng.choice(("arr_0.npy", "mu.npy", "../arr_0.npy")), header + head + bytes(256))
    np_text = rng.choice(
        (data, data, data, _damaged(rng, data), odd.getvalue(), b"", b"\x93NUMPY", pickle.dumps(_Code()))
    )
    if rng.random() < 0.07:
        os.mkfifo(file)
    else:
        file.write_bytes(np_text)
    measured = [
        "data=images",
        f"data_path={file.name}",
        "eval.num_samples=4",
        "eval.seeds=1",
        "eval.ddim_nfe=[3]",
        "eval.metric=digits",
    ]
    words = rng.choice(
        (
            ["eval", fixtures.run, "--num-samples", "4", "--ref", file.name],
            ["eval", fixtures.run, "--num-samples", "4", "--ref", file.name],
            ["train", "smoke", *QUICK, *measured, "--outdir", "out"],
            ["train", "smoke", *QUICK, f"eval.reference={file.name}", "eval.num_samples=4", "--outdir", "out"],
            ["teacher", "smoke", "device=cpu", "teacher_train.steps=1", *measured[:2], "--outdir", "out"],
        )
    )
    return Input("arrays", words)


def _idx(kind, shape, data):
    return struct.pack(">HBB", 0, kind, len(shape)) + b"".join(struct.pack(">I", size) for size in shape) + data


def images(rng, folder, fixtures):
    """Folders of idx files and of pictures."""
    place = folder / "data"
    place.mkdir()
    if rng.random() < 0.5:
        n = rng.choice((0, 1, 5))
        shape = rng.choice(
            ((n, 28, 28), (n, 32, 32), (n, 40, 40), (n, 28), (2**31, 2**31, 2), (2**20, 28, 28), (), (n, 0, 0))
        )
        size = math.prod(shape)
        content = _idx(rng.choice((8, 8, 8, 9, 13, 0x77)), shape, bytes(size if size < 10**6 else 100))
        content = rng.choice((content, content, _damaged(rng, content)))
        packed = rng.choice((False, False, True))
        bomb = packed and rng.random() < 0.3
        if packed:
            content = gzip.compress(bytes(1 << 29) if bomb else content, 1)
            content = content if bomb else rng.choice((content, _damaged(rng, content)))
        (place / f"train-images-idx3-ubyte{'.gz' if packed else ''}").write_bytes(content)
        labels = _idx(8, (rng.choice((n, n, n + 1)),), bytes(rng.choice((0, 3, 200)) for _ in range(n)))
        if rng.random() < 0.6:
            (place / "train-labels-idx1-ubyte").write_bytes(rng.choice((labels, labels, _damaged(rng, labels))))
        data = "mnist"
    else:
        data = "images"
        for number in range(rng.choice((0, 1, 3))):
            mode = rng.choice(("L", "RGB", "RGBA", "P", "1", "I;16", "LA", "CMYK", "F", "I"))
            size = rng.choice(((8, 8), (8, 8), (8, 8), (9, 7), (1, 1), (6000, 6000)))
            form = "TIFF" if mode in ("F", "CMYK", "I") else "PNG"
            stream = io.BytesIO()
            Image.new(mode, size).save(stream, format=form)
            name = f"{number}{rng.choice(('.png', '.png', '.jpg', '.PNG', '.webp', '.bmp'))}"
            content = stream.getvalue()
            if rng.random() < 0.1:  # a picture that says that it is larger than it is
                content = content[:16] + struct.pack(">II", 30000, 30000) + content[24:]
            (place / name).write_bytes(rng.choice((content, content, _damaged(rng, content))))
        if rng.random() < 0.1:
            os.mkfifo(place / "z.png")
    more = (
        ["teacher_train.steps=1"]
        if rng.random() < 0.3
        else ["eval.num_samples=4", "eval.seeds=1", "eval.ddim_nfe=[3]", "eval.metric=digits"]
    )
    command = ["teacher"] if more[0].startswith("teacher") else ["train"]
    return Input("images", [*command, "smoke", *QUICK, f"data={data}", "data_path=data", *more, "--outdir", "out"])


def numbers(rng, folder, fixtures):
    """Seeds, counts, batches and choices of the commands that read a run."""
    seeds = (
        "0-3",
        "",
        "-",
        "3-1",
        "1,,2",
        "a",
        "0-",
        "-1",
        "1e3",
        "0-9999999999",
        "0-199999999",
        "9" * 30,
        "0-3,0-3",
        "٣",
        " 1 , 2 ",
        "0x1",
        "1.5",
        "9223372036854775807",
    )
    value = str(rng.choice(NUMBERS)) if rng.random() < 0.8 else rng.choice(WORDS)
    run = rng.choice(
        (
            fixtures.run,
            fixtures.run,
            fixtures.plane,
            folder,
            "nowhere",
            "/dev/null",
            fixtures.published,
            "",
            "run\0",
            "x" * 300,
        )
    )
    words = rng.choice(
        (
            ["sample", run, "--seeds", rng.choice(seeds), "--outdir", "out"],
            ["sample", fixtures.run, "--seeds", rng.choice(seeds), "--outdir", "out"],
            ["sample", fixtures.run, "--seeds", "0-3", "--batch", value, "--outdir", "out"],
            ["eval", run, "--num-samples", "4"],
            ["eval", fixtures.run, "--num-samples", rng.choice((value, "10000000000000", "1", "0", "4"))],
            [
                "eval",
                fixtures.run,
                "--num-samples",
                "4",
                "--save-images",
                rng.choice(("a.npz", "out", ".", "a.npz/b", "/dev/null", "")),
            ],
            ["eval", fixtures.run, "--num-samples", "4", "--ref", rng.choice(WORDS)],
            ["train", "smoke", "--dry-run", "--processes", value],
            [
                "report",
                run,
                *rng.choice(
                    ([], ["--out", "page.html"], [fixtures.run], ["--out", "."], ["--out", "/dev/full"], ["--out", ""])
                ),
            ],
            [
                "export",
                run,
                "--format",
                rng.choice(("safetensors", "diffusers", "x")),
                "--outdir",
                rng.choice(("out", ".", "..", "/dev/null", "")),
            ],
            [
                "convert",
                rng.choice((run, fixtures.checkpoint, fixtures.published)),
                "--to",
                rng.choice(("out", "a.pt", ".", "..", "/dev/null", "", "a/b/c")),
            ],
            [
                "train",
                rng.choice(("smoke", "nowhere", "", ".", "/", "smoke.yaml", "x" * 300, "a\0")),
                *QUICK,
                "--outdir",
                rng.choice(("out", "/dev/null", "a/../out", "", "missing/../x", "x" * 300)),
            ],
            [rng.choice(("train", "sample", "evil", "", "--help", "-v")), rng.choice(("--help", "--x", "-", ""))],
        )
    )
    return Input("numbers", words)


def environment(rng, folder, fixtures):
    """Variables of launchers, folders and libraries."""
    (folder / "file").touch()
    name, values = rng.choice(
        (
            ("WORLD_SIZE", ("0", "-1", "2", "x", "", "1e3", "9" * 30)),
            ("RANK", ("0", "5", "-1", "x", "")),
            ("LOCAL_RANK", ("0", "9", "x", "-1")),
            ("MASTER_ADDR", ("nowhere.invalid", "127.0.0.1", "", "::::")),
            ("MASTER_PORT", ("0", "-1", "99999", "x", "1")),
            ("HSIVI_CACHE", ("file", "/dev/null", "/proc", "", "x" * 300)),
            ("HOME", ("file", "/nowhere", "", None)),
            ("TMPDIR", ("/nowhere", "file", "")),
            ("OMP_NUM_THREADS", ("x", "0", "-1", "99999")),
            ("CUDA_VISIBLE_DEVICES", ("x", "-1", "0,0", "99")),
            ("HSIVI_BACKEND", ("x", "", "triton", "torch")),
            ("PYTHONIOENCODING", ("ascii", "x")),
            ("COLUMNS", ("0", "-1", "x", "3")),
            ("LANG", ("C", "x")),
            ("MPLBACKEND", ("x", "TkAgg")),
        )
    )
    given = {name: rng.choice(values)}
    if name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        given = {
            "WORLD_SIZE": "2",
            "RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(rng.randrange(20000, 60000)),
            **given,
        }
    words = rng.choice(
        (
            ["train", "smoke", *QUICK, "distributed.connect_timeout=1", "--outdir", "out"],
            ["sample", fixtures.run, "--seeds", "0-1", "--outdir", "out"],
            ["report", fixtures.plane, "--out", "page.html"],
        )
    )
    if given.get("WORLD_SIZE", "1") not in ("1", "0", "-1", "x", ""):
        words = ["train", "smoke", *QUICK, "distributed.connect_timeout=1", "--outdir", "out"]
    return Input("environment", words, given)


def streams(rng, folder, fixtures):
    """Standard streams that are closed, full, or a pipe that nobody reads."""
    troubles = ("closed", "full", "pipe") if Path("/dev/full").is_char_device() else ("closed", "pipe")
    given = {descriptor: rng.choice(troubles) for descriptor in rng.sample((1, 2), rng.choice((1, 1, 2)))}
    if rng.random() < 0.2:
        given[0] = "closed"
    words = rng.choice(
        (
            ["train", "smoke", *QUICK, "--outdir", "out"],
            ["train", "smoke", *QUICK, "--dry-run"],
            ["sample", fixtures.run, "--seeds", "0-1", "--outdir", "out"],
            ["eval", fixtures.run, "--num-samples", "4"],
            ["train", "nowhere"],
            ["--help"],
            ["convert", fixtures.checkpoint, "--to", "out"],
        )
    )
    return Input("streams", words, streams=given, keeps=False)


KINDS = (
    overrides,
    run_files,
    checkpoints,
    overrides,
    yaml,
    arrays,
    run_files,
    images,
    numbers,
    checkpoints,
    environment,
    streams,
)


def make(rng, number, folder, fixtures):
    """The input of a number, whose files are written to `folder`."""
    from .hostile_teachers import teachers  # here: it stands on this module

    kinds = (*KINDS, teachers)
    return kinds[number % len(kinds)](rng, folder, fixtures)
