"""Reading network weights from files."""

from pathlib import Path


def read_weights(path):
    """Name -> tensor of a safetensors file, on the CPU. Raises ValueError, in one line, where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(f"checkpoint {str(path)!r}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint {str(path)!r}: not a readable safetensors file ({error})") from None


def load_weights(network, weights, source):
    """Copy name -> tensor `weights` into a network whose parameters they must match exactly.

    `source` names the file in the ValueError that says which names or shapes differ.
    """
    own = dict(network.named_parameters())
    problems = []
    for word, names in (("lacks", [name for name in own if name not in weights]),
                        ("has unknown", [name for name in weights if name not in own]),
                        ("has another shape for", [name for name in own if name in weights and own[name].shape != weights[name].shape])):
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
