"""A system of the tests' own: the demo's network, with a line in a file for each picture drawn.

A line is the key and the process that drew it. Where a gate is named, each process draws once and
then waits until that file is there.
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
    """Draws as another system does, and keeps account."""

    def __init__(self, system: System, log: Path) -> None:
        self._system, self._log = system, log
        self._has_drawn = False
        self.described: Mapping[str, Any] = system.described

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        gate = os.environ.get(GATE)
        while self._has_drawn and gate and not Path(gate).exists():
            time.sleep(0.1)
        self._has_drawn = True
        with self._log.open("a") as file:
            file.writelines(f"{prompt.key} {os.getpid()}\n" for prompt in prompts)
        return self._system.generate(prompts)


def build(context: SystemContext) -> Logged:
    spec = parse_system("uvit-s", "demo:backbone", context.recipe)
    inner = build_system(dataclasses.replace(context, spec=spec))
    return Logged(inner, Path(os.environ[LOG]))
