"""Tar shards: groups, keys, damage, and the index that is kept."""

import io
import json
import os
import tarfile
import tracemalloc

import pytest
from helpers import image_sets
from helpers.image_sets import read_captions as read
from helpers.processes import run_processes
from PIL import Image

from sprint_jax.core.errors import UserError
from sprint_jax.data.sources import tars
from sprint_jax.data.sources.records import Caption, Rejected
from sprint_jax.data.sources.tars import index_tar, open_tars, scan_tar
from sprint_jax.parallel import sharding

PNG = image_sets.encode(Image.effect_noise((30, 20), 99), "PNG")


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """Writes a shard; returns the offsets of the headers of its members."""
    offsets = {}
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            offsets[name] = tar.offset
            tar.addfile(info, io.BytesIO(content))
    return offsets


def five(path):
    """A shard of 0.png, 0.txt, ..., 4.txt."""
    files = lambda number: (("png", PNG), ("txt", b"%d" % number))  # noqa: E731
    return write_tar(path, [(f"{n}.{end}", data) for n in range(5) for end, data in files(n)])


def spoil(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"damaged!")


def test_members_belong_together_up_to_the_first_dot(tmp_path):
    long = "a" * 150
    members = {
        "./x/1.PNG": PNG,
        "./x/1.txt": b"one",
        "x/2.seg.png": b"of no use",
        "x/2.jpg": PNG,
        "x/2.json": b'{"caption": "two"}',
        "v1.0/3.png": PNG,
        f"{long}/猫.png": PNG,
        f"{long}/猫.txt": b"cat",
        "4.txt": b"no image",
        "5.png": PNG,
        "5.jpg": PNG,
        "._5.png": b"hidden",
        "LICENSE": b"no dot",
        "3b.txt": b"apart",
        "6.txt": b"first",
        "3b.png": PNG,
        "6.png": PNG,
    }
    write_tar(tmp_path / "a.tar", members.items())
    assert read(open_tars([tmp_path / "a.tar"])) == {
        "x/1": ["one"],
        "x/2": ["two"],
        "v1.0/3": [""],
        f"{long}/猫": ["cat"],
        "4": "no images in a group",
        "5": "several images in a group",
        "3b": ["apart"],
        "6": ["first"],
    }


def test_keys_of_several_shards_are_told_apart_where_they_must_be(tmp_path):
    (tmp_path / "more").mkdir()
    paths = [tmp_path / "a.tar", tmp_path / "more" / "a.tar"]
    write_tar(paths[0], [("1.png", PNG)])
    write_tar(paths[1], [("2.png", PNG)])
    assert list(read(open_tars(paths))) == ["1", "2"]
    write_tar(paths[1], [("2.png", PNG), ("1.png", PNG)])
    assert list(read(open_tars(paths))) == ["a/1", "more/a/2", "more/a/1"]


