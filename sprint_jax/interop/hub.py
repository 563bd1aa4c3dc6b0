"""Downloads of pipelines by their id on the Hugging Face hub."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from ..core.errors import UserError

# The files that a pipeline needs: no pickles, no other framework's weights, no pictures of a model card.
FILES = ("*.json", "*.safetensors", "tokenizer/*")
# Copies of one network's weights in a repository; `files.open_safetensors` takes the first that it finds.
VARIANTS = ("", "bf16", "fp16")


def is_hub_id(path: str | Path) -> bool:
    """Whether ``path`` may be a hub id, ORG/NAME or ORG/NAME@REVISION, and no file has that name."""
    name = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(path))
    return name is not None and not Path(path).exists()


def choose_files(files: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Returns the files that are wanted, of the weights of each folder in one variant alone."""
    wanted = [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)]
    weights: dict[str, dict[str, list[str]]] = {}
    for file in wanted:
        if ".safetensors" in file:
            variant = re.search(r"\.(bf16|fp16|non_ema|ema_only)[.-]", file)
            folder = weights.setdefault(file.rpartition("/")[0], {})
            folder.setdefault(variant[1] if variant else "", []).append(file)
    spare = set()
    for found in weights.values():
        first = next((variant for variant in VARIANTS if variant in found), None)
        spare |= {file for variant in found if variant != first for file in found[variant]}
    return [file for file in wanted if file not in spare]


def download(repository: str, patterns: Sequence[str] = FILES) -> Path:
    """Returns the folder of a hub repository, downloaded unless the local cache has it.

    Args:
      repository: its id; ORG/NAME@REVISION for a branch, tag or commit.
      patterns: of the files wanted; by default all that a pipeline needs.

    Raises:
      UserError: no repository has that id, its licence must be accepted first, or neither network nor cache
        has it.
    """
    # Imported here, because most commands download nothing.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    name, _, revision = repository.partition("@")
    try:
        files = choose_files(HfApi().list_repo_files(name, revision=revision or None), patterns)
    except (
        Exception
    ):  # of hub, network or none of it: the download has it in the cache, or says why not
        files = list(patterns)
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except GatedRepoError as error:
        raise UserError(
            f"{repository} is gated: accept its terms on the hub and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{repository} is neither a folder nor a repository on the hub") from error
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{repository} is no folder here and could not be downloaded from the hub: {reason}"
        ) from error
