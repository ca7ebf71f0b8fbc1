"""Mixture-of-experts layers."""

OPERATIONS = ("moe", "router_logits")


def bench_moe(run, workload, backend):
    run(workload, backend)
