"""One module a case."""

from bench.cases import blocking, cluster, codec, imports, large, latency, memory, policy, read, replay, sizes, write
from bench.harness import Case

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        write.CASE,
        read.CASE,
        replay.CASE,
        latency.CASE,
        policy.CASE,
        large.CASE,
        sizes.CASE,
        codec.CASE,
        memory.CASE,
        imports.CASE,
        blocking.CASE,
        cluster.WRITE,
        cluster.READ,
        cluster.REPLAY,
    )
}
