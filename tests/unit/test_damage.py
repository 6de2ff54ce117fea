"""Every file that d2i reads back is checked: damage is an error with the file's name, or harmless.

Seeded bit flips, cuts and holes in every kind of file give neither other numbers nor a traceback.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from d2i import run_dir
from d2i.cli.app import app
from d2i.config import BackboneConfig
from d2i.demo.corpus import write_corpus
from d2i.errors import D2IError
from d2i.eval.features.reference_features import ReferenceFeatures
from d2i.eval.tasks import EvalTask, finished_tasks, images_path, read_tasks, write_task
from d2i.images.tar_index import open_index
from d2i.io import checksums, storage
from d2i.models import read_state_dict, save_weights
from d2i.models.model_dir import read_config, write_config
from d2i.preprocess.job_files import JobFiles, check_job_files
from d2i.preprocess.ledger import LedgerRow, read_ledger, write_ledger
from d2i.preprocess.plan.planner import Plan, PlanRequest, make_plan, records_url
from d2i.preprocess.plan.record_files import read_records
from d2i.preprocess.plan.supplements import plan_retry_shards
from d2i.recipes import load_recipe, read_stored_recipe, store_recipe
from d2i.report import read_evaluation
from d2i.run_dir import MetricsLine, RunConfig, append_line, load_selection, start_or_resume
from d2i.shards import (
    Sample,
    ShardReader,
    json_bytes,
    npy_bytes,
    write_manifest,
    write_shard,
)
from d2i.train.checkpoint.checkpoint_files import (
    Checkpoint,
    Progress,
    slice_key,
    write_marker,
    write_part,
)
from tests.samples import metadata

NUM_DAMAGES, NUM_SOAK = 2_000, 10_000
WEIGHTS = {"a.weight": torch.arange(24.0).reshape(4, 6), "a.bias": torch.ones(4)}


@dataclass(frozen=True)
class Kind:
    """Files that are read together.

    Args:
        name: Name of the kind.
        directory: Directory of the files.
        read: Reads all of them and returns a value that can be compared.
        is_cache: True if `read` returns None for damage, so that the work is done again.
        by_directory: True if an error may name the directory instead of the file.
    """

    name: str
    directory: Path
    read: Callable[[Path], Any]
    is_cache: bool = False
    by_directory: bool = False

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.directory.rglob("*") if path.is_file())


def read_data(directory: Path) -> Any:
    reader = ShardReader(str(directory))
    arrays = reader.read(range(len(reader)))
    others = [reader.read_json(index) for index in range(len(reader))], list(reader.keys)
    empty = reader.empty_tokens.tobytes(), reader.empty_text.tobytes()
    return {name: array.tobytes() for name, array in arrays.items()}, others, empty


def read_job(directory: Path) -> Any:
    job = JobFiles(str(directory))
    indexes = job.indexes()
    planned = [
        read_records(records_url(str(directory), index), job.records_sha256(index))
        for index in indexes
    ]
    return job.plan, job.supplements, planned


def read_run(directory: Path) -> Any:
    lines = run_dir.read_metrics(str(directory))
    best = load_selection(str(directory))
    assert best is not None
    chosen = replace(best, weights=best.weights.removeprefix(str(directory)))
    found = run_dir.read_recipe(str(directory)), run_dir.last_step(str(directory)), chosen
    state = read_state_dict(directory / "ema.safetensors")
    return lines, found, {name: tensor.tolist() for name, tensor in state.items()}


def read_checkpoint(directory: Path) -> Any:
    checkpoint = Checkpoint(str(directory / "checkpoints" / "step-4"))
    checkpoint.check()
    whole = {name: tensor.tolist() for name, tensor in checkpoint.read_whole("ema")}
    return whole, checkpoint.progress


def read_model(directory: Path) -> Any:
    state = read_state_dict(directory)
    return {name: tensor.tolist() for name, tensor in state.items()}, read_config(directory)


def read_scored(directory: Path) -> Any:
    url = str(directory)
    evaluation = read_evaluation(url)
    arrays = read_tasks(url, finished_tasks(url))
    images = evaluation.read_images(evaluation.image_urls)
    scores = dict(evaluation.scores), dict(evaluation.card), evaluation.judged
    return {name: array.tolist() for name, array in arrays.items()}, images, scores


def read_cache(directory: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        kept = ReferenceFeatures({"of": "these"}).read([0, 2])
    return kept and {name: array.tolist() for name, array in kept.items()}


def read_tar_index(directory: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        return open_index(str(directory.parent / "pictures.tar")).find("a.png")


def write_data(directory: Path) -> None:
    numbers = np.random.default_rng(0)
    text = numbers.standard_normal((6, 77, 8)).astype(np.float16)
    for index in range(2):
        samples = [
            Sample(
                f"k{number}",
                {
                    "json": json_bytes(metadata(f"k{number}")),
                    "tokens.npy": npy_bytes(np.full(77, number, np.uint16)),
                    "text.npy": npy_bytes(text[number]),
                },
            )
            for number in range(3 * index, 3 * index + 3)
        ]
        write_shard(samples, str(directory), index, failures={})
    (directory / "empty_tokens.npy").write_bytes(npy_bytes(np.zeros(77, np.uint16)))
    (directory / "empty_text.npy").write_bytes(npy_bytes(text[0]))
    write_manifest(str(directory), {})


def write_plan(corpus: Path, directory: Path) -> None:
    """Write a plan whose first shard has transient failures to be retried, and its ledger."""
    recipe = load_recipe("demo")
    small = recipe.preprocess.model_copy(update={"num_samples_per_shard": 4})
    request = PlanRequest("mmdialog", str(corpus), "test", replace_preprocess(recipe, small))
    plan = make_plan(request, str(directory))
    for index in range(plan.num_shards):
        instances = read_records(records_url(str(directory), index), plan.sha256(index))
        rows = [ledger_row(i.key, "passing" if index == 0 else "ok") for i in instances]
        write_ledger(str(directory), index, rows)
    plan_retry_shards(str(directory), plan.num_shards, 100)


def replace_preprocess(recipe: Any, preprocess: Any) -> Any:
    return recipe.model_copy(update={"preprocess": preprocess})


def ledger_row(key: str, status: Any) -> LedgerRow:
    facts: dict[str, Any] = {"size_bytes": 900, "width": 64, "height": 48, "sha256": "ab" * 32}
    return LedgerRow(key, f"{key}.jpg", status, status, "", 1, 200, None, time_s=1.5, **facts)


def write_run(directory: Path) -> None:
    recipe = load_recipe("demo").model_dump(mode="json")
    start_or_resume(str(directory), RunConfig(recipe, "data", "a" * 64, 2), is_begun=False)
    for step in range(1, 6):
        append_line(str(directory), MetricsLine(step, 1 / step, 1e-3, 8 * step, 10.5, 0.1 * step))
    for name in ("ema.safetensors", "select/step-4.safetensors"):
        save_weights(WEIGHTS, directory / name, {"step": "300"})
    best = {"weights": "select/step-4.safetensors", "guidance_scale": 1.5, "last_step": 300}
    checksums.write_bytes(str(directory / "best.json"), json.dumps(best).encode())


def write_checkpoint(directory: Path) -> None:
    step = str(directory / "checkpoints" / "step-4")
    for rank, (name, tensor) in enumerate(WEIGHTS.items()):
        write_part(step, rank, {slice_key("ema", name, 0): tensor.flatten()})
    shapes = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}
    write_marker(step, Progress(4, 1.5, (0.25, 0.5), 4), shapes, 2)


def write_scored(directory: Path) -> None:
    random_numbers = np.random.default_rng(0)
    for start in (0, 3):
        task = EvalTask(start, start + 3)
        rows = {
            name: random_numbers.standard_normal((3, 4)).astype(np.float32)
            for name in ("real_features", "real_embeddings", "features", "embeddings")
        }
        details = {
            "keys": np.array([f"test-{n}-0-0" for n in task.indices]),
            "reasons": np.array([""] * 3),
            "sources": np.array(["memory"] * 3),
            "is_flat": np.zeros(3, bool),
        }
        data = tar_of({f"test-{start}-0-0.png": b"a picture"})
        storage.write_bytes(str(directory / images_path(task)), data)
        sums = {images_path(task): checksums.sha256_of(data)}
        write_task(str(directory), task, details | rows, sums)
    scores = {"scores": {"fid": 12.5, "kid": 0.25}, "card": {"seed": 0}, "intervals": {}}
    for name, content in (("scores.json", scores), ("judged.json", {"accuracy": {"true": 1.0}})):
        checksums.write_bytes(str(directory / name), json.dumps(content, indent=1).encode())


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_cache(directory: Path) -> None:
    arrays: dict[str, Any] = {"real_features": np.eye(3), "real_embeddings": np.ones((3, 2))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        ReferenceFeatures({"of": "these"}).keep(arrays)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    root = tmp_path_factory.mktemp("kept")
    write_corpus(root / "corpus", 60, seed=0)
    for name in ("data", "recipe", "run", "checkpoint", "model", "scored", "cache", "tars"):
        (root / name).mkdir()
    write_data(root / "data")
    write_plan(root / "corpus", root / "plan")
    store_recipe(load_recipe("demo"), str(root / "recipe"))
    write_run(root / "run")
    write_checkpoint(root / "checkpoint")
    save_weights(WEIGHTS, root / "model" / "model.safetensors")
    write_config(root / "model", BackboneConfig(name="uvit-s", depth=3))
    write_scored(root / "scored")
    write_cache(root / "cache")
    (root / "pictures.tar").write_bytes(tar_of({"a.png": b"a picture", "b.png": b"another"}))
    # The ledger is stored beside the plan, and read separately.
    (root / "ledgers").mkdir()
    (root / "plan" / "ledger").rename(root / "ledgers" / "ledger")
    found = [
        Kind("data", root / "data", read_data),
        Kind("plan", root / "plan", read_job),
        Kind("ledger", root / "ledgers", lambda directory: read_ledger(str(directory))),
        Kind("recipe", root / "recipe", lambda directory: read_stored_recipe(str(directory))),
        Kind("run", root / "run", read_run),
        Kind("checkpoint", root / "checkpoint", read_checkpoint, by_directory=True),
        Kind("model", root / "model", read_model),
        Kind("scored", root / "scored", read_scored),
        Kind("cache", root / "cache", read_cache, is_cache=True),
        Kind("tars", root / "tars", read_tar_index),
    ]
    for kind in found:
        assert kind.read(kind.directory), kind.name
    return {kind.name: kind for kind in found}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return the data with a flipped bit, another byte, a cut or a hole of zeros."""
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    mode = rng.choice(("bit", "bit", "byte", "cut", "hole", "empty"))
    if mode == "cut":
        return data[:at]
    if mode == "empty":
        return b""
    if mode == "hole":
        size = min(rng.choice((1, 8, 64, 512)), len(data) - at)
        return data[:at] + bytes(size) + data[at + size :]
    byte = data[at] ^ (1 << rng.randrange(8)) if mode == "bit" else rng.randrange(256)
    return data[:at] + bytes([byte]) + data[at + 1 :]