def test_files_of_sana_beside_a_shard(tmp_path):
    write_tar(tmp_path / "0.tar", [("d/1.png", PNG), ("d/1.json", b'{"prompt": "p"}')])
    write_tar(tmp_path / "0_x.tar", [("d/2.png", PNG)])
    for name, content in {
        "0_VILA": {"d/1": {"VILA": "long"}},
        "0_VILA_clip_score": {"d/1": {"VILA": "27.5", "prompt": 20}},
        "0_x_VILA": {"d/2": {"VILA": "other"}, "d/1": {"VILA": "not this"}},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    source = open_tars([tmp_path / "0.tar", tmp_path / "0_x.tar"])
    assert source[0].captions == (Caption("p", 1.0, 20.0), Caption("long", 1.0, 27.5))
    assert source[1].captions == (Caption("other"),)
    (tmp_path / "0_VILA.json").write_text("{")
    with pytest.raises(Rejected, match=r"d/1: .*0_VILA\.json"):
        open_tars([tmp_path / "0.tar"])[0]


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        ({"1.png": 148}, {"@1.png", "0", "1"}),
        ({"1.txt": 148}, {"@1.txt", "1", "2"}),
        ({"1.png": 148, "1.txt": 148, "2.png": 148}, {"@1.png", "0", "2"}),
        ({"3.png": 512 + 200}, {"3"}),  # its content
        # The file ends there.
        (("3.png", 600), {"3"}),
        (("3.txt", 300), {"3", "@3.txt"}),
        (("3.png", 0), {"2", "@3.png"}),
    ],
)
def test_damage_is_named_and_costs_no_more_than_its_neighbours(tmp_path, damage, lost):
    path = tmp_path / "a.tar"
    offsets = five(path)
    if isinstance(damage, tuple):
        os.truncate(path, offsets[damage[0]] + damage[1])
    else:
        for name, more in damage.items():
            spoil(path, offsets[name] + more)
    found = read(open_tars([path]))
    good = {key for key, captions in found.items() if captions == [key]}
    lost = {f"a.tar@{offsets[key[1:]]}" if key[0] == "@" else key for key in lost}
    assert found.keys() - good == lost and good


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_wherever_a_shard_is_cut_off_no_member_is_lost_without_a_word(tmp_path, format):
    path = tmp_path / "a.tar"
    files = lambda n: ((f"{n}.png", bytes(300 + 500 * n)), (f"{n}.txt", b"%d" % n))  # noqa: E731
    members = [*files(0), *files(1), ("no dot", b"."), (f"d/{'n' * 120}.png", b"1"), *files(2)]
    write_tar(path, members, format=format)
    whole = {group.key: group for group in scan_tar(path)}
    assert len(whole) == 4 and all(group.problem is None for group in whole.values())
    content, end = (
        path.read_bytes(),
        max(at + size for group in whole.values() for at, size in group.members.values()),
    )
    # In headers, in contents and in padding; beyond are zeros.
    cuts = {block + more for block in range(0, end + 512, 512) for more in (-5, 0, 1, 3, 300, 511)}
    for cut in sorted(cut for cut in cuts if 0 < cut < end + 512 - end % 512):
        path.write_bytes(content[:cut])
        found = {group.key: group for group in scan_tar(path)}
        good = {key for key, group in found.items() if group.problem is None}
        assert all(found[key] == whole[key] for key in good), cut
        assert good != whole.keys() or cut > end, cut
        assert len(found) > len(good), cut


def test_a_shard_cut_off_in_the_padding_behind_a_member_is_named(tmp_path):
    path = tmp_path / "a.tar"
    offsets = five(path)
    os.truncate(path, offsets["3.txt"] + 512 + 300)  # its content is 1 byte
    found = read(open_tars([path]))
    size = offsets["3.txt"] + 812
    assert found == {
        **{str(n): [str(n)] for n in range(3)},
        "3": "broken tar member",
        f"a.tar@{size}": "broken tar",
    }


@pytest.mark.parametrize("size", [-1, -512, -(10**6)])
def test_a_member_of_negative_size_is_named_and_costs_itself(tmp_path, size):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(4):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = size if number == 1 else len(PNG)
            tar.addfile(info) if number == 1 else tar.addfile(info, io.BytesIO(PNG))
            tar.offset = tar.fileobj.tell()
    found = read(open_tars([path]))
    assert found == {"0": [""], "1": "broken tar member", "2": [""], "3": [""]}


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_members_that_are_no_regular_files_are_named_and_not_followed(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path, "folder.d", recursive=False)
        for name in ("0.png", "1.png", "1.txt", "2.png"):
            info = tarfile.TarInfo(name)
            if name == "1.txt":
                info.type, info.linkname = kind, "1.txt"
                tar.addfile(info)
            else:
                info.size = len(PNG)
                tar.addfile(info, io.BytesIO(PNG))
    assert read(open_tars([path])) == {"0": [""], "1": "not a regular file", "2": [""]}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_member_whose_long_name_is_lost_is_not_taken_for_another(tmp_path, format):
    path, name = tmp_path / "a.tar", "d/" + "n" * 120
    members = [("0.png", PNG), (f"{name}.png", PNG), (f"{name}.txt", b"a"), ("1.png", PNG)]
    offsets = write_tar(path, members, format=format)
    spoil(path, offsets[f"{name}.png"] + 148)
    found = read(open_tars([path]))
    assert found.pop("1") == [""] and found.pop("0") == "broken tar member"
    assert found.pop(name) == "no images in a group"
    assert found and all(isinstance(reason, str) for reason in found.values())


