"""Reports go where they were sent: a file is replaced as a whole, and nothing else ever is."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.errors import OutputError
from runtime.parity.output_file import check_writable, write


@contextmanager
def ordinary_user():
    """Nobody instead of root, whom no mode keeps from anything."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def public():
    """A folder that anybody may write in; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_a_pipe_gets_the_text_and_stays(pipe):
    path, text = pipe
    check_writable(path, path)
    write(path, "report")
    assert text() == "report" and path.is_fifo()


def test_a_links_file_is_replaced_and_the_link_stays(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("before")
    link.symlink_to(file)
    write(link, "after")
    assert link.is_symlink() and file.read_text() == "after" and not file.is_symlink()
    link.unlink()
    link.symlink_to(tmp_path / "new")
    write(link, "new")
    assert link.is_symlink() and (tmp_path / "new").read_text() == "new"
    with pytest.raises(OutputError, match="expected two files"):
        check_writable(link, tmp_path / "new")


def test_devices_are_writable_where_their_folder_may_not_be():
    check_writable("/dev/null", "/dev/null", "/dev/stdout")


def test_an_open_file_is_written_to_not_replaced(tmp_path):
    with (tmp_path / "file").open("w") as opened:
        write(Path(f"/dev/fd/{opened.fileno()}"), "report")
        assert os.fstat(opened.fileno()).st_nlink == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "report"


def test_what_is_no_path_is_refused(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (loop, "a\0b"):
        with pytest.raises(OutputError, match="cannot write the report"):
            check_writable(path)


def test_files_beside_it_are_kept(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "report.partial"
    victim.write_text("before")
    link.symlink_to(victim)
    write(tmp_path / "report", "report")
    assert link.is_symlink() and victim.read_text() == "before"
    assert (tmp_path / "report").read_text() == "report"


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def replace(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "report", "report")
    assert not [*tmp_path.iterdir()]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    file = tmp_path / ("a" * 255)
    check_writable(file)
    write(file, "report")
    assert file.read_text() == "report"
    with pytest.raises(OutputError, match="File name too long"):
        check_writable(tmp_path / ("a" * 256))


def test_what_is_not_unicode_is_replaced(tmp_path):
    write(tmp_path / "report", "été \udcff")
    assert (tmp_path / "report").read_text(encoding="utf-8") == "été ?"


@pytest.mark.parametrize("mode", [None, 0o600, 0o666], ids=["new", "private", "public"])
def test_a_file_keeps_its_mode_and_a_new_one_gets_the_usual(mode, tmp_path):
    file = tmp_path / "report"
    if mode is not None:
        file.touch()
        file.chmod(mode)
    before = os.umask(0o027)
    try:
        write(file, "report")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == (0o640 if mode is None else mode)


def test_a_read_only_file_is_refused(public):
    file = public / "report"
    with ordinary_user():
        file.touch(0o400)
        with pytest.raises(OutputError, match="no permission"):
            check_writable(file)


def test_a_folder_that_cannot_be_searched_is_refused(public):
    with ordinary_user():
        (public / "closed").mkdir(0o600)
        with pytest.raises(OutputError, match="Permission denied"):
            check_writable(public / "closed" / "report")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_users_file_in_a_sticky_folder_is_written_in_place(public):
    public.chmod(0o1777)
    file = public / "report"
    file.write_text("a longer one before")
    file.chmod(0o666)
    with ordinary_user():
        check_writable(file)
        write(file, "report")
        assert file.read_text() == "report"
    assert [*public.iterdir()] == [file] and file.stat().st_uid == 0


def test_one_file_by_two_names_is_refused(tmp_path):
    file, other = tmp_path / "file", tmp_path / "other"
    with file.open("w") as opened:
        other.hardlink_to(file)
        for name in (other, f"/dev/fd/{opened.fileno()}"):
            with pytest.raises(OutputError, match="expected two files"):
                check_writable(file, name)


def test_a_link_to_an_open_file_is_written_through(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    with file.open("w") as opened:
        link.symlink_to(f"/dev/fd/{opened.fileno()}")
        write(link, "report")
        assert os.fstat(opened.fileno()).st_nlink == 1
    assert file.read_text() == "report"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_a_file_in_shared_memory_is_no_device():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file, other = Path(folder) / "file", Path(folder) / "other"
        file.write_text("before")
        other.hardlink_to(file)
        with pytest.raises(OutputError, match="expected two files"):
            check_writable(file, file)
        write(file, "after")
        assert file.read_text() == "after" and other.read_text() == "before", "the file was not replaced"
