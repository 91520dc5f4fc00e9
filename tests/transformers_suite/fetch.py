"""transformers' test files, from the source distribution of the installed version."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

PACKAGE = "transformers_tests"  # their `tests`, under a name that is not ours
# What test_modeling_common.py imports and the source distribution leaves out, which packs no folders inside of `tests`.
ABSENT = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def fetch(folder: Path) -> Path:
    """Have the tests under `folder`, once for each version; returns the path from which `transformers_tests` is imported."""
    root = folder / transformers.__version__
    package = root / PACKAGE
    if package.is_dir():
        return root
    with tempfile.TemporaryDirectory() as temporary:
        command = "pip download --quiet --no-deps --no-build-isolation --no-binary transformers --dest".split()
        wanted = f"transformers=={transformers.__version__}"
        subprocess.run([sys.executable, "-m", *command, temporary, wanted], check=True)
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            tests = [m for m in packed.getmembers() if m.isfile() and Path(m.name).parts[1] == "tests"]
            for member in tests:
                target = Path(temporary, PACKAGE, *Path(member.name).parts[2:])
                target.parent.mkdir(parents=True, exist_ok=True)
                content = packed.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())
        for name, text in ABSENT.items():
            path = Path(temporary, PACKAGE, name)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        root.mkdir(parents=True, exist_ok=True)
        Path(temporary, PACKAGE).rename(package)
    return root
