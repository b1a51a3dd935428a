"""Reports go where they were sent: a file is replaced as a whole, and nothing else ever is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.errors import OutputError
from runtime.parity.output_file import check_writable, write


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
