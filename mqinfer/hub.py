"""Models on the Hugging Face hub: their files, headers and commits. The only home of huggingface_hub.

The library is imported when something is fetched, not before; it reads its own settings (`HF_HOME`, `HF_TOKEN`,
`HF_HUB_OFFLINE`). What files mean is `checkpoint.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mqinfer.errors import PlanError
from mqinfer.headers import TensorHeader

#: Config, tokenizer and chat template.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
WEIGHTS = ("*.safetensors",)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def commit(model: str, revision: str) -> str:
    """The commit that a branch or tag ("": the default branch) stands for just now. Raises: PlanError."""
    if _COMMIT.fullmatch(revision):
        return revision
    with _translated(model, revision):
        from huggingface_hub import HfApi

        return str(HfApi().model_info(model, revision=revision or None).sha)


def fetch(model: str, revision: str, patterns: Sequence[str]) -> Path:
    """A folder with the repository's files that match, downloaded where they are not yet. Raises: PlanError."""
    with _translated(model, revision):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            model, revision=revision or None, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
    return Path(str(folder))


def headers(model: str, revision: str) -> dict[str, TensorHeader]:
    """The tensors of the repository's checkpoint, read without its weights. Raises: PlanError."""
    with _translated(model, revision):
        from huggingface_hub import HfApi

        files = HfApi().get_safetensors_metadata(model, revision=revision or None).files_metadata
    return {
        name: TensorHeader(
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            file=file,
            begin=tensor.data_offsets[0],
            end=tensor.data_offsets[1],
        )
        for file, metadata in files.items()
        for name, tensor in metadata.tensors.items()
    }


@contextmanager
def _translated(model: str, revision: str) -> Iterator[None]:
    from huggingface_hub import errors

    unreachable = errors.HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, by the library's version
    try:
        yield
    except errors.HFValidationError as error:
        raise PlanError(f"{model} is neither a folder here nor a Hugging Face hub id") from error
    except errors.GatedRepoError as error:
        raise PlanError(f"{model} is gated: accept its terms on huggingface.co, then run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise PlanError(f"{model} is neither a folder here nor on the hub (or private: run `hf auth login`)") from error
    except errors.RevisionNotFoundError as error:
        raise PlanError(f"{model} has no revision {revision!r} on the hub") from error
    except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as error:
        raise PlanError(f"{model} has no safetensors weights on the hub that can be read") from error
    except errors.HfHubHTTPError as error:
        raise PlanError(f"the hub refuses {model}: {_one_line(error)}") from error
    except (unreachable, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise PlanError(f"{model} is no folder here, and the hub can't be asked for it: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
