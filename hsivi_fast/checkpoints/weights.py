"""Reading network weights from files."""

from .formats import read_checkpoint


def read_weights(path, part="teacher"):
    """Name -> float32 tensor, in our layout, of a checkpoint file or folder of any kind that `read_checkpoint` knows, on the CPU.

    `part` says which network of a published HSIVI file: "teacher", "student", "student_ema", "score_net" or "score_net_ema"; other files have one network, their "teacher".
    Raises ValueError, in one line, where it is missing, damaged, of an unknown layout, or has no such part.
    """
    return read_checkpoint(path).weights(part)


def load_weights(network, weights, source):
    """Copy name -> tensor `weights` into a network whose parameters they must match exactly.

    `source` names the file in the ValueError that says which names or shapes differ.
    """
    own = dict(network.named_parameters())
    problems = []
    for word, names in (
        ("lacks", [name for name in own if name not in weights]),
        ("has unknown", [name for name in weights if name not in own]),
        ("has another shape for", [name for name in own if name in weights and own[name].shape != weights[name].shape]),
    ):
        if names:
            shown = ", ".join(_described(name, own, weights) for name in names[:3])
            problems.append(f"{word} {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else ""))
    if problems:
        raise ValueError(f"checkpoint {str(source)!r}: is of another network, it {'; it '.join(problems)}")
    network.load_state_dict(weights, strict=True)


def _described(name, own, weights):
    if name in own and name in weights:
        return f"{name} ({list(weights[name].shape)}, expected {list(own[name].shape)})"
    return name
