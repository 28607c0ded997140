"""The hub that other tests use answers huggingface_hub as the real one would."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub import READER, STRANGER, WRITER, Hub

WEIGHTS = bytes(range(256)) * 300


def write_folder(directory: Path) -> Path:
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "sub" / "notes.txt").write_text("notes")
    (directory / "model.safetensors").write_bytes(WEIGHTS)
    return directory


def test_upload_list_tag_and_pinned_download(hub: Hub, tmp_path: Path):
    api, folder = HfApi(), write_folder(tmp_path / "folder")
    api.create_repo("lab/model", private=True)
    sha = api.upload_folder(repo_id="lab/model", folder_path=folder).oid
    api.create_tag("lab/model", tag="v1")
    tree = {e.path: e for e in api.list_repo_tree("lab/model", recursive=True)
            if hasattr(e, "blob_id")}
    assert set(tree) == {".gitattributes", "config.json", "sub/notes.txt", "model.safetensors"}
    assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    # `printf '{}' | git hash-object --stdin`
    assert tree["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    api.upload_file(repo_id="lab/model", path_in_repo="config.json", path_or_fileobj=b"{ }")
    pinned = Path(snapshot_download("lab/model", revision="v1"))
    assert pinned.name == sha
    assert (pinned / "config.json").read_text() == "{}"
    assert (pinned / "model.safetensors").read_bytes() == WEIGHTS
    assert Path(hf_hub_download("lab/model", "config.json")).read_text() == "{ }"
    assert [ref.name for ref in api.list_repo_refs("lab/model").tags] == ["v1"]
    assert hub.repos["lab/model"].private


def test_what_is_there_is_not_sent_again(hub: Hub, tmp_path: Path):
    api, folder = HfApi(), write_folder(tmp_path / "folder")
    for name in ("lab/one", "lab/two"):
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=folder)
    assert hub.count("PUT", "/_lfs/") == 1
    assert hub.repos["lab/one"].files == hub.repos["lab/two"].files


def test_missing_private_and_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.add("other/private", {"config.json": "{}"}, private=True)
    hub.add("other/gated", {"config.json": "{}"}, gated=True)
    sha = hub.add("other/open", {"config.json": "{}"})
    assert HfApi().model_info("other/open").sha == sha
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("other/missing")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("other/private")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("other/open", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("other/open", "weights.bin")
    hf_hub_download("other/gated", "config.json", token=READER)
    for token, status in ((False, 401), (STRANGER, 403)):
        with pytest.raises(GatedRepoError) as refused:
            HfApi(token=token).auth_check("other/gated")
        assert refused.value.response.status_code == status
    with pytest.raises(GatedRepoError):
        snapshot_download("other/gated", token=STRANGER, cache_dir="/nonexistent")


def test_who_may_write(hub: Hub):
    hub.add("lab/there", {"config.json": "{}"})
    for token in (READER, STRANGER):
        with pytest.raises(HfHubHTTPError) as refused:
            HfApi(token=token).create_repo("lab/model")
        assert refused.value.response.status_code == 403
        with pytest.raises(HfHubHTTPError) as refused:
            HfApi(token=token).upload_file(repo_id="lab/there", path_in_repo="a",
                                           path_or_fileobj=b"b")
        assert refused.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(token="hf_unknown").whoami()
    assert refused.value.response.status_code == 401
    assert HfApi(token=WRITER).whoami()["name"] == "tester"


def test_a_request_that_fails_is_tried_again(hub: Hub, tmp_path: Path):
    folder = write_folder(tmp_path / "folder")
    HfApi().create_repo("lab/model")
    hub.fail("PUT", "/_lfs/", times=2)
    hub.fail("POST", "/preupload/", times=1, status=0)
    HfApi().upload_folder(repo_id="lab/model", folder_path=folder)
    assert hub.repos["lab/model"].files["model.safetensors"] == WEIGHTS
    assert len(hub.waits) == 3
    assert [r.status for r in hub.requests if r.method == "PUT"] == [503, 503, 200]


def test_an_upload_cut_midway_leaves_no_commit_and_can_be_repeated(hub: Hub, tmp_path: Path):
    folder = write_folder(tmp_path / "folder")
    HfApi().create_repo("lab/model")
    hub.fail("PUT", "/_lfs/", times=6, status=0, after=1000)
    with pytest.raises(Exception, match=r"Error while uploading 'model\.safetensors'"):
        HfApi().upload_folder(repo_id="lab/model", folder_path=folder)
    assert set(hub.repos["lab/model"].files) == {".gitattributes"}
    HfApi().upload_folder(repo_id="lab/model", folder_path=folder)
    assert hub.repos["lab/model"].files["model.safetensors"] == WEIGHTS


def test_a_download_cut_midway_goes_on(hub: Hub):
    hub.add("lab/model", {"model.safetensors": WEIGHTS})
    hub.fail("GET", "/resolve/", status=0, after=1000)
    assert Path(hf_hub_download("lab/model", "model.safetensors")).read_bytes() == WEIGHTS


def test_a_process_of_its_own(hub: Hub, tmp_path: Path):
    sha = hub.add("lab/data", {"a.txt": "text"}, type="dataset", tag="v1")
    code = ("import json; from huggingface_hub import snapshot_download, whoami\n"
            "path = snapshot_download('lab/data', repo_type='dataset', revision='v1')\n"
            "print(json.dumps([whoami()['name'], path]))")
    done = subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path / "home"),
                          capture_output=True, text=True, check=True)
    name, path = json.loads(done.stdout)
    assert (name, Path(path).name) == ("tester", sha)
    assert path.startswith(str(tmp_path / "home"))
