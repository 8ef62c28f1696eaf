"""Models from the Hugging Face hub: only safetensors, configuration and tokenizer files are fetched."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from pipeline.errors import CheckpointError

ALLOWED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*"]


def fetch_model(name: str, revision: str) -> Path:
    """Return the local directory of a hub model at a revision, downloading what is not in the cache.

    The token, if one is needed, comes from the environment or the standard cache. Raises CheckpointError.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=ALLOWED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the model {name} at revision {revision} cannot be fetched from the hub: {str(error).splitlines()[0]} "
            "Check its name and your access to it, or download it and give `model.path`"
        ) from None
