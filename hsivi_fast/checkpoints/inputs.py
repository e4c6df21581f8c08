"""The files that a run was started from, known by their content, so that they and the run can move."""

import hashlib
from pathlib import Path

from ..config import FILES, code_file, resolved_dict
from .files import file_sha256

# What may change when a run goes on is not compared.
_KEYS = [(section, key) for section, key in FILES if section != "distributed"]


def input_sums(config):
    """{dotted key: [sum, ...]} of the files and folders that a configuration names and that are there.

    A file has the sha256 of its bytes. A run, which `init` may name, has one for the student of each checkpoint, since
    it may be trained further. Any other folder has the sum of its files' names and sizes: it may hold a data set.
    """
    sums = {}
    for section, key in _KEYS:
        text = _named(config, section, key)
        found = _sums_of(Path(text)) if text is not None else []
        if found:
            sums[_dotted(section, key)] = found
    return sums


def with_same_content(before, now, sums):
    """The resolved values of the configuration `before`, with the names that `now` has of files of the same content.

    sums: of the run that had `before`, as of `input_sums`; without one the file is looked at, if it is still there.
    """
    values, new_values = resolved_dict(before), resolved_dict(now)
    for section, key in _KEYS:
        old, new = _named(before, section, key), _named(now, section, key)
        if old is None or new is None or old == new:
            continue
        known = sums.get(_dotted(section, key)) or _sums_of(Path(old))
        if {*known} & {*_sums_of(Path(new))}:
            into, name = (values[section], new_values[section][key]) if section else (values, new_values[key])
            into[key] = name
    return values


def changed_files(config, sums, section):
    """[(key, file)] of a section's files that have other content than a run's `sums` say; those that are there."""
    changed = []
    for of_section, key in _KEYS:
        file, known = _named(config, of_section, key), sums.get(_dotted(of_section, key))
        if of_section == section and file is not None and known:
            now = _sums_of(Path(file))
            if now and now != known:
                changed.append((_dotted(of_section, key), file))
    return changed


def _named(config, section, key):
    """The file or folder that a key names, None for none; of code, FILE.py:NAME, the file."""
    text = getattr(getattr(config, section) if section else config, key, None)
    return code_file(text)[0] if text is not None and section == "target" else text


def _dotted(section, key):
    return f"{section}.{key}" if section else key


def _sums_of(path):
    try:
        if path.is_file():
            return [file_sha256(path)]
        if (path / "config.yaml").is_file():
            return [file_sha256(file) for file in sorted(path.glob("checkpoints/step_*/student.safetensors"))]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            names = "".join(f"{file.relative_to(path)} {file.stat().st_size}\n" for file in files)
            return [hashlib.sha256(names.encode()).hexdigest()]
    except OSError:  # not readable: whoever needs it says so
        pass
    return []
