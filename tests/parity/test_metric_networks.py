"""Networks and tokens of metrics against transformers, OpenAI's CLIP, and stored features of pytorch-fid."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from helpers.metric_pictures import make_pictures, random_tensors
from helpers.reference import channels_first
from safetensors.numpy import load_file, save_file

from sprint_jax.interop.files import Tensors, load_params
from sprint_jax.metrics import clip, clip_tokenizer, dinov2, inception, preprocess

pytestmark = pytest.mark.usefixtures("quick")
STORED = Path(__file__).parent / "stored" / "metrics" / "arrays.safetensors"


def openai_file(name):
    """A file of OpenAI's package, which itself cannot be imported without torchvision."""
    return Path(importlib.util.find_spec("clip").submodule_search_locations[0]) / name


def openai_module(name):
    spec = importlib.util.spec_from_file_location(name, openai_file(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(ours, theirs):
    return np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max()


def randomize(module, seed):
    """Gives a module of torch random weights, also where its own would be zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1.0 if parameter.ndim == 1 else 0.0) + 0.2 * noise
    return module.eval()


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_inception_is_that_of_pytorch_fid_and_torch_fidelity():
    table, stored = inception.inception_table(), load_file(STORED)
    shapes = {name: entry.shape for name, entry in table.items()}
    tensors = Tensors("random", shapes, random_tensors(shapes).__getitem__)
    params = load_params(table, tensors, "float32")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 23_885_392
    run = jax.jit(lambda params, x: inception.Inception().apply({"params": params}, x))
    first = np.random.default_rng(2).uniform(0, 1, (2, 299, 299, 3)).astype(np.float32)
    ours = run(params, 2 * first - 1)
    for pool in inception.POOLS:
        assert relative(ours[pool], stored[f"pytorch-fid/{pool}"]) < 1e-5, pool
    pictures = [x[:40, :50] for x in make_pictures(2, seed=3, low=60)]
    ours = run(
        params, np.stack([preprocess.apply(preprocess.INCEPTION_FIDELITY, x) for x in pictures])
    )
    for name in ("64", "2048", "logits_unbiased", "logits"):
        assert relative(ours[name], stored[f"torch-fidelity/{name}"]) < 1e-5, name


TOWER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A folder of a small CLIP of transformers, the module, and some inputs."""
    text = TOWER | dict(vocab_size=60, max_position_embeddings=11, bos_token_id=58, eos_token_id=59)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=TOWER | dict(image_size=24, patch_size=8), projection_dim=16
    )
    model = randomize(transformers.CLIPModel(config), 0)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    random = np.random.default_rng(0)
    pixels = random.normal(size=(3, 24, 24, 3)).astype(np.float32)
    ids = random.integers(0, 58, (3, 11))
    ids[:, 0], ids[0, 5:], ids[1, 10], ids[2, 3:] = 58, 59, 59, 0
    ids[2, 3] = 59
    return folder, model, pixels, ids


def features(model, params, pixels, ids):
    tree = {"params": params}
    image = jax.jit(lambda tree, x: model.apply(tree, x, method="image_features"))(tree, pixels)
    text = jax.jit(lambda tree, x: model.apply(tree, x, method="text_features"))(tree, ids)
    return image, text


def test_clip_is_that_of_transformers(clip_folder):
    folder, theirs, pixels, ids = clip_folder
    model, params = clip.load_clip(folder)
    image, text = features(model, params, pixels, ids)
    want = theirs(input_ids=torch.tensor(ids), pixel_values=channels_first(pixels))
    for ours, their in ((image, want.image_embeds), (text, want.text_embeds)):
        ours = ours / np.linalg.norm(ours, axis=-1, keepdims=True)
        assert relative(ours, their) < 1e-5
    assert relative(model.apply({"params": params}, pixels, ids), want.logits_per_image) < 1e-5


def test_openai_names_give_the_same_clip(tmp_path):
    theirs = randomize(openai_module("model").CLIP(16, 24, 2, 128, 8, 11, 60, 64, 1, 2), 1)
    path = tmp_path / "openai.safetensors"
    save_file({name: x.contiguous().numpy() for name, x in theirs.state_dict().items()}, path)
    model, params = clip.load_clip(path)
    assert (model.vision_heads, model.text_heads, model.image) == (2, 1, 24)
    random = np.random.default_rng(1)
    pixels = random.normal(size=(2, 24, 24, 3)).astype(np.float32)
    ids = random.integers(0, 59, (2, 11))
    ids[:, 4] = 59
    image, text = features(model, params, pixels, ids)
    assert relative(image, theirs.encode_image(channels_first(pixels))) < 1e-5
    assert relative(text, theirs.encode_text(torch.tensor(ids))) < 1e-5
    torch.save(theirs.state_dict() | {"context_length": torch.tensor(11)}, tmp_path / "openai.pt")
    again = clip.load_clip(tmp_path / "openai.pt")[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


FACEBOOK = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    ("layernorm.", "norm."),
    (".attention.output.dense.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
)


def test_dinov2_is_that_of_transformers_under_both_names(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=70, patch_size=14
    )
    theirs = randomize(transformers.Dinov2Model(config), 2)
    theirs.save_pretrained(tmp_path / "hugging")
    pixels = np.random.default_rng(0).normal(size=(2, 42, 42, 3)).astype(np.float32)
    want = theirs(channels_first(pixels)).pooler_output
    model, params = dinov2.load_dinov2(tmp_path / "hugging")
    assert (model.grid, model.offset, model.heads) == (5, 0.0, 1)
    run = jax.jit(lambda params, x: model.apply({"params": params}, x))
    assert relative(run(params, pixels), want) < 1e-5
    tensors = {}
    for name, value in load_file(tmp_path / "hugging" / "model.safetensors").items():
        for hugging, facebook in FACEBOOK:
            name = name.replace(hugging, facebook)
        tensors[name] = torch.tensor(value)
    for part in ("weight", "bias"):
        for layer in ("0", "1"):
            names = (
                f"blocks.{layer}.attention.attention.{q}.{part}" for q in ("query", "key", "value")
            )
            joined = torch.cat([tensors.pop(name) for name in names])
            tensors[f"blocks.{layer}.attn.qkv.{part}"] = joined
    torch.save(tensors, tmp_path / "facebook.pth")
    model, again = dinov2.load_dinov2(tmp_path / "facebook.pth")
    assert model.offset == 0.1
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))
    # Facebook's code hands the stretched scale to torch instead of the size.
    places = theirs.embeddings.position_embeddings[:, 1:].reshape(1, 5, 5, 64).permute(0, 3, 1, 2)
    how = dict(scale_factor=3.1 / 5, mode="bicubic")
    stretched = torch.nn.functional.interpolate(places, **how)[0].permute(1, 2, 0)
    matrix, table = dinov2.cubic_matrix(5, 3, 0.1), places[0].permute(1, 2, 0).numpy()
    assert relative(np.einsum("ai,bj,ijc->abc", matrix, matrix, table), stretched) < 1e-5


