"""Pictures that `evaluate` draws, by a stand-in for a pipeline; their names, prompts and record."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.metric_pictures import make_pictures, write_pictures
from PIL import Image

from sprint_jax import evaluate
from sprint_jax.core.errors import UserError
from sprint_jax.core.fingerprint import digest
from sprint_jax.metrics import drawing, report
from sprint_jax.metrics.geneval_prompts import make_prompts
from sprint_jax.metrics.pictures import open_pictures, prompts_of, read_prompts
from sprint_jax.models.sana import SIZES, SanaTransformer
from sprint_jax.pipeline import Request


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    write_pictures(root / "real", make_pictures(2, 2, 16, 40))
    (root / "prompts.txt").write_text("".join(f"a thing of kind {n}\n" for n in range(4)))
    return root


def words(root, out, **flags):
    usual = dict(reference=root / "real", prompts=root / "prompts.txt", out=out, batch=5)
    given = {name: value for name, value in (usual | flags).items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("key", ["../../evil", "/evil", "a/b", "..", "", "a\0"])
def test_keys_of_prompts_are_names_and_not_paths(tmp_path, key):
    (tmp_path / "p.json").write_text(json.dumps({"good": "x", key: "y"}))
    with pytest.raises(UserError, match=r"p\.json: the key") as error:
        read_prompts(tmp_path / "p.json")
    assert repr(key) in str(error.value)


class Pipe:
    """Draws a picture of the number and the prompt of each."""

    guidance, meta, params = 4.5, {}, {"w": np.zeros(2, np.float32)}
    is_student, sigma_d, shift, midpoint, integer_times = True, 0.5, 3.0, 1.3, False
    size, model = (8, 8), SanaTransformer(**SIZES["digits"])
    autoencoder, text_encoder = None, None

    def __init__(self):
        self.drawn = []

    def check_steps(self, steps):
        return steps or 2

    def draw(self, prompts, request):
        numbers = [request.first + i for i in range(len(prompts))]
        self.drawn += numbers
        yield np.stack(
            [
                np.full((8, 8, 3), 10 * i + len(p), np.uint8)
                for i, p in zip(numbers, prompts, strict=True)
            ]
        )


def test_pictures_are_drawn_once_whatever_was_there(tmp_path):
    plan = drawing.plan_prompts(["a", "bb", "ccc"], each=2)
    assert plan.prompts == ["a", "a", "bb", "bb", "ccc", "ccc"] and plan.names[-1] == "00005"
    many = drawing.plan_prompts(["a"], each=100_001).names
    assert many == sorted(many) and many[-1] == "100000"
    pipe, base = Pipe(), Request(batch_size=4)
    drawing.draw(plan, tmp_path, pipe, base, "png", {"model": 1})
    assert pipe.drawn == [0, 1, 2, 3, 4, 5]
    pixels = {path.name: np.asarray(Image.open(path))[0, 0, 0] for path in tmp_path.glob("*.png")}
    assert pixels == {f"0000{n}.png": 10 * n + 1 + n // 2 for n in range(6)}
    (tmp_path / "00005.png").unlink()
    drawing.draw(plan, tmp_path, pipe, base, "png", {"model": 1})
    assert pipe.drawn[6:] == [4, 5]
    with pytest.raises(UserError, match="model=1, not 2"):
        drawing.draw(plan, tmp_path, pipe, base, "png", {"model": 2})
    requests = make_prompts(count=1)
    plan = drawing.plan_geneval(requests)
    assert len(plan.names) == 24 and plan.names[5] == "00001/samples/00001"
    keyed = {"k": "x", "a": "y"}
    assert drawing.plan_prompts(keyed) == (["a", "k"], ["y", "x"])
    several = drawing.plan_prompts(keyed, each=2)
    drawing.draw(several, tmp_path / "k", pipe, base, "jpeg 75", {})
    assert prompts_of(open_pictures(tmp_path / "k"), keyed) == several.prompts == list("yyxx")
    numbered = {"00000": "x", "00001": "y"}
    drawing.draw(drawing.plan_prompts(numbered, each=2), tmp_path / "n", pipe, base, "png", {})
    assert prompts_of(open_pictures(tmp_path / "n"), numbered) == list("xxyy")
    with pytest.raises(UserError, match=r"no key '00000' for a/00000\.jpg"):
        prompts_of(open_pictures(tmp_path / "k"), {"k": "x"})
    drawing.write_geneval_metadata(tmp_path, requests)
    assert json.loads((tmp_path / "00003" / "metadata.jsonl").read_text()) == requests[3]


@pytest.mark.parametrize("source", ["geneval", "lines"])
def test_the_first_pictures_keep_their_prompts(root, tmp_path, source, monkeypatch):
    requests = make_prompts(count=1)
    monkeypatch.setattr(evaluate, "make_prompts", lambda: requests)
    plan = drawing.plan_geneval(requests)
    for name in plan.names:
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1, 1)).save(tmp_path / "p" / f"{name}.png")
    (tmp_path / "lines").write_text("".join(each["prompt"] + "\n" for each in requests))
    flags = dict(pictures=tmp_path / "p", metrics="none", count=8)
    flags["prompts"] = "geneval" if source == "geneval" else tmp_path / "lines"
    evaluate.main(words(root, tmp_path / "r.json", **flags))
    found = json.loads((tmp_path / "r.json").read_text())["protocol"]["prompts"]
    assert found == digest(plan.prompts[:8])


@pytest.fixture
def pipe(monkeypatch):
    """The pipeline that ``--model`` loads."""
    pipe = Pipe()
    monkeypatch.setattr(evaluate.SprintPipeline, "from_pretrained", lambda *_, **__: pipe)
    return pipe


def test_pictures_for_geneval_are_png_under_any_protocol(root, tmp_path, pipe):
    flags = dict(pictures=None, model="m", prompts="geneval", metrics="none", count=2)
    evaluate.main(words(root, tmp_path / "r.json", **flags))
    protocol = json.loads((tmp_path / "r.json").read_text())["protocol"]
    found = [protocol[key] for key in ("name", "format", "formats", "sizes")]
    assert found == ["sana", "png", {"png": 8}, ["8x8"]]
    drawn = json.loads((tmp_path / "r.cache" / "pictures" / drawing.RECORD).read_text())
    assert (drawn["request"]["height"], drawn["request"]["width"]) == pipe.size


def test_reports_name_the_autoencoder_that_was_put_in(root, tmp_path, pipe, capsys):
    (tmp_path / "lines").write_text("a cat\n")
    for name, changes in {"own": {}, "other": dict(autoencoder="org/lite")}.items():
        flags = dict(
            pictures=None, model="m", prompts=tmp_path / "lines", metrics="none", **changes
        )
        evaluate.main(words(root, tmp_path / f"{name}.json", cache=tmp_path / name, **flags))
    own, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("own", "other"))
    assert "autoencoder" not in own["model"] and other["model"]["autoencoder"] == "org/lite"
    assert "org/lite" in (tmp_path / "other.md").read_text().splitlines()[0]
    assert report.title("r", {"model": {"int8": True}}) != report.title("r", own)
    capsys.readouterr()
    evaluate.main(["--compare", str(tmp_path / "own.json"), str(tmp_path / "other.json")])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert ["org/lite" in row for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (dict(metrics="fid"), "--inception"),
        (dict(metrics="cmmd", reference="no_folder"), "no_folder"),
        (dict(metrics="fid", reference="no.npz"), "no.npz"),
        (dict(metrics="geneval", boxes="no.jsonl"), "no.jsonl"),
        (dict(metrics="clip", clip="no_clip"), "no_clip"),
        (dict(metrics="cmmd", clip336="no_clip"), "no_clip"),
        (dict(metrics="fd_dinov2", dinov2="no_dino"), "no_dino"),
    ],
)
def test_what_is_missing_is_said_before_a_picture_is_drawn(root, tmp_path, pipe, flags, name):
    with pytest.raises(UserError, match=name):
        evaluate.main(words(root, tmp_path / "r.json", pictures=None, model="m", **flags))
    assert not pipe.drawn


def test_pictures_of_another_or_of_no_known_origin_are_refused(root, tmp_path, pipe, monkeypatch):
    flags = dict(pictures=None, model="m", metrics="none", count=2, cache=tmp_path)
    folder, line = tmp_path / "pictures", words(root, tmp_path / "r.json", **flags)
    evaluate.main(line)
    for name, value in dict(midpoint=1.1, shift=1.0, sigma_d=1.0, integer_times=True).items():
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"model.{name}="):
            patch.setattr(pipe, name, value)
            evaluate.main(line)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"model\.dtype='float32'"):
        patch.setattr(pipe, "model", pipe.model.clone(dtype=jnp.bfloat16))
        evaluate.main(line)
    # The same weights in another network, and the same request of another usual size.
    heads = r"model\.network\.attention_head_dim=32, not 64"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=heads):
        patch.setattr(pipe, "model", pipe.model.clone(num_attention_heads=2, attention_head_dim=64))
        evaluate.main(line)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"request\.width=8, not"):
        patch.setattr(pipe, "size", (8, 16))
        evaluate.main(line)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"model\.encoders="):
        patch.setattr(evaluate, "identify", lambda *_: "other")
        evaluate.main(line)
    Image.new("RGB", (1, 1)).save(folder / "stranger.png")
    with pytest.raises(UserError, match=r"stranger\.png"):
        evaluate.main(line)
    (folder / "stranger.png").unlink()
    (folder / drawing.RECORD).unlink()
    with pytest.raises(UserError, match=r"00000\.jpg, and no drawn\.json"):
        evaluate.main(line)
    assert pipe.drawn == [0, 1]
