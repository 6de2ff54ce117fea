"""A system for tests: the demo's network, which logs a line for each generated image.

A line holds the key and the process id. If a gate file is named, each process generates one batch
and then waits until that file exists.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2i.eval.prompts import Prompt
from d2i.eval.system import Generation, System, SystemContext
from d2i.eval.systems import build_system, parse_system

LOG, GATE = "D2I_TEST_DRAWN", "D2I_TEST_GATE"


class Logged:
    """Generates as the wrapped system does, and logs each key."""

    def __init__(self, system: System, log: Path) -> None:
        self._system, self._log = system, log
        self._has_generated = False
        self.described: Mapping[str, Any] = system.described

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        gate = os.environ.get(GATE)
        while self._has_generated and gate and not Path(gate).exists():
            time.sleep(0.1)
        self._has_generated = True
        with self._log.open("a") as file:
            file.writelines(f"{prompt.key} {os.getpid()}\n" for prompt in prompts)
        return self._system.generate(prompts)


def build(context: SystemContext) -> Logged:
    spec = parse_system("uvit-s", "demo:backbone", context.recipe)
    inner = build_system(dataclasses.replace(context, spec=spec))
    return Logged(inner, Path(os.environ[LOG]))
