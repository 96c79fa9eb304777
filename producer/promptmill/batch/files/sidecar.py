"""What the same command needs to go on where it was interrupted: a small file beside the results."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from promptmill.batch.files.writing import replace, writing
from promptmill.errors import BadRequest

SUFFIX: Final = ".promptmill.json"


class Sidecar(BaseModel):
    """A batch and its files.

    ``stage``: ``new`` before the batch exists for sure, ``created`` while lines are uploaded, ``sealed`` once all are,
    ``complete`` once every line stands in one of the files. ``options`` are those of the command that decide what is
    asked and what is written. ``ordered``: the results were sorted. ``skipped`` are numbers of lines left out.

    Everything before ``cursor`` among the lines that ended stood in the files when they had ``results_bytes`` and
    ``failures_bytes``. Where a file is smaller now the cursor means nothing.
    """

    model_config = ConfigDict(extra="ignore")

    version: Literal[1] = 1
    batch_id: str
    stage: Literal["new", "created", "sealed", "complete"] = "new"
    input_size: int
    input_sha256: str
    total: int
    chunk_lines: int
    format: str
    options: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue])
    ordered: bool = False
    skipped: list[int] = Field(default_factory=list[int])
    cursor: int = 0
    results_bytes: int = 0
    failures_bytes: int = 0

    @property
    def lines(self) -> int:
        """How many lines stand in the files once all is done, those that were left out among them."""
        return self.total + len(self.skipped)

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """What stands there; None where nothing does. Raises BadRequest for a file that is none of ours."""
        with writing(path):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return None
        try:
            return cls.model_validate_json(data)
        except ValidationError as err:
            what = err.errors(include_url=False)[0]
            where = ".".join(str(part) for part in what["loc"]) or "the file"
            raise BadRequest(
                f"{path} is not what this version writes there ({where}: {what['msg']}); choose another file for the "
                "results, or --overwrite",
                field="output",
            ) from None

    def save(self, path: Path) -> None:
        """Put this in the place of what stands there, at once and durably. Raises ``cannot_write``."""
        replace(path, self.model_dump_json(indent=1).encode() + b"\n")

    def check(self, options: dict[str, JsonValue], path: Path) -> None:
        """Raise BadRequest where the command has other options now, naming them."""
        for name in sorted(self.options.keys() | options.keys()):
            then, now = self.options.get(name), options.get(name)
            if then != now:
                raise BadRequest(
                    f"{path} holds results of this command with another {name} ({_shown(then)}, now {_shown(now)}); "
                    "give the same, or another file for the results, or --overwrite",
                    field=name,
                )


def sidecar_path(results: Path) -> Path:
    """Where the sidecar of a results file stands."""
    return results.with_name(results.name + SUFFIX)


def _shown(value: JsonValue) -> str:
    return "none" if value is None else repr(value)[:80]
