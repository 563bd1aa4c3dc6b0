"""The command teacher_check, what it measures, and when its verdict changes."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.runs import quick_compilation, run_here, tiny, write_digits
from helpers.workdirs import make_workdir, random_params, tiny_config
from PIL import Image

from sprint_jax import losses, teacher_check, trigflow
from sprint_jax.core.errors import UserError
from sprint_jax.data import feed
from sprint_jax.interop import diffusers
from sprint_jax.interop.sana import config_from_fields
from sprint_jax.models.sana import from_fields
from sprint_jax.parallel.sharding import make_mesh
from sprint_jax.teacher import measure
from sprint_jax.teacher.verdict import judge
from sprint_jax.training import setup

FIELDS = tiny_config("flow")["model"] | {"num_layers": 1}
SIGMA_D = 0.5


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """The commands' mesh; programs for all eight would take a minute to compile."""
    mesh = make_mesh(devices=jax.devices()[:2])
    monkeypatch.setattr(setup, "mesh_from", lambda c: mesh)


@pytest.fixture(scope="module")
def setting():
    random = np.random.default_rng(0)

    def batch():
        return {
            "latents": jnp.asarray(random.normal(size=(4, 4, 4, 12)), jnp.float32),
            "text": jnp.asarray(random.normal(size=(4, 5, 64)), jnp.float32),
            "mask": jnp.ones((4, 5), jnp.int32),
        }

    null = jnp.zeros((5, 64)), jnp.asarray([1, 0, 0, 0, 0])
    return measure.Setting([batch(), batch()], *null, guidance=2.0, sigma_d=SIGMA_D, shift=1.0)


@pytest.fixture(scope="module")
def small():
    """A calm network: weights so small that its velocity hardly depends on time."""
    return jax.tree.map(lambda leaf: 0.3 * leaf, random_params(FIELDS, 1))


@pytest.fixture(scope="module")
def found(small, setting):
    ticks = []
    numbers, latents = measure.measure(
        from_fields(FIELDS), small, setting, lambda: ticks.append(None)
    )
    assert len(ticks) == setting.calls
    assert latents.shape == (4, 4, 4, 12)
    return numbers


def failed(found, before=None) -> set[str]:
    return {check.name for check in judge(found, before) if not check.passed}


def test_transform_is_lossless(found):
    assert set(found["transform"]) == {"velocity", "x0", "samples"}
    assert max(found["transform"].values()) < 2e-5


def test_flow_loss_is_that_of_the_bin(small, setting, found):
    """Bin 5 anew, with the two times and the noise that it stands for."""
    values = []
    for number, batch in enumerate(setting.batches):
        t = jnp.full(4, (5 + (number + 0.5) / 2) / 8)
        noise = jax.random.normal(
            jax.random.fold_in(jax.random.key(2), 10 + number), batch["latents"].shape
        )
        x = (1 - t[0]) * batch["latents"] + t[0] * noise
        apply = jax.jit(from_fields(FIELDS).apply)
        v = apply({"params": small}, x, t, batch["text"], batch["mask"])
        values.append(float(jnp.square(v - (noise - batch["latents"])).mean()))
    assert found["flow"]["loss"][5] == pytest.approx(np.mean(values), rel=1e-5)


def test_linear_guess_is_the_best_multiple_of_the_noisy_latents(setting, found):
    """At the ends: data alone at 0, where noise is the error; at 1, where data is."""
    random = np.random.default_rng(1)
    power = np.mean([np.square(batch["latents"]).mean() for batch in setting.batches])
    x0 = np.sqrt(power) * random.normal(size=200_000)
    noise = random.normal(size=x0.shape)
    t = (3 + random.random(x0.shape)) / 8
    x, v = (1 - t) * x0 + t * noise, noise - x0
    # The multiple may depend on time: take it from narrow bins.
    parts = np.array_split(np.argsort(t), 50)
    errors = [np.square(v[i] - x[i] * (x[i] @ v[i]) / (x[i] @ x[i])).mean() for i in parts]
    assert found["flow"]["linear"][3] == pytest.approx(np.mean(errors), rel=0.02)


