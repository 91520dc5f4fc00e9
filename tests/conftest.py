"""The tests' processes: each has its share of the processor's cores, and without a GPU Triton's kernels run in its interpreter.

Both are settled before torch and triton are first imported.
"""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

WORKERS = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if WORKERS is not None:  # in the process that starts the workers it is not set: what is set there they would inherit
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(WORKERS))))

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def shared_exports() -> Iterator[None]:
    """Equal attention modules are exported once a process; see `tests.shared_exports`."""
    if "hydrasurgery" not in sys.modules:
        yield
        return
    from hydrasurgery.ir import capture
    from tests.shared_exports import SharedExports

    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        from tests.interpreter import hasten

        hasten()
    shared = SharedExports()
    capture._export = shared
    yield
    capture._export = shared.export