PIECES = [
    "cat",
    "DOG's",
    "don't",
    "I'LL",
    "&amp;",
    "&amp;lt;",
    "<|endoftext|>",
    "  ",
    "\n",
    "\t",
    "é",
]
PIECES += [
    "e\u0301",
    "ﬁ",
    "Ⅷ",
    "一只",
    "🐈",
    "👨\u200d👩\u200d👧",
    "ß",
    "İ",
    "ΣΑΣ",
    "1234",
    "½",
    "#!$%",
    "--",
]
PIECES += [
    "...",
    "”quote“",
    "schÃ¶n",
    "\u200b",
    "\xa0",
    "\x07",
    "a'b",
    "x_y",
    "\r\n",
    "<b>",
    "&nbsp;",
    "'s",
]
PIECES += ["Ǆ", "²", "\u3000", "\ufeff", "à̧", "supercalifragilistic", "aaaaaaaaaaaa"]


def hard_strings(count, seed):
    random = np.random.default_rng(seed)
    for _ in range(count):
        words = random.choice(PIECES, random.integers(0, 14))
        yield "".join(word + random.choice(["", " "]) for word in words)


def test_tokens_of_hard_strings_are_those_of_openai_and_of_transformers(tmp_path):
    vocabulary = openai_file(clip_tokenizer.OPENAI_FILE)
    ours = clip_tokenizer.load_clip_tokenizer(vocabulary)
    theirs = openai_module("simple_tokenizer").SimpleTokenizer(str(vocabulary))
    assert ours.tokenizer.get_vocab_size() == 49408
    for text in hard_strings(500, 0):
        want = [49406, *theirs.encode(text)[:75], 49407]
        row = ours.encode([text])[0]
        assert list(row[: len(want)]) == want and not row[len(want) :].any(), text
    pairs = json.loads(ours.tokenizer.to_str())["model"]["merges"]
    vocab = ours.tokenizer.get_vocab()
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = "\n".join(["#version: 0.2", *map(" ".join, pairs)])
    (tmp_path / "merges.txt").write_text(merges + "\n")
    how = dict(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    theirs = transformers.CLIPTokenizer(**how)
    theirs.save_pretrained(tmp_path / "saved")
    both = [clip_tokenizer.load_clip_tokenizer(p, False) for p in (tmp_path, tmp_path / "saved")]
    for text in hard_strings(500, 1):
        want = theirs(text, truncation=True, max_length=77)["input_ids"]
        for ours in both:
            row = ours.encode([text])[0]
            assert list(row[: len(want)]) == want and not row[len(want) :].any(), text
