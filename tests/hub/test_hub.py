"""A finished run pushed with the real client to a Hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hub_server import TOKEN, Hub, running_hub
from helpers.processes import in_child
from helpers.programs import Job, run_forked, run_fresh
from helpers.written_run import CLASS_NAMES, METRICS, RECIPE, write_run
from huggingface_hub import constants
from PIL import Image
from ruamel.yaml import YAML

from hf_fasttrain.export.export import export_run
from hf_fasttrain.hub.card import is_hub_name
from hf_fasttrain.hub.push import files_to_push, push_run
from hf_fasttrain.inference import predict_images
from hf_fasttrain.run_folder.finished import read_run
from hf_fasttrain.run_folder.scrub import Scrubber, is_local_path
from hf_fasttrain.utils.errors import RunError


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run in `runs/small`; tests read it and change only copies."""
    home = tmp_path_factory.mktemp("somebody")
    write_run(home / "runs" / "small", home)
    return home


@pytest.fixture
def run(workspace: Path) -> Path:
    return workspace / "runs" / "small"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


def test_files_arrive_unchanged_in_one_commit(hub: Hub, run: Path) -> None:
    address = push_run(run, "me/flowers")
    assert address == f"{hub.url}/me/flowers"
    repo = hub.repos["me/flowers"]
    assert len(repo.commits) == 1
    assert set(repo.files) == {
        "README.md", "config.json", "curves.png", "hf_fasttrain.json", "metrics.jsonl", "model.safetensors",
        "recipe.yaml", "result.json",
    }  # fmt: skip
    for name in ("model.safetensors", "config.json", "hf_fasttrain.json"):
        assert repo.files[name] == (run / "model" / name).read_bytes()
    assert repo.files["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()
    assert hub.cards == [repo.files["README.md"].decode()]


def test_pushed_files_contain_no_local_path(hub: Hub, run: Path, workspace: Path) -> None:
    push_run(run, "me/flowers")
    files = hub.repos["me/flowers"].files
    for name, content in files.items():
        for part in (str(workspace), str(workspace.parent), workspace.name, "my photos", str(Path.home()) + "/", TOKEN):
            assert part.encode() not in content, (name, part)
    recipe = files["recipe.yaml"].decode()
    assert recipe == RECIPE.format(run="small", photos="flowers", weights="w.safetensors")
    result = json.loads(files["result.json"])
    assert result["notes"] == ["1.jpg: can't be decoded", "read from 'cache', 25 images/s"]
    assert result["metrics"] == METRICS
    assert json.loads(files["hf_fasttrain.json"])["class_names"] == CLASS_NAMES


def test_local_paths_of_training_are_removed_everywhere(hub: Hub, copied: Path) -> None:
    from huggingface_hub import ModelCard

    (copied / "recipe.yaml").write_text(
        "model: {name: test_resnet, pretrained: old/w.safetensors}\ndata: {dataset: data/flowers}\n"
        "train: {duration: 2 steps, batch_size: 16}\n"
    )
    resolved = {"local": {"value": ["data.dataset", "model.pretrained"], "origin": "", "tag": "fact"}}
    (copied / "resolved.yaml").write_text(json.dumps(resolved))
    push_run(copied, "me/flowers")
    files = hub.repos["me/flowers"].files
    assert YAML(typ="safe", pure=True).load(files["recipe.yaml"].decode()) == {
        "model": {"name": "test_resnet", "pretrained": "w.safetensors"},
        "data": {"dataset": "flowers"},
        "train": {"duration": "2 steps", "batch_size": 16},
    }
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets is None
    assert card.data.eval_results[0].dataset_name == "own images"
    assert "data/flowers" not in card.content
    assert "hf_fasttrain hf://me/flowers data.dataset=FOLDER model.pretrained=WEIGHTS\n" in card.text


def test_a_token_in_a_comment_is_masked(hub: Hub, copied: Path) -> None:
    with (copied / "recipe.yaml").open("a") as file:
        file.write(f"# {TOKEN}\n")
    push_run(copied, "me/flowers")
    assert all(TOKEN.encode() not in content for content in hub.repos["me/flowers"].files.values())


def test_an_unknown_license_is_refused(hub: Hub, run: Path) -> None:
    with pytest.raises(
        RunError, match=r"the Hub rejects the model card \(.*\); correct its license, dataset or model names"
    ):
        push_run(run, "me/flowers", license="nobody-knows")
    with pytest.raises(RunError, match="--license is 'My Own'; write it as the Hub does"):
        push_run(run, "me/flowers", license="My Own")
    assert not any(repo.commits for repo in hub.repos.values())


def test_the_index_has_both_splits_and_not_the_authors_repository(hub: Hub, copied: Path) -> None:
    from huggingface_hub import ModelCard

    (copied / "recipe.yaml").write_text(
        "model: {name: test_resnet}\ndata: {dataset: cifar10, test_split: test}\n"
        "train: {duration: 2 steps, batch_size: 16}\nhub: {repo: me/flowers}\n"
    )
    push_run(copied, "me/flowers")
    card = ModelCard(hub.repos["me/flowers"].files["README.md"].decode())
    assert card.data.datasets == ["cifar10"]
    results = {(r.metric_name, r.dataset_split, r.metric_value) for r in card.data.eval_results}
    assert {("accuracy", None, 0.8125), ("accuracy", "test", 0.75)} <= results
    assert "accelerate launch -m hf_fasttrain recipe.yaml hub=null\n" in card.text


def test_the_request_has_the_private_flag(hub: Hub, run: Path) -> None:
    push_run(run, "me/secret", private=True)
    assert hub.created == [{"name": "secret", "organization": "me", "visibility": "private"}]
    assert hub.repos["me/secret"].private
    push_run(run, "me/open")
    assert "visibility" not in hub.created[1]  # what the owner's settings say
    with pytest.raises(RunError, match=r"me/open: the repository exists and is public.*leave --private out"):
        push_run(run, "me/open", private=True)
    assert len(hub.repos["me/open"].commits) == 1


def test_an_existing_repository_gets_another_commit(hub: Hub, run: Path) -> None:
    first, second = push_run(run, "me/flowers"), push_run(run, "me/flowers")
    assert first == second
    assert len(hub.repos["me/flowers"].commits) == 2
    assert len(hub.stored) == 1


def test_the_card_describes_results_loading_and_training(hub: Hub, run: Path) -> None:
    from huggingface_hub import ModelCard

    push_run(run, "me/flowers")
    card = ModelCard(hub.repos["me/flowers"].files["README.md"].decode())
    assert card.data.library_name == "timm"
    assert "image-classification" in card.data.tags
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert {(r.metric_name, r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("accuracy", "accuracy", 0.8125), ("top5_accuracy", "accuracy", 1.0), ("f1_macro", "f1", 0.7931),
        ("accuracy", "accuracy", 0.75),  # of the test split
    }  # fmt: skip
    assert "| accuracy | 0.8125 | 0.7500 |" in card.text
    assert "accelerate launch -m hf_fasttrain recipe.yaml data.dataset=FOLDER" in card.text
    assert "accelerate launch -m hf_fasttrain hf://me/flowers data.dataset=FOLDER" in card.text
    assert "data:\n  dataset: flowers\n  image_size: 32" in card.text  # the recipe itself
    for row in ("hardware | a processor, ? cores", "training steps took | 1.2 s, ", "images per second | 25.6"):
        assert f"| {row}" in card.text
    assert "python 3.11.1" in card.text
    assert "![loss, accuracy and learning rate over training](curves.png)" in card.text
    assert card.data.license is None


def test_names_of_strangers_are_no_markup_in_the_card(copied: Path, tmp_path: Path) -> None:
    from markdown_it import MarkdownIt

    hostile = [
        "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](https://e)", "![x](https://e/x.png)",
        "a\n\n# forged", "a | b", "`code`", "**bold**", "https://evil.example", "\u202egpj", "\x1b[31mred",
    ]  # fmt: skip
    spec = json.loads((copied / "model" / "hf_fasttrain.json").read_text())
    (copied / "model" / "hf_fasttrain.json").write_text(
        json.dumps({**spec, "name": "`<b>x</b>`", "class_names": hostile})
    )
    result = json.loads((copied / "result.json").read_text())
    machine = {"processor": hostile[0], "device": "<b>gpu</b>", "cores": 2}
    changed = {"metrics": {hostile[1]: 0.5}, "machine": machine, "versions": {"<b>": hostile[3]}}
    (copied / "result.json").write_text(json.dumps({**result, **changed}))
    with (copied / "recipe.yaml").open("a") as file:
        file.write("# ```\n# <script>\n")
    card = files_to_push(read_run(copied), "me/x", tmp_path)["README.md"].decode()
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = [inner for token in parser.parse(card.split("---\n")[2]) for inner in (token, *(token.children or []))]
    assert not {"html_inline", "html_block", "link_open", "strong_open"} & {token.type for token in tokens}
    assert [token.attrs["src"] for token in tokens if token.type == "image"] == ["curves.png"]
    headings = [token for token in tokens if token.type == "heading_open"]
    assert len(headings) == 5  # ours
    shown = "".join(token.content for token in tokens if token.type in ("text", "code_inline"))
    assert "<script>alert(1)</script>, <img src=x onerror=alert(1)>, [x](https://e)" in shown
    assert not any(letter in card for letter in "\u202e\x1b")


def test_the_card_has_a_license_only_if_one_is_given(hub: Hub, run: Path) -> None:
    from huggingface_hub import ModelCard

    push_run(run, "me/flowers", license="apache-2.0")
    assert ModelCard(hub.repos["me/flowers"].files["README.md"].decode()).data.license == "apache-2.0"


def test_the_base_model_is_the_one_that_training_started_from(hub: Hub, copied: Path) -> None:
    from huggingface_hub import ModelCard

    def base_model(model: str) -> object:
        data = "data: {dataset: digits}\ntrain: {duration: 2 steps, batch_size: 16}\n"
        (copied / "recipe.yaml").write_text(f"model: {model}\n{data}")
        push_run(copied, "me/flowers")
        return ModelCard(hub.repos["me/flowers"].files["README.md"].decode()).data.base_model

    assert base_model("{name: test_resnet, pretrained: hf://you/digits@v1}") == "you/digits"
    assert base_model("{name: test_resnet, pretrained: false}") is None
    assert base_model("{name: test_resnet, pretrained: true}") == "timm/test_resnet.r160_in1k"  # its default weights


def test_card_names_models_and_data_sets_of_the_hub(hub: Hub, copied: Path) -> None:
    from huggingface_hub import ModelCard

    spec = json.loads((copied / "model" / "hf_fasttrain.json").read_text())
    (copied / "model" / "hf_fasttrain.json").write_text(json.dumps({**spec, "name": "timm/test_resnet.r160_in1k"}))
    (copied / "recipe.yaml").write_text(
        "model: {name: timm/test_resnet.r160_in1k, pretrained: true}\n"
        "data: {dataset: somebody/flowers, config: small}\ntrain: {duration: 2 steps, batch_size: 16}\n"
    )
    push_run(copied, "me/flowers")
    pushed = hub.repos["me/flowers"].files
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.base_model == "timm/test_resnet.r160_in1k"
    assert card.data.datasets == ["somebody/flowers"]
    assert card.data.eval_results[0].dataset_type == "somebody/flowers"
    assert card.data.eval_results[0].dataset_config == "small"
    assert "data.dataset=FOLDER" not in card.text
    assert pushed["recipe.yaml"] == (copied / "recipe.yaml").read_bytes()


def test_the_card_names_the_teacher_and_low_rank_updates(copied: Path, tmp_path: Path) -> None:
    recipe = (copied / "recipe.yaml").read_text()

    def card(sections: str) -> str:
        (copied / "recipe.yaml").write_text(f"{recipe}\n{sections}")
        return files_to_push(read_run(copied), "me/x", tmp_path)["README.md"].decode()

    taught = card(f"distill: {{teacher: {tmp_path / 'large run'}}}\nlora: {{rank: 4}}\n")
    assert "learned from the logits of a teacher too, `large run` (distillation)" in taught
    assert "low-rank updates were trained (LoRA of rank 4)" in taught
    assert str(tmp_path) not in taught
    plain = card("distill: {teacher: hf://you/large}\nlora: false\n")
    assert "a teacher too, `hf://you/large` (distillation)" in plain
    assert "LoRA" not in plain


def programs_of(readme: bytes, image: Path) -> list[Job]:
    """Return a card's programs, each to be run once, for an image."""
    return [(part.split("```")[0], [[str(image)]]) for part in readme.decode().split("```python\n")[1:]]


def guesses(printed: str) -> list[list[str]]:
    """Return score and class of each line that a program prints."""
    return [line.split("  ") for line in printed.splitlines()]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image file."""
    path = tmp_path / "photo.png"
    Image.effect_noise((50, 40), 80).convert("RGB").save(path)
    return path


def expected_answer(run: Path, image: Path) -> list[list[str]]:
    (row,) = predict_images(run, [str(image)])
    return [[f"{guess['score']:.5f}", guess["class"]] for guess in row["classes"]]


def test_the_cards_programs_load_the_pushed_model(hub: Hub, copied: Path, image: Path) -> None:
    in_child(lambda: export_run(copied, onnx=True))
    push_run(copied, "me/flowers")
    files = hub.repos["me/flowers"].files
    assert files["model.onnx"] == (copied / "model" / "model.onnx").read_bytes()
    assert not any(text in files["model.onnx"] for text in (b"site-packages", b"/hf_fasttrain/", b'File "'))
    answers, _ = run_fresh(programs_of(files["README.md"], image), image.parent)
    assert len(answers) == 3  # timm, transformers, onnxruntime
    for answer in answers:
        for (score, name), (expected, class_name) in zip(guesses(answer), expected_answer(copied, image), strict=True):
            assert name == class_name
            assert float(score) == pytest.approx(float(expected), abs=2e-5)
    assert b"hf-fasttrain predict hf://me/flowers IMAGE..." in files["README.md"]


def test_a_model_with_another_stem_is_loaded_by_this_package(hub: Hub, tmp_path: Path, image: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path, "resnet18", small_image_stem=True)
    push_run(run, "me/small")
    files = hub.repos["me/small"].files
    assert b"library_name: hf_fasttrain" in files["README.md"]
    assert b"```python" not in files["README.md"]
    assert "config.json" not in files
    assert predict_images("hf://me/small", [str(image)]) == predict_images(run, [str(image)])


def test_files_of_an_earlier_push_are_deleted(hub: Hub, run: Path, tmp_path: Path) -> None:
    push_run(run, "me/flowers")
    hub.repos["me/flowers"].files["notes.md"] = b"the owner's own"
    push_run(write_run(tmp_path / "run", tmp_path, "resnet18", small_image_stem=True), "me/flowers")
    assert "config.json" not in hub.repos["me/flowers"].files  # timm would read it as another model
    assert hub.repos["me/flowers"].files["notes.md"] == b"the owner's own"


def test_a_timm_model_of_a_local_folder_is_named_by_its_architecture(hub: Hub, run: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path, str(run / "model"))
    push_run(run, "me/flowers")
    files = hub.repos["me/flowers"].files
    assert json.loads(files["hf_fasttrain.json"])["name"] == "test_resnet"
    assert all(str(tmp_path.parent).encode() not in content for content in files.values())


def test_a_transformers_model_of_a_local_folder_is_loaded_by_transformers(
    hub: Hub, tmp_path: Path, image: Path
) -> None:
    from transformers import ViTConfig

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTConfig(**size, image_size=32, patch_size=16).save_pretrained(tmp_path / "own" / "vit")
    run = write_run(tmp_path / "run", tmp_path, f"transformers:{tmp_path / 'own' / 'vit'}")
    push_run(run, "me/vit")
    files = hub.repos["me/vit"].files
    assert b"library_name: transformers" in files["README.md"]
    assert json.loads(files["hf_fasttrain.json"])["name"] == "transformers:vit"
    assert all(str(tmp_path).encode() not in content for content in files.values())
    (answer,) = run_forked(programs_of(files["README.md"], image))
    assert [name for _, name in guesses(answer)] == [name for _, name in expected_answer(run, image)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/data", "data"),
        ("~/data/flowers/", "flowers"),
        ("../flowers", "flowers"),
        ("./runs/x", "x"),
        (r"C:\Users\me\flowers", "flowers"),
        ("file:///home/me/x.parquet", "x.parquet"),
        ("transformers:/home/me/vit", "transformers:vit"),
        ("transformers:google/vit-base", "transformers:google/vit-base"),
        ("data.dataset=/home/me/x seed=1", "data.dataset=x seed=1"),
        ("no file '/home/me/x', none in /data/y.", "no file 'x', none in y."),
        ("25 images/s, and/or 1/2, 3 / 4", "25 images/s, and/or 1/2, 3 / 4"),
        ("https://huggingface.co/me/x and hf://datasets/me/x", "https://huggingface.co/me/x and hf://datasets/me/x"),
        ("me/flowers", "me/flowers"),
    ],
)
def test_paths_are_cut_to_their_last_component(text: str, expected: str) -> None:
    assert Scrubber([]).value(text) == expected


def test_a_relative_path_is_local_if_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local_path("data/flowers")
    assert is_hub_name("data/flowers")
    (tmp_path / "data" / "flowers").mkdir(parents=True)
    assert is_local_path("data/flowers")
    assert not is_hub_name("data/flowers")
    scrub = Scrubber(["data/flowers"])
    assert scrub.value("data/flowers") == "flowers"
    assert scrub.text("data/flowers/rose/1.jpg: broken, mydata/flowers") == "1.jpg: broken, mydata/flowers"


def test_a_recipe_stays_yaml_with_the_same_types() -> None:
    text = "data: {dataset: /home/me/2024}  # years\n"
    clean = Scrubber([]).yaml(text, YAML(typ="safe", pure=True).load(text))
    assert YAML(typ="safe", pure=True).load(clean) == {"data": {"dataset": "2024"}}


@pytest.mark.parametrize("name", ["result.json", "model/hf_fasttrain.json"])
def test_an_unfinished_run_is_refused(hub: Hub, copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(RunError, match=rf"copied: is not a finished run, it has no {name}; give .*resume=True"):
        push_run(copied, "me/flowers")
    assert hub.created == []


def test_a_damaged_result_is_named(copied: Path) -> None:
    (copied / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"result\.json: can't be read .*fix it or train again"):
        push_run(copied, "me/flowers")


def test_a_file_of_a_model_that_is_too_large_for_json_is_not_read(hub: Hub, copied: Path) -> None:
    os.truncate(copied / "model" / "config.json", 1 << 40)
    with pytest.raises(RunError, match=r"config\.json: can't be read"):
        push_run(copied, "me/flowers")
    assert hub.created == []


@pytest.mark.parametrize("repo", ["flowers", "me/my flowers", "me/a--b", "datasets/me/flowers", ""])
def test_an_invalid_repository_name_is_refused(hub: Hub, run: Path, repo: str) -> None:
    with pytest.raises(RunError, match=rf"'{repo}' is not a valid Hub repository name; write OWNER/NAME"):
        push_run(run, repo)
    assert hub.created == []


def test_a_missing_token_is_explained(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RunError, match="me/flowers: no token found; log in with `hf auth login` or set HF_TOKEN"):
        push_run(run, "me/flowers")


def test_a_wrong_token_is_explained(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 34)
    with pytest.raises(RunError, match=r"does not accept the token \(401\); log in with `hf auth login`") as error:
        push_run(run, "me/flowers")
    assert "yyy" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("create", 403, r"the token has no write access \(403.*\); .* write access to me, or give another OWNER/NAME"),
        ("preupload", 403, r"the token has no write access \(403.*\)"),
        ("commit", 404, r"the token has no write access \(404.*\)"),
        ("create", 500, r"is unavailable \(500\); the run is complete on disk, try later; then hf-fasttrain push"),
        ("commit", 503, r"is unavailable \(503\)"),
        ("storage", 403, r"the token has no write access \(403.*\)"),
        ("commit", 400, r"refused it \(.*refused by the test.*\); correct that"),
    ],
)
def test_refusals_of_the_hub_are_explained(hub: Hub, run: Path, part: str, status: int, message: str) -> None:
    hub.refuse = {f"/{part}": status} if part != "create" else {"/api/": status}
    with pytest.raises(RunError, match=message) as error:
        push_run(run, "me/flowers", patience=0.0)
    assert str(error.value).count("\n") == 0
    assert not any(repo.commits for repo in hub.repos.values())


def test_an_unreachable_hub_is_explained(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with pytest.raises(RunError, match=rf"{address} can't be reached \(.+\); check the network and HF_ENDPOINT"):
            push_run(run, "me/flowers", private=True, patience=0.0)


def test_offline_mode_is_explained(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=r"HF_HUB_OFFLINE is set; unset it; then hf-fasttrain push .* me/flowers$"):
        push_run(run, "me/flowers")


def test_the_command_uses_hf_endpoint(run: Path, tmp_path: Path) -> None:
    with running_hub() as hub:
        hub_env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        env = {**os.environ, **hub_env, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-m", "hf_fasttrain", "push", str(run), "me/flowers", "--private"]
        process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert process.returncode == 0, process.stderr
        assert process.stdout == f"{hub.url}/me/flowers\n"
        assert TOKEN not in process.stdout + process.stderr
        repo = hub.repos["me/flowers"]
        assert repo.private
        assert len(repo.commits) == 1
        assert repo.files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
        process = subprocess.run(command, env={**env, "HF_TOKEN": "hf_no"}, capture_output=True, text=True, timeout=60)
        assert process.returncode == 2
        assert process.stderr.startswith("error: push to me/flowers: ")
        assert "Traceback" not in process.stderr


@pytest.mark.parametrize("name", ["model/notes.txt", "result.json", "metrics.jsonl", "recipe.yaml"])
def test_a_link_out_of_the_run_is_not_pushed(hub: Hub, copied: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text('{"auths": {}}')
    (copied / name).unlink(missing_ok=True)
    (copied / name).symlink_to(tmp_path / "secret")
    with pytest.raises(RunError, match=rf"{name}: is a link to .*secret, outside of the run; "):
        push_run(copied, "me/linked")
    assert "me/linked" not in hub.repos


def test_a_linked_model_folder_is_pushed(hub: Hub, copied: Path, tmp_path: Path) -> None:
    (copied / "model").rename(tmp_path / "elsewhere")
    (copied / "model").symlink_to(tmp_path / "elsewhere")
    (copied / "model" / "notes.txt").symlink_to(copied / "recipe.yaml")
    push_run(copied, "me/linked")
    assert {"model.safetensors", "notes.txt"} <= hub.repos["me/linked"].files.keys()
