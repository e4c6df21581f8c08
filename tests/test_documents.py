"""The documents: every path of the repository that they name is there, and every relative link and anchor resolves."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("bench", "configs", "hsivi_fast", "kernels", "launch", "tests")
DOCUMENTS = sorted([ROOT / "README.md", *(path for room in ROOMS for path in (ROOT / room).rglob("*.md"))])
ENDINGS = ("py", "md", "sh", "yaml", "json", "jsonl", "npz", "png", "safetensors", "toml", "ini", "example")
PATH = re.compile(rf"(?:\.?\w[\w.*-]*/)*\.?\w[\w.*-]*(?:\.(?:{'|'.join(ENDINGS)})\b|/)")
# Paths that are not of the repository: of a run's folder, of exports and teachers, and of the reader's own.
FOREIGN = {
    *("config.yaml", "environment.json", "metrics.jsonl", "saves.jsonl", "results.json", "wandb.json", "state.json"),
    *("inputs.json", "unet/", "unet_ema/", "vae/", "vqvae/", "bridge.safetensors", "fisher.json", "MINE.yaml"),
    *("samples/", "tensorboard/", "checkpoints/", "checkpoints/step_N/", "config.json", "network.yaml"),
    *("teacher.safetensors", "samples/step_XXXXXXX.png", "step_XXXXXXX.png", "my_run.yaml"),
}
FOREIGN_ROOTS = ("runs/", "teachers/")
PLACEHOLDER = re.compile(r"STATS|CARD|FILE|DIR/|NAME")  # words that the reader replaces


def _prose(path):
    """A document without its code blocks, which are indented."""
    return re.sub(r"^ {4,}.*$", "", path.read_text(), flags=re.MULTILINE)


def _named_paths(path):
    """Paths in backticks: the words of each that look like one."""
    for quoted in re.findall(r"`([^`\n]+)`", _prose(path)):
        for word in quoted.split():
            word = word.partition("::")[0].rpartition("=")[2]
            foreign = word in FOREIGN or word.startswith(FOREIGN_ROOTS) or PLACEHOLDER.search(word)
            if PATH.fullmatch(word) and not foreign:
                yield word


def _is_there(name, document):
    if any(list(folder.glob(name)) for folder in (document.parent, ROOT, ROOT / "hsivi_fast")):
        return True
    # A bare name in a table or a list, behind its room: `method/`: `losses.py`.
    return "/" not in name.rstrip("/") and any(next((ROOT / room).rglob(name), None) for room in ROOMS)


def _named(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=_named)
def test_every_path_that_is_named_is_there(document):
    missing = sorted({name for name in _named_paths(document) if not _is_there(name, document)})
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=_named)
def test_every_path_of_a_command_is_there(document):
    """In code blocks and in backticks: what begins with a room of the repository."""
    words = re.findall(rf"(?<![\w/.-])((?:{'|'.join(ROOMS)})/[\w./-]*)", document.read_text())
    names = {word.rstrip(".") for word in words if not PLACEHOLDER.search(word)}
    assert not sorted(name for name in names if not _is_there(name, document))


def _anchors(path):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=_named)
def test_every_relative_link_and_anchor_resolves(document):
    text = document.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)$", text, re.MULTILINE)
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_what_is_looked_for_is_found():
    """The patterns see a path that is not there, in each form."""
    document = ROOT / "README.md"
    for name in ("tests/test_nothing.py", "nothing.py", "bench/nothing/", "kernels/nothing_*.py"):
        assert PATH.fullmatch(name) and not _is_there(name, document)
    assert len(set(_named_paths(document))) > 20


@pytest.mark.parametrize("document", DOCUMENTS, ids=_named)
def test_lines_are_short(document):
    """At most 120 columns, but for rows of tables that a script fills in."""
    filled = re.sub(r"<!-- table .*?<!-- end -->", "", document.read_text(), flags=re.DOTALL)
    assert [line for line in filled.splitlines() if len(line) > 120] == []
