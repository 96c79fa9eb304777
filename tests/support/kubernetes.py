"""The manifests of ops/kubernetes, put together by Kustomize as ``kubectl apply -k`` does it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from tests.support.docs import ROOT

FOLDER: Final = ROOT / "ops" / "kubernetes"

Object = dict[str, Any]


@cache
def _built(folder: Path) -> str:
    kubectl = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
    assert kubectl is not None, "kubectl is in the group manifests"
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=120, check=False)
    # It warns of what is deprecated, and goes on.
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def build(folder: Path = FOLDER) -> list[Object]:
    """All objects of a folder with a kustomization."""
    return list(yaml.safe_load_all(_built(folder)))


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    """Those of a kind, by their names."""
    return {found["metadata"]["name"]: found for found in objects if found["kind"] == kind}


def container(deployment: Object) -> Object:
    """The one container of its pods."""
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return only


def selected(objects: list[Object], labels: dict[str, str]) -> Iterator[str]:
    """The names of the deployments whose pods have all of ``labels``."""
    for name, deployment in of_kind(objects, "Deployment").items():
        if labels.items() <= deployment["spec"]["template"]["metadata"]["labels"].items():
            yield name
