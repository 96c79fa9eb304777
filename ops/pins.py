"""Write the tested versions into pyproject.toml, as constraints without any address.

``uv lock`` resolves under these constraints, so ``uv sync``, CI and the images install the same versions, and no file
in the repository names a download host.

    python ops/pins.py             write what the present lock resolved
    python ops/pins.py --upgrade   drop the pins, resolve anew, write the result
    python ops/pins.py --check     exit 1 where the lock and the pins differ
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
BEGIN, END = "# pins: begin (python ops/pins.py)", "# pins: end"
_BLOCK = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), re.DOTALL)


def resolved() -> list[str]:
    """``name==version`` (with its marker) for everything that any extra or group brings."""
    command = ["uv", "export", "--no-hashes", "--all-extras", "--all-groups", "--no-emit-project", "--no-annotate"]
    command += ["--no-header", "--quiet"]
    out = subprocess.run(command, cwd=PROJECT.parent, capture_output=True, text=True, check=True).stdout
    return sorted({" ".join(line.split()) for line in out.splitlines() if "==" in line})


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
        if pinned != text:
            print("the pins in pyproject.toml differ from what resolves: run python ops/pins.py", file=sys.stderr)
            return 1
        return 0
    PROJECT.write_text(pinned)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
