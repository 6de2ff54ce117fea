"""Share of a GPU's peak rates that d2i reaches: one command of at most eight minutes.

    python benchmarks/gpu.py --out gpu-benchmark
    python benchmarks/gpu.py --device cpu --size toy --minutes 2 --out toy

First the rate of matrix products, the memory bandwidth and the bandwidth of the link to the device;
then, as shares of those, training steps, sampling, AdamW, encoders and reading
(gpu_measurements.py). It requires PyTorch and this checkout; a measurement that needs any other
package is skipped if that is missing (README.md lists the packages to copy). Writes gpu.json and
gpu.md into `--out` after every row, so that a kill keeps the results. The time is divided among the
measurements; those that do not fit are "not reached".

`--table gpu.json` prints the Markdown of such a file again and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_measurements import list_measurements

WORKER = Path(__file__).resolve().with_name("gpu_measurements.py")
# Reserved for stopping the worker and for the last write.
RESERVE_S = 3.0
# A measurement that exceeds its time by more than this hangs, for example in a compiler.
GRACE_S = 10.0
USAGE = 2
HEAD = ("measurement", "", "ms: median (least to most; repeats)", "a second", "rate", "share")
Result = dict[str, Any]


def begin(options: argparse.Namespace, names: list[str]) -> Result:
    """Return a result without measurements."""
    return {
        "benchmark": "gpu",
        "device": options.device,
        "size": options.size,
        "minutes": options.minutes,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": 0.0,
        "is_finished": False,
        "machine": {},
        "measurements": {
            name: {"state": "not reached", "reason": "the time was over before it", "rows": []}
            for name in names
        },
    }


def write(directory: Path, result: Result) -> None:
    """Write both files, each atomically."""
    data = {"gpu.json": json.dumps(result, indent=1) + "\n", "gpu.md": table(result)}
    for name, text in data.items():
        with tempfile.NamedTemporaryFile("w", dir=directory, delete=False) as file:
            file.write(text)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(directory / name)


# --- The worker -----------------------------------------------------------------------------------


class Worker:
    """A measuring process and its JSON messages."""

    def __init__(self, options: argparse.Namespace, names: list[str], seconds: float) -> None:
        command = (sys.executable, str(WORKER), "--device", options.device, "--size", options.size)
        self._process = subprocess.Popen(
            [*command, "--seconds", str(seconds), "--", *names],
            stdout=subprocess.PIPE,
            # A new session, so that its children, such as compilers, are killed with it.
            start_new_session=True,
        )
        self.limit = time.monotonic() + seconds

    def messages(self) -> Iterator[Result]:
        """Yield its messages until it ends.

        Raises:
            TimeoutError: Once `limit` is reached.
        """
        assert self._process.stdout is not None
        pipe, rest = self._process.stdout.fileno(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, self.limit - time.monotonic())):
                    raise TimeoutError
                data = os.read(pipe, 1 << 16)
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n")
                yield from map(json.loads, lines)

    def stop(self, timeout_s: float = 0) -> int:
        """Kill it and its children, unless it ends by itself; return its exit status."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


class Run:
    """One run of the benchmark: its worker, its result and its output.

    Args:
        options: The command line options.
        names: The measurements, in order.
    """

    def __init__(self, options: argparse.Namespace, names: list[str]) -> None:
        self._options, self._waiting = options, list(names)
        self._started = time.monotonic()
        self._end = self._started + 60 * options.minutes - RESERVE_S
        self.result = begin(options, names)

    def measure(self) -> int:
        """Run all measurements that the time allows; return the exit status."""
        self._write()
        while self._waiting and self._left_s > 0:
            worker = Worker(self._options, self._waiting, self._left_s)
            num_waiting, current = len(self._waiting), ""
            try:
                for message in worker.messages():
                    current = self._take(message, current, worker)
                # Its output ends seconds before the process does.
                status = worker.stop(max(1.0, self._left_s))
                problem = f"its process ended with status {status}"
            except TimeoutError:
                problem = "stopped: it was over its time"
            finally:
                status = worker.stop()
            if current:
                self._fail(current, problem)
            elif len(self._waiting) == num_waiting and self._left_s > 0:
                # It measured nothing and has printed the reason; a new worker would fail as well.
                print(f"gpu.py: {problem}; see above", file=sys.stderr)
                return USAGE if status == USAGE else 1
        self.result["is_finished"] = True
        self._write()
        return 0

    def _take(self, message: Result, current: str, worker: Worker) -> str:
        """Record a message; return the measurement in progress after it."""
        if "machine" in message:
            self.result["machine"] = message["machine"]
        elif "begin" in message:
            current = message["begin"]
            self._waiting.remove(current)
            limit = time.monotonic() + 2 * message["seconds"] + GRACE_S
            worker.limit = min(self._end, limit)
        elif "end" in message:
            self._found(current).update(state=message["state"], reason=message["reason"])
            say(f"{current}: {message['state']}{because(message)}")
            current, worker.limit = "", self._end
        else:
            self._found(current)["rows"].append(self._with_share(message))
            say(f"{current}, {message['row']}: {' | '.join(filter(None, cells(message)))}")
        self._write()
        return current

    def _with_share(self, row: Result) -> Result:
        ceiling = row.get("ceiling")
        for measurement in self.result["measurements"].values():
            for known in measurement["rows"]:
                if ceiling and known.get("sets") == ceiling and known["state"] == "measured":
                    unit = "tflop_per_s" if "tflop_per_s" in known else "gb_per_s"
                    return row | {"share": float(f"{row[unit] / known[unit]:.3g}")}
        return row

    def _fail(self, name: str, problem: str) -> None:
        self._found(name).update(state="failed", reason=problem)
        say(f"{name}: {problem}")
        self._write()

    def _found(self, name: str) -> Result:
        found: Result = self.result["measurements"][name]
        return found

    @property
    def _left_s(self) -> float:
        return self._end - time.monotonic()

    def _write(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self._started, 1)
        write(self._options.out, self.result)


