"""Conditions as data: cached and online, in buckets, of every source; folders without them are as they were."""

import functools

import chex
import jax
import numpy as np
import pytest
from helpers.encoding import Pictures, small_config
from helpers.runs import tiny, write_digits
from PIL import Image
from safetensors.numpy import save_file

from sprint_jax.core.errors import UserError
from sprint_jax.core.files import read_json
from sprint_jax.data import feed
from sprint_jax.data.buckets import read_fitted
from sprint_jax.data.latents import encoding
from sprint_jax.data.latents.cache import CachedRecord, open_cache, pack, unpack
from sprint_jax.data.sources.folders import open_folder
from sprint_jax.data.sources.maps import with_maps
from sprint_jax.data.sources.records import Caption, Rejected
from sprint_jax.encode import open_source
from sprint_jax.encoders import conditions
from sprint_jax.interop.hed import hed_table, load_hed
from sprint_jax.models.hed import HED
from sprint_jax.training import setup

TEACHER = "configs/digits.py:teacher,small"
SIZES = ("8x16", "16x8", "8x8")
STROKES = {"data__control": "strokes", "data__control_variants": 3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 40 pictures in several sizes, the folder of their maps, and their latents with strokes."""
    folder = tmp_path_factory.mktemp("conditions")
    for name in ("pictures", "maps"):
        (folder / name).mkdir()
    source = Pictures(40)
    for key, image, captions, _ in map(source.__getitem__, range(40)):
        Image.fromarray(image).save(folder / "pictures" / f"{key}.png")
        (folder / "pictures" / f"{key}.txt").write_text(captions[0].text)
        # A map in another size: of the pixels' brightness, and half as large where that can be.
        grey = Image.fromarray(image).convert("L")
        grey = grey if min(grey.size) % 2 else grey.resize((grey.width // 2, grey.height // 2))
        grey.save(folder / "maps" / f"{key}.webp", lossless=True)
    encode(folder / "strokes", folder, **STROKES)
    return folder


def encode(out, folder, **changes):
    c = small_config(data__images=(str(folder / "pictures"),), **changes)
    job = encoding.make_job(c, open_source(c), out, None)
    encoding.encode(job, sigma_d=c.sigma_d, max_rejected=1.0)
    return out


def open_data(folder, tmp_path, source, **changes):
    """Data of a training on the pictures, or on cached latents of them."""
    paths = {"images": folder / "pictures", "latents": folder / changes.pop("cache", "strokes")}
    keys = {f"data__{source}": (str(paths[source]),), "data__source": source}
    keys |= {"data__sizes": SIZES, "encode__dtype": "float32", "encode__batch_size": 8}
    keys |= {"encode__text_batch_size": 8, "data__dir": str(tmp_path), "data__max_rejected": 1.0}
    keys["data__batch_size"] = 8
    c = tiny(TEACHER, tmp_path, **(keys | changes))
    return feed.open_data(c, setup.mesh_from(c))


def test_cached_and_online_conditions_are_the_same_numbers(pictures, tmp_path):
    cached = open_data(pictures, tmp_path, "latents", data__control="strokes")
    online = open_data(pictures, tmp_path, "images", **STROKES)
    plain = open_data(pictures, tmp_path, "latents")
    assert cached.shapes == online.shapes and len(cached.shapes) == 3
    seen = set()
    for i in range(10):
        batch = cached.batches(i)
        chex.assert_trees_all_equal(batch, online.batches(i), strict=True)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
        assert shapes in cached.shapes
        rows = zip(batch["latents"], batch["control"], strict=True)
        seen |= {(latents.tobytes(), control.tobytes()) for latents, control in rows}
        # Without conditions a run on the same folder sees what it saw before there were any.
        del batch["control"]
        chex.assert_trees_all_equal(batch, plain.batches(i), strict=True)
    # 40 pictures, some of which were drawn in several thicknesses.
    assert len({latents for latents, _ in seen}) == 40 < len(seen)
    np.testing.assert_array_equal(cached.control(5), online.control(5))
    assert cached.control(5).shape[1:] == cached.shapes[0]["latents"].shape[1:]
    assert plain.control is None and "control" not in plain.shapes[0]
    # A run does not go on with other conditions, and goes on without as before.
    assert plain.identity not in (cached.identity, online.identity)
    with pytest.raises(UserError, match=r"config\.data\.control is 'edges'.*are strokes"):
        open_data(pictures, tmp_path, "latents", data__control="edges")


@pytest.mark.slow
def test_cached_and_online_scribbles_are_the_same_numbers(pictures, tmp_path, monkeypatch):
    """Of a tiny HED that sees where red exceeds green by 80, in noise."""
    fields = dict(features=(2, 2, 2, 2, 2), depths=(1, 1, 1, 1, 1))
    monkeypatch.setattr(conditions, "load_hed", functools.partial(load_hed, fields=fields))
    table, weights = hed_table(HED(**fields)).items(), tmp_path / "hed.safetensors"
    tensors = {name: np.zeros(entry.shape, np.float32) for name, entry in table}
    tensors["block1.convs.0.weight"][:, :2, 1, 1] = [[1, -1], [-1, 1]]
    tensors["block1.projection.weight"][0, :, 0, 0] = [0.3, -0.3]
    tensors["block1.projection.bias"] -= 24
    save_file(tensors, weights)
    keys = {"data__control": "scribble", "data__control_weights": str(weights)}
    keys |= {"data__control_variants": 2, "data__sizes": ("48x96",)}
    encode(pictures / "scribbles", pictures, **keys)
    cached = open_data(pictures, tmp_path, "latents", cache="scribbles", data__control="scribble")
    online = open_data(pictures, tmp_path, "images", **keys)
    for i in range(3):
        batch = cached.batches(i)
        chex.assert_trees_all_equal(batch, online.batches(i), strict=True)
        assert len(np.unique(batch["control"])) == 2
        assert len({row.tobytes() for row in batch["control"]}) == 8
    about = open_cache(pictures / "scribbles").control
    assert about["hed"]["weights"] == "ControlNetHED" and about["thickness"] == [0, 24]


def test_the_manifest_tells_of_conditions_and_is_as_before_without(pictures, tmp_path):
    found = open_cache(pictures / "strokes")
    assert found.control == {"kind": "strokes", "thickness": [2, 5], "variants": 3}
    assert all(len(record.controls) == 3 for record in found.__getitems__(range(40)))
    without = encode(tmp_path / "plain", pictures)
    assert "control" not in read_json(without / "manifest.json")
    assert "control" not in read_json(without / "encoding.json")
    plain = open_cache(without)
    assert plain.identity == found.identity and plain.control is None
    assert plain[3].controls == () and plain[3].latents.tobytes() == found[3].latents.tobytes()
    with pytest.raises(UserError, match=r"conditions in .*plain are none"):
        open_data(tmp_path, tmp_path, "latents", cache="plain", data__control="strokes")
    # An encoding that was begun without conditions is not gone on with otherwise.
    with pytest.raises(UserError, match="control"):
        encode(without, pictures, **STROKES)
    other = encode(pictures / "thin", pictures, data__control="strokes", data__control_thickness=2)
    with pytest.raises(UserError, match=rf"{other}.*thicknesses"):
        both = (str(pictures / "strokes"), str(other))
        open_data(pictures, tmp_path, "latents", data__latents=both, data__control="strokes")


def test_a_record_keeps_its_conditions():
    latents = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    text = np.ones((1, 4), np.float32)
    for count in (0, 1, 12):
        record = CachedRecord(
            "k", latents, (Caption("a"),), (text,), tuple(latents + k for k in range(count))
        )
        chex.assert_trees_all_equal(unpack(pack(record)).controls, record.controls)


def test_maps_beside_pictures(pictures, tmp_path):
    keys = {"data__control": "maps", "data__control_maps": (str(pictures / "maps"),)}
    encode(pictures / "mapped", pictures, **keys)
    how = dict(cache="mapped", data__control="maps")
    cached = open_data(pictures, tmp_path, "latents", **how)
    online = open_data(pictures, tmp_path, "images", **keys)
    for i in range(4):
        batch = cached.batches(i)
        chex.assert_trees_all_equal(batch, online.batches(i), strict=True)
        grey = batch["control"].reshape(-1, 3)
        np.testing.assert_array_equal(grey, grey[:, :1].repeat(3, 1))
    records = map(open_cache(pictures / "mapped").__getitem__, range(40))
    (picture,) = (record for record in records if record.key == "picture-002")
    # A picture of 9 x 9 pixels, and a map of the same: both are cut to 8 x 8 alike.
    colours = picture.latents.reshape(-1, 3).mean(-1)
    assert np.corrcoef(colours, picture.controls[0].reshape(-1, 3)[:, 0])[0, 1] > 0.8


def test_a_picture_without_its_map_is_rejected(pictures, tmp_path):
    source = open_folder(pictures / "pictures")
    other = tmp_path / "maps"
    other.mkdir()
    Image.new("L", (5, 5)).save(other / "picture-002.png")  # of 9 x 9 pixels
    Image.new("L", (5, 5)).save(other / "picture-000.png")  # of 8 x 16 pixels
    (mapped,) = with_maps([source], [str(other)])
    assert mapped.measure(2) == source.measure(2) and mapped[2].control.shape == (5, 5, 3)
    assert mapped.identity != source.identity and len(mapped) == 40
    for read in (mapped.measure, mapped.__getitem__):
        with pytest.raises(Rejected, match="picture-001: no map"):
            read(1)
    with pytest.raises(Rejected, match=r"picture-000: .*5x5 .* 8x16"):
        read_fitted(mapped, 0, [(8, 16)])
    for paths, named in (((), "0 folders"), ((str(tmp_path / "none"),), "none")):
        with pytest.raises(UserError, match=named):
            with_maps([source], paths)


@pytest.mark.parametrize("source", ["digits", "synthetic"])
def test_conditions_of_data_without_files(tmp_path, source):
    changes = {"data__source": source, "data__latent_size": (4, 4), "data__text_length": 12}
    c = tiny(TEACHER, write_digits(tmp_path), **changes)
    with_control = c.override({"data.control": "strokes", "data.control_variants": 4})
    data, plain = (feed.open_data(each, setup.mesh_from(c)) for each in (with_control, c))
    for i in (0, 7):
        batch = data.batches(i)
        assert data.shapes == [feed.batch_shapes(with_control)]
        assert batch["control"].shape == data.shapes[0]["control"].shape == batch["latents"].shape
        control = batch.pop("control")
        chex.assert_trees_all_equal(batch, plain.batches(i), strict=True)
        if source == "digits":
            # White on black, in some blocks of the autoencoder.
            assert set(np.unique(data.decode(control))) == {0, 255}
    assert data.held_out(3)["control"].shape == (3, *control.shape[1:])
    if source == "digits":
        assert data.control(5).shape == (5, *control.shape[1:])
        with pytest.raises(UserError, match="maps"):
            feed.open_data(c.override({"data.control": "maps"}), setup.mesh_from(c))
