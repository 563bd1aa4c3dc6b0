"""The one answer to "what lies at this path?": a workdir, a pipeline, a transformer, or a file of NVlabs."""

from collections.abc import Sequence
from typing import NamedTuple

from ..core.errors import UserError
from ..core.storage import AnyPath, as_path, fetch, in_bucket
from ..interop import hub

# In the words of an error message; a hub id stands for the folder that it is downloaded to.
KINDS = {
    "workdir": "a training workdir (config.json and checkpoints)",
    "pipeline": "a pipeline folder of diffusers (model_index.json or transformer) or its hub id",
    "transformer": "a diffusers folder of one network (config.json)",
    "nvlabs": "a .pth file of NVlabs",
}


class Found(NamedTuple):
    """A place with weights: its kind, one of `KINDS`, and the folder or file, local but for workdirs."""

    kind: str
    path: AnyPath


def locate(path: str | AnyPath, kinds: Sequence[str], files: Sequence[str] = hub.FILES) -> Found:
    """Says what lies at a path; what lies on the hub or in a bucket is downloaded, once, but for workdirs.

    Args:
      path: a folder, a file, one in a bucket, or the id of a repository on the Hugging Face hub.
      kinds: those of `KINDS` that will do.
      files: patterns of the files that are wanted of a hub repository, or of a folder in a bucket.

    Raises:
      UserError: nothing of these kinds is there, with exit code 2; or the hub cannot be asked, with 1.
    """
    local = _download(str(path), files) if hub.is_hub_id(path) else as_path(path)
    found = _kind(local)
    if in_bucket(local) and found in kinds and found != "workdir":
        # Weights are mapped into memory, which takes a file here.
        local = fetch(local, files if local.is_dir() else ("*",))
    if found in kinds:
        return Found(found, local)
    wanted = ", or ".join(KINDS[kind] for kind in kinds)
    problem = f"is {KINDS[found]}" if found else "is none of them"
    raise UserError(f"{path} {problem if local.exists() else 'does not exist'}: give {wanted}", 2)


def _download(name: str, files: Sequence[str]) -> AnyPath:
    try:
        return hub.download(name, files)
    except UserError as error:
        # Where its folder is, ``runs/techer`` is a mistyped path that no other try will find.
        mistyped = as_path(name).parent.is_dir()
        raise UserError(str(error), 2 if mistyped else error.exit_code) from error


def _kind(path: AnyPath) -> str | None:
    if path.is_file():
        return "nvlabs" if path.suffix == ".pth" else None
    if (path / "config.json").is_file():
        return "workdir" if (path / "checkpoints").is_dir() else "transformer"
    parts = ("model_index.json", "transformer", "vae")
    return "pipeline" if any((path / part).exists() for part in parts) else None
