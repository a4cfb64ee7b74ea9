"""The gallery's script makes every picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastroute import plots
from tests.helpers.examples import example, leave_no_trace, little_data

__all__ = ["leave_no_trace", "little_data"]  # fixtures of every test here


@pytest.mark.long
def test_every_picture(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    matplotlib_image = pytest.importorskip("matplotlib.image")
    gallery = example("gallery")
    assert set(gallery.PICTURES) == set(plots.__all__)
    assert gallery.main(["--quick", "--folder", str(tmp_path)]) == 0
    for name in plots.__all__:
        assert matplotlib_image.imread(tmp_path / f"gallery_{name}.png").std() > 0.05, name


def test_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example("gallery").main(["--threads", "0"])
    assert "--threads: expected at least 1" in capsys.readouterr().err
