import pytest

from jaxppo.data.folders import complete_folder
from jaxppo.errors import PretrainedError


def test_a_folder_is_complete_or_absent(tmp_path):
    place = tmp_path / "deep" / "out"
    with (
        pytest.raises(PretrainedError, match="cannot be written .No space left on device.*"),
        complete_folder(place) as path,
    ):
        (path / "half").touch()
        assert not place.exists()
        raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), complete_folder(place) as path:
        (path / "half").touch()
        raise ZeroDivisionError
    assert list(place.parent.iterdir()) == []
    place.mkdir()  # an empty one may be there
    with complete_folder(place) as path:
        (path / "whole").touch()
        assert list(place.iterdir()) == []
    assert [x.name for x in place.iterdir()] == ["whole"]
    assert (
        place.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777
    )  # not for its owner alone
    with pytest.raises(PretrainedError, match="cannot be written"), complete_folder(place) as path:
        (path / "other").touch()  # somebody was faster
    assert [x.name for x in place.iterdir()] == ["whole"] and len(list(place.parent.iterdir())) == 1
