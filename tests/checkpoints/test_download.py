"""Checkpoints by name or address: they are fetched once, and their sums are checked."""

import base64
import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from small_checkpoints import DDPM, random_weights, teacher_has

from hsivi_fast.checkpoints import download
from hsivi_fast.checkpoints.convert import convert_checkpoint
from hsivi_fast.config import config_difference, without_password


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An address of a checkpoint, its file and its sum; the cache is a folder of the test."""
    monkeypatch.setenv("HSIVI_CACHE", str(tmp_path / "cache"))
    torch.save(random_weights(DDPM), tmp_path / "served.pt")
    file = tmp_path / "served.pt"
    return file.as_uri(), file, hashlib.sha256(file.read_bytes()).hexdigest()


def test_an_address_is_a_teacher_and_is_fetched_once(tmp_path, served):
    address, file, found = served
    cached = download.fetch_checkpoint(f"{address}#sha256={found.upper()}")
    assert cached.read_bytes() == file.read_bytes() and cached.parent == tmp_path / "cache"
    file.unlink()
    assert download.fetch_checkpoint(address) == cached and teacher_has(tmp_path, DDPM, address, random_weights(DDPM))
    assert cached.with_name(f"{cached.name}.sha256").read_text().split()[0] == found


def test_a_wrong_sum_leaves_nothing_and_says_both(tmp_path, served):
    address, _, found = served
    with pytest.raises(ValueError, match=f"has the sha256 {found}, expected {'0' * 64}; it was deleted"):
        download.fetch_checkpoint(f"{address}#sha256={'0' * 64}")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    with pytest.raises(ValueError, match="must be sha256= and 64 hexadecimal digits"):
        download.fetch_checkpoint(f"{address}#md5=00")


def test_a_cached_file_that_changed_is_noticed(served):
    address, _, found = served
    cached = download.fetch_checkpoint(address)
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(
        ValueError,
        match=rf"its sha256 is [0-9a-f]+, expected {found} as at its first use; delete it and .*sha256 to have it",
    ):
        download.fetch_checkpoint(address)


def test_a_file_put_there_by_hand_is_used_and_its_sum_noted(tmp_path, monkeypatch, served):
    monkeypatch.setitem(download.PUBLISHED_TEACHERS, "cifar10", "file:///nowhere/cifar10_2040.pt")
    with pytest.raises(
        ValueError,
        match="checkpoint file:///nowhere/cifar10_2040.pt: cannot be downloaded .*No such file.*; "
        "put the file at .*/cache/cifar10_2040.pt by hand",
    ) as caught:
        download.fetch_checkpoint("cifar10")
    assert "\n" not in str(caught.value)
    (tmp_path / "cache" / "cifar10_2040.pt").write_bytes(served[1].read_bytes())
    assert teacher_has(tmp_path, DDPM, "cifar10", random_weights(DDPM))
    assert (tmp_path / "cache" / "cifar10_2040.pt.sha256").read_text().split()[0] == served[2]
    with pytest.raises(ValueError, match=r"neither a known name \(cifar10, imagenet64, edm_cifar10, .*\) nor"):
        download.fetch_checkpoint("cifar11")


def test_a_cut_answer_and_a_missing_page_leave_nothing(tmp_path, served):
    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/missing.pt":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * (1000 if self.path == "/whole.pt" else 400))

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        with pytest.raises(ValueError, match="cut.pt: cannot be downloaded .*400.*; put the file at"):
            download.fetch_checkpoint(f"{base}/cut.pt")
        with pytest.raises(ValueError, match=r"missing.pt: cannot be downloaded \(Not Found\)"):
            download.fetch_checkpoint(f"{base}/missing.pt")
        assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
        assert download.fetch_checkpoint(f"{base}/whole.pt", progress=True).read_bytes() == b"x" * 1000
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ValueError, match=r"other.pt: cannot be downloaded \(.*Connection refused\)"):
        download.fetch_checkpoint(f"{base}/other.pt")


@pytest.mark.parametrize("content", [b"<html>sign in</html>", b"PK\x03\x04 cut", b"\x80\x02\0", b"\0" * 8 + b"{cut"])
def test_a_bad_download_leaves_the_cache_and_is_fetched_again(tmp_path, served, content):
    address, file, _ = served
    whole = file.read_bytes()
    file.write_bytes(content)
    for read in (
        lambda: teacher_has(tmp_path, DDPM, address, random_weights(DDPM)),
        lambda: convert_checkpoint(address, tmp_path / "ours"),
    ):
        with pytest.raises(ValueError, match="it was downloaded, and is deleted: the next try fetches it again"):
            read()
        assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}
    file.write_bytes(whole)
    assert teacher_has(tmp_path, DDPM, address, random_weights(DDPM))


def test_a_bad_file_that_was_put_there_by_hand_stays(tmp_path, monkeypatch, served):
    monkeypatch.setitem(download.PUBLISHED_TEACHERS, "cifar10", "file:///nowhere/cifar10_2040.pt")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cifar10_2040.pt").write_bytes(b"bad")
    with pytest.raises(ValueError, match="is neither a safetensors file") as error:
        teacher_has(tmp_path, DDPM, "cifar10", random_weights(DDPM))
    assert "deleted" not in str(error.value) and (tmp_path / "cache" / "cifar10_2040.pt").is_file()


def test_a_user_and_password_go_to_their_host_and_into_no_message(tmp_path, served):
    _, file, found = served
    seen = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            if self.path == "/moved.pt":
                self.send_response(302)
                self.send_header("Location", "/served.pt")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(file.read_bytes())

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://anna:s%40cret@127.0.0.1:{server.server_port}/moved.pt"
        assert download.fetch_checkpoint(f"{address}#sha256={found}").read_bytes() == file.read_bytes()
    finally:
        server.shutdown()
        server.server_close()
    assert seen == [("/moved.pt", f"Basic {base64.b64encode(b'anna:s@cret').decode()}"), ("/served.pt", None)]


@pytest.mark.parametrize(
    "address",
    [
        "http://anna:s3cret@127.0.0.1:9/a.pt",
        "http://anna:s3cret@127.0.0.1:9/a.pt#sha256=12",
        "http://anna:s3cret@127.0.0.1:port/a.pt",
        "http://anna:s3cret@/a.pt",
        "http://127.0.0.1:9/a.pt?token=s3cret&key=s3cret",
        "https://[anna:s3cret@/a.pt",
        "file://anna:s3cret@/nowhere/a.pt",
        "ftp://anna:s3cret@host/a.pt",
    ],
)
def test_no_message_shows_a_password(served, address):
    with pytest.raises(ValueError) as error:
        download.fetch_checkpoint(address)
    assert "s3cret" not in str(error.value) and "***" in str(error.value) and "\n" not in str(error.value)


def test_a_difference_of_two_runs_shows_no_password():
    difference = config_difference({"checkpoint": "https://a:s3cret@h/x"}, {"checkpoint": "https://a:other@h/x?k=1"})
    assert difference == "checkpoint = 'https://***@h/x', not 'https://***@h/x?***'"
    assert without_password("a?b=1 c@d.e") == "a?b=1 c@d.e"


def test_addresses_of_pipes_and_devices_are_not_opened(tmp_path, served):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="is a pipe, socket or device; give a regular file"):
            download.fetch_checkpoint(f"file://{path}")


def test_a_licence_is_told_where_its_file_is_downloaded(served, monkeypatch, capsys):
    monkeypatch.setitem(download.PUBLISHED_TEACHERS, "edm_cifar10", served[0])
    file = download.fetch_checkpoint("edm_cifar10")
    said = f"{file.name}: its licence is NVIDIA's, CC BY-NC-SA 4.0: not for commercial use"
    assert said in capsys.readouterr().err
    download.fetch_checkpoint("edm_cifar10")
    assert "licence" not in capsys.readouterr().err