def replace_file(path: Path, data: bytes) -> None:
    """Replace the file, as the old one may still be memory-mapped."""
    path.unlink()
    path.write_bytes(data)


def misread_of(kind: Kind, file: Path, good: Any) -> str | None:
    """Return how reading a damaged file went wrong, or None if it did not."""
    try:
        found = kind.read(kind.directory)
    except (D2IError, OSError) as err:
        details = str(err)
        names = {file.name, file.name.removesuffix(".sha256"), file.name.partition(".")[0]}
        names |= {file.parent.name} if kind.by_directory else set()
        is_named = any(name in details for name in names) and "\n" not in details
        return None if is_named else f"names no file: {details}"
    except Exception as err:
        return f"a traceback: {err!r}"
    if found == good or (kind.is_cache and found is None):
        return None
    if file.name == "metrics.jsonl" and found[1:] == good[1:]:
        # A killed run has fewer lines, but no different ones.
        return None if found[0] == good[0][: len(found[0])] else "other lines"
    return "other content"


def damage_files(kinds: dict[str, Kind], num: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    good = {name: kind.read(kind.directory) for name, kind in kinds.items()}
    wrong = []
    for number in range(num):
        kind = kinds[rng.choice(sorted(kinds))]
        file = rng.choice(kind.files)
        data = file.read_bytes()
        broken = damaged(data, rng)
        if broken == data:
            continue
        replace_file(file, broken)
        misread = misread_of(kind, file, good[kind.name])
        # A rebuilt cache leaves its own file, which is equal to the original.
        replace_file(file, data)
        if misread:
            wrong.append(f"{number}: {kind.name} {file.name}: {misread}")
    return wrong


def test_damaged_file_is_error_with_its_name_or_harmless(kinds: dict[str, Kind]) -> None:
    assert damage_files(kinds, NUM_DAMAGES, seed=0) == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_damaged_files_are_errors_or_harmless(kinds: dict[str, Kind]) -> None:
    assert damage_files(kinds, NUM_SOAK, seed=1) == []


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: reordered(value[name]) for name in reversed(list(value))}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def rewrite_checksum(path: Path) -> None:
    line = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    path.with_name(f"{path.name}.sha256").write_text(line)


