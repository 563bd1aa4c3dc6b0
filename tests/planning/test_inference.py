"""Plans of inference: a small pipeline beside XLA's own counts, batches, cards, and the command."""

import dataclasses
import importlib.util
import json

import jax
import pytest
from helpers.pipeline_folder import write_pipeline
from helpers.runs import quick_compilation, run_here
from helpers.workdirs import tiny_config

from sprint_jax import plan
from sprint_jax.core.errors import UserError
from sprint_jax.models.inference.sampler import STATIC
from sprint_jax.planning import inference
from sprint_jax.planning.counts import analyze, total
from sprint_jax.planning.inference import PARTS, Run, calls_of, largest_batches, lower_part
from sprint_jax.planning.topology import has_cuda_compiler, open_topology

needs_cuda = pytest.mark.skipif(
    not has_cuda_compiler(), reason="CUDA's compiler is not installed (extra 'plan-cuda')"
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra 'plan')"
)
RUN = Run(1, 3, (64, 128))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder of configs alone: a plan reads no weights."""
    found = write_pipeline(tmp_path_factory.mktemp("model") / "pipeline")
    for weights in found.rglob("*.safetensors"):
        weights.unlink()
    return found


@pytest.fixture(scope="module")
def pipe(folder):
    return inference.open_model(str(folder), "float32")


@pytest.fixture(scope="module")
def compiled(pipe):
    """The three programs of one run, without a loop over blocks or steps, whose turns XLA counts once."""
    apart = dataclasses.replace(pipe.sampler, model=pipe.model.clone(scan=False))
    pipe._latents = jax.jit(apart.from_noise, static_argnames=STATIC)
    with quick_compilation():
        return {part: lower_part(pipe, part, RUN, jax.devices()[0]).compile() for part in PARTS}


@pytest.mark.parametrize("part", ["transformer", "decoder"])
def test_xla_counts_the_same(compiled, part):
    """XLA counts elementwise arithmetic as well, which in so narrow networks is much."""
    theirs, works = compiled[part].cost_analysis(), analyze(compiled[part].as_text())
    assert 0.4 * theirs["flops"] < total(works, "flops") <= theirs["flops"]
    assert 0.8 * theirs["bytes accessed"] < total(works, "hbm") <= 1.05 * theirs["bytes accessed"]


def test_arguments_are_the_weights_and_the_inputs(pipe, compiled):
    for part in PARTS:
        leaves = jax.tree.leaves(inference.weights_of(pipe, part))
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        found = compiled[part].memory_analysis().argument_size_in_bytes
        assert weights < found < weights + 4e6


def test_calls_are_those_of_the_pipeline(pipe):
    for batch, size, text, decoder in [
        (1, 1024, (1, 1), (1, 1)),
        (10, 1024, (1, 16), (5, 2)),  # two megapixels at once
        (20, 1024, (2, 16), (10, 2)),
        (10, 512, (1, 16), (2, 8)),
    ]:
        run = Run(1, batch, (size, size))
        assert calls_of(pipe, "text", run) == text
        assert calls_of(pipe, "transformer", run) == (1, batch)
        assert calls_of(pipe, "decoder", run) == decoder


@pytest.mark.slow
def test_models_of_other_kinds(folder, pipe, tmp_path):
    """A teacher's transformer has both halves of guidance; digits have no networks beside the transformer."""
    teacher = write_pipeline(tmp_path / "teacher", student=False)
    digits = tmp_path / "digits"
    (digits / "checkpoints").mkdir(parents=True)
    (digits / "config.json").write_text(json.dumps(tiny_config("distill")))
    flops = {}
    for name, run in [(folder, RUN), (teacher, RUN), (digits, Run(1, 2, (16, 16)))]:
        other = inference.open_model(str(name), "float32")
        assert other.is_student == (name != teacher)
        assert inference.parts_of(other) == (("transformer",) if name == digits else PARTS)
        lowered = lower_part(other, "transformer", run, jax.devices()[0])
        flops[name] = total(analyze(lowered.as_text(dialect="hlo")), "flops")
    assert 1.8 < flops[teacher] / flops[folder] < 2.1 and flops[digits] > 0


def run_of(batch: int, weights: float, text: float, transformer: float, decoder: float) -> dict:
    """A run as `plan_sampling` makes it, from GiB; two thirds of the weights are the text encoder's."""
    size, parts = 2**30, []
    for name, share, beside in [
        ("text", 2 / 3, text),
        ("transformer", 1 / 3, transformer),
        ("decoder", 0.0, decoder),
    ]:
        part = {"name": name, "calls": 1, "weight_bytes": share * weights * size}
        part |= dict.fromkeys(("flops", "hbm_bytes", "kernels", "seconds"), 1.0)
        parts.append(part | {"bytes": part["weight_bytes"] + beside * size, "fits": True})
    limits = open_topology("local")._replace(hbm_bytes=8.0 * size)
    return inference._whole(Run(1, batch, (1024, 1024)), parts, limits)


