"""What publish sends, and that it arrives: against the loopback hub, with PEFT as the judge."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, snapshot_download

import extend
from extend.adapter_format.peft_files import Adapter
from extend.errors import HubError, RecipeError
from extend.manifest import hash_files, outputs_intact
from extend.model_config import read_config
from extend.publish import card, metadata
from tests.hub import READER, STRANGER, Hub

BASE = "maker/base"


@pytest.fixture
def base_id(hub: Hub, run: Path) -> str:
    """The base on the hub, pinned."""
    return f"{BASE}@{hub.add(BASE, run.parent / 'base')}"


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are files, but not drawn, which takes a second."""
    def sketch(panels: object, path: Path, title: str) -> None:
        path.write_bytes(b"a picture")
        path.with_suffix(".svg").write_bytes(b"another")

    monkeypatch.setattr(card, "draw_heatmap", sketch)


def texts_of(hub: Hub, repo: str) -> dict[str, str]:
    return {name: data.decode() for name, data in hub.repos[repo].files.items()
            if not name.endswith((".safetensors", ".png"))}


def python_of(text: str) -> str:
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_a_run_as_an_adapter(hub: Hub, run: Path, base_id: str, tmp_path: Path):
    done = extend.publish(run, "lab/long", base_id=base_id, tag="v1", out=tmp_path / "record")
    assert hub.repos["lab/long"].private
    assert done.uploaded.commit == hub.repos["lab/long"].refs["v1"]
    assert set(done.uploaded.sent) == {name for name, _, _ in done.files}
    files = hub.repos["lab/long"].files
    assert set(files) - {".gitattributes"} == {name for name, _, _ in done.files} >= {
        "README.md", "adapter_model.safetensors", "extend_sidecar.json", "manifest.json",
        "manifests/rescaled.json", "manifests/long.json", "manifests/merged.json", "recipe.yaml",
        "results/eval-base/results.json", "images/heatmap-passkey.png"}
    for name, text in texts_of(hub, "lab/long").items():
        assert str(run.parent.parent) not in text and "secret-project" not in text, name
    record = json.loads((tmp_path / "record" / "published.json").read_text())
    assert record["commit"] == done.uploaded.commit and record["private"]
    assert outputs_intact(tmp_path / "record") is None


def test_what_is_downloaded_is_whole_and_says_where_it_comes_from(hub: Hub, run: Path,
                                                                  base_id: str):
    extend.publish(run / "adapter", "lab/long", base_id=base_id, results={})
    got = Path(snapshot_download("lab/long"))
    manifest = json.loads((got / "manifest.json").read_text())
    assert {name: entry for name, entry in hash_files(got).items()
            if name in manifest["outputs"]} == manifest["outputs"]
    sha = base_id.partition("@")[2]
    assert manifest["inputs"]["base"] == {
        "path": BASE, "repo": BASE, "revision": sha,
        "sha256": json.loads((run / "adapter/manifest.json").read_text())["inputs"]["base"][
            "sha256"]}
    config = json.loads((got / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, sha)
    sources = Adapter(got).sidecar.sources
    assert (sources["base"].path, sources["tuned"].path) == (BASE, "long")
    merged = extend.merge(got, run.parent / "sibling", got.parent / "merged")
    assert hash_files(merged)["model.safetensors"] == hash_files(run / "merged")[
        "model.safetensors"]


def test_the_card_loads_the_long_model(hub: Hub, run: Path, base_id: str):
    """The lines of the card, run as they stand, give the long model but for what no LoRA holds."""
    done = extend.publish(run / "adapter", "lab/long", base_id=base_id, tag="v1", results={})
    loaded: dict = {}
    exec(python_of(done.card), loaded)
    model, ids = loaded["model"].eval(), torch.arange(1, 120)[None]
    wanted = read_config(run / "long").rope.rope_theta
    assert model.config.rope_parameters["rope_theta"] == wanted != 10000.0
    assert model.config.max_position_embeddings == 128
    base = loaded["AutoModelForCausalLM"].from_pretrained(run / "long").eval()
    adapter = Adapter(run / "adapter")
    for name, parameter in base.named_parameters():  # the same but for the low rank and sidecar
        module = name.removesuffix(".weight")
        start = load_base(run, name)
        if module in adapter.modules:
            lora_a, lora_b = adapter.read_factors(module)
            parameter.data = start + lora_b @ lora_a
        else:
            parameter.data = start
    with torch.no_grad():  # fp32 in another order
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)


