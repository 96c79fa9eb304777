"""The files that ``batch run`` writes, and what an earlier run left in them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from promptmill.batch.files.records import STDIN, Input
from promptmill.batch.files.sidecar import Sidecar, sidecar_path
from promptmill.errors import BadRequest, PromptmillError


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where results go, and how."""

    results: Path
    failures: Path
    overwrite: bool = False
    ordered: bool = False

    @classmethod
    def of(cls, results: Path, failures: Path | None, sample: int | None, *, overwrite: bool, ordered: bool) -> Outputs:
        """The files of a run; those of a sample have names of their own. Raises BadRequest."""
        if str(results) == STDIN:
            advice = "what went into a pipe cannot be gone on with. `batch submit`, then `batch results`, write to one"
            raise BadRequest(f"--output needs a file: {advice}", field="output")
        if sample is not None:
            results = results.with_name(f"{results.stem}.sample{results.suffix}")
        own = f"{results.stem if results.suffix == '.jsonl' else results.name}.failed.jsonl"
        found = cls(results, failures or results.with_name(own), overwrite, ordered)
        if found.failures.absolute() == found.results.absolute():
            raise BadRequest("results and failures need two files", field="failures")
        return found

    @property
    def sidecar(self) -> Path:
        """What lets the same command go on."""
        return sidecar_path(self.results)

    def check(self) -> None:
        """Raise where the results could not be written anyway, before much is done."""
        for path in (self.results, self.failures):
            if path.is_dir() or not path.parent.is_dir():
                reason = "it is a directory" if path.is_dir() else f"there is no directory {path.parent}"
                raise PromptmillError(f"{path} cannot be written: {reason}", code="cannot_write", retryable=False)

    def known(self, options: dict[str, JsonValue], source: Input) -> Sidecar | None:
        """What an earlier run left; None where there was none, or it shall be forgotten.

        Raises BadRequest where there is something that this command cannot go on with.
        """
        if self.overwrite:
            return self._unfinished(options, source)
        sidecar = Sidecar.load(self.sidecar)
        if sidecar is not None:
            sidecar.check(options, self.results)
            if not _is_of(sidecar, source):
                raise BadRequest(
                    f"{self.results} holds results of another input: {source.name} was changed since; give the same "
                    "input, or another file for the results, or --overwrite",
                    field="input",
                )
            return sidecar
        for path in (self.results, self.failures):
            with suppress(FileNotFoundError):
                if path.stat().st_size:
                    raise BadRequest(f"{path} exists; choose another file, or --overwrite", field="output")
        return None

    def _unfinished(self, options: dict[str, JsonValue], source: Input) -> Sidecar | None:
        # The same command must not begin anew, and pay again, because it was interrupted.
        try:
            sidecar = Sidecar.load(self.sidecar)
        except BadRequest:
            return None  # to be overwritten, whatever it is
        same = sidecar is not None and sidecar.stage != "complete" and sidecar.options == options
        return sidecar if same and sidecar is not None and _is_of(sidecar, source) else None


def _is_of(sidecar: Sidecar, source: Input) -> bool:
    return (source.size, source.digest()) == (sidecar.input_size, sidecar.input_sha256)
