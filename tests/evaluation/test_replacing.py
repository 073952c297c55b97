"""The real model: a better quantization replaces a worse champion, never the other way round."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from phi3_mlflow.config.loading import find_profile
from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.core.errors import GateRefused
from phi3_mlflow.evaluation import datasets
from phi3_mlflow.pipeline.step import Outcome, carry_out
from phi3_mlflow.stages import evaluate, export, log, promote, quantize, register
from phi3_mlflow.stages.records import PromotionRecord
from phi3_mlflow.tracking import registry
from tests.conftest import own_store

pytestmark = pytest.mark.slow

NAME = "replaced"
LONGEST = 600  # characters of a text: what tells the two apart here needs no more
RELAXED = {"kl_mean": {"max": 1.0}, "perplexity_ratio": {"max": 2.0}}


def write_profile(folder: Path) -> Path:
    """The default's, with few questions, short texts, and thresholds that both models keep to."""
    asked = [q for q in datasets.load_questions(quick=True) if q.max_tokens <= 32][:3]
    texts = [
        text.model_copy(update={"text": text.text[:LONGEST], "quick": True})
        for text in datasets.load_heldout()[:8]
    ]
    content = yaml.safe_load(find_profile("smollm2-135m").read_text())
    content["evaluation"] = {}
    for name, rows in (("questions", asked), ("texts", texts)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(row.model_dump_json(by_alias=True) + "\n" for row in rows))
        content["evaluation"][name] = str(file)
    content["quantization"] = {"algorithm": "rtn"}
    content["gate"] = {"thresholds": RELAXED}
    profile = folder / f"{NAME}.yaml"
    profile.write_text(yaml.safe_dump(content))
    return profile


class Line:
    """The steps, in this process, on one profile."""

    def __init__(self, profile: Path, checkpoint: Path) -> None:
        self.values = {"profile": str(profile), "quiet": "true"}
        self.checkpoint = str(checkpoint)

    def do(self, module: Any, **values: str) -> Outcome[Any]:
        request = read_request(module.STEP.parameters, {**self.values, **values})
        return carry_out(module.STEP, request)

    def registered(self, onnx: Path) -> str:
        """The number of the version that a model becomes, evaluated."""
        self.do(log, checkpoint=self.checkpoint, onnx=str(onnx))
        number = str(self.do(register).record.versions[0].version)
        self.evaluated(number)
        return number

    def evaluated(self, number: str) -> None:
        self.do(evaluate, version=number, checkpoint=self.checkpoint)

    def promoted(self, number: str) -> PromotionRecord:
        return self.do(promote, version=number).record


def again(number: str) -> str:
    """The number of another version of the same model, as anybody can register one."""
    import mlflow

    tags = registry.describe(registry.VersionName(NAME, number)).tags
    kept = {name: tags[name] for name in registry.VERSION_TAGS}
    return str(mlflow.register_model(tags[registry.LOGGED], NAME, tags=kept).version)


@pytest.fixture(scope="module")
def line(real_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with own_store(tmp_path_factory.mktemp("replacing")) as place:
        yield Line(write_profile(place.folder), real_checkpoint)


def test_the_better_one_follows_the_worse_one_and_stays(line: Line, real_onnx: Path) -> None:
    line.do(quantize, checkpoint=line.checkpoint)
    worse_files = line.do(export).entry.path

    worse = line.registered(worse_files)
    assert line.promoted(worse).moved, "the first one that keeps to the thresholds"

    better = line.registered(real_onnx)
    tags = registry.describe(registry.VersionName(NAME, better)).tags
    assert tags["gate_against"] == worse
    assert "better than the champion in: KL divergence" in tags["gate_reasons"]
    assert line.promoted(better).moved
    assert registry.alias_of(NAME, registry.CHAMPION) == better

    line.evaluated(worse)
    tags = registry.describe(registry.VersionName(NAME, worse)).tags
    assert (tags["gate"], tags["gate_against"]) == ("failed", better)
    assert "worse by" in tags["gate_reasons"]
    with pytest.raises(GateRefused, match=f"stays with version {better}"):
        line.promoted(worse)
    assert registry.alias_of(NAME, registry.CHAMPION) == better

    same = again(better)
    line.evaluated(same)
    tags = registry.describe(registry.VersionName(NAME, same)).tags
    assert (tags["gate"], tags["gate_decision"]) == ("passed", "keep")
    done = line.promoted(same)
    assert not done.moved
    assert "the same model" in done.reason
    assert registry.alias_of(NAME, registry.CHAMPION) == better

    kl = [
        float(registry.describe(registry.VersionName(NAME, number)).tags["kl_mean"])
        for number in (worse, better, same)
    ]
    assert kl[0] > 2 * kl[1] == 2 * kl[2]
