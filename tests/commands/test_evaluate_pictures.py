"""`evaluate` on folders of pictures and on a tiny model that draws them, by small random networks."""

import contextlib
import hashlib
import io
import json
import os
import shutil
from unittest import mock

import numpy as np
import pytest
from helpers.metric_networks import write_clip, write_dinov2
from helpers.metric_pictures import make_pictures, write_pictures
from helpers.workdirs import make_workdir
from PIL import Image

from sprint_jax import evaluate
from sprint_jax.core.errors import UserError
from sprint_jax.metrics import evaluation, features, frechet, pictures, protocols, report

pytestmark = pytest.mark.usefixtures("quick")
COUNT = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    write_pictures(root / "fake", make_pictures(COUNT, 1, 16, 40))
    write_pictures(root / "real", [x // 2 for x in make_pictures(COUNT + 3, 2, 16, 40)])
    write_clip(root / "clip")
    write_dinov2(root / "dinov2.safetensors")
    (root / "prompts.txt").write_text("".join(f"a thing of kind {n % 4}\n" for n in range(COUNT)))
    return root


def words(root, out, *more, **flags):
    usual = dict(pictures=root / "fake", reference=root / "real", prompts=root / "prompts.txt")
    usual |= dict(clip=root / "clip", clip336=root / "clip", dinov2=root / "dinov2.safetensors")
    usual |= dict(metrics="clip,diversity,cmmd,fd_dinov2", out=out, batch=5)
    given = {name: value for name, value in (usual | flags).items() if value is not None}
    return [*(word for name, value in given.items() for word in (f"--{name}", str(value))), *more]


@pytest.fixture(scope="module")
def written(root):
    evaluate.main(words(root, root / "report.json"))
    return json.loads((root / "report.json").read_text())


def test_report_has_numbers_errors_and_their_protocol(root, written):
    assert list(written["metrics"]) == ["clip", "diversity", "cmmd", "fd_dinov2"]
    for name, number in written["metrics"].items():
        assert np.isfinite(number["value"]) and number["standard_error"] > 0, name
    assert written["metrics"]["diversity"]["prompts"] == 4
    protocol = written["protocol"]
    found = [protocol[key] for key in ("name", "count", "format", "formats")]
    assert found == ["sana", COUNT, None, {"png": COUNT}]
    shapes = [x.shape for x in make_pictures(COUNT, 1, 16, 40)]
    assert protocol["sizes"] == sorted({f"{height}x{width}" for height, width, _ in shapes})
    assert protocol["views"]["clip"]["resizes"][0] == dict(
        size=16, filter="bicubic", way="pillow", shape="short side"
    )
    assert (
        protocol["weights"]["clip"] == protocol["weights"]["cmmd"] != protocol["weights"]["dinov2"]
    )
    assert {len(mark) for mark in protocol["weights"].values()} == {64}
    networks = protocol["networks"]
    assert (networks["clip"]["act"], networks["clip"]["vision_heads"]) == ("quick_gelu", 2)
    assert (networks["dinov2"]["offset"], networks["dinov2"]["heads"]) == (0.0, 1)
    assert written["throughput"]["clip of pictures"]["pictures_per_second"] > 0
    page = (root / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page.replace(
        "http-equiv", ""
    )
    assert (
        f"| clip | {report.show(written['metrics']['clip'])} |" in (root / "report.md").read_text()
    )


def test_a_second_run_reads_features_and_finds_the_same(root, written, monkeypatch):
    def never(*_):
        raise AssertionError("features were computed again")

    monkeypatch.setattr(features, "_compute", never)
    evaluate.main(words(root, root / "again.json", cache=root / "report.cache"))
    again = json.loads((root / "again.json").read_text())
    assert again["metrics"] == written["metrics"] and again["protocol"] == written["protocol"]


def test_numbers_are_those_of_features_one_by_one(root, written):
    files = sorted((root / "report.cache").glob("dinov2-*/part-*.npy"))
    sets = {len(rows): rows for rows in map(np.load, files)}
    ours, theirs = sets[COUNT], sets[COUNT + 3]
    number = written["metrics"]["fd_dinov2"]["value"]
    assert number == pytest.approx(frechet.low_rank(ours, theirs), rel=1e-6)


def test_reports_of_one_protocol_share_a_table_and_others_do_not(root, written, capsys):
    evaluate.main(["--compare", str(root / "report.json"), str(root / "report.json")])
    assert len(capsys.readouterr().out.splitlines()) == 3
    evaluate.main(
        words(root, root / "other.json", protocol="torch-fidelity", metrics="clip", reference=None)
    )
    with pytest.raises(UserError, match=r"report\.json and .*other\.json .*protocol\.clip_floor"):
        evaluate.main(["--compare", str(root / "report.json"), str(root / "other.json")])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", 11),
        ("seed", 1),
        ("format", "png"),
        ("formats", {"jpg": 12}),
        ("sizes", ["512x512"]),
        ("prompts", "0"),
    ],
)
def test_any_difference_of_protocols_is_found(written, key, value):
    other = written | {"protocol": written["protocol"] | {key: value}}
    with pytest.raises(UserError, match=f"protocol.{key}"):
        protocols.check_same({"a": written, "b": other})


def test_what_only_one_report_used_is_no_difference(written):
    protocol = written["protocol"]
    less = {key: {"clip": protocol[key]["clip"]} for key in ("views", "weights")}
    other = {"protocol": protocol | less | {"reference": None}}
    protocols.check_same({"a": written, "b": other, "c": written})
    # Two that differ in what the first lacks.
    third = {"protocol": protocol | {"reference": "0"}}
    with pytest.raises(UserError, match=r"a and c cannot be compared: protocol\.reference"):
        protocols.check_same({"b": other, "a": written, "c": third})
    other["protocol"]["weights"]["clip"] = "0" * 64
    with pytest.raises(UserError, match=r"a and b cannot be compared: protocol\.weights\.clip"):
        protocols.check_same({"a": written, "b": other})


def test_references_of_equal_names_and_sizes_share_no_table(root, tmp_path):
    found = {}
    for name, level in (("a", 1), ("b", 2), ("again", 1)):
        folder = tmp_path / name
        folder.mkdir()
        Image.new("RGB", (4, 4), (level,) * 3).save(folder / "x.bmp")
        # One folder's features are not to be taken for another's.
        os.utime(folder / "x.bmp", (1, 1))
        flags = dict(reference=folder, metrics="none", prompts=None, cache=tmp_path / "cache")
        evaluate.main(words(root, tmp_path / f"{name}.json", **flags))
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    protocols.check_same({"a": found["a"], "again": found["again"]})
    with pytest.raises(UserError, match=r"protocol\.reference"):
        protocols.check_same(found)


def test_long_work_without_steps_is_told_to_the_other_processes(
    root, written, tmp_path, monkeypatch
):
    peers, told = mock.Mock(), []
    peers.at_phase.side_effect = told.append
    peers.at_step.side_effect = lambda _: told.append("step")
    joined = contextlib.nullcontext(peers)
    monkeypatch.setattr(evaluate.distributed, "joined", lambda _: joined)
    shutil.copytree(root / "report.cache", tmp_path / "cache")
    shutil.rmtree(next((tmp_path / "cache").glob("text-*")))
    evaluate.main(words(root, tmp_path / "r.json", cache=tmp_path / "cache"))
    names = ["CLIP", "step", "the CLIP of CMMD", "DINOv2"]
    loading = [name if name == "step" else f"loading {name}" for name in names]
    assert list(dict.fromkeys(told)) == ["opening pictures", *loading, "measuring"]


def test_equal_weights_in_another_network_are_other_features(root, written, tmp_path):
    shutil.copytree(root / "clip", tmp_path / "clip")
    heads = {f"{tower}_config": {"num_attention_heads": 4} for tower in ("vision", "text")}
    (tmp_path / "clip" / "config.json").write_text(json.dumps(heads))
    before = set((root / "report.cache").glob("cmmd-*"))
    flags = dict(clip336=tmp_path / "clip", metrics="cmmd", cache=root / "report.cache")
    evaluate.main(words(root, tmp_path / "heads.json", **flags))
    assert len(set((root / "report.cache").glob("cmmd-*")) - before) == 2
    other = json.loads((tmp_path / "heads.json").read_text())
    assert other["metrics"]["cmmd"]["value"] != written["metrics"]["cmmd"]["value"]
    with pytest.raises(UserError, match=r"protocol\.networks\.cmmd\.text_heads is 2 .* 4"):
        protocols.check_same({"a": written, "b": other})


def test_damaged_parts_of_features_are_made_again(root, written):
    part = sorted((root / "report.cache").glob("clip-*/part-*.npy"))[0]
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    evaluate.main(words(root, root / "mended.json", cache=root / "report.cache", metrics="clip"))
    assert part.read_bytes() == whole


def test_no_metrics_leave_a_report_of_the_pictures_alone(root, tmp_path):
    evaluate.main(words(root, tmp_path / "r.json", metrics="none", count=COUNT))
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["metrics"] == found["throughput"] == {} and found["protocol"]["count"] == COUNT


def test_a_damaged_picture_is_named(root, tmp_path):
    write_pictures(tmp_path / "bad", make_pictures(3, 1, 16, 40))
    (tmp_path / "bad" / "00001.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"bad/00001\.png"):
        evaluate.main(
            words(
                root, tmp_path / "r.json", pictures=tmp_path / "bad", metrics="cmmd", prompts=None
            )
        )
    assert not (tmp_path / "r.json").exists()


def test_statistics_are_read_and_written_as_pytorch_fid_does(tmp_path):
    random = np.random.default_rng(0)
    made = frechet.moments(random.normal(size=(9, 4)))
    evaluation.write_statistics(tmp_path / "a.npz", made)
    with np.load(tmp_path / "a.npz") as file:
        assert set(file.files) == {"mu", "sigma"}
        assert (file["mu"] == made.mu).all() and (file["sigma"] == made.sigma).all()
    np.savez(tmp_path / "b.npz", mu=np.float32(made.mu), sigma=np.float32(made.sigma))
    assert evaluation.read_statistics(tmp_path / "b.npz").sigma.dtype == np.float64
    content = io.BytesIO()
    np.savez(content, mu=made.mu, sigma=np.array([object()]))
    (tmp_path / "c.npz").write_bytes(content.getvalue())
    np.savez(tmp_path / "nan.npz", mu=np.full(4, np.nan), sigma=made.sigma)
    for name in ("c.npz", "missing.npz", "nan.npz"):
        with pytest.raises(UserError, match=name):
            evaluation.read_statistics(tmp_path / name)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (dict(metrics="fiddle"), ["fiddle", "fid_infinity"]),
        (dict(metrics="fid", reference=None), ["fid", "--reference"]),
        (dict(metrics="kid", reference="stats.npz"), ["kid", "--reference DIR"]),
        (dict(metrics="clip", prompts=None), ["clip", "--prompts"]),
        (dict(metrics="fid"), ["--inception", "pt_inception-2015-12-05-6726825d.pth"]),
        (dict(metrics="geneval"), ["--boxes"]),
        (dict(pictures="nowhere"), ["nowhere"]),
        (dict(count=COUNT + 1), [f"has {COUNT} pictures", f"{COUNT + 1} are asked for"]),
        (dict(clip="nothing"), ["nothing"]),
        (dict(model="x"), ["--model", "--pictures"]),
        (dict(prompts="nowhere.txt"), ["nowhere.txt"]),
    ],
)
def test_mistakes_are_refused(root, tmp_path, flags, names):
    with pytest.raises(UserError) as error:
        evaluate.main(words(root, tmp_path / "r.json", **flags))
    assert all(name in str(error.value) for name in names), error.value


