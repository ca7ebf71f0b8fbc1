"""The small operations around attention and the matrix multiplications."""

OPERATIONS = (
    "rms_norm",
    "layer_norm",
    "rotary_embedding",
    "swiglu",
    "geglu",
    "sample",
)


def bench_fused(run, workload, backend):
    run(workload, backend)
