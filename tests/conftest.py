"""The tests' processes: each has its share of the processor's cores, and without a GPU Triton's kernels run in its interpreter.

Both are settled before torch and triton are first imported.
"""

import os

WORKERS = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if WORKERS is not None:  # in the process that starts the workers it is not set: what is set there they would inherit
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(WORKERS))))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
