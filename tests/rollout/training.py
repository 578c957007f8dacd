"""Short runs with an engine, and the evaluation that they must end with."""

from helpers import run_config

from mm_agrae.evaluation.evaluate import build_engine
from mm_agrae.progress import Reporter
from mm_agrae.tasks import load_all
from mm_agrae.trainer import Trainer


def small_trainer(tmp_path, path, engine, **sections):
    config = run_config(
        tmp_path / engine,
        path,
        rollout={"engine": engine, **sections.pop("rollout", {})},
        # Every completion teaches, so that two steps move the weights visibly.
        advantage={"rule": "w_reinforce"},
        evaluate={"before": False, "samples": 1},
        prompt={"max_tokens": 128},
        **sections,
    )
    return Trainer(config, Reporter(enabled=False))


def require_same_greedy_evaluation(tmp_path, trainer):
    """The run's last evaluation is that of its checkpoint by the reference engine."""
    config = trainer.config
    reference = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"engine": "hf", "overlap": False})}
    )
    greedy = config.evaluate.model_copy(update={"temperature": 0.0})
    task = load_all(config.data.evaluate)
    texts = []
    for source in (str(trainer.newest_checkpoint()), config.model.path):
        processing, _, engine = build_engine(reference, source)
        prompts = [processing.prompt(task[index]) for index in range(4)]
        groups = engine.generate(prompts, 1, greedy, range(4))
        texts.append([group[0].text for group in groups])
    (result,) = trainer.run.read_evaluations()
    samples = trainer.run.read_samples(result)
    evaluated = [sample["completion"] for sample in samples if sample["sample"] == -1]
    trained, untrained = texts
    assert evaluated == trained != untrained
