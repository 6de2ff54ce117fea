"""Measured inputs of scale.py: wall-clock times of small real jobs, and costs of their parts.

    python benchmarks/scale_costs.py fit check --photos photos --vae taesd.safetensors --into FILE

`fit`: the smallest jobs, with 1 and 2 workers or ranks, and the parts: opening an image, encoding,
writing, the driver's own work on Ray, the end of a job over many shards, scores. `check`: the same
jobs, 2, 4 and 8 times as long, with 2 workers, held out of the fit. If both are given, they
alternate. Every job is a whole command: `d2i preprocess` of photographs at 256 pixels with a tiny
autoencoder, `d2i train` and `d2i eval` of the demo's network at 64. The record of a job is the
duration of the command, and the time at which each shard, step or task was done. Writes them to
FILE (JSON), whose other parts are kept, and prints one JSON line: medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2i.config import Recipe
from d2i.recipes import resolve_recipe

if TYPE_CHECKING:
    from d2i.cluster import Session

D2I = (sys.executable, "-c", "from d2i.cli import main; main()")
NUM_WORKERS = 2
FITTED, HELD_OUT = (1,), (2, 4, 8)
"""Lengths of the jobs, in multiples of the shortest."""
UNIT_SIZES = {"preprocess": 4, "train": 16, "eval": 4}
"""Images of a shard, samples of a step, instances of a task."""
NUM_UNITS = {"preprocess": 10, "train": 10, "eval": 10}
"""Units of the shortest job."""
PREPROCESS_SETTINGS = ("image.resolution=256", "encoders.vae_kind=tiny", "text.latents=none")
TRAIN_SETTINGS = (
    "train.num_log_steps=1",
    "train.num_checkpoint_steps=1000",
    f"train.global_batch_size={UNIT_SIZES['train']}",
    "train.micro_batch_size=8",
)
EVAL_SETTINGS = ("sample.num_steps=10", f"sample.compute_batch_size={UNIT_SIZES['eval']}")

MANY_SHARDS = (500, 2000)
MANY_LEDGERS = (30, 120)
NUM_SHARD_SAMPLES = 1000
MANY_SAMPLES = (1_000_000, 4_000_000)
MANY_IMAGES = (1100, 2200)
"""Above the 1,000 that a subset of KID has."""
MANY_TASKS = (20, 420)


@dataclass(frozen=True)
class Job:
    """One whole command: its stage, its workers, and its length relative to the shortest."""

    stage: str
    num_workers: int
    times: int

    @property
    def num_units(self) -> int:
        """The number of shards, steps or tasks."""
        return NUM_UNITS[self.stage] * self.times


@dataclass(frozen=True)
class Inputs:
    """Inputs of the jobs: photographs, an autoencoder, prepared data sets by length."""

    photos: Path
    vae: Path
    directory: Path

    def chats(self, num: int, split: str) -> Path:
        """Return a directory of chats with one photograph each, written if it does not exist."""
        directory = self.directory / f"chats-{split}-{num}"
        if not directory.exists():
            directory.mkdir()
            make_chats(self.photos, directory, num, split)
        return directory

    def prepared(self, times: int) -> Path:
        """Return a data set of test dialogs for an evaluation of that length."""
        whole = self.directory / "prepared"
        num = NUM_UNITS["eval"] * UNIT_SIZES["eval"]
        if not whole.exists():
            settings = (f"preprocess.num_samples_per_shard={num}",)
            chats = self.chats(num * max(HELD_OUT), "test")
            run(preprocess_command(chats, whole, 0, settings), whole)
        part = self.directory / f"prepared-{times}"
        if not part.exists():
            take_shards(whole, part, times)
        return part


def make_chats(photos: Path, directory: Path, num: int, split: str) -> None:
    """Write one chat for each image; the images repeat, under distinct names."""
    files = sorted(photos.rglob("*.jpg"))
    lines = []
    for number in range(num):
        name = f"{number:06d}.jpg"
        shutil.copyfile(files[number % len(files)], directory / name)
        turns = [{"text": f"what is {number}", "images": []}, {"text": "", "images": [name]}]
        lines.append(json.dumps({"id": str(number), "turns": turns}))
    (directory / f"{split}.jsonl").write_text("\n".join(lines))


def take_shards(whole: Path, part: Path, num: int) -> None:
    """Write a data set of the first shards of another."""
    from d2i.shards import read_manifest, write_manifest

    manifest = read_manifest(str(whole / "test"))
    (part / "test").mkdir(parents=True)
    shutil.copy(whole / "recipe.json", part)
    kept = [name for shard in manifest.shards[:num] for name in (shard.tar_name, shard.index_name)]
    kept += [shard.commit_name for shard in manifest.shards[:num]]
    for name in (*kept, *manifest.files):
        shutil.copy(whole / "test" / name, part / "test")
    write_manifest(str(part / "test"), manifest.fingerprint)


def preprocess_command(
    chats: Path, out: Path, num_workers: int, settings: Iterable[str]
) -> list[str]:
    """Return the command that prepares chats."""
    words = ["preprocess", "--corpus", "jsonl", "--source", str(chats), "--out", str(out)]
    return [*words, "--recipe", "demo", "--workers", str(num_workers), *_set(settings)]


def command_of(job: Job, inputs: Inputs, out: Path) -> list[str]:
    """Return the command of a job whose inputs exist."""
    if job.stage == "preprocess":
        size = UNIT_SIZES["preprocess"]
        chats = inputs.chats(job.num_units * size, "train")
        settings = (*PREPROCESS_SETTINGS, f"encoders.vae={inputs.vae}", *_of_shards(size))
        return preprocess_command(chats, out, job.num_workers, settings)
    if job.stage == "train":
        data = inputs.prepared(max(HELD_OUT)) / "test"
        words = ["train", "--recipe", "demo", "--data", str(data), "--run", str(out)]
        steps = f"train.num_steps={job.num_units}"
        return [*words, "--num-accelerators", str(job.num_workers), *_set((*TRAIN_SETTINGS, steps))]
    words = ["eval", "--system", "uvit-s", "--weights", "demo:backbone", "--out", str(out)]
    words += ["--data", str(inputs.prepared(job.times)), "--save-images", "none", "--parallel"]
    words += ["--task-size", str(UNIT_SIZES["eval"]), "--workers", str(job.num_workers)]
    return [*words, *_set(EVAL_SETTINGS)]


def _of_shards(size: int) -> tuple[str, str]:
    return (
        f"encoders.compute_batch_size={size}",
        f"preprocess.num_samples_per_shard={size}",
    )


def _set(settings: Iterable[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def run(command: list[str], out: Path) -> float:
    """Run a command with its own cache directory; return its seconds."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [*D2I, *command],
            env={**os.environ, "XDG_CACHE_HOME": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{command[0]} into {out} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - began


def measure_job(job: Job, inputs: Inputs) -> dict[str, Any]:
    """Run a job; return its duration and the time at which each unit was done."""
    out = Path(tempfile.mkdtemp(dir=inputs.directory))
    command = command_of(job, inputs, out)
    wall_s = run(command, out)
    marks = sorted(_marks(job.stage, out))
    if len(marks) != job.num_units:
        raise SystemExit(f"{command}: {len(marks)} units done, expected {job.num_units}")
    shutil.rmtree(out)
    return {
        "stage": job.stage,
        "num_workers": job.num_workers,
        "times": job.times,
        "num_units": job.num_units,
        "wall_s": round(wall_s, 2),
        "marks_s": [round(mark - marks[0], 3) for mark in marks],
    }


def _marks(stage: str, out: Path) -> Iterator[float]:
    if stage == "train":
        for line in (out / "metrics.jsonl").read_text().splitlines():
            yield json.loads(line)["elapsed_s"]
        return
    pattern = "train/*.commit.json" if stage == "preprocess" else "tasks/*.npz"
    for path in out.glob(pattern):
        yield path.stat().st_mtime


def measure_images(inputs: Inputs) -> dict[str, float]:
    """Return CPU seconds per image of each worker's work, in this process with one thread."""
    from d2i.preprocess.job import PreprocessRequest, plan_job
    from d2i.preprocess.workers.encode_worker import EncodeWorkerBuilder
    from d2i.preprocess.workers.messages import ShardTask

    size = UNIT_SIZES["preprocess"]
    settings = [*PREPROCESS_SETTINGS, f"encoders.vae={inputs.vae}", *_of_shards(size)]
    recipe = resolve_recipe("demo", settings)
    with tempfile.TemporaryDirectory(dir=inputs.directory) as out:
        chats = inputs.chats(size * NUM_UNITS["preprocess"], "train")
        plan_job(PreprocessRequest("jsonl", str(chats), out, recipe))
        finisher = EncodeWorkerBuilder(recipe, (f"{out}/train",))()
        feed_s, finish_s = [], []
        for number in range(NUM_UNITS["preprocess"]):
            task = ShardTask(f"{out}/train", number)
            began = time.process_time()
            block = _opened(task, chats, recipe)
            fed = time.process_time()
            finisher.run(task, [block])
            feed_s.append((fed - began) / size)
            finish_s.append((time.process_time() - fed) / size)
    return {"feed_s": statistics.median(feed_s), "finish_s": statistics.median(finish_s)}


def _opened(task: Any, chats: Path, recipe: Recipe) -> list[Any]:
    """Read and decode the images of a shard, as a fetch worker does."""
    from d2i.fetch.result import FetchResult
    from d2i.images.image_files import read_image
    from d2i.images.sandbox import Decoder
    from d2i.preprocess.workers.fetch_worker import open_image

    fetch = recipe.fetch
    decoder = Decoder(recipe.image, fetch.decode_timeout_s, fetch.max_decode_mib)
    refs = [instance.image_ref for instance in task.read_instances()]
    files = (read_image(str(chats), ref.value[0], 1 << 24) for ref in refs)
    pairs = zip(refs, files, strict=True)
    block = [open_image(ref, FetchResult(data), decoder, is_kept=False) for ref, data in pairs]
    decoder.close()
    return block


def _seconds(work: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def measure_writing(inputs: Inputs) -> dict[str, float]:
    """Return the seconds of publishing a shard, and of each sample in it."""
    from d2i.shards import Sample, json_bytes, npy_bytes, write_shard

    arrays = {"moments": (8, 32, 32), "clip": (512,), "text": (77, 768)}
    members = {f"{n}.npy": npy_bytes(np.zeros(s, np.float16)) for n, s in arrays.items()}
    members["tokens.npy"] = npy_bytes(np.zeros(77, np.uint16))
    found = {}
    with tempfile.TemporaryDirectory(dir=inputs.directory) as out:
        for num in (1, 201):
            samples = [
                Sample(f"train-{n}-1-0", {"json": json_bytes({"n": n}), **members})
                for n in range(num)
            ]
            write = partial(write_shard, samples, out, 0, failures={})
            found[num] = _seconds(write, 7)
    sample_s = (found[201] - found[1]) / 200
    return {"shard_s": found[1] - sample_s, "sample_s": max(sample_s, 0.0)}


class Nothing:
    """A producer and consumer that does nothing, with `num_blocks` empty blocks per task."""

    def __init__(self, num_blocks: int = 0) -> None:
        self._num_blocks = num_blocks

    def stream(self, task: int) -> Iterator[int]:
        """Yield the blocks."""
        for number in range(self._num_blocks):
            yield task + number

    def run(self, task: int, blocks: Iterable[int] = ()) -> int:
        """Consume the blocks."""
        return task + sum(1 for _ in blocks)


def measure_driver() -> dict[str, float]:
    """Return the driver's CPU seconds per task and block, and a shared actor's calls per second."""
    from d2i.cluster import Session

    few, many = MANY_TASKS
    with Session(NUM_WORKERS) as session:
        session.start()
        # Each starts its workers again, which costs the same.
        least_s = _staged_s(session, few, 1)
        task_s = (_staged_s(session, many, 1) - least_s) / (many - few)
        block_s = (_staged_s(session, few, 1 + many) - least_s) / (few * many)
        pool_task_s = (_pooled_s(session, many) - _pooled_s(session, few)) / (many - few)
        calls_per_s = _calls_per_s(session.shared(Nothing()))
    return {
        "block_s": max(block_s, 0.0),
        "stages_task_s": max(task_s - block_s, 0.0),
        "pool_task_s": max(pool_task_s, 0.0),
        "shared_calls_per_s": calls_per_s,
    }


def _staged_s(session: Session, num_tasks: int, num_blocks: int) -> float:
    build = partial(Nothing, num_blocks)
    began = time.process_time()
    list(session.pipeline(build, build, range(num_tasks)))
    return time.process_time() - began


def _pooled_s(session: Session, num_tasks: int) -> float:
    began = time.process_time()
    list(session.map(Nothing, range(num_tasks)))
    return time.process_time() - began


def _calls_per_s(shared: Any, num: int = 4000) -> float:
    """Return the calls per second of a shared actor by 16 threads together."""
    from concurrent.futures import ThreadPoolExecutor

    shared.call("run", 0)
    began = time.perf_counter()
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda number: shared.call("run", number), range(num)))
    return num / (time.perf_counter() - began)