def test_json_with_reordered_keys_is_read(kinds: dict[str, Kind]) -> None:
    """With a checksum by `sha256sum NAME > NAME.sha256`, after another program wrote the file."""
    num = 0
    for kind in kinds.values():
        good = kind.read(kind.directory)
        for file in kind.files:
            is_summed = file.with_name(f"{file.name}.sha256").exists()
            has_own_checksum = kind.name == "checkpoint" or file.parent.name == "tasks"
            is_lines = file.suffix == ".jsonl"
            if file.suffix not in {".json", ".jsonl"} or kind.name in {"data", "cache"}:
                continue
            if not (is_summed or has_own_checksum or is_lines):
                continue
            data = file.read_bytes()
            texts = data.splitlines() if is_lines else [data]
            others = (json.dumps(reordered(json.loads(text))) + "\n" for text in texts)
            replace_file(file, "".join(others).encode())
            if is_summed:
                rewrite_checksum(file)
            assert kind.read(kind.directory) == good, file
            replace_file(file, data)
            if is_summed:
                rewrite_checksum(file)
            num += 1
    assert num >= 10


def test_parquet_of_another_version_is_read(kinds: dict[str, Kind]) -> None:
    kind = kinds["ledger"]
    good = kind.read(kind.directory)
    file = kind.directory / "ledger" / "000000.parquet"
    data, table = file.read_bytes(), pq.read_table(file)
    assert isinstance(table, pa.Table)
    pq.write_table(table, file, version="1.0", compression="snappy", use_dictionary=True)
    rewrite_checksum(file)
    assert kind.read(kind.directory) == good
    replace_file(file, data)
    rewrite_checksum(file)


