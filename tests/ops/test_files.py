"""Files that are written whole: in place of a link's target, with the permissions that were there, under any name."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fastroute.ops import files


def test_a_link_stays_and_permissions_too(tmp_path: Path) -> None:
    page, link = tmp_path / "page", tmp_path / "latest"
    page.write_text("old")
    page.chmod(0o640)
    link.symlink_to(page.name)
    with files.whole(link) as part:
        part.write_text("new")
    assert link.is_symlink() and page.read_text() == "new" and page.stat().st_mode & 0o777 == 0o640
    with pytest.raises(OSError, match="cannot be written"), files.whole(link) as part:
        part.write_text("half")
        raise RuntimeError("the disk is full")
    assert page.read_text() == "new" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["y" * 255, "é" * 127])
def test_the_longest_names(name: str, tmp_path: Path) -> None:
    with files.whole(tmp_path / name) as part:
        part.write_text("all")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_threads_write_parts_of_their_own(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def write(text: str) -> None:
        with files.whole(tmp_path / "page") as part:
            both.wait(10)
            part.write_text(text)
            both.wait(10)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one" * 999, "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "page").read_text() in ("one" * 999, "two") and len(list(tmp_path.iterdir())) == 1