@pytest.mark.parametrize("metric", ["fid", "fid_infinity", "fd_dinov2", "narrow"])
def test_references_without_a_number_are_refused_before_features(
    root, tmp_path, metric, monkeypatch
):
    monkeypatch.setattr(features, "_compute", None)
    write_pictures(tmp_path / "one", make_pictures(1, 2, 16, 40))
    evaluation.write_statistics(tmp_path / "a.npz", frechet.moments(np.eye(5)))
    flags = dict(reference=tmp_path / "one", metrics=metric, inception=tmp_path / "none.pth")
    match = f"1 pictures of the reference are too few for {metric}: at least 2"
    if metric == "narrow":
        flags |= dict(reference=tmp_path / "a.npz", metrics="fid")
        match = r"a\.npz has statistics of 5 features, not of Inception's 2048"
    with pytest.raises(UserError, match=match):
        evaluate.main(words(root, tmp_path / "r.json", **flags))


@pytest.mark.slow
def test_a_model_draws_each_picture_once_and_is_measured(root, tmp_path):
    model = make_workdir(tmp_path / "student", "distill", "small")
    (tmp_path / "p.json").write_text(json.dumps({f"k{n}": {"prompt": f"a {n}"} for n in range(5)}))
    flags = dict(pictures=None, model=model, prompts=tmp_path / "p.json", metrics="clip", batch=2)
    flags |= dict(cache=tmp_path / "cache", steps=1, reference=None)
    evaluate.main(words(root, tmp_path / "a.json", **flags))
    first = json.loads((tmp_path / "a.json").read_text())
    files = {
        path.name: path.read_bytes() for path in (tmp_path / "cache" / "pictures").glob("*.jpg")
    }
    assert sorted(files) == [f"k{n}.jpg" for n in range(5)]
    assert Image.open(io.BytesIO(files["k0.jpg"])).format == "JPEG"
    assert first["request"]["steps"] == 1 and first["model"]["path"] == str(model)
    # Of a run that was killed some pictures are missing: the same come again, and no others are drawn.
    for name in ("k3.jpg", "k4.jpg"):
        (tmp_path / "cache" / "pictures" / name).unlink()
    evaluate.main(words(root, tmp_path / "b.json", **flags))
    for name, content in files.items():
        assert (tmp_path / "cache" / "pictures" / name).read_bytes() == content, name
    assert json.loads((tmp_path / "b.json").read_text())["metrics"] == first["metrics"]
    with pytest.raises(UserError, match=r"request\.steps=1, not 2"):
        evaluate.main(words(root, tmp_path / "c.json", **(flags | dict(steps=2))))


