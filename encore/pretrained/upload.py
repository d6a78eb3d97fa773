"""A model's folder on the Hugging Face Hub.

    encore upload OWNER/NAME [--model DIR] [--private]

Compares the files with the hashes of encore.json, makes the repository if there is none of this name, uploads the files
and prints the address. The token is the one of HF_TOKEN or of `hf auth login`; HF_ENDPOINT names another Hub.
"""

import argparse
from pathlib import Path

from encore.errors import EncoreError
from encore.pretrained.init_from import RECORD, bring_model_back, check_hashes, read_record
from encore.pretrained.model_card import CARD

MESSAGE = "A model of Encore"  # of the commit


def upload(folder: Path, repository: str, private: bool) -> str:
    """The address of the repository, OWNER/NAME, that then has the files of a model and no other file of its folder.

    private: of a repository that is made here. Raises EncoreError where a file is missing or has other bytes than when
    it was written, and where the Hub refuses or cannot be reached.
    """
    names = find_files(folder)

    # It takes half a second, which no other command should.
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if not get_token():
        raise EncoreError(f"{repository}: the Hub wants a token; set HF_TOKEN, or run `hf auth login`")
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names, commit_message=MESSAGE)
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
    parser = argparse.ArgumentParser(prog="encore upload", description="Uploads a model to the Hugging Face Hub.")
    parser.add_argument("repository", metavar="OWNER/NAME", help="a repository, which is made if there is none")
    parser.add_argument("--model", type=Path, default=Path("model"), metavar="DIR", help="default: model")
    parser.add_argument("--private", action="store_true", help="a new repository is seen by its owner alone")
    arguments = parser.parse_args()
    if arguments.repository.count("/") != 1:
        raise EncoreError(f"{arguments.repository} is no repository of the Hub; name one as OWNER/NAME")
    print(upload(arguments.model, arguments.repository, arguments.private))