def test_tangent_and_gradient_are_those_of_the_loss(small, setting, found):
    model, batch = from_fields(FIELDS), setting.batches[0]
    one = setting._replace(batches=[batch])
    result = measure.tangents(model, small, one, lambda: None)
    t = jnp.full(4, 2.5 / 8 * np.pi / 2)
    key = jax.random.fold_in(jax.random.key(2), 2)
    x0 = SIGMA_D * batch["latents"]
    z = SIGMA_D * jax.random.normal(key, x0.shape)

    def network(params, text, mask):
        def velocity(x, t):
            return model.apply({"params": params}, x, t, text, mask)

        return trigflow.to_trigflow(velocity)

    def teacher(x, t):
        shape = (4, *setting.null_text.shape)
        text = jnp.broadcast_to(setting.null_text, shape)
        mask = jnp.broadcast_to(setting.null_mask, shape[:2])
        without = network(small, text, mask)(x, t)
        return without + 2.0 * (network(small, batch["text"], batch["mask"])(x, t) - without)

    def student(params, x, t):
        return network(params, batch["text"], batch["mask"])(x, t), jnp.zeros(4)

    @jax.jit
    def both(params):
        def loss(params):
            return losses.scm_loss(student, teacher, params, x0, z, t, sigma_d=SIGMA_D, warmup=1.0)

        grads, aux = jax.grad(loss, has_aux=True)(params)
        x_t = trigflow.add_noise(x0, z, t)
        size = losses.per_sample_norm(student(params, x_t / SIGMA_D, t)[0])
        return optax.tree.norm(grads), (aux["tangent_norm"] / (SIGMA_D * size)).mean()

    gradient, size = both(small)
    weight = 1 / (SIGMA_D * np.tan(2.5 / 8 * np.pi / 2))
    assert result["size"][2] == pytest.approx(float(size), rel=1e-4)
    assert result["gradient"][2] == pytest.approx(float(gradient) / weight, rel=1e-4)


def test_a_healthy_teacher_passes_all_but_what_it_did_not_learn(found):
    assert failed(found) <= {"learnt", "samples"}


def test_scale_1000_with_loud_attention_fails_for_its_derivative(setting):
    fields = FIELDS | {"timestep_scale": 1.0, "qk_norm": False}
    params = jax.tree.map(lambda leaf: 0.5 * leaf, random_params(fields, 1))
    for layer in ("to_q", "to_k"):
        attention = params["transformer_blocks"]["attn2"]
        attention[layer] = jax.tree.map(lambda leaf: 30 * leaf, attention[layer])
    numbers, _ = measure.measure(from_fields(fields), params, setting, lambda: None)
    assert {"tangent", "bend"} <= failed(numbers)


def test_weights_that_are_not_finite_fail(small, setting):
    params = small | {"scale_shift_table": small["scale_shift_table"].at[0, 0].set(jnp.nan)}
    numbers, _ = measure.measure(from_fields(FIELDS), params, setting, lambda: None)
    assert {"finite", "lossless", "tangent", "gradient", "samples"} <= failed(numbers)


def good() -> dict:
    flow = {"loss": [0.3] * 8, "linear": [1.0] * 8, "mean": 0.3, "linear_mean": 1.0}
    tangent = {"size": 0.3, "gradient": 1.0, "bend": 0.01, "bfloat16": 0.03, "nonfinite": 0.0}
    return {
        "transform": {"velocity": 1e-6, "x0": 1e-6, "samples": 1e-5},
        "flow": flow,
        "tangent": {name: [value] * 8 for name, value in tangent.items()},
        "samples": {"finite": 1.0, "deviation": 1.0},
    }


