"""Damaged prepared data: `verify` finds the damage, `repair` restores the same bytes."""

from __future__ import annotations

import json
import random
import shutil
import signal
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from d2i.cluster import Session
from d2i.errors import ShardError
from d2i.fault_injection import Fault
from d2i.fetch.sources import NetworkPolicy
from d2i.preprocess.job import PreprocessRequest
from d2i.preprocess.job import preprocess as run_job
from d2i.preprocess.ledger import read_ledger
from d2i.preprocess.repair import RepairRequest, RepairSummary, repair
from d2i.recipes import resolve_recipe
from d2i.shards import find_data_sets, read_commits, verify
from tests.integration.chats import noise_image, sends, write_chats
from tests.integration.commands import preprocess
from tests.processes import run_d2i, run_process
from tests.servers import WebServer, running
from tests.shared import needs_shared

pytestmark = needs_shared
NUM = 10
NUM_PER_SHARD = ("--set", "preprocess.num_samples_per_shard=3")


def write_corpus(directory: Path) -> Path:
    """Write two splits of image files, one file of each truncated."""
    directory.mkdir()
    for split, first in (("train", 0), ("test", NUM)):
        numbers = range(first, first + NUM)
        for n in numbers:
            data = noise_image(size=(64 + n, 64))
            (directory / f"{n}.jpg").write_bytes(data[:200] if n % NUM == 4 else data)
        lines = [
            {"id": f"c{n}", "turns": [{"text": f"look at {n}", "images": [f"{n}.jpg"]}]}
            for n in numbers
        ]
        (directory / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("repair")
    source = write_corpus(directory / "chats")
    preprocess("jsonl", source, directory / "data", *settings, *NUM_PER_SHARD)
    return directory / "data"


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "data"))


