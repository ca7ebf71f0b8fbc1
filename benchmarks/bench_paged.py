"""Attention over a paged cache, and the writing of new tokens into it."""

OPERATIONS = ("paged_attention", "append_kv")


def bench_paged(run, workload, backend):
    run(workload, backend)