def make_commits(directory: Path, num: int) -> None:
    """Write commit records of shards of 1,000 samples, and their manifest."""
    from d2i.shards import write_manifest
    from d2i.shards.commit import Commit, shard_name

    sha256 = "ab" * 32
    file = {"size_bytes": 135_680_000, "sha256": sha256}
    arrays = {
        "moments": {"dtype": "float16", "shape": (8, 32, 32)},
        "clip": {"dtype": "float16", "shape": (512,)},
        "tokens": {"dtype": "uint16", "shape": (77,)},
        "text": {"dtype": "float16", "shape": (77, 768)},
    }
    for index in range(num):
        commit = Commit.model_validate(
            {
                "name": shard_name(index, sha256),
                "index": index,
                "num_samples": 990,
                "failures": {"timeout": 6, "too_small": 4},
                "tar": file,
                "index_file": file,
                "arrays": arrays,
            }
        )
        (directory / commit.commit_name).write_bytes(commit.to_bytes())
    write_manifest(str(directory), {})


def make_ledgers(directory: Path, num: int) -> None:
    """Write commit records, each with a ledger of 1,000 fetched images."""
    from d2i.preprocess.ledger import LedgerRow, write_ledger

    make_commits(directory, num)
    for index in range(num):
        rows = [
            LedgerRow(
                key=f"train-{index}-{row}-0",
                image=f"https://pictures.example.org/{index}/{row}.jpg",
                status="ok",
                reason="ok",
                detail="",
                attempts=1,
                http_status=200,
                final_url=f"https://pictures.example.org/{index}/{row}.jpg",
                size_bytes=40_000,
                width=400,
                height=300,
                sha256=f"{index:032x}{row:032x}",
                time_s=1.7e9,
            )
            for row in range(NUM_SHARD_SAMPLES)
        ]
        write_ledger(str(directory), index, rows)


