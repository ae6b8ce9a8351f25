"""Archives: what is unpacked, and what is refused with nothing written outside."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from mmcore.errors import LoadFailed
from mmcore.storage import archives
from mmcore.storage.archives import unpack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "top" / "folder"
    made.mkdir(parents=True)
    return made


def tar(path: Path, *members: tuple[str, bytes | str | None, bytes]) -> Path:
    """Members are (name, content or target, type)."""
    mode = "w" if path.suffix == ".tar" else "w:gz"
    with tarfile.open(path, mode) as made:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if isinstance(content, str):
                member.linkname = content
            elif content is not None:
                member.size = len(content)
            made.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def tree(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()}


@pytest.mark.parametrize("name", ["m.tar", "m.tar.gz", "m.tgz"])
def test_tar_with_links_inside(tmp_path: Path, folder: Path, name: str) -> None:
    taken: list[int] = []
    archive = tar(
        tmp_path / name,
        ("./", None, tarfile.DIRTYPE),
        ("./1", None, tarfile.DIRTYPE),
        ("latest", "1", tarfile.SYMTYPE),
        ("./1/model.onnx", b"model", tarfile.REGTYPE),
        ("2/copy", "1/model.onnx", tarfile.LNKTYPE),
        ("2/up", "../1/model.onnx", tarfile.SYMTYPE),
    )
    unpack(archive, folder, taken.append)
    assert tree(folder) == {
        "1/model.onnx": b"model", "2/copy": b"model", "2/up": b"model",
    }  # fmt: skip
    assert (folder / "latest" / "model.onnx").read_bytes() == b"model"
    assert sum(taken) == 10


def test_zip_and_gz(tmp_path: Path, folder: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.mkdir("1")
        made.writestr("1/model.onnx", b"model")
    unpack(tmp_path / "m.zip", folder, lambda count: None)
    (tmp_path / "model.joblib.gz").write_bytes(gzip.compress(b"other"))
    unpack(tmp_path / "model.joblib.gz", folder, lambda count: None)
    assert tree(folder) == {"1/model.onnx": b"model", "model.joblib": b"other"}


@pytest.mark.parametrize(
    "members",
    [
        [("../evil", b"x", tarfile.REGTYPE)],
        [("a/../../evil", b"x", tarfile.REGTYPE)],
        [("/tmp/evil", b"x", tarfile.REGTYPE)],
        [("link", "/etc", tarfile.SYMTYPE)],
        [("link", "..", tarfile.SYMTYPE)],
        [("a/link", "../../evil", tarfile.SYMTYPE)],
        # Through a link: made first, written to later; and links that leave only together.
        [("link", "..", tarfile.SYMTYPE), ("link/evil", b"x", tarfile.REGTYPE)],
        [("link", "..", tarfile.SYMTYPE), ("link/evil", "x", tarfile.SYMTYPE)],
        [("a", "b/c", tarfile.SYMTYPE), ("b/c", "../d/e", tarfile.SYMTYPE), ("f", "a/../../..", tarfile.SYMTYPE)],
        [("d/e", None, tarfile.DIRTYPE), ("a", "d/e", tarfile.SYMTYPE), ("x", "a/../..", tarfile.SYMTYPE)],
        [("a", "a", tarfile.SYMTYPE), ("a/x", "y", tarfile.SYMTYPE)],
        [("hard", "/etc/passwd", tarfile.LNKTYPE)],
        [("hard", "../evil", tarfile.LNKTYPE)],
        [("device", None, tarfile.CHRTYPE)],
        [("pipe", None, tarfile.FIFOTYPE)],
        [("twice", b"x", tarfile.REGTYPE), ("twice", b"y", tarfile.REGTYPE)],
        [("file", b"x", tarfile.REGTYPE), ("file/under", b"y", tarfile.REGTYPE)],
    ],
)
def test_harmful_tars_are_refused_and_nothing_is_written_outside(
    tmp_path: Path, folder: Path, members: list[tuple[str, bytes | str | None, bytes]]
) -> None:
    archive = tar(tmp_path / "m.tar", *members)
    with pytest.raises(LoadFailed, match=r"m\.tar"):
        unpack(archive, folder, lambda count: None)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.tar", "top"]
    assert [one.name for one in folder.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil"])
def test_harmful_zips_are_refused(tmp_path: Path, folder: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as made:
        made.writestr(name, b"x")
    with pytest.raises(LoadFailed, match="is no path inside"):
        unpack(tmp_path / "m.zip", folder, lambda count: None)


def test_link_in_a_zip_is_refused(tmp_path: Path, folder: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as made:
        made.writestr(link, "/etc")
    with pytest.raises(LoadFailed, match="neither a file nor a folder"):
        unpack(tmp_path / "m.zip", folder, lambda count: None)


@pytest.mark.parametrize("name", ["m.tar.gz", "m.zip", "m.gz"])
def test_bombs_are_refused_before_they_are_large(
    tmp_path: Path, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    zeros = bytes(16 * 2**20)
    archive = tmp_path / name
    if name == "m.tar.gz":
        tar(archive, ("zeros", zeros, tarfile.REGTYPE))
    elif name == "m.zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
            made.writestr("zeros", zeros)
    else:
        archive.write_bytes(gzip.compress(zeros))
    with pytest.raises(LoadFailed, match="taken for a bomb"):
        unpack(archive, folder, lambda count: None)
    assert sum(one.stat().st_size for one in folder.rglob("*")) < len(zeros) / 2


def test_bomb_in_a_header_is_refused(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    with tarfile.open(tmp_path / "m.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as made:
        member = tarfile.TarInfo("x")
        member.pax_headers = {"comment": "0" * (16 * 2**20)}
        made.addfile(member)
    with pytest.raises(LoadFailed, match="taken for a bomb"):
        unpack(tmp_path / "m.tar.gz", folder, lambda count: None)


def test_too_many_entries_are_refused(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_FILES", 10)
    archive = tar(tmp_path / "m.tar", *((f"d{number}", None, tarfile.DIRTYPE) for number in range(11)))
    with pytest.raises(LoadFailed, match="more than 10 entries"):
        unpack(archive, folder, lambda count: None)


@pytest.mark.parametrize("name", ["m.tar.gz", "m.tar", "m.zip", "m.gz"])
def test_damaged_archives_say_so(tmp_path: Path, folder: Path, name: str) -> None:
    good = tar(tmp_path / f"good-{name}" if "tar" in name else tmp_path / "good.tar.gz", ("x", bytes(9999), b"0"))
    (tmp_path / name).write_bytes(good.read_bytes()[:-5] if name != "m.zip" else b"PK nothing")
    if name == "m.tar":
        (tmp_path / name).write_bytes(good.read_bytes()[:5000])
    with pytest.raises(LoadFailed, match="is damaged"):
        unpack(tmp_path / name, folder, lambda count: None)


def test_a_zip_whose_files_begin_before_it_is_damaged(tmp_path: Path, folder: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as made:
        made.writestr("model.onnx", b"model")
    data = bytearray((tmp_path / "m.zip").read_bytes())
    # APPNOTE 4.3.16: the directory's place, 6 bytes before the end; zipfile takes the difference for bytes in front.
    data[-6:-2] = (int.from_bytes(data[-6:-2], "little") + 1000).to_bytes(4, "little")
    (tmp_path / "m.zip").write_bytes(data)
    with pytest.raises(LoadFailed, match=r"m\.zip is damaged"):
        unpack(tmp_path / "m.zip", folder, lambda count: None)


def test_names_that_no_file_can_have_are_the_archives_fault(tmp_path: Path, folder: Path) -> None:
    archive = tar(tmp_path / "m.tar", ("x" * 300, b"x", tarfile.REGTYPE))
    with pytest.raises(LoadFailed, match=r"m\.tar is damaged"):
        unpack(archive, folder, lambda count: None)
