"""One module a case."""

from bench.cases import codec, large, latency, memory, read, replay, sizes, write
from bench.harness import Case

CASES: dict[str, Case] = {
    case.name: case
    for case in (write.CASE, read.CASE, replay.CASE, latency.CASE, large.CASE, sizes.CASE, codec.CASE, memory.CASE)
}