def fold(directory: str) -> None:
    """Merge the commit records of a finished split into a manifest."""
    from d2i.shards import write_manifest

    write_manifest(directory, {})


def look_through(directory: str) -> None:
    """Search the ledger of a split for placeholders, in one pass."""
    from d2i.preprocess.placeholders import plan_retractions

    plan_retractions(directory, 10)


def open_shards(directory: str) -> None:
    """Open a data set, as every rank and worker does."""
    from d2i.shards import ShardReader

    len(ShardReader(directory))


def take_order(num_samples: str) -> None:
    """Compute the first global batch of two epochs, as every rank does."""
    from d2i.train.data.data_order import DataOrder

    sizes = (1000,) * (int(num_samples) // 1000)
    order = DataOrder(sizes, 0)
    order.global_batch(0, 4096)
    order.global_batch(int(num_samples) // 4096, 4096)


def score_images(num: str) -> None:
    """Score random features of CLIP's size, with Inception's classes."""
    import torch

    from d2i.eval.metrics.measured import Measured
    from d2i.eval.metrics.scores import instance_rows, score

    torch.set_num_threads(1)
    dice, count = np.random.default_rng(0), int(num)
    sizes = {"real_features": 512, "features": 512, "logits": 1008}
    sizes |= dict.fromkeys(("real_embeddings", "embeddings", "text_embeddings"), 512)
    arrays: dict[str, Any] = {
        name: dice.standard_normal((count, size), dtype=np.float32) for name, size in sizes.items()
    }
    arrays["keys"] = np.array([f"test-{number}-1-0" for number in range(count)])
    arrays["reasons"], arrays["sources"] = np.full(count, ""), np.full(count, "memory")
    arrays["is_flat"] = np.zeros(count, bool)
    measured = Measured(arrays)
    list(instance_rows(measured))
    score(measured, 256)


ALONE: dict[str, Callable[[str], None]] = {
    "fold": fold,
    "look_through": look_through,
    "open": open_shards,
    "order": take_order,
    "score": score_images,
}


def measure_alone(name: str, argument: str) -> None:
    """Measure one part in a fresh process, and print it as JSON."""
    began = time.process_time()
    ALONE[name](argument)
    seconds = time.process_time() - began
    print(json.dumps({"seconds": seconds, "bytes": peak_bytes()}))


def peak_bytes() -> int:
    """Return the peak memory of this process; `getrusage` would include the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _alone(name: str, argument: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--alone", name, argument]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure_growth(inputs: Inputs) -> dict[str, list[dict[str, float]]]:
    """Return CPU seconds and bytes of the parts that grow with a job, each at two sizes."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ALONE}

    def note(name: str, num: int, argument: str) -> None:
        found[name].append({"num": num, **_alone(name, argument)})

    for num in MANY_SHARDS:
        with tempfile.TemporaryDirectory(dir=inputs.directory) as directory:
            make_commits(Path(directory), num)
            size = sum(path.stat().st_size for path in Path(directory).glob("manifest*"))
            note("fold", num, directory)
            note("open", num, directory)
            found.setdefault("manifest", []).append({"num": num, "seconds": 0.0, "bytes": size})
    for num in MANY_LEDGERS:
        with tempfile.TemporaryDirectory(dir=inputs.directory) as directory:
            make_ledgers(Path(directory), num)
            note("look_through", num * NUM_SHARD_SAMPLES, directory)
    for num in MANY_SAMPLES:
        note("order", num, str(num))
    for num in MANY_IMAGES:
        note("score", num, str(num))
    return found


def measure_opening(inputs: Inputs) -> float:
    """Return CPU seconds of the first sample of a shard of 1,000."""
    from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard

    tokens = npy_bytes(np.zeros(77, np.uint16))
    with tempfile.TemporaryDirectory(dir=inputs.directory) as out:
        samples = (
            Sample(f"train-{n}-1-0", {"json": json_bytes({"n": n}), "tokens.npy": tokens})
            for n in range(NUM_SHARD_SAMPLES)
        )
        write_shard(samples, out, 0, failures={})
        write_manifest(out, {})
        found = []
        for _ in range(9):
            reader = ShardReader(out)
            began = time.process_time()
            reader.read([0])
            found.append(time.process_time() - began)
    return statistics.median(found)


def measure_parts(inputs: Inputs) -> dict[str, Any]:
    """Measure the costs of the parts of the jobs."""
    return {
        **measure_images(inputs),
        **measure_writing(inputs),
        **measure_driver(),
        "map_s": measure_opening(inputs),
        "growth": measure_growth(inputs),
    }


def machine() -> dict[str, object]:
    """Describe the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def jobs_of(asked: list[str]) -> list[Job]:
    """Return the jobs of one repeat."""
    fitted = [Job(s, w, t) for t in FITTED for s in NUM_UNITS for w in (1, NUM_WORKERS)]
    held_out = [Job(s, NUM_WORKERS, t) for t in HELD_OUT for s in NUM_UNITS]
    return (fitted if "fit" in asked else []) + (held_out if "check" in asked else [])


def measure(asked: list[str], repeats: int, inputs: Inputs) -> Iterator[dict[str, Any]]:
    """Run the requested measurements alternately; yield the results so far after each part."""
    # Written before any measurement starts.
    inputs.prepared(max(HELD_OUT))
    found: dict[str, Any] = {"machine": machine(), "unit_sizes": UNIT_SIZES}
    if "fit" in asked:
        found |= {"parts": measure_parts(inputs), "fitted": []}
    if "check" in asked:
        found["held_out"] = []
    for job in jobs_of(asked) * repeats:
        found["fitted" if job.times in FITTED else "held_out"].append(measure_job(job, inputs))
        yield found


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median seconds of each job."""
    names = {f"{r['stage']} {r['times']}x, {r['num_workers']} workers": r for r in runs}
    return {
        name: statistics.median(
            other["wall_s"]
            for other in runs
            if all(other[key] == one[key] for key in ("stage", "times", "num_workers"))
        )
        for name, one in names.items()
    }


def dumped(record: dict[str, Any]) -> str:
    """Return a record as JSON with each list of numbers on one line."""
    text = json.dumps(record, indent=1)
    return re.sub(r"\[[-\d.,\s]+\]", lambda m: " ".join(m[0].split()), text) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="+", choices=("fit", "check"))
    parser.add_argument("--photos", type=Path, required=True, help="Directory of JPEG files.")
    parser.add_argument(
        "--vae", type=Path, required=True, help="The weights file of an AutoencoderTiny."
    )
    parser.add_argument("--into", type=Path, required=True, help="The JSON file to write.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--beside", default="nothing else", help="Other load on the machine during the measurement."
    )
    return parser


def main() -> None:
    """Measure, write the file, and print one JSON line."""
    if sys.argv[1:2] == ["--alone"]:
        measure_alone(*sys.argv[2:4])
        return
    options = build_parser().parse_args()
    known = json.loads(options.into.read_text()) if options.into.exists() else {}
    known |= {"repeats": options.repeats, "beside": options.beside}
    with tempfile.TemporaryDirectory() as directory:
        inputs = Inputs(options.photos.resolve(), options.vae.resolve(), Path(directory))
        for found in measure(options.part, options.repeats, inputs):
            # After each part, so that a failure does not lose an hour of results.
            options.into.write_text(dumped({**known, **found}))
    print(json.dumps(medians([*found.get("fitted", []), *found.get("held_out", [])])))


if __name__ == "__main__":
    main()
