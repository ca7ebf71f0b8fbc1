"""Matrix multiplication with quantized weights."""

OPERATIONS = ("quantized_matmul",)


def bench_quant(run, workload, backend):
    run(workload, backend)
