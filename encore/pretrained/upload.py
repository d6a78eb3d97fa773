"""A model's folder, or the tokens of data/tokens, on the Hugging Face Hub.

    encore upload OWNER/NAME [--model DIR | --data] [--private]

Compares the files with the hashes of encore.json or of the manifest, makes the repository if there is none of this
name, uploads the files and prints the address. data/tokens gets a card there that it has not here. The token is the one
of HF_TOKEN or of `hf auth login`; HF_ENDPOINT names another Hub.
"""

import argparse
from pathlib import Path

from encore.errors import EncoreError
from encore.integrity import Verification
from encore.pretrained.data_card import describe_folder
from encore.pretrained.init_from import RECORD, bring_model_back, check_hashes, read_record
from encore.pretrained.model_card import CARD
from encore.tokens.token_files import MANIFEST, WAY_OUT, token_hashes

TOKENS = Path("data/tokens")


def upload_model(folder: Path, repository: str, private: bool) -> str:
    """The address of the repository, OWNER/NAME, that then has the files of a model and no other file of its folder.

    private: of a repository that is made here. Raises EncoreError where a file is missing or has other bytes than when
    it was written, and where the Hub refuses or cannot be reached.
    """
    return _upload({name: folder / name for name in find_files(folder)}, repository, "model", private)


def upload_tokens(folder: Path, repository: str, private: bool) -> str:
    """The same of a data set that has the shards of a token folder, their tokenizer and manifest, and a card."""
    card = describe_folder(folder)
    hashes = token_hashes(folder)
    Verification(hashes, WAY_OUT).check()
    paths = [*hashes, folder / MANIFEST]
    return _upload({**{path.name: path for path in paths}, CARD: card}, repository, "dataset", private)


def _upload(files: dict[str, Path | bytes], repository: str, kind: str, private: bool) -> str:
    # It takes half a second, which no other command should.
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if not get_token():
        raise EncoreError(f"{repository}: the Hub wants a token; set HF_TOKEN, or run `hf auth login`")
    api = HfApi()
    try:
        address = api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repository, added, commit_message=f"A {kind} of Encore", repo_type=kind)
    except HfHubHTTPError as error:
        raise EncoreError(_refusal(repository, error.response.status_code)) from None
    except (HTTPError, ConnectionError) as error:  # the second where HF_HUB_OFFLINE is set
        raise EncoreError(
            f"{repository}: the connection to the Hub fails ({type(error).__name__}); check the network, proxies, "
            "HF_ENDPOINT and HF_HUB_OFFLINE and run again"
        ) from None
    except ValueError as error:  # a name that no repository can have, a card that the Hub refuses, an answer of no Hub
        reason = " ".join(str(error).split())
        raise EncoreError(f"{repository}: it cannot be uploaded ({reason}); mend that and run again") from None
    return str(address)


def find_files(folder: Path) -> list[str]:
    """The names of what is uploaded: the files that encore.json has the hash of, itself, and the card.

    Raises EncoreError where one is missing or has other bytes.
    """
    record = read_record(folder)
    if not record or "files_sha256" not in record:
        raise EncoreError(
            f"{folder / RECORD} is missing or has no hashes; name the folder of a model that Encore wrote"
        )
    hashed = list(record["files_sha256"])
    names = [*hashed, RECORD, CARD]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise EncoreError(f"{folder} lacks {', '.join(missing)}; {bring_model_back(folder)}")
    check_hashes(folder, record, hashed)
    return names


def _refusal(repository: str, status: int) -> str:
    if status in (401, 403, 404):
        return (
            f"{repository}: the Hub refuses it ({status}); check the spelling, and that the token may write to this "
            "OWNER (`hf auth whoami` tells whose it is)"
        )
    return f"{repository}: the Hub answers with an error ({status}); run again later"


def main() -> None:
    parser = argparse.ArgumentParser(prog="encore upload", description="Uploads to the Hugging Face Hub.")
    parser.add_argument("repository", metavar="OWNER/NAME", help="a repository, which is made if there is none")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, default=Path("model"), metavar="DIR", help="a model; default: model")
    what.add_argument("--data", action="store_true", help=f"{TOKENS} instead, as a data set")
    parser.add_argument("--private", action="store_true", help="a new repository is seen by its owner alone")
    arguments = parser.parse_args()
    if arguments.repository.count("/") != 1:
        raise EncoreError(f"{arguments.repository} is no repository of the Hub; name one as OWNER/NAME")
    upload, folder = (upload_tokens, TOKENS) if arguments.data else (upload_model, arguments.model)
    print(upload(folder, arguments.repository, arguments.private))
