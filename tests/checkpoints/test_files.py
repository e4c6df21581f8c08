"""What is written is there as a whole or not at all."""

import pytest

from hsivi_fast.checkpoints.files import write_atomically, written_beside


def test_a_folder_is_there_when_its_block_ends_and_not_before(tmp_path):
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "left").touch()  # by a killed process
    (tmp_path / "out").mkdir()
    with written_beside(tmp_path / "out") as folder:
        (folder / "inside").mkdir(parents=True)
        (folder / "inside" / "file").write_text("new")
        assert not list((tmp_path / "out").iterdir())
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/inside",
        "out/inside/file",
    ]


def test_a_full_folder_gives_way_only_where_it_may_be_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(OSError, match="not empty"):
        with written_beside(tmp_path / "out") as folder:
            folder.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    with written_beside(tmp_path / "out", replace=True) as folder:
        folder.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_an_error_everything_is_as_it_was(tmp_path, kind):
    (tmp_path / "out").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with written_beside(tmp_path / "out") as unfinished:
            if kind == "folder":
                unfinished.mkdir()
            else:
                unfinished.write_text("half")
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").read_text() == "old"


def test_a_file_is_replaced_or_named_in_the_error(tmp_path):
    write_atomically(tmp_path / "file", b"old")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="^cannot write .*/missing/file: No such file or directory$"):
        write_atomically(tmp_path / "missing" / "file", b"new")
