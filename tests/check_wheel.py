"""Build the wheel, install it beside the tested dependencies, and prune a tiny model with it from another folder."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

PRUNE = """
import prunelm, sys
from prunelm.testing import tiny_model
assert sys.argv[1] in prunelm.__file__, prunelm.__file__
tiny_model("llama").save_pretrained("dense")
report = prunelm.prune("dense", "pruned", recipe="l2", sparsity=0.3, multiple_of=1)
assert report.parameters_after < report.parameters_before
"""


def run(*command: str, cwd: Path, **env: str) -> None:
    """Run a command; its failure is ours."""
    subprocess.run(command, cwd=cwd, check=True, env={**os.environ, **env}, stdout=subprocess.DEVNULL)


def main() -> None:
    """Build, install, prune."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", scratch, str(ROOT), cwd=ROOT)
        (wheel,) = folder.glob("*.whl")
        site = folder / "site"
        run(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(site),
            str(wheel),
            cwd=folder,
        )
        run(sys.executable, "-m", "prunelm", "--help", cwd=folder, PYTHONPATH=str(site))
        run(sys.executable, "-c", PRUNE, str(site), cwd=folder, PYTHONPATH=str(site))
    print("wheel: built, installed, pruned a tiny model")


if __name__ == "__main__":
    main()
