"""Mixture-of-experts layers."""

OPERATIONS = ("moe",)


def bench_moe(run, workload, backend):
    run(workload, backend)
