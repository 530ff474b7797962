"""How files are replaced, and what is known of that before."""

import os
from pathlib import Path

import pytest

from dvn_cli.errors import InputError
from dvn_cli.files import atomic, check_folder_writable, check_regular, check_writable, read_bytes


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "old.json"
    path.write_text("{}")
    return path


def test_only_what_no_living_writer_holds_is_removed(file):
    """And only what is named as dvn names it."""
    left = [".x.safetensors.1-0123abcd.tmp", ".dvn.run.json.99999-ffffffff.tmp"]
    foreign = [".x.tmp", "x.1-0123abcd.tmp", ".x.1-0123.tmp", ".x.1-0123abcd.tmp.txt"]
    for name in (*left, *foreign):
        Path(name).write_bytes(b"x")
    with atomic("slow.json") as slow:
        slow.write(b"{}")
        with atomic("quick.safetensors") as quick:
            quick.write(b"{}")
        assert not {*left} & {*os.listdir()}
    assert set(os.listdir()) == {file.name, "slow.json", "quick.safetensors", *foreign}


def test_that_it_can_be_written_is_known_before(file):
    """Without a trace, be it so or not."""
    before = file.read_bytes()
    check_writable(file)
    check_writable("new.json")
    check_folder_writable(Path("new/folder"))
    for path, why in (("no/where", "there is no folder"), (".", "it is a folder"), ("/dev/null", "not a regular file")):
        with pytest.raises(InputError, match=why):
            check_writable(path)
    for folder in (file, file / "inside"):
        with pytest.raises(InputError, match=f"cannot write to the folder '{folder}': '{file}' is not a folder"):
            check_folder_writable(folder)
    assert os.listdir() == [file.name]
    assert file.read_bytes() == before


def test_streams_of_the_process_are_not_replaced(file):
    """Such as a log that stdout is redirected to, which realpath leads to."""
    with open(file, "r+b") as log:
        numbered = [f"{folder}/{log.fileno()}" for folder in ("/dev/fd", "/proc/self/fd", f"/proc/{os.getpid()}/fd")]
        for name in ("/dev/stdin", "/dev/stdout", "/dev/../dev/stderr", *numbered):
            with pytest.raises(InputError, match=f"cannot write '{name}': it is a stream of this process: give a file"):
                check_writable(name)


def test_a_write_at_the_same_time_is_left_alone(file):
    with atomic(file) as slow:
        slow.write(b"slow")
        with atomic(file) as quick:
            quick.write(b"quick")
        assert file.read_bytes() == b"quick"
    assert file.read_bytes() == b"slow"
    assert os.listdir(file.parent) == [file.name]


def test_what_is_no_regular_file_is_not_waited_for(file):
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("link").symlink_to("pipe")
    check_regular(file)
    assert read_bytes(file, 2) == b"{}"
    odd = (("pipe", "not a regular"), ("link", "not a regular"), (".", "a folder"), ("/dev/zero", "not a regular"))
    wrong = (("none", "there is no file"), ("loop", "symbolic"), ("x" * 4000, "too long"), ("a\0b", "null"))
    for path, why in (*odd, *wrong):
        for read in (check_regular, lambda path: read_bytes(path, 2)):
            with pytest.raises(InputError, match=why):
                read(path)


def test_what_is_read_is_bounded(file):
    with pytest.raises(InputError, match=r"'/dev/fd/\d+': it is larger than 1 MiB"), open("/dev/zero", "rb") as endless:
        read_bytes(f"/dev/fd/{endless.fileno()}", 1 << 20)
    file.write_bytes(bytes(3))
    with pytest.raises(InputError, match="larger"):
        read_bytes(file, 2)