def contents(out: Path) -> dict[str, bytes]:
    """Return the files that `verify` covers, and the ledger files."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.parent.name != "plan" and not path.name.startswith(".d2i")
    }


def problems_of(out: Path) -> list[str]:
    return [p.reason for url in find_data_sets(str(out)) for p in verify(url).problems]


def repaired(out: Path) -> list[RepairSummary]:
    return repair(RepairRequest(str(out)), Session(0))


def only(out: Path, pattern: str) -> Path:
    """Return a file that matches the pattern in the train split, whose shards keep no images."""
    return sorted((out / "train").glob(pattern))[-1 if "empty" in pattern else 0]


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def cut_at_a_sample(path: Path) -> None:
    with tarfile.open(path) as file:
        cut(path, [m for m in file.getmembers() if m.name.endswith(".json")][1].offset)


def cut_in_a_member(path: Path) -> None:
    with tarfile.open(path) as file:
        cut(path, [m for m in file.getmembers() if "moments" in m.name][1].offset_data + 100)


def swap(path: Path) -> None:
    other = sorted(path.parent.glob(f"*{path.suffix}"))[1]
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def lose_all_but_the_tars(path: Path) -> None:
    for pattern in ("*.commit.json", "*.arrow", "manifest.json*"):
        for found in path.parent.glob(pattern):
            found.unlink()


def lose_the_shard_and_the_manifest(path: Path) -> None:
    for found in [*path.parent.glob(f"{path.stem}*"), *path.parent.glob("manifest*")]:
        found.unlink()


def leave_only_plan_and_ledger(path: Path) -> None:
    for found in path.parent.iterdir():
        if found.is_file():
            found.unlink()


def add_stray_shard(path: Path) -> None:
    """Add a shard that no manifest lists."""
    (path.parent / f"000009-{'0' * 16}.tar").write_bytes(path.read_bytes())


FILES = (
    *("*.tar", "*.arrow", "*.commit.json", "manifest.json", "manifest.json.sha256"),
    *("empty_tokens.npy", "empty_text.npy"),
)
DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    **{f"{name} missing": (name, Path.unlink) for name in FILES},
    **{f"{name} cut": (name, lambda p: cut(p, p.stat().st_size // 2)) for name in FILES},
    **{f"{name} empty": (name, lambda p: cut(p, 0)) for name in FILES},
    "cut at a sample": ("*.tar", cut_at_a_sample),
    "cut in a member": ("*.tar", cut_in_a_member),
    "tars swapped": ("*.tar", swap),
    "indexes swapped": ("*.arrow", swap),
    "tail": ("*.tar", lambda p: p.write_bytes(p.read_bytes() + b"\0" * 512)),
    "only the tars left": ("*.tar", lose_all_but_the_tars),
    "a shard and the manifest lost": ("*.tar", lose_the_shard_and_the_manifest),
    "only plan and ledger left": ("*.tar", leave_only_plan_and_ledger),
    "an unlisted shard": ("*.tar", add_stray_shard),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_repair_restores_same_bytes_after_damage(case: str, copy: Path) -> None:
    good = contents(copy)
    pattern, damage = DAMAGE[case]
    damage(only(copy, pattern))
    assert contents(copy) != good
    assert problems_of(copy)
    assert [summary.problems for summary in repaired(copy)] == [(), ()]
    assert contents(copy) == good


@pytest.mark.parametrize("seed", range(24))
def test_repair_restores_same_bytes_after_bit_flips(seed: int, copy: Path) -> None:
    """One bit in each of one to three files, anywhere."""
    good = contents(copy)
    rng = random.Random(seed)
    paths = [copy / name for name in good if "ledger" not in name and name != "recipe.json"]
    for path in rng.sample(paths, 1 + seed % 3):
        flip(path, rng.randrange(path.stat().st_size * 8))
    assert problems_of(copy)
    assert [summary.problems for summary in repaired(copy)] == [(), ()]
    assert contents(copy) == good


def break_sample(out: Path, number: int) -> None:
    """Flip a bit in the moments of one sample."""
    for path in (out / "test").glob("*.tar"):
        with tarfile.open(path) as file:
            for member in file.getmembers():
                if member.name == f"test-c{number}-0-0.moments.npy":
                    flip(path, (member.offset_data + 200) * 8)
                    return
    raise AssertionError(f"no sample of {number}")


def test_repair_refetches_only_lost_images(tmp_path: Path, settings: list[str]) -> None:
    """Also for samples of supplements; an image that is gone is reported."""
    answers = {f"/{n}": sends(noise_image(size=(64 + n, 64))) for n in range(8)}
    late = {f"/{n}": sends(b"", 500) for n in (1, 6)}
    with running(WebServer("127.0.0.1", answers | late | {"/8": sends(b"", 404)})) as web:
        host = f"127.0.0.1:{web.port}"
        urls = {f"c{n}": [f"http://{host}/{n}"] for n in range(9)}
        source, out = write_chats(tmp_path / "chats", urls), tmp_path / "data"
        recipe = resolve_recipe("demo", [*settings, *NUM_PER_SHARD][1::2])
        network_policy = NetworkPolicy(frozenset({host}))
        job = PreprocessRequest("jsonl", str(source), str(out), recipe)
        prepare = partial(run_job, job, Session(0), lambda _: None, network_policy=network_policy)
        prepare()
        web.answers.update(answers)
        prepare(retry_failed=True)
        good, ledger = contents(out), read_ledger(str(out / "test"))
        request = RepairRequest(str(out / "test"))
        repair_again = partial(repair, request, Session(0), network_policy=network_policy)

        web.asked.clear()
        break_sample(out, 3)
        break_sample(out, 6)
        assert repair_again()[0].problems == ()
        assert sorted(web.asked) == ["/3", "/6"]
        assert contents(out) == good

        for commit in read_commits(str(out / "test")):
            (out / "test" / commit.tar_name).unlink()
            (out / "test" / commit.index_name).unlink()
        web.asked.clear()
        assert repair_again()[0].problems == ()
        assert sorted(web.asked) == [f"/{n}" for n in range(8)], "404 is not asked again"
        assert contents(out) == good
        assert_lost_supplements_lose_no_sample(out, repair_again)

        web.answers["/3"] = sends(b"", 404)
        break_sample(out, 3)
        broken = contents(out)
        (issue, *_) = repair_again()[0].problems
        assert (issue.reason, issue.detail) == (
            "repair",
            "some images could not be fetched or encoded again: 1 http_404",
        )
        web.answers["/3"] = sends(noise_image("PNG"))
        assert (
            "has other bytes; an image or a version changed" in repair_again()[0].problems[0].detail
        )
        assert contents(out) == broken, "nothing else stands under the shard's name"
        assert read_ledger(str(out / "test")) == ledger


def assert_lost_supplements_lose_no_sample(
    out: Path, repair_again: Callable[[], list[RepairSummary]]
) -> None:
    """Without supplements.json no record is dropped, and the checksum reveals lost ones."""
    good, supplements = contents(out), out / "test" / "plan" / "supplements.json"
    planned = supplements.read_bytes()
    supplements.unlink()
    flip(out / "test" / "manifest.json", 400)
    assert repair_again()[0].problems == ()
    assert contents(out) == good

    last = read_commits(str(out / "test"))[-1]
    for name in (last.tar_name, last.index_name, last.commit_name):
        (out / "test" / name).unlink()
    flip(out / "test" / "manifest.json", 400)
    broken = contents(out)
    assert "does not match manifest.json.sha256" in repair_again()[0].problems[0].detail
    assert contents(out) == broken, "nothing is written that leaves a shard out"
    supplements.write_bytes(planned)
    for name, content in good.items():
        (out / name).write_bytes(content)


def test_killed_repair_resumes(copy: Path) -> None:
    good = contents(copy)
    only(copy, "*.tar").unlink()
    only(copy, "*.arrow").unlink()
    command = ("repair", copy, "--workers", "0", "--json")
    killed = run_process(*command, "--fault", "shard.written:kill:1")
    assert killed.returncode == -signal.SIGKILL
    assert run_process("verify", copy).returncode == 1
    test, train = sorted(run_d2i(*command)["data_sets"], key=lambda found: found["folder"])
    assert (test["made"], test["mended"], test["problems"]) == ([], [], [])
    assert (train["made"], train["problems"]) == ([only(copy, "*.tar").stem], [])
    assert contents(copy) == good


@pytest.mark.soak
def test_repair_replaces_killed_ray_worker(copy: Path) -> None:
    good = contents(copy)
    only(copy, "*.tar").unlink()
    fault = Fault("shard.tar", "kill", 1)
    with Session(1, fault=fault) as session:
        (summary,) = repair(RepairRequest(str(copy / "train")), session)
    assert summary.problems == ()
    assert contents(copy) == good


def test_repair_without_plan_restores_index_and_commit(copy: Path) -> None:
    """As for shards of other programs: nothing records the sources of the images."""
    shutil.rmtree(copy / "train" / "plan")
    (copy / "recipe.json").unlink()
    good = contents(copy)
    only(copy, "*.arrow").unlink()
    only(copy, "*.commit.json").unlink()
    assert repaired(copy / "train")[0].problems == ()
    assert contents(copy) == good
    only(copy, "*.tar").unlink()
    (problem,) = repaired(copy / "train")[0].problems
    assert problem.reason == "missing"


def test_repair_without_plan_and_manifest_deletes_nothing(copy: Path) -> None:
    """Commit record and manifest damaged, and no plan: the tar may be the only copy."""
    shutil.rmtree(copy / "train" / "plan")
    flip(copy / "train" / "manifest.json", 400)
    flip(only(copy, "*.commit.json"), 400)
    broken = contents(copy)
    assert "fingerprint of its shards is missing" in repaired(copy / "train")[0].problems[0].detail
    assert contents(copy) == broken


def test_stray_tar_is_deleted_only_with_manifest_checksum(copy: Path) -> None:
    good, manifest = contents(copy), copy / "train" / "manifest.json"
    add_stray_shard(only(copy, "*.tar"))
    manifest.unlink()
    assert repaired(copy / "train")[0].problems == ()
    assert contents(copy) == good
    add_stray_shard(only(copy, "*.tar"))
    stray = only(copy, "000009-*.tar")
    manifest.unlink()
    (copy / "train" / "manifest.json.sha256").unlink()
    (issue, *_) = repaired(copy / "train")[0].problems
    assert (issue.file, stray.exists(), manifest.exists()) == (stray.name, True, False)
    stray.unlink()
    assert repaired(copy / "train")[0].problems == ()
    assert contents(copy) == good


def test_lost_job_files_are_reported_and_plan_is_restored(
    copy: Path, data: Path, settings: list[str]
) -> None:
    """The same command writes the plan again; a ledger is lost for good, but no reader needs it."""
    good = contents(copy)
    shutil.rmtree(copy / "train" / "plan")
    (copy / "recipe.json").unlink()
    lost = sorted((copy / "train" / "ledger").glob("*.parquet"))[1]
    lost.unlink()
    found = run_process("repair", copy, "--workers", "0")
    assert found.returncode == 0, found.stderr
    train = copy / "train"
    for line in (
        f"{train}/recipe.json: missing; it is needed only to remake shards",
        f"{train}/plan/plan.json and 4 more: missing; it is needed only",
        f"{train}/ledger/000001.parquet: missing, and cannot be restored; the manifest still",
    ):
        assert line in found.stdout
    preprocess("jsonl", data.parent / "chats", copy, *settings, *NUM_PER_SHARD)
    assert contents(copy) == {
        name: content for name, content in good.items() if name != str(lost.relative_to(copy))
    }
    only(copy, "*.tar").unlink()
    (summary, _) = sorted(repaired(copy), key=lambda one: one.folder, reverse=True)
    assert summary.problems == ()
    (note,) = summary.notes
    assert note.startswith("ledger/000001.parquet: missing")


def test_repair_with_changed_settings_raises(copy: Path) -> None:
    recipe = json.loads((copy / "recipe.json").read_text())
    plan = json.loads((copy / "train" / "plan" / "plan.json").read_text())
    plan["decided_by"]["recipe"]["encoders"]["compute_batch_size"] = 4
    (copy / "train" / "plan" / "plan.json").write_text(json.dumps(plan))
    (copy / "train" / "plan" / "plan.json.sha256").unlink()
    assert recipe["encoders"]["compute_batch_size"] == 8
    only(copy, "*.tar").unlink()
    with pytest.raises(ShardError, match=r"got image\.compute_batch_size: 4, expected 8"):
        repaired(copy / "train")