@pytest.mark.parametrize(
    ("group", "key", "value", "names"),
    [
        ("transform", "velocity", 1e-3, {"lossless"}),
        ("flow", "mean", 0.95, {"learnt", "kept"}),
        ("flow", "loss", [0.3] * 7 + [0.4], {"kept"}),
        ("tangent", "size", [0.3] * 7 + [1.5], {"tangent"}),
        ("tangent", "bend", [0.2] + [0.01] * 7, {"bend"}),
        ("tangent", "bfloat16", [0.5] + [0.01] * 7, {"bfloat16"}),
        ("tangent", "gradient", [20.0] + [1.0] * 7, {"gradient"}),
        ("tangent", "nonfinite", [0.1] + [0.0] * 7, {"finite"}),
        ("samples", "deviation", 0.3, {"samples"}),
        ("samples", "finite", 0.9, {"finite"}),
    ],
)
def test_each_number_beyond_its_limit_fails_its_own_check(group, key, value, names):
    assert failed(good(), good()) == set()
    bad = copy.deepcopy(good())
    bad[group][key] = value
    assert failed(bad, good()) == names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    data = write_digits(tmp_path_factory.getbasetemp() / "digits")
    make_workdir(folder / "teacher", "flow")
    make_workdir(folder / "student", "distill")
    fields = tiny_config("flow")["model"]
    diffusers.save_transformer(folder / "before", fields, random_params(fields, 1))
    # Weights are not looked at before the widths are.
    (folder / "wide").mkdir()
    wide = config_from_fields(fields | {"caption_channels": 32})
    config = {"_class_name": "SanaTransformer2DModel"} | wide
    (folder / "wide" / "config.json").write_text(json.dumps(config))
    return folder, [f"--config.data.dir={data}", "--count", "8", "--batch", "8"]


def test_command_reports_curves_pictures_and_exit_code(folder, monkeypatch, capfd):
    folder, flags = folder
    out = folder / "report"
    line = ["--model", str(folder / "teacher"), "--before", str(folder / "before"), *flags]
    ended = run_here([*line, "--out", str(out)], monkeypatch, capfd, main=teacher_check.main)
    report = json.loads((out / "report.json").read_text())
    assert ended.code == teacher_check.NOT_READY and "NOT ready" in ended.out  # never trained
    assert report["ready"] is False
    assert not next(each for each in report["checks"] if each["name"] == "learnt")["passed"]
    assert set(report["measured"]) == {"after", "before"}
    # The workdir's average has the weights of the folder.
    same = [report["measured"][name]["flow"]["loss"] for name in ("after", "before")]
    np.testing.assert_allclose(*same, rtol=1e-5)
    assert all(f"{each['name']} " in ended.out for each in report["checks"])
    for name in ("curves.png", "samples.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--model", "before"], 2, "say with --config"),
        (["--model", "student"], 1, "is a student"),
        (["--model", "nothing"], 2, "say with --config"),
        (["--model", "teacher", "--before", "nothing"], 1, "does not exist"),
        (["--model", "teacher", "--before", "wide"], 2, "text of 32"),
        (["--model", "teacher", "--count", "0"], 2, "--count"),
        (["--model", "teacher", "--config.data.source=tape"], 2, "tape"),
    ],
)
def test_command_refuses_what_it_cannot_measure(folder, monkeypatch, capfd, words, code, message):
    folder, flags = folder
    monkeypatch.chdir(folder)
    line = [*flags, *words, "--out", "refused"]
    ended = run_here(line, monkeypatch, capfd, main=teacher_check.main)
    assert ended.code == code and message in ended.error
    assert not (folder / "refused").exists()


def test_held_out_records_are_the_same_each_time_and_of_another_split(folder):
    c = tiny("configs/digits.py:teacher,small", folder[1][0].partition("=")[2])
    data = feed.open_data(c, setup.mesh_from(c))
    held, again = data.held_out(16), data.held_out(16)
    np.testing.assert_array_equal(held["latents"], again["latents"])
    seen = {row.tobytes() for i in range(13) for row in data.batches(i)["latents"]}
    assert not seen & {row.tobytes() for row in held["latents"]}
    with pytest.raises(UserError, match="21 held-out records are wanted, but there are 20"):
        data.held_out(21)


def test_held_out_records_of_noise_are_of_another_seed():
    noise = dict(data__source="synthetic", data__latent_size=(2, 2), data__text_length=3)
    c = tiny("configs/teacher.py:600m", "", **noise, mesh__fsdp=1)
    data = feed.open_data(c, setup.mesh_from(c))
    held = data.held_out(4)
    assert held["latents"].shape == (4, 2, 2, 32) and held["text"].shape == (4, 3, 2304)
    assert not {a.tobytes() for a in held["latents"]} & {
        a.tobytes() for a in data.batches(0)["latents"]
    }