def test_backward_compatibility_of_files_without_checksums(
    kinds: dict[str, Kind], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Data, runs and evaluations had no checksums; a plan named no files, a task had no marker."""
    for name in ("plan", "ledger", "recipe", "run", "model", "scored"):
        kind = replace(kinds[name], directory=tmp_path / name)
        good = kind.read(kinds[name].directory)
        shutil.copytree(kinds[name].directory, kind.directory)
        for file in [*kind.directory.rglob("*.sha256"), *kind.directory.glob("tasks/*.json")]:
            file.unlink()
        if name == "plan":
            file = kind.directory / "plan" / "plan.json"
            values = json.loads(file.read_text())
            del values["files"]
            file.write_text(json.dumps(values))
            good = (replace(good[0], files={}), *good[1:])
        caplog.clear()
        assert kind.read(kind.directory) == good, name
        details = [record.getMessage() for record in caplog.records]
        assert details, name
        assert all("not verified" in line and str(kind.directory) in line for line in details)
        assert len(details) == len(set(details))


def test_verify_names_damaged_ledger_and_plan(kinds: dict[str, Kind], tmp_path: Path) -> None:
    directory = tmp_path / "test"
    for name in ("data", "plan"):
        shutil.copytree(kinds[name].directory, directory, dirs_exist_ok=True)
    shutil.copytree(kinds["ledger"].directory / "ledger", directory / "ledger")
    plan = json.dumps({}, indent=1).encode()
    checksums.write_bytes(str(directory / "plan" / "fingerprint.json"), plan)
    verify = partial(CliRunner().invoke, app, ["verify", str(tmp_path)])
    sound = verify()
    assert sound.exit_code == 0, sound.output
    for part in ("ledger", "plan"):
        file = directory / part / "000001.parquet"
        data = file.read_bytes()
        replace_file(file, data[:50] + bytes([data[50] ^ 1]) + data[51:])
        rejected = verify()
        assert rejected.exit_code == 1
        assert f"{part}/000001.parquet: {part}: " in rejected.stdout
        replace_file(file, data)
    assert list(check_job_files(str(directory))) == []


def test_sample_rejects_run_with_damaged_config(kinds: dict[str, Kind], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(kinds["run"].directory, run)
    config = run / "config.json"
    replace_file(config, config.read_bytes().replace(b'"seed": 0', b'"seed": 1'))
    chat = tmp_path / "chat.txt"
    chat.write_text("a red ball\n")
    sample = partial(CliRunner().invoke, app, ["sample", "--run", str(run), "--dialog", str(chat)])
    rejected = sample()
    assert isinstance(rejected.exception, D2IError)
    assert f"delete {config}.sha256 to accept the edit" in str(rejected.exception)
    (run / "config.json.sha256").unlink()
    assert "config.json" not in str(sample().exception)


def test_checksum_files_pass_sha256sum_check(kinds: dict[str, Kind]) -> None:
    for name in ("run", "recipe", "model"):
        sums = sorted(path.name for path in kinds[name].directory.glob("*.sha256"))
        assert sums
        command = ["sha256sum", "--check", "--strict", *sums]
        subprocess.run(command, cwd=kinds[name].directory, check=True, capture_output=True)


def test_interrupted_checksum_write_leaves_readable_file(tmp_path: Path) -> None:
    """Killed at any point, the file is read as verified or as not verified."""
    url = str(tmp_path / "a.json")
    checksums.write_bytes(url, b"{}")
    for fails_at in range(4):
        calls = iter(range(10))

        def stop(*_: Any, calls: Any = calls, at: int = fails_at) -> None:
            if next(calls) == at:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            for name in ("remove", "write_bytes"):
                real = getattr(storage, name)
                patch.setattr(
                    storage, name, lambda *args, real=real, stop=stop: (stop(), real(*args))
                )
            with contextlib.suppress(KeyboardInterrupt):
                checksums.write_bytes(url, f'{{"a": {fails_at}}}'.encode())
        assert checksums.read_bytes(url)


def test_plan_stores_checksums_of_its_records(kinds: dict[str, Kind]) -> None:
    plan: Plan = kinds["plan"].read(kinds["plan"].directory)[0]
    assert len(plan.files) == plan.num_shards > 1
