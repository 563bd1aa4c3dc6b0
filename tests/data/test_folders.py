"""Folders of images: keys, captions beside them, metadata.jsonl."""

import json
import os

import pytest
from helpers import image_sets
from helpers.image_sets import read_captions as read
from PIL import Image

from sprint_jax.core.errors import UserError
from sprint_jax.data.sources.folders import open_folder
from sprint_jax.data.sources.open import open_images
from sprint_jax.data.sources.records import Caption, Rejected

PNG = image_sets.encode(Image.new("RGB", (3, 2), "red"), "PNG")


def write(folder, files):
    for path, content in files.items():
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_folder(folder)


def test_keys_are_paths_in_order_without_hidden_files_and_links_lead_to_each_file_once(tmp_path):
    names = ["b.png", "a.PNG", "deep/er/x.y.jpeg", "deep/a.webp", "Grün/猫.png", "README.txt"]
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "circle").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "elsewhere", {"x.png": PNG})
    source = write(tmp_path / "in", dict.fromkeys([*names, ".a.png", ".b/c.png"], PNG))
    assert list(read(source)) == ["Grün/猫", "a", "b", "deep/a", "deep/er/x.y", "link/x"]
    assert source.measure(0) == ("Grün/猫", (2, 3))


def test_images_that_differ_in_the_extension_alone_keep_it(tmp_path):
    source = write(tmp_path, {"a.png": PNG, "a.jpg": PNG, "a.txt": "both", "b.png": PNG})
    assert read(source) == {"a.jpg": ["both"], "a.png": ["both"], "b": [""]}
    with pytest.raises(UserError, match=r"a\.jpg\.png .*a\.jpg "):
        write(tmp_path, {"a.jpg.png": PNG})


def test_what_is_no_image_is_refused_and_not_left_out(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(PNG)
    source = write(tmp_path, {"page.jpg": "<html>", "empty.gif": b"", "good.png": PNG})
    assert read(source) == {
        "empty": "empty file",
        "gone": "cannot be read",
        "good": [""],
        "page": "not an image",
        r"\udcff": "bad file name",
    }
    with pytest.raises(Rejected, match=r"gone: .*gone\.png"):
        source.measure(2)


def test_links_to_themselves_pipes_and_devices_are_named_and_never_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    ends = {"itself": "itself.png", "pipe": "pipe", "zero": "/dev/zero", "null": "/dev/null"}
    # A file of the kernel says that it is regular and has 0 bytes, whatever comes when it is read.
    ends["kernel"] = "/proc/self/smaps"
    for name, end in ends.items():
        (tmp_path / f"{name}.png").symlink_to(end)
    os.mkfifo(tmp_path / "pipe2.png")
    for number, end in enumerate(("1.txt", "pipe", "/dev/zero")):
        (tmp_path / f"{number + 1}.txt").symlink_to(end)
    source = write(tmp_path, dict.fromkeys(["1.png", "2.png", "3.png", "good.png"], PNG))
    found = read(source)
    place = list(found).index("itself")
    assert found.pop("good") == [""] and found.pop("kernel") == "empty file"
    assert set(found) == {"1", "2", "3", "itself", "null", "pipe", "pipe2", "zero"}
    assert set(found.values()) == {"cannot be read"}
    with pytest.raises(Rejected, match=r"itself: .*itself\.png"):
        source.measure(place)


@pytest.mark.parametrize("name", ["metadata.jsonl", "shard.tar", "x.array_record"])
@pytest.mark.parametrize("end", ["pipe", "/dev/zero", "itself"])
def test_files_that_are_read_as_a_whole_must_be_regular_ones(tmp_path, name, end):
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path, {"a.png": PNG})
    folder = tmp_path if name == "metadata.jsonl" else tmp_path / "shards"
    folder.mkdir(exist_ok=True)
    (folder / name).symlink_to(name if end == "itself" else tmp_path / end)
    for path in (folder, folder / name):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            open_images([path])


def test_files_of_sana_belong_to_the_image_of_the_longest_name(tmp_path):
    files = {
        "d/7.png": PNG,
        "d/7_b.png": PNG,
        "d/7.txt": "short",
        "d/7_VILA.json": json.dumps({"7": {"VILA": "long"}}),
        "d/7_VILA_clip_score.json": json.dumps({"7": {"VILA": "27.5"}}),
        "d/7_prompt_clip_score.json": json.dumps({"7": {"prompt": 21}}),
        "d/7_b.json": '{"caption": "b"}',
        "d/7_b_VILA.json": json.dumps({"7_b": {"VILA": "b long"}}),
        "d/other_VILA.json": "{",
    }
    source = write(tmp_path, files)
    assert source[0].captions == (Caption("short", 1.0, 21.0), Caption("long", 1.0, 27.5))
    assert source[1].captions == (Caption("b"), Caption("b long"))
    with pytest.raises(Rejected, match=r"d/7: bad JSON: d/7_VILA\.json"):
        write(tmp_path, {"d/7_VILA.json": "{"})[0]


def test_metadata_gives_captions_by_file_name(tmp_path):
    lines = [
        {"file_name": "a.png", "text": "one"},
        {"file_name": "./a.png", "caption": "two"},
        {"file_name": "sub/b.png", "captions": ["x", "y"], "weights": [1, 2]},
        {"file_name": "c.png", "label": 3},
        {"file_name": "gone.png", "text": "?"},
        {"text": "of what?"},
        {"file_name": "../out.png", "text": "?"},
        {"file_name": "d.png", "text": 7},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\nnot JSON\n"
    names = ["a.png", "sub/b.png", "c.png", "d.png", "lone.png", "beside.png"]
    files = dict.fromkeys(names, PNG) | {"metadata.jsonl": text, "beside.txt": "its own"}
    below = {"below/metadata.jsonl": '{"file_name": "b.png", "text": "b"}', "below/b.png": PNG}
    files |= below | {"below/c.png": PNG}
    assert read(write(tmp_path, files)) == {
        "a": ["one", "two"],
        "sub/b": ["x", "y"],
        "c": [""],
        "beside": ["its own"],
        "gone": "no such file",
        "metadata.jsonl:6": "bad JSON",
        "metadata.jsonl:7": "no such file",
        "metadata.jsonl:8": "bad caption",
        "metadata.jsonl:10": "bad JSON",
        "d": "no caption",
        "lone": "no caption",
        "below/b": ["b"],
        "below/c": "no caption",
    }


def test_files_that_are_not_read_do_not_change_what_the_source_is(tmp_path):
    files = {"a.png": PNG, "a.txt": "one", "metadata.jsonl": ""}
    before = write(tmp_path, files).identity
    assert write(tmp_path, {"notes.txt": "x", "out/b.bin": "x", ".b.png": PNG}).identity == before
    for path in ("a.txt", "a.json", "a_VILA.json", "metadata.jsonl", "b.png"):
        now = write(tmp_path, {path: '{"file_name": "a.png"}'}).identity
        assert now != before, path
        before = now


def test_folders_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(UserError, match="gone"):
        open_folder(tmp_path / "gone")
    with pytest.raises(UserError, match=str(tmp_path)):
        write(tmp_path, {"notes.txt": "x"})
    with pytest.raises(UserError, match=r"metadata\.csv.* metadata\.jsonl"):
        write(tmp_path, {"a.png": PNG, "metadata.csv": "file_name,text\n"})
