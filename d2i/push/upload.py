"""The upload of a run's files to a repository of the hub, in one commit.

Alone in d2i writes to the hub, and only when called. The token is that of huggingface_hub: the
variable HF_TOKEN, or the login of `hf auth login`. Must not import torch.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d2i import __version__
from d2i.errors import ConfigError, D2IError, HubError
from d2i.push.repository_files import RECIPE_NAME, RepositoryFiles

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

# As the hub itself allows.
_PART = r"(?!.*(?:--|\.\.))\w[\w.-]{0,95}(?<![.-])(?<!\.git)"
_NAME = re.compile(f"{_PART}/{_PART}", re.ASCII)
# A repository with nothing but these is empty.
_OF_EMPTY = {".gitattributes", "README.md"}
# Every path that a push may have written before, with another kind of run or other weights.
_OF_RESULTS = re.compile(
    r"pytorch_lora_weights(-[a-z-]+)?\.safetensors"
    r"|(unet|transformer)(-[a-z-]+)?/(config\.json|diffusion_pytorch_model\.safetensors)"
)
_MAX_REASON_CHARS = 300


@dataclass(frozen=True)
class Upload:
    """A finished upload.

    Args:
        commit: The commit that has the files.
        is_new: False if the repository had all of them already, so that none was made.
        removed: Files of an earlier push that this commit removed.
    """

    commit: str
    is_new: bool
    removed: tuple[str, ...]


def repository_url(repository: str) -> str:
    """Return the URL of a repository, on the hub that `HF_ENDPOINT` names.

    Raises:
        ConfigError: If it is not named as `OWNER/NAME`.
    """
    from huggingface_hub import constants

    if not _NAME.fullmatch(repository):
        raise ConfigError(
            f"got the repository {repository!r}; expected OWNER/NAME of letters, digits, '-', '_' "
            "and '.', where OWNER is a user or an organization of the hub; correct it"
        )
    return f"{constants.ENDPOINT}/{repository}"


def upload(contents: RepositoryFiles, repository: str, *, private: bool) -> Upload:
    """Create the repository if there is none, and commit the files to it, all or none.

    Results of an earlier push that the run does not have are removed by the same commit.

    Args:
        contents: The files.
        repository: The repository, `OWNER/NAME`.
        private: Of a new repository; an existing one must be so.

    Raises:
        ConfigError: If there is no token.
        HubError: If the hub cannot be reached or refuses, or the repository holds something else,
            or is private where a public one is meant, or the other way round.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    # It warns where nothing has changed, which is a result here.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with _explained_errors(repository):
        token = get_token()
        if token is None:
            raise ConfigError(
                "got no token of the hub; expected one that may write to "
                f"{repository}; set HF_TOKEN, or run hf auth login"
            )
        api = HfApi(token=token, library_name="d2i", library_version=__version__)
        info = _find_repository(api, repository)
        paths: Sequence[str] = ()
        if info is None:
            api.create_repo(repository, private=private)
        else:
            paths = [sibling.rfilename for sibling in info.siblings or ()]
            _check_repository(repository, paths, is_private=bool(info.private), private=private)
        added = {file.path for file in contents.files}
        removed = [path for path in paths if _OF_RESULTS.fullmatch(path) and path not in added]
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(file.path, file.source) for file in contents.files),
                *(CommitOperationDelete(path) for path in removed),
            ],
            commit_message=f"Upload the results after step {contents.step}, by d2i {__version__}",
        )
    is_new = info is None or commit.oid != info.sha
    return Upload(commit.oid, is_new=is_new, removed=tuple(removed))


def _find_repository(api: HfApi, repository: str) -> ModelInfo | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repository)
    except RepositoryNotFoundError:
        return None


def _check_repository(
    repository: str, paths: Sequence[str], *, is_private: bool, private: bool
) -> None:
    """Check that an existing repository is empty, or one that was pushed, and as visible as meant.

    Raises:
        HubError: If not.
    """
    if RECIPE_NAME not in paths and (others := set(paths) - _OF_EMPTY):
        raise HubError(
            f"{repository} holds files that d2i did not push, such as {min(others)}; expected an "
            "empty repository, or that of an earlier push; choose another name"
        )
    if is_private and not private:
        raise HubError(
            f"{repository} is private; expected a public repository with --public; leave that "
            "option out, or change the repository in its settings"
        )
    if private and not is_private:
        raise HubError(
            f"{repository} is public, so everybody would see what you upload; expected a private "
            "repository; give --public if that is meant, or change it in its settings"
        )


@contextlib.contextmanager
def _explained_errors(repository: str) -> Iterator[None]:
    """Turn any error of the hub's libraries into one line.

    Raises:
        HubError: With the reason and the next step.
    """
    try:
        yield
    except D2IError:
        raise
    except Exception as err:
        # Those of its HTTP client and of its storage have no common base class.
        raise HubError(_explain(err, repository)) from err


def _explain(err: BaseException, repository: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cause = err
    while not isinstance(cause, (HfHubHTTPError, OfflineModeIsEnabled)) and cause.__cause__:
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError):
        return _explain_status(cause.response.status_code, _reason(err), repository)
    if isinstance(cause, OfflineModeIsEnabled):
        return (
            "the variable HF_HUB_OFFLINE forbids requests to the hub; expected none for an "
            "upload; unset it"
        )
    return (
        f"{repository} was not uploaded to {constants.ENDPOINT}: {_reason(err)}; check the network "
        "and HF_ENDPOINT, and repeat the command"
    )


def _explain_status(status: int, reason: str, repository: str) -> str:
    if status == 401:
        return (
            "the hub does not accept the token (401); expected a valid one; set HF_TOKEN, or run "
            "hf auth login again"
        )
    if status == 403:
        owner = repository.partition("/")[0]
        return (
            f"the token may not write to {repository} (403): {reason}; expected one with write "
            f"access to {owner}; create it in the settings of that account, and set HF_TOKEN"
        )
    return f"the hub refused {repository} ({status}): {reason}; correct that, or try again later"


def _reason(err: BaseException) -> str:
    """Return an error as one line, without a header that would show the token."""
    found: Any = getattr(err, "server_message", None) or err
    text = " ".join(str(found).split()) or type(err).__name__
    return re.sub(r"Bearer [^ ]+", "Bearer …", text)[:_MAX_REASON_CHARS]