@pytest.mark.parametrize(("size", "sizes"), [(40, 32), (41, 2)])
def test_many_sizes_of_pictures_are_a_hash(tmp_path, size, sizes):
    for n in range(9, size + 1):
        Image.new("RGB", (n, 8)).save(tmp_path / f"{n}.png")
    found = pictures.read_sizes(tmp_path, pictures.open_pictures(tmp_path))
    assert len(found) == sizes and found[0] == ("8x10" if size == 40 else "33 sizes")


def geneval_results(folder, rows):
    """Writes GenEval's results.jsonl of a picture of each prompt; ``rows``: (place, task, correct)."""
    lines = [
        dict(filename=f"elsewhere/{place}", correct=correct, details="{}")
        | dict(metadata=json.dumps(dict(tag=tag, prompt=str(n))))
        for n, (place, tag, correct) in enumerate(rows)
    ]
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def samples(tmp_path):
    """Places of three pictures in GenEval's layout, below ``tmp_path / "p"``."""
    places = [f"0000{n}/samples/00000.png" for n in range(3)]
    for place in places:
        (tmp_path / "p" / place).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "p" / place)
    return places


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:2], "1 pictures without a result, 0 results .*00002/samples/00000.png"),
        (lambda p: [*p, p[0]], "0 pictures without a result, 2 results .*00000/samples/00000.png"),
        (lambda p: [*p, "3/samples/0.png"], "0 pictures .* 1 results .*3/samples/0.png"),
        (lambda p: [*p[:2], "00002.png"], "1 pictures .* 1 results .*00002/samples/00000.png"),
    ],
)
def test_results_of_other_pictures_are_refused(root, tmp_path, samples, change, message):
    path = geneval_results(tmp_path, [(place, "colors", True) for place in change(samples)])
    flags = dict(pictures=tmp_path / "p", metrics="geneval", boxes=path, prompts=None)
    with pytest.raises(UserError, match=rf"results\.jsonl .*{message}") as error:
        evaluate.main(words(root, tmp_path / "r.json", **flags))
    assert error.value.exit_code == 2 and not (tmp_path / "r.json").exists()


def test_geneval_is_summed_up_from_its_detectors_results(root, tmp_path, samples):
    # As GenEval's own generator adds.
    Image.new("RGB", (8, 4)).save(tmp_path / "p" / "00000" / "grid.png")
    rows = [("colors", True), ("colors", False), ("counting", True)]
    path = geneval_results(tmp_path, [(p, *row) for p, row in zip(samples, rows, strict=True)])
    flags = dict(pictures=tmp_path / "p", metrics="geneval", boxes=path, prompts=None)
    evaluate.main(words(root, tmp_path / "r.json", **flags))
    number = json.loads((tmp_path / "r.json").read_text())["metrics"]["geneval"]
    parts = number["parts"]
    missing = ["single_object", "two_object", "position", "color_attr"]
    assert number["missing"] == missing
    assert number["boxes"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    for page in ("r.md", "r.html"):
        assert f"without {', '.join(missing)}" in (tmp_path / page).read_text()
    assert parts["overall"]["value"] == 0.75 and parts["images"]["count"] == 3
    assert "| geneval/overall | 0.75" in (tmp_path / "r.md").read_text()