def load_base(run: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(run.parent / "base" / "model.safetensors", "pt") as file:
        return file.get_tensor(name)


def test_metadata(hub: Hub, run: Path, base_id: str, sketched: None):
    data = ModelCard(extend.publish(run, "lab/long", base_id=base_id, dry_run=True).card).data
    assert (data.base_model, data.base_model_relation) == (BASE, "adapter")
    assert (data.license, data.language, data.library_name) == ("apache-2.0", ["en"], "peft")
    assert data.pipeline_tag == "text-generation"
    assert {"long-context", "ntk", "lora", f"base_model:adapter:{BASE}"} <= set(data.tags)
    assert data.eval_results is None  # it was evaluated merged into another model only
    assert hub.requests == []


def test_a_merged_model(hub: Hub, run: Path, base_id: str, sketched: None):
    sibling = hub.add("friend/sibling", {"README.md": "---\nlicense: other\nlicense_name: mine\n"
                                         "license_link: LICENSE\n---\n"})
    done = extend.publish(run / "merged", "lab/merged", base_id=base_id,
                          ids={"sibling": f"friend/sibling@{sibling}"}, public=True,
                          license="other", license_name="mine", license_link="LICENSE")
    data = ModelCard(done.card).data
    assert data.base_model == ["friend/sibling", BASE]
    assert (data.base_model_relation, data.library_name) == ("merge", "transformers")
    assert data.license_link == "https://huggingface.co/friend/sibling/blob/main/LICENSE"
    assert not hub.repos["lab/merged"].private
    result, = data.eval_results
    score = json.loads((run / "eval-merged/results.json").read_text())["summary"]["tasks"][
        "passkey"]["lengths"]["320"]
    assert (result.metric_value, result.metric_args) == (
        score["score"], {key: score[key] for key in ("n", "wilson_low", "wilson_high")})
    assert f"at `{sibling}`" in done.card and "method add, weight 1.0" in done.card
    assert "vllm serve lab/merged --max-model-len 128" in done.card


def test_results(hub: Hub, run: Path, sketched: None):
    done = extend.publish(run, "lab/results", kind="results", license="mit")
    repo = hub.repos["lab/results"]
    assert (repo.type, done.uploaded.url) == ("dataset", f"{hub.url}/datasets/lab/results")
    assert {"results/eval-base/results.json", "results/eval-merged/results.json"} <= set(repo.files)
    assert "passkey at 320 | 0 % (0/2; 0-66) | 0 % (0/2; 0-66)" in done.card
    assert yaml.safe_load(done.card.split("---")[1])["license"] == "mit"


def test_the_card_says_what_the_manifests_say(run: Path, sketched: None):
    text = extend.publish(run, "lab/long", base_id=BASE, dry_run=True).card
    theta = read_config(run / "long").rope.rope_theta
    assert f"| rope_theta | 10000 | {theta:.10g} |" in text
    assert "| longest context, tokens | 64 | 128 |" in text
    assert ("| long | train | model rescaled, data[0] text.jsonl | full, adamw: 2 steps of 1 row "
            "of 128, lr 0.003; 256 tokens in all, last loss 5.2500; 1 process |") in text
    modules = json.loads((run / "adapter/extend_sidecar.json").read_text())["modules"]
    squares = sum(m["delta_norm"] ** 2 for m in modules.values())
    left = sum((m["residual"] * m["delta_norm"]) ** 2 for m in modules.values())
    largest = max(m["residual"] for m in modules.values())
    assert f"| all | 14 | 4 | {(left / squares) ** 0.5:.3f} | {largest:.3f} |" in text
    assert "model: maker/base, to: 128" in text and "path: text.jsonl" in text
    assert "# how the tiny model got its context" in text
    assert "- This very output was not evaluated; the table is of what it was made from" in text


def test_again_nothing_is_sent(hub: Hub, run: Path, base_id: str):
    first = extend.publish(run / "adapter", "lab/long", base_id=base_id, results={}, tag="v1")
    hub.requests.clear()
    again = extend.publish(run / "adapter", "lab/long", base_id=base_id, results={}, tag="v1")
    assert again.uploaded.sent == [] and again.uploaded.commit == first.uploaded.commit
    assert hub.count("PUT", "/_lfs/") == hub.count("POST", "/commit/") == 0
    assert hub.repos["lab/long"].refs["v1"] == first.uploaded.commit


def test_an_interrupted_upload_goes_on(hub: Hub, run: Path, base_id: str):
    weights = hash_files(run / "adapter")["adapter_model.safetensors"]["sha256"]
    hub.fail("PUT", f"/_lfs/{weights}", times=6, status=0, after=100)
    with pytest.raises(HubError, match="the network failed .*run the same command again, and only"):
        extend.publish(run, "lab/long", base_id=base_id, results={})
    assert set(hub.repos["lab/long"].files) == {".gitattributes"}
    sent = hub.count("PUT", "/_lfs/")
    assert sent > 0
    extend.publish(run, "lab/long", base_id=base_id, results={})
    assert hub.count("PUT", "/_lfs/") == sent + 1
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == hub.repos[
        "lab/long"].files["adapter_model.safetensors"]


def test_what_arrives_wrong_is_seen(hub: Hub, run: Path, base_id: str,
                                    monkeypatch: pytest.MonkeyPatch):
    upload = HfApi.upload_folder

    def damage(api, **options):
        upload(api, **options)
        return api.upload_file(repo_id="lab/long", path_in_repo="serving.json",
                               path_or_fileobj=b"{}")

    monkeypatch.setattr(HfApi, "upload_folder", damage)
    with pytest.raises(HubError, match=r"1 files are not what was sent: serving\.json"):
        extend.publish(run, "lab/long", base_id=base_id, results={})


def test_a_repository_that_holds_something_else(hub: Hub, run: Path, base_id: str):
    hub.add("lab/long", {"model.safetensors": b"else", "README.md": "# Mine"}, private=True,
            tag="v1")
    options = {"base_id": base_id, "results": {}}
    with pytest.raises(HubError, match=r"something else: model\.safetensors, README\.md"):
        extend.publish(run, "lab/long", **options)
    with pytest.raises(HubError, match="has the tag v1 already"):
        extend.publish(run, "lab/long", **options, replace=True, tag="v1")
    assert len(hub.repos["lab/long"].commits) == 1
    extend.publish(run, "lab/long", **options, replace=True)
    assert "model.safetensors" not in hub.repos["lab/long"].files
    extend.publish(run, "lab/long", **options, language=["de"])  # another card of the same thing
    assert "- de" in hub.repos["lab/long"].files["README.md"].decode()
    hub.add("lab/open", {"README.md": "# Mine"})
    with pytest.raises(HubError, match="is public.*--public"):
        extend.publish(run, "lab/open", **options)


@pytest.mark.parametrize(("token", "to", "message"), [
    (None, "lab/long", "there is no token"),
    (READER, "lab/long", "the token of reader may only read"),
    (STRANGER, "lab/long", "stranger may write to stranger, but not to lab"),
    ("hf_unknown_to_the_hub", "lab/long", "the token is not accepted")])
def test_tokens_that_will_not_do(hub: Hub, run: Path, monkeypatch, tmp_path, token, to, message):
    hub.connect(monkeypatch, tmp_path, token)
    with pytest.raises(HubError, match=message) as refused:
        extend.publish(run, to, base_id=BASE, results={})
    assert "hf_unknown" not in str(refused.value)
    assert hub.repos == {}


def test_offline_and_lost(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    hub.fail("GET", "/whoami", status=0)
    with pytest.raises(HubError, match="the network failed"):
        extend.publish(run, "lab/long", base_id=BASE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        extend.publish(run, "lab/long", base_id=BASE)


def test_the_base_is_the_one_on_the_hub(hub: Hub, run: Path, base_id: str):
    """Without a commit it is found by the weights; other weights are not taken for the base."""
    sha, options = base_id.partition("@")[2], {"results": {}, "license": "mit"}
    card = extend.publish(run / "adapter", "lab/long", base_id=BASE, **options).card
    assert f"the model {BASE}: commit `{sha}`" in card
    hub.add(BASE, {"model.safetensors": b"of another model"})
    with pytest.raises(HubError, match=r"maker/base: is not the model at .*/base: model\.safetens"
                                       r"ors has 16 bytes and sha256 .* give another id, or the"):
        extend.publish(run / "adapter", "lab/long", base_id=BASE, **options)
    hub.add("maker/other", {"README.md": "# Nothing to compare"}, tag="v1")
    card = extend.publish(run / "adapter", "lab/b", base_id="maker/other", **options).card
    assert "the model maker/other: its commit was not recorded" in card
    card = extend.publish(run / "adapter", "lab/c", base_id="maker/other@v1", **options).card
    assert f"the model maker/other: commit `{hub.repos['maker/other'].refs['v1']}`" in card


def test_the_licence_of_a_base_on_the_hub(hub: Hub, run: Path, monkeypatch):
    monkeypatch.setattr(metadata, "read_front", lambda _: {})  # as if the base were not here
    hub.add(BASE, {"README.md": "---\nlicense: llama3\n---\n"}, gated=True)
    assert "license: llama3" in extend.publish(run, "lab/long", base_id=BASE, results={}).card
    hub.add("maker/bare", {"a": "b"})
    with pytest.raises(RecipeError, match="the card of maker/bare names none; give --license"):
        extend.publish(run, "lab/other", base_id="maker/bare", results={})
    with pytest.raises(HubError, match="maker/none: cannot look at the base.*no such repository"):
        extend.publish(run, "lab/other", base_id="maker/none", results={})
