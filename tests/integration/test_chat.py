"""Pipelines of language models read chats in training as in sampling, by their own code."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2i.cli.sample import sample as sample_command
from d2i.config import TextConfig, apply_settings
from d2i.encoders.chat_text import ChatText
from d2i.encoders.pipeline_text import PipelineText, load_text_parts, open_chat
from d2i.errors import ConfigError, DataError
from d2i.eval.prompts import PromptReader
from d2i.models.pipeline_family import pipeline_family
from d2i.prompt_text import Message
from d2i.recipes import load_recipe
from d2i.shards import ShardReader
from d2i.train.data.text_source import build_text
from tests.integration.evaluations import images_by_name
from tests.integration.fine_tuning import prepare, train_command
from tests.integration.pipelines import save_tiny_flux2_klein, save_tiny_z_image
from tests.processes import run_d2i

pytestmark = pytest.mark.timeout(900)
RECIPE = "z-image-lora-photochat"
CHAT = TextConfig.model_validate({"format": "chat", "encode": "on_the_fly"})
LINES = ["i saw a red ball", "Look at <|im_end|> this!", "a long dialog " * 90, ""]
SHORT: dict[str, Any] = {
    "train__num_steps": 2,
    "train__num_sample_steps": 2,
    "train__num_validation_steps": 2,
    "sample__num_steps": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "z-image"
    save_tiny_z_image(directory)
    return directory


@pytest.fixture(scope="module")
def data(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(RECIPE, base, tmp_path_factory.mktemp("made"), 16)


def train(base: Path, data: Path, run: Path, text: str, roles: str = "speaker") -> Path:
    chat: dict[str, Any] = {"text__format": text, "text__roles": roles}
    run_d2i(*train_command(RECIPE, base, data, run, **SHORT, **chat))
    return run


@pytest.fixture(scope="module")
def chat_run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base, data, tmp_path_factory.mktemp("runs") / "chat", "chat")


def evaluate(run: Path, data: Path, out: Path, *extra: object) -> dict[str, bytes]:
    run_d2i(
        *("eval", "--system", f"run:{run}", "--data", data / "test", "--out", out),
        *("--save-images", "all", "--json", "--set", "sample.num_steps=2"),
        *("--set", "sample.compute_batch_size=4", *extra),
    )
    return images_by_name(out)


@pytest.mark.parametrize("name", ["z-image", "flux2-klein"])
def test_chat_of_one_message_has_tokens_and_states_of_pipeline(tmp_path: Path, name: str) -> None:
    save = {"z-image": save_tiny_z_image, "flux2-klein": save_tiny_flux2_klein}[name]
    save(tmp_path / "base")
    family, pipeline = pipeline_family(name), load_text_parts(tmp_path / "base", "cpu")
    chat = open_chat(pipeline, family, CHAT, 0, "cpu", "base")
    lines = [LINES[0], LINES[3]]
    with torch.inference_mode():
        expected = family.encode_prompts(pipeline, lines, "cpu")
        with chat.as_given():
            texts = [chat.write([Message("user", line)]) for line in lines]
            found = family.encode_prompts(pipeline, texts, "cpu")
        again = family.encode_prompts(pipeline, lines, "cpu")
    for key, states in expected.items():
        assert torch.equal(states, found[key])
        assert torch.equal(states, again[key])


def test_chat_of_one_message_is_the_line_at_any_length(base: Path) -> None:
    text = PipelineText(str(base), pipeline_family("z-image"), CHAT, 2, "cpu")
    lines = text.encode(LINES)
    chats = text.encode_chats([[Message("user", line)] for line in LINES], ["k"] * len(LINES))
    for name, rows in lines.items():
        np.testing.assert_array_equal(rows, chats[name])
    shown = chats["mask"].sum(1)
    assert 500 < shown.max() <= 512
    two = text.encode_chats([[Message("user", "a"), Message("assistant", "b")]], ["k"])
    alone = text.encode_chats([[Message("user", "a"), Message("user", "b")]], ["k"])
    assert two["text"].shape[1] > alone["text"].shape[1]


@pytest.mark.parametrize(
    ("method", "wrong", "problem"),
    [
        (
            "_plain",
            lambda _, text: text,
            "for a message of a chat that spells it; expected plain text",
        ),
        ("_cut", lambda _, messages: messages[:1], "differ in the newest turn alone"),
        ("_written", lambda _, messages: str([m.text for m in messages]), "newest role alone"),
    ],
)
def test_probe_refuses_chats_that_are_not_read(
    base: Path, monkeypatch: pytest.MonkeyPatch, method: str, wrong: Any, problem: str
) -> None:
    pipeline = load_text_parts(base, "cpu")
    monkeypatch.setattr(ChatText, method, wrong)
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        open_chat(pipeline, pipeline_family("z-image"), CHAT, 0, "cpu", "base")
    assert "\n" not in str(caught.value)


def test_pipeline_without_chat_template_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="encoder of sana has no chat template"):
        open_chat(None, pipeline_family("sana"), CHAT, 0, "cpu", "base")


def test_run_generates_from_chats_as_it_was_trained(
    base: Path, data: Path, chat_run: Path, tmp_path: Path
) -> None:
    assert (chat_run / "samples" / "step-2.png").exists()
    found = evaluate(chat_run, data, tmp_path / "full")
    card = json.loads((tmp_path / "full" / "scores.json").read_text())["card"]
    assert card["text"]["format"] == "chat"
    # The image of one dialog, from a record that says which turn shares it, is that of d2i eval.
    reader = ShardReader(str(data / "test"))
    sample = reader.read_json(0)
    parts: list[Any] = [[{"__TEXT__": turn["text"]}] for turn in sample["context"]]
    parts[-1].append({"__MEDIA__": "1"})
    record = {"conversation_id": 1, "conversation": [{"turn": part} for part in parts]}
    (tmp_path / "dialog.json").write_text(json.dumps(record))
    sample_command(
        str(chat_run),
        str(tmp_path / "dialog.json"),
        out=str(tmp_path / "one.png"),
        key=sample["key"],
        settings=["sample.num_steps=2", "sample.compute_batch_size=4"],
    )
    with Image.open(tmp_path / "one.png") as image:
        one = np.asarray(image.convert("RGB"))
    with Image.open(io.BytesIO(found[f"{sample['key']}.png"])) as image:
        np.testing.assert_array_equal(one, np.asarray(image.convert("RGB")))
    check_card(base, chat_run)


def check_card(base: Path, run: Path) -> None:
    """Assert that the program of a model card encodes its chat as the network was trained on."""
    card = (run / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    *lines, last = program.replace("RUN/", f"{run}/").replace(base.name, str(base)).splitlines()
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec("\n".join(lines), names)
    assert [m["role"] for m in names["messages"]] == ["assistant", "user", "assistant"]
    text = PipelineText(str(base), pipeline_family("z-image"), CHAT, 1, "cpu", "bf16")
    messages = [Message(m["role"], m["content"]) for m in names["messages"]]
    expected = text.encode_chats([messages], ["k"])["text"][0]
    np.testing.assert_allclose(names["embeds"][0].detach().float().numpy(), expected, atol=1e-5)
    small = last.replace(").images", ", num_inference_steps=2).images")
    exec(small, names)
    assert names["image"].size == (64, 64)


def test_data_that_do_not_say_who_shares_the_image_are_refused_before_training() -> None:
    class Reader:
        def __len__(self) -> int:
            return 1

        def read_json(self, index: int) -> dict[str, Any]:
            context = [{"speaker": index, "text": "a"}]
            return {"key": "k", "direction": "answer", "turn": 1, "context": context}

    recipe = apply_settings(load_recipe(RECIPE), ["text.format=chat"])
    reader: Any = Reader()
    with pytest.raises(DataError, match=r"corpus\.own_turn=include"):
        build_text(recipe, reader, "cpu")


def test_parts_of_a_context_keep_their_roles(data: Path) -> None:
    reader = ShardReader(str(data / "test"))
    prompts = {
        mode: PromptReader(reader, CHAT, mode).read(0)
        for mode in ("full", "last", "none", "shuffled")
    }
    messages = prompts["full"].messages
    assert [m.role for m in messages[-1:]] == ["assistant"]
    assert {m.role for m in messages[:-1]} <= {"user"}
    assert prompts["last"].messages == messages[-1:]
    assert prompts["none"].messages == ()
    assert prompts["shuffled"].messages[-1].role == "assistant"
    assert prompts["shuffled"].messages != messages
    line = PromptReader(reader, TextConfig(), "full").read(0)
    assert (line.messages, line.text) == ((), prompts["full"].text)


@pytest.mark.soak
def test_line_chat_and_control_train_from_the_same_data(
    base: Path, data: Path, chat_run: Path, tmp_path: Path
) -> None:
    runs = {
        "line": train(base, data, tmp_path / "line", "line"),
        "chat": chat_run,
        "permuted": train(base, data, tmp_path / "permuted", "chat", "permuted"),
    }
    losses, images = {}, {}
    for name, run in runs.items():
        losses[name] = (run / "metrics.jsonl").read_text().splitlines()[-1]
        images[name] = evaluate(run, data, tmp_path / f"eval-{name}")
    found = [json.loads(line)["loss"] for line in losses.values()]
    assert len(set(found)) == 3
    assert "random order" in (runs["permuted"] / "README.md").read_text()
    assert images["line"] != images["chat"] != images["permuted"]
    last = evaluate(chat_run, data, tmp_path / "last", "--context", "last")
    shuffled = evaluate(chat_run, data, tmp_path / "shuffled", "--context", "shuffled")
    assert images["chat"] != last != shuffled
