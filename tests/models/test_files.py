"""Files that appear complete or not at all, and texts of errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from file_support import full_disk

from xattn_models.files import clip, listing, replacing, shown


def test_complete_files_take_their_name(tmp_path: Path) -> None:
    path = tmp_path / ("name" * 60)  # with anything before or after it, too long for a file
    for content in (b"first", b"second"):
        with replacing(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"first"
        assert path.read_bytes() == content and os.listdir(tmp_path) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_errors_leave_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")

    def write_and_fail() -> None:
        with replacing(path) as file:
            file.write(b"after")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a"]


def test_full_disks_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    with full_disk(1000), pytest.raises(OSError, match="too large"), replacing(path) as file:
        file.write(b"x" * 2000)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    with pytest.raises(FileNotFoundError, match="there is no folder"), replacing(tmp_path / "link"):
        pass
    (tmp_path / "folder").mkdir()
    with replacing(tmp_path / "link") as file:
        file.write(b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_bytes() == b"x"


@pytest.mark.parametrize("path", ["", "/", os.devnull])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, path: str) -> None:
    with pytest.raises(FileExistsError, match="folder or a device"), replacing(tmp_path / path):
        pass
    assert not os.listdir(tmp_path)


def test_texts_are_short() -> None:
    assert clip("x" * 400) == "x" * 400
    assert clip("x" * 5000, 10) == "xxxxxxxxxx ... (5,000 characters)"
    assert shown(Path("a/b.png")) == "a/b.png"
    assert shown("a/" * 1000 + "b.png").endswith("a/b.png") and len(shown("a" * 4000)) < 310
    assert listing("abcd") == "'a', 'b', 'c', 'd'"
    assert listing(range(2000)) == "0, 1, 2, 3 and 1,996 more"
    assert len(listing(["x" * 10_000] * 9)) < 500
