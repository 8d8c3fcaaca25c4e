"""What every test stands on: one thread, the same random examples every time, and shapes that are checked."""

import os
import sys
from importlib.machinery import PathFinder

from hypothesis import settings
from jaxtyping import install_import_hook

# Before torch is first imported, and inherited by the processes that tests start: their models are so small that
# threads would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
# Before Triton is first imported: without a GPU its kernels are interpreted (tests/triton_paths.py).
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=2000)  # pytest --hypothesis-profile=explore
settings.load_profile("ci")

# From here on every call into the ops checks the shapes and dtypes that its signature states.
install_import_hook("crocuta.ops", "beartype.beartype")


class _AsTheyAre:
    """Modules of kernels that Triton compiles from their source: nothing may be wrapped around those."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path) if name.startswith("crocuta.ops.kernels.triton.") else None


sys.meta_path.insert(0, _AsTheyAre)  # type: ignore[arg-type]