def test_files_that_are_no_tar(tmp_path):
    path = tmp_path / "a.tar"
    for content in (b"", b"junk" * 1000, b"\0" * 10240):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tar"):
            open_tars([path])
    five(tmp_path / "b.tar")
    path.write_bytes(b"")
    found = read(open_tars([path, tmp_path / "b.tar"]))
    assert found["a.tar@0"] == "broken tar" and len(found) == 6
    with pytest.raises(UserError, match=r"gone\.tar"):
        open_tars([tmp_path / "gone.tar"])


def test_the_index_is_kept_where_that_can_be_and_made_anew_when_the_shard_changes(
    tmp_path, monkeypatch, capsys
):
    path, kept = tmp_path / "a.tar", tmp_path / ".a.tar.index.json"
    five(path)
    kept.mkdir()
    assert len(index_tar(path)) == 5 and str(kept) in capsys.readouterr().err
    kept.rmdir()
    scanned = []
    monkeypatch.setattr(tars, "scan_tar", lambda path: scanned.append(path) or scan_tar(path))
    assert index_tar(path) == index_tar(path) == scan_tar(path)
    assert len(scanned) == 1 and kept.is_file()
    status = path.stat()
    write_tar(path, [("9.png", PNG)])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert [group.key for group in index_tar(path)] == ["9"]
    for damaged in (kept.read_bytes()[:-20], b"[]", b"\xff", b'{"stamp": 1}'):
        kept.write_bytes(damaged)
        assert [group.key for group in index_tar(path)] == ["9"]
    assert len(scanned) == 6 and [group.key for group in index_tar(path)] == ["9"]


def test_a_group_takes_little_memory_beside_its_key(tmp_path, monkeypatch):
    paths = [tmp_path / f"{number}.tar" for number in range(20)]
    for path in paths:
        path.write_bytes(b"")
    members = {"png": (512, 90_000), "txt": (91_136, 80), "json": (92_160, 900)}
    groups = lambda path: [tars.Group(f"{path.stem}-{k:08d}", members) for k in range(300)]  # noqa: E731
    monkeypatch.setattr(tars, "index_tar", groups)
    open_tars(paths[:1])  # imports
    tracemalloc.start()
    source = open_tars(paths)
    used = tracemalloc.get_traced_memory()[0] / len(source)
    tracemalloc.stop()
    assert len(source) == 6000 and used < 150


def test_a_shard_that_changed_under_its_index_is_noticed(tmp_path):
    path = tmp_path / "a.tar"
    offsets = five(path)
    source = open_tars([path])
    path.write_bytes(path.read_bytes()[: offsets["2.png"] + 600])
    found = read(source)
    assert found["1"] == ["1"] and found["2"] == "broken tar member"
    path.unlink()
    assert set(read(source).values()) == {"cannot be read"}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_indices(tmp_path, monkeypatch, processes):
    """Each shard is read by one process, and each process ends with all of them, part by part."""
    monkeypatch.setattr(sharding, "SHARED", 999)
    monkeypatch.setattr(tars, "AT_ONCE", 2)
    for number in range(5):
        five(tmp_path / f"{number}.tar")
    write_tar(tmp_path / "5.tar", [("5.txt", b"no image")])
    write_tar(tmp_path / "6.tar", [])
    scanned = []
    monkeypatch.setattr(tars, "scan_tar", lambda path: scanned.append(path.name) or scan_tar(path))

    def items(process, folder):
        source = open_tars(sorted(folder.glob("*.tar")))
        return source.identity, [source._items[k] for k in range(len(source))]

    expected = items(0, tmp_path)
    assert {item.key for item in expected[1]} >= {"0/4", "4/0"} and len(expected[1]) == 26
    for index in tmp_path.glob(".*.index.json"):
        index.unlink()
    scanned.clear()
    for _ in range(2):  # the second time they are kept
        assert run_processes(processes, items, [tmp_path] * processes) == [expected] * processes
        assert sorted(scanned) == [f"{number}.tar" for number in range(7)]
    other = tmp_path / "other"
    other.mkdir()
    five(other / "0.tar")
    with pytest.raises(UserError, match="process 1 sees other images"):
        run_processes(2, items, [tmp_path, other])
