"""The networks of metrics by path or hub id, as `features.Network` with the view that each takes."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ..core.errors import UserError
from ..core.storage import as_path, fetch, in_bucket
from ..interop.hub import download, is_hub_id
from .clip import load_clip
from .clip_tokenizer import OPENAI_FILE, load_clip_tokenizer
from .dinov2 import load_dinov2
from .features import Network, make_network
from .inception import load_inception
from .preprocess import View
from .protocols import Protocol

# The files of a repository that are wanted.
FILES = ("config.json", "model.safetensors", "open_clip_model.safetensors", "tokenizer.json")
FILES += ("vocab.json", "merges.txt", OPENAI_FILE)
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)


class Places(NamedTuple):
    """Where weights lie: files, folders, hub ids, paths in buckets."""

    inception: str | None = None
    clip: str = "openai/clip-vit-large-patch14"
    clip336: str = "openai/clip-vit-large-patch14-336"
    dinov2: str = "facebook/dinov2-large"


def find(name: str) -> Path:
    """Returns a place on this machine, downloaded if it is in a bucket or on the hub.

    Raises:
      UserError: there is nothing.
    """
    if in_bucket(name):
        return fetch(as_path(name), ("*",))
    if is_hub_id(name):
        return download(name, FILES)
    if not Path(name).exists():
        raise UserError(f"{name}: no weights are there")
    return Path(name)


def find_all(places: Places, wanted: set[str]) -> None:
    """Finds the weights of the networks that are wanted, and loads none.

    Raises:
      UserError: one has no place, or there is nothing.
    """
    if "inception" in wanted and places.inception is None:
        raise UserError(f"give --inception FILE: {INCEPTION_URL}", exit_code=2)
    names = {"inception": "inception", "clip": "clip", "cmmd": "clip336", "dinov2": "dinov2"}
    for network in sorted(wanted & set(names)):
        find(getattr(places, names[network]))


def load_inception_network(places: Places, logits: bool) -> Network:
    """Returns Inception's last pool [B, 2048], with ``logits`` behind it if they are asked for."""
    find_all(places, {"inception"})
    model, params = load_inception(find(places.inception))

    def apply(params, x):
        found = model.apply({"params": params}, x)
        wanted = ["2048"] + ["logits_unbiased"] * logits
        return jnp.concatenate([found[name] for name in wanted], axis=-1)

    return make_network("inception" + "-logits" * logits, apply, params, model)


def load_clip_networks(
    name: str, sentences: list[str] | None, protocol: Protocol
) -> tuple[Network, View, Network | None, np.ndarray | None]:
    """Returns CLIP's network of pictures and their view; and that of sentences, with their tokens, or Nones."""
    place = find(name)
    model, params = load_clip(place)
    picture = make_network(
        "clip", lambda p, x: model.apply({"params": p}, x, method="image_features"), params, model
    )
    view = with_side(protocol.clip, model.image)
    if sentences is None:
        return picture, view, None, None
    tokenizer = load_clip_tokenizer(place if place.is_dir() else place.parent, protocol.openai_text)
    tokens = tokenizer.encode(sentences, model.context)
    if tokens.max(initial=0) >= model.vocab:
        raise UserError(f"{name}: its tokenizer has more tokens than its network: {model.vocab}")
    text = Network(
        "text",
        lambda p, ids: model.apply({"params": p}, ids, method="text_features"),
        params,
        picture.weights,
        picture.fields,
    )
    return picture, view, text, tokens


def load_cmmd_network(name: str, protocol: Protocol) -> tuple[Network, View]:
    """Returns the CLIP of CMMD, and its view."""
    model, params = load_clip(find(name))
    network = make_network(
        "cmmd", lambda p, x: model.apply({"params": p}, x, method="image_features"), params, model
    )
    return network, with_side(protocol.cmmd, model.image)


def load_dinov2_network(name: str) -> Network:
    """Returns DINOv2."""
    model, params = load_dinov2(find(name))
    return make_network("dinov2", lambda p, x: model.apply({"params": p}, x), params, model)


def with_side(view: View, side: int) -> View:
    """Returns a view whose last resize is to what a network takes."""
    return view._replace(resizes=(*view.resizes[:-1], view.resizes[-1]._replace(size=side)))