def test_cards_and_largest_batches(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "1.0")
    one, two = run_of(1, 6, 1, 1, 2), run_of(2, 6, 3, 2, 2)
    assert (one["whole"]["bytes"], one["whole"]["bytes_in_turn"]) == (8 * 2**30, 5 * 2**30)
    assert one["whole"]["fits"] and not two["whole"]["fits"]
    assert one["whole"]["cards"] == [8, 12, 16, 24, 80]
    assert two["whole"]["cards"] == [12, 16, 24, 80]
    assert two["whole"]["cards_in_turn"] == [8, 12, 16, 24, 80]
    (found,) = largest_batches([two, one])
    # 6 GiB of weights and one for each picture; on 8 GiB the text encoder has no room for two prompts.
    assert found["bytes"] == {"8": 1, "12": 6, "16": 10, "24": 18, "80": 74}
    assert found["bytes_in_turn"] == {"8": 6, "12": 10, "16": 14, "24": 22, "80": 78}
    assert largest_batches([one]) == []


@pytest.fixture
def command(monkeypatch, capfd):
    def run(*words):
        words = ["--sample", "--topology", "local", *words]
        return run_here(words, monkeypatch, capfd, main=plan.main)

    return run


@pytest.mark.slow
def test_a_plan_of_a_folder(command, folder, tmp_path):
    out = tmp_path / "plan.json"
    words = ["--model", str(folder), "--steps", "1", "--batch", "1,2", "--image", "64x64"]
    with quick_compilation():
        ended = command(*words, "--dtype", "float32", "--out", str(out))
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())
    assert out.with_suffix(".png").is_file() and "largest batch" in ended.out
    assert [(run["steps"], run["batch"]) for run in found["runs"]] == [(1, 1), (1, 2)]
    for run in found["runs"]:
        assert [part["name"] for part in run["parts"]] == list(PARTS)
        whole = run["whole"]
        for key in ("flops", "hbm_bytes", "kernels", "seconds"):
            assert whole[key] == sum(part["calls"] * part[key] for part in run["parts"]) > 0
        assert whole["bytes_in_turn"] < whole["bytes"]
    assert len(found["largest_batch"]) == 1


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("--model", "700m"), "700m"),
        ((), "--model"),
        (("--model", "FOLDER", "--steps", "5"), "5"),
        (("--model", "FOLDER", "--image", "101x64"), "101x64"),
        (("--model", "FOLDER", "--batch", "0"), "--batch"),
        (("--model", "FOLDER", "--sweep", "batch"), "--sweep"),
    ],
)
def test_wrong_usage_is_one_line(command, folder, words, name):
    ended = command(*(str(folder) if word == "FOLDER" else word for word in words))
    assert ended.code in (1, 2) and name in ended.error and len(ended.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "two"),
    [
        pytest.param("h200:1", "h200:2", marks=needs_cuda),
        pytest.param("v6e:1x1", "v6e:1x2", marks=needs_libtpu),
    ],
)
def test_a_device_that_is_not_here(folder, pipe, name, two):
    """The decoder has the FLOPs of the traced program; only one device is planned for."""
    device, lines = open_topology(name), []
    found = inference.plan_sampling(str(folder), "float32", device, [RUN], False, lines.append)
    decoder, whole = found["runs"][0]["parts"][-1], found["runs"][0]["whole"]
    traced = lower_part(pipe, "decoder", RUN, device.devices[0]).as_text(dialect="hlo")
    assert decoder["flops"] == pytest.approx(total(analyze(traced), "flops"), rel=0.1)
    assert decoder["kernels"] > 20 and whole["fits"] and len(lines) == len(PARTS)
    assert decoder["bytes"] > decoder["weight_bytes"] > 0 and whole["images_per_second"] > 0
    with pytest.raises(UserError, match="one device"):
        inference.plan_sampling(str(folder), "float32", open_topology(two), [], False, print)


def test_flags_of_inference_are_refused_beside_a_config(monkeypatch, capfd):
    words = ["--config", "configs/sprint.py:600m", "--topology", "local", "--batch", "512"]
    ended = run_here(words, monkeypatch, capfd, main=plan.main)
    assert ended.code == 2 and "--batch" in ended.err