def say(line: str) -> None:
    """Print the progress."""
    print(line, file=sys.stderr, flush=True)


# --- The table ------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """Return the result as Markdown: the machine, and a row for each measurement."""
    lines = [about(result), "", row_line((*HEAD, "peak memory", "first call"))]
    lines.append(row_line(("---",) * (len(HEAD) + 2)))
    for name, measurement in result["measurements"].items():
        lines += [row_line((name, *cells(row))) for row in measurement["rows"]]
        if measurement["state"] != "measured" or not measurement["rows"]:
            lines.append(row_line((name, measurement["state"] + because(measurement), *[""] * 6)))
    lines += ["", "Shares are of the rates measured above, in the same precision."]
    return "\n".join(lines) + "\n"


def about(result: Result) -> str:
    """Describe the machine and the options in one line."""
    machine = result["machine"]
    if not machine:
        return "Nothing was measured."
    device = machine["device"]
    if "device_memory_gib" in machine:
        device += (
            f", {machine['device_memory_gib']} GiB, driver {machine['driver'] or 'unknown'}, "
            f"CUDA {machine['cuda']}"
        )
    ended_how = "" if result["is_finished"] else ", cut off"
    return (
        f"**{device}**; torch {machine['torch']}, Python {machine['python']}, "
        f"{machine['num_cpus']} cores of {machine['processor']}, {machine['memory_gib']} GiB; "
        f"size {result['size']}, {result['seconds']:.0f} s{ended_how}, {result['started']}"
    )


def cells(row: Result) -> tuple[str, ...]:
    """Return a row's cells except the measurement's name."""
    if row["state"] != "measured":
        return (f"{row['row']}: {row['state']}{because(row)}", *[""] * 6)
    ms = row["ms"]
    rates = [("tflop_per_s", "TFLOP/s"), ("gb_per_s", "GB/s")]
    return (
        row["row"],
        f"{ms['median']:g} ({ms['least']:g} to {ms['most']:g}; {ms['num']})",
        f"{row['a_second']:g} {row['unit']}" if "a_second" in row else "",
        next((f"{row[key]:g} {unit}" for key, unit in rates if key in row), ""),
        f"{row['share']:.1%} of {row['ceiling']}" if "share" in row else "",
        f"{row['peak_gib']:g} GiB" if row.get("peak_gib") is not None else "",
        f"{row['first_s']:g} s",
    )


def because(found: Result) -> str:
    """Return the reason why a measurement is missing, to follow its state."""
    return f": {found['reason']}" if found["reason"] else ""


def row_line(texts: tuple[str, ...]) -> str:
    """Return a line of a Markdown table."""
    return "| " + " | ".join(text.replace("|", "/") for text in texts) + " |"


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-benchmark"), metavar="DIR")
    parser.add_argument(
        "--minutes", type=float, default=8, help="wall-clock minutes for all measurements"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="only measurements whose name contains TEXT"
    )
    parser.add_argument("--list", action="store_true", help="print the measurements' names")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a gpu.json")
    return parser


def main() -> None:
    """Measure and write both files, or print the list or the table."""
    parser = build_parser()
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return
    wanted = options.only or [""]
    names = [measurement.name for measurement in list_measurements()]
    # The peak rates, to which the others are relative, are always measured.
    names = [n for n in names if n.startswith("device:") or any(text in n for text in wanted)]
    if options.list:
        print(*names, sep="\n")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options, names)
    status = run.measure()
    if status:
        raise SystemExit(status)
    print(table(run.result), end="")


if __name__ == "__main__":
    main()
