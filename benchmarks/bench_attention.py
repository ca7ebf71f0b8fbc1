"""Attention over dense and ragged batches, and the merging of its partial results."""

OPERATIONS = ("flash_attention", "flash_attention_varlen", "merge_states")


def bench_attention(run, workload, backend):
    run(workload, backend)
