"""Downloads of pipelines by their id on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import UserError

# The files that a pipeline needs: no pickles, no other framework's weights, no pictures of a model card.
FILES = ("*.json", "*.safetensors", "tokenizer/*")


def is_hub_id(path: str | Path) -> bool:
    """Whether ``path`` may be a hub id: two words with a slash between, and no file of that name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None and not Path(path).exists()


def download(repository: str, patterns: Sequence[str] = FILES) -> Path:
    """Returns the folder of a hub repository, downloaded unless the local cache has it.

    Args:
      repository: its id.
      patterns: of the files wanted; by default all that a pipeline needs.

    Raises:
      UserError: no repository has that id, its licence must be accepted first, or neither network nor cache
        has it.
    """
    # Imported here, because most commands download nothing.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
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
