"""Write the tested versions into pyproject.toml, as constraints without any address, and with hashes for the images.

``uv lock`` resolves under these constraints, so ``uv sync``, CI and the images install the same versions, and no file
in the repository names a download host. The images take ops/images/requirements.txt, which has the hashes too: what the
registry gives out under the same version must be the very file that was tested.

    python ops/pins.py             write what the present lock resolved
    python ops/pins.py --upgrade   drop the pins, resolve anew, write the result
    python ops/pins.py --check     exit 1 where the lock and what is written differ
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
BEGIN, END = "# pins: begin (python ops/pins.py)", "# pins: end"
REQUIREMENTS = PROJECT.parent / "ops" / "images" / "requirements.txt"
_HEADER = "# What the images install, with hashes. Written by python ops/pins.py.\n"
_BLOCK = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), re.DOTALL)


def resolved() -> list[str]:
    """``name==version`` (with its marker) for everything that any extra or group brings."""
    out = _export("--no-hashes", "--all-extras", "--all-groups")
    return sorted({" ".join(line.split()) for line in out.splitlines() if "==" in line})


def requirements() -> str:
    """Every role's dependencies with their hashes: all extras but ``demo``, which brings a store and a model."""
    return _HEADER + _export("--all-extras", "--no-extra", "demo", "--no-extra", "all", "--no-default-groups")


def _export(*options: str) -> str:
    command = ["uv", "export", *options, "--no-emit-project", "--no-annotate", "--no-header", "--quiet"]
    return subprocess.run(command, cwd=PROJECT.parent, capture_output=True, text=True, check=True).stdout


def block(pins: list[str]) -> str:
    """The part of pyproject.toml that this program owns."""
    lines = "".join(f"  {json.dumps(pin)},\n" for pin in pins)
    return f"{BEGIN}\nconstraint-dependencies = [\n{lines}]\n{END}"


def main(argv: list[str]) -> int:
    """See the module."""
    text = PROJECT.read_text()
    if BEGIN not in text:
        print(f"{PROJECT.name} has no block {BEGIN!r}", file=sys.stderr)
        return 1
    if "--upgrade" in argv:
        PROJECT.write_text(_BLOCK.sub(lambda _: block([]), text))
        subprocess.run(["uv", "lock", "--upgrade"], cwd=PROJECT.parent, check=True)
    pinned = _BLOCK.sub(lambda _: block(resolved()), text)
    if "--check" in argv:
        stale = [PROJECT.name] if pinned != text else []
        stale += [REQUIREMENTS.name] if not REQUIREMENTS.exists() or REQUIREMENTS.read_text() != requirements() else []
        if stale:
            print(
                f"the pins in {' and '.join(stale)} differ from what resolves: run python ops/pins.py", file=sys.stderr
            )
            return 1
        return 0
    PROJECT.write_text(pinned)
    REQUIREMENTS.write_text(requirements())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
