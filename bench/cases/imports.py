"""How long ``import aionpredis`` takes, in fresh processes, against what it cannot do without."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import ClassVar

from bench.harness import Case, Contender, Ratio, Sample

PROCESSES = 20


class Importing(Contender):
    """Bytecode is there from the second process on, as after an installation by pip."""

    statement: ClassVar[str]

    async def run(self) -> Sample:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        processes = self.work.size(PROCESSES)
        for _ in range(processes):
            subprocess.run([sys.executable, "-c", self.statement], env=environment, check=True)  # noqa: ASYNC221
        return Sample(processes, 0)


class Needed(Importing):
    name = statement = "import numpy, redis"


class Ours(Importing):
    name = statement = "import aionpredis"
    kind = "ours"


CASE = Case(
    "imports",
    "Fresh processes, with the interpreter's own start",
    (Needed, Ours),
    (Ratio("import_time", Ours.name, Needed.name, "<= 1.5", "cpu", smaller_is_better=True),),
    metrics=("rate", "cpu"),
)
