"""What somebody asks to have scored, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phi3_mlflow.trust.policy import OPEN

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from phi3_mlflow.trust.settings import TrustSettings


@dataclass(frozen=True)
class ScoringJob:
    """What somebody asks to have scored.

    Attributes:
        input: the file of rows.
        output: the file to write, of the same format.
        model_uri: resolved, of one version; never an alias.
        options: `max_tokens`, `temperature`, `top_p`, as far as they were given.
        seed: None draws one, which a resumed run takes from the journal.
        engine: `local` or `spark`.
        master: of Spark; None: this machine.
        workers: None: as many as fit.
        batch_size: rows that are handed out, and entered in the journal, together.
        batch: rows that a worker computes together, if the model can; 1: as `predict` would.
        force: begin anew whatever is there.
        trust: what is let through of a model.
    """

    input: Path
    output: Path
    model_uri: str
    options: Mapping[str, int | float] = field(default_factory=dict)
    seed: int | None = None
    engine: str = "local"
    master: str | None = None
    workers: int | None = None
    batch_size: int = 16
    batch: int = 8
    force: bool = False
    trust: TrustSettings = OPEN

    @property
    def journal(self) -> Path:
        """The file that keeps what is done until the output is written."""
        return self.output.with_name(self.output.name + ".journal")

    @property
    def record(self) -> Path:
        """The file that says what the output was made of."""
        return self.output.with_name(self.output.name + ".score.json")


@dataclass
class ScoringSummary:
    """What scoring came to.

    Attributes:
        rows: of the input.
        input_sha256: of the input, as hex.
        output_sha256: of the output, as hex; empty as long as there is none.
        failed: rows with an error.
        resumed: rows found in the journal.
        seconds: of the rows that were scored now.
        prompt_tokens: of all rows.
        completion_tokens: of all rows.
        new_tokens: completion tokens of the rows that were scored now.
        models_loaded: worker processes that loaded the model.
        was_there: the output of the same job was there, and nothing was done.
    """

    rows: int
    input_sha256: str
    output_sha256: str = ""
    failed: int = 0
    resumed: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    new_tokens: int = 0
    models_loaded: int = 0
    was_there: bool = False

    def metrics(self) -> dict[str, float]:
        """What a run logs; the rates are those of the rows that were scored now."""
        scored = self.rows - self.resumed
        return {
            "rows": self.rows,
            "failed": self.failed,
            "resumed": self.resumed,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "tokens_per_second": self.new_tokens / self.seconds if self.seconds else 0.0,
            "rows_per_second": scored / self.seconds if self.seconds else 0.0,
            "models_loaded": self.models_loaded,
        }
