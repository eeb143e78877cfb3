import pytest

from jaxppo.pretrained import identity


@pytest.mark.parametrize("size", [10, 10_000_000])
def test_weights_that_change_are_noticed_and_a_copy_is_the_same(tmp_path, size):
    """In a file smaller than a piece and in one larger than all pieces (4 MB); the first, the last
    and a middle piece.
    """
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(size))
        (folder / "config.json").write_text(folder.name)  # no weights
    assert identity(str(one)) == identity(str(other)) != ""
    for place in (0, size // 2, size - 1):
        data = bytearray(size)
        data[max(place - 10_000, 0) : place + 90_000] = b"\1" * min(
            size, 90_000
        )  # what training moves is no single byte
        (other / "model.safetensors").write_bytes(data[:size])
        assert identity(str(other)) != identity(str(one))
    (other / "model.safetensors").write_bytes(bytes(size + 1))
    assert identity(str(other)) != identity(str(one))


def test_what_is_not_here_has_none(tmp_path):
    assert identity("") == identity("some/hub-id") == identity(str(tmp_path)) == ""
    (tmp_path / "x.gguf").write_bytes(b"x")
    assert identity(str(tmp_path / "x.gguf")) != ""
