"""The card of a checkpoint and of an export, as the hub and a reader take it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, TEXT, VL, policy, processing, run_config
from huggingface_hub import ModelCard

from mm_agrae import config as configs
from mm_agrae.advantage import RULES
from mm_agrae.run import checkpoint
from mm_agrae.run.export import export
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.model_card import model_card
from mm_agrae.trainer import Trainer

SECTIONS = ["Training", "Evaluation", "Loading", "Versions", "Citation"]


def card_of(folder):
    card = ModelCard((Path(folder) / "README.md").read_text("utf-8"))
    assert re.findall("^## (.*)", card.text, re.MULTILINE) == SECTIONS
    assert str(ROOT) not in card.content  # a card is published, and no path of this machine is anybody's business
    return card


def row(label, before, at, after, k):
    """A line of the table, from the run folder's own results."""
    cells = [f"{100 * x.mean:.1f} % [{100 * x.low:.1f}, {100 * x.high:.1f}]" for x in (before, after)]
    return f"| {label} | 4 | {k} | {cells[0]} | {at} | {cells[1]} |"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A LoRA run of two steps with an evaluation before, between and after, which writes in the background."""
    folder = tmp_path_factory.mktemp("cards") / "my run"
    Trainer(
        run_config(
            folder,
            VL,
            model={"path": VL, "device": "cpu", "lora": {"rank": 24}},
            checkpoint={"every": 1, "background": True},
            evaluate={"every": 1},
            prompt={"instruction": "Think | first.\nThen answer."},
            advantage={"rule": "edge"},
        )
    ).train()
    return folder


def test_the_card_of_a_checkpoint(finished):
    results = {result.name: result.pass_at_k for result in RunFolder(finished).read_evaluations()}
    for step, name in ((1, "step_000001"), (2, "after")):
        folder = finished / "checkpoints" / f"step_00000{step}"
        card = card_of(folder)
        assert card.data.to_dict() == {
            "library_name": "peft",
            "pipeline_tag": "image-text-to-text",
            "tags": ["mm-agrae", "reinforcement-learning", "grpo", "edge"],
        }
        for text in (
            f"# my run, step {step}\n",
            "| learned | LoRA adapter, rank 24, alpha 32 |",
            "`edge`: base grpo, low 0.0, high inf",
            "`grpo`: ratio from 0.8 to 1.2, KL 0.0 |",
            r"| after each question | Think \| first. Then answer. |",
            "PeftModel.from_pretrained",
            "--max-lora-rank 32",
            "arxiv.org/abs/2507.21848",
            "arxiv.org/abs/2602.05548",
        ):
            assert text in card.text
        for k in (1, 2):
            assert row("test", results["before"][k], step, results[name][k], k) in card.text
        versions = json.loads((folder / checkpoint.STATE_FILE).read_text())["versions"]
        assert f"torch {versions['torch']}" in card.text
        # Whoever edits the card has damaged nothing; neither has an earlier version, which knew its checksum.
        (folder / "README.md").write_text(card.content.replace("# my run", "# Mine"))
        assert checkpoint.damaged(folder) == []
        (folder / "README.md").write_text(card.content)


def test_the_card_of_an_export(finished, tmp_path):
    export(finished, tmp_path / "out")
    card, before = card_of(tmp_path / "out"), card_of(finished / "checkpoints" / "latest")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert "LoRA merged into the weights, rank 24" in card.text
    assert "vllm serve THIS\n" in card.text
    assert re.findall(r"^\| test .*", card.text, re.MULTILINE) == re.findall(r"^\| test .*", before.text, re.MULTILINE)
    export(tmp_path / "out", tmp_path / "again")
    assert "# my run, step 2\n" in card_of(tmp_path / "again").text
    assert "There is none in the run's folder." in card_of(tmp_path / "again").text
    export(Path(TEXT), tmp_path / "plain")
    plain = ModelCard((tmp_path / "plain" / "README.md").read_text("utf-8"))
    assert re.findall("^## (.*)", plain.text, re.MULTILINE) == ["Loading", "Versions", "Citation"]
    assert plain.data.pipeline_tag == "text-generation"


def card(run, **sections):
    config = run_config(run, TEXT, **sections)
    return ModelCard(model_card(config, policy(TEXT), processing(TEXT), {"step": 1}, Path(run)))


def test_base_model_licence_and_data_come_from_the_files_here(tmp_path):
    cached = tmp_path / "models--Org--Base-7B" / "snapshots" / "0123"
    shutil.copytree(TEXT, cached)
    front = "license: other\nlicense_name: own\nlicense_link: https://example.org/licence"
    (cached / "README.md").write_text(f"---\n{front}\nbase_model: Org/Older\n---\n# Base\n")
    sources = [{"task": "geometry3k"}, {"task": "files", "path": "some/set"}, {"task": "files", "path": str(tmp_path)}]
    data = card(tmp_path / "run", model={"path": str(cached)}, data={"train": sources, "evaluate": []}).data.to_dict()
    known = {"license": "other", "license_name": "own", "license_link": "https://example.org/licence"}
    assert known.items() <= data.items()
    assert data["base_model"] == "Org/Base-7B"
    assert data["datasets"] == ["hiyouga/geometry3k", "some/set"]
    # A run that goes on from a checkpoint or an export goes back to the same model.
    shutil.copytree(TEXT, tmp_path / "export")
    (tmp_path / "export" / "README.md").write_text(card(tmp_path / "run", model={"path": str(cached)}).content)
    data = card(tmp_path / "run", model={"path": str(tmp_path / "export")}).data.to_dict()
    assert data["base_model"] == "Org/Base-7B"
    assert known.items() <= data.items()
    # Any other folder is no model of the hub, whatever its card says of its own base; and cards may be broken.
    (tmp_path / "export" / "README.md").write_text("---\nbase_model: Org/Older\nlicense: mit\n---\n")
    data = card(tmp_path / "run", model={"path": str(tmp_path / "export")}).data.to_dict()
    assert (data.get("base_model"), data["license"]) == (None, "mit")
    (tmp_path / "export" / "README.md").write_text("---\n{: [\n---\n")
    assert card(tmp_path / "run", model={"path": str(tmp_path / "export")}).data.base_model is None
    assert card(tmp_path / "run", model={"path": "Org/Elsewhere"}).data.base_model == "Org/Elsewhere"


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_cites_its_paper(rule, tmp_path):
    """The one of the line in docs/papers.md that names the rule."""
    lines = (ROOT / "docs" / "papers.md").read_text("utf-8").split("## Losses")[0].splitlines()
    line = next(i for i, line in enumerate(lines) if re.search(rf"[`=]{rule}`", line))
    while not (paper := re.search(r"\d{4}\.\d{5}", lines[line])):  # "the same, …": the paper of the line before
        line -= 1
    assert f"The rule `{rule}`: [arXiv {paper[0]}]" in card(tmp_path / "run", advantage={"rule": rule}).text


def test_a_damaged_evaluation_does_not_keep_a_checkpoint_from_being_written(tmp_path):
    result = tmp_path / "run" / "evaluations" / "before" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("{")
    assert "There is none in the run's folder." in card(tmp_path / "run").text


def test_sampling_and_ends_as_trained(finished, tmp_path):
    """What transformers and vLLM read by themselves; a plain model's own settings are kept."""
    from transformers import GenerationConfig

    export(finished, tmp_path / "out")
    rollout = configs.load(finished / "config.yaml").rollout
    for folder in (finished / "checkpoints" / "latest", tmp_path / "out"):
        read = GenerationConfig.from_pretrained(folder)
        assert (read.do_sample, read.temperature, read.top_p) == (True, rollout.temperature, rollout.top_p)
        assert (read.top_k, read.repetition_penalty) == (0, None)
        assert read.eos_token_id == list(processing(VL).eos_ids)
        assert read.suppress_tokens == list(processing(VL).forbidden_ids)
        assert read.pad_token_id == processing(VL).pad_id
    model = shutil.copytree(TEXT, tmp_path / "model")
    GenerationConfig(do_sample=True, repetition_penalty=1.05, eos_token_id=1).save_pretrained(model)
    export(model, tmp_path / "plain")
    assert GenerationConfig.from_pretrained(tmp_path / "plain").repetition_penalty == 1.05
