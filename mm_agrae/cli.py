"""The command line: mm-agrae quickstart | train | eval | data | sample | report | demo | ... (`mm-agrae --help`).

Each command imports what it needs when it runs, so `mm-agrae --help` is quick.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_agrae import __version__
from mm_agrae.config.shipped import config_file, config_names, found
from mm_agrae.errors import ConfigError, UserError, install, no_model
from mm_agrae.out_of_memory import explained
from mm_agrae.run.step_line import legend, show_summary

if TYPE_CHECKING:
    from mm_agrae.config import Config

OVERRIDE = "key=value|FILE.yaml"
"""Each changes the config that precedes it."""
CONFIG = "a YAML file, or the name of a shipped one"
ERRORS_WITHOUT_NOTICE = 0.01
"""The share of a run's completions whose reward may fail before `train` ends with status 3."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A UserError becomes one line and status 2."""
    arguments = _parse(argv)
    try:
        status = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # A reader such as `head` has closed the pipe; discard what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        stage = {_eval: "evaluate", _difficulty: "evaluate", _sample: "rollout"}.get(arguments.command, "loading")
        problem = explained(error, stage=stage)
        if not isinstance(problem, UserError):
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args((sys.argv[1:] if argv is None else argv) or ["--help"])
    if arguments.command is _serve:  # which parses its own options
        arguments.options = rest
        return arguments
    # argparse rejects positionals that follow an option, but overrides may appear anywhere.
    overrides = getattr(arguments, "overrides", None)
    if rest and (overrides is None or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides is not None:
        overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mm-agrae", description="Train vision-language and text models to reason, by GRPO with A-GRAE."
    )
    parser.add_argument("--version", action="version", version=f"mm-agrae {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(
        run: Callable[[Any], int], summary: str, *, config: str = "", nargs: str | None = None, **options: Any
    ) -> Callable[..., Any]:
        """Add the command that `run` carries out; returns what adds an argument to it. `config`: help of its first."""
        name = run.__name__.removeprefix("_")
        made = commands.add_parser(name, help=summary, description=run.__doc__, **options)
        made.set_defaults(command=run)
        if config:
            made.add_argument("config", nargs=nargs, help=config)
            made.add_argument("overrides", nargs="*", metavar=OVERRIDE)
        return made.add_argument

    _add_training(add)

    _add_evaluations(add)

    what = "a file, a folder, a hub id or a task, whose options may follow; or a config"
    argument = add(_data, "what a data set is read as, and its bad rows", config=what)
    argument("-n", type=int, default=3, help="how many rows to show")
    argument("--out", type=Path, help="also write them with their images to an .html page or a .png sheet")

    argument = add(_sample, "show a task's images and questions", config=CONFIG)
    argument("-n", type=int, default=12, help="how many examples")
    argument("--split", choices=["train", "evaluate"], default="train")
    argument("--completions", type=int, default=0, help="also sample this many of each")
    argument("--out", type=Path, default="sample.html", help="an .html page or a .png sheet")

    _add_variants(add)

    argument = add(_report, "one HTML page of a run")
    argument("runs", nargs="+", metavar="RUN", help="run folders")
    argument("--out", type=Path, default="compare.html", help="page for several runs")

    argument = add(_demo, "explore runs and query checkpoints in a browser")
    argument("paths", nargs="*", metavar="RUN|MODEL", help="besides the embedded ones")
    argument("--host", default="127.0.0.1", help="address to listen on (default: local)")
    argument("--port", type=int, default=0, help="default: a free one from 7860 on")
    argument("--share", action="store_true", help="open Gradio's public tunnel")
    argument("--allow-model-paths", action="store_true", help="let the browser name other models")
    argument("--no-browser", action="store_true", help="do not open a browser")

    argument = add(_export, "a plain Hugging Face checkpoint, LoRA merged")
    argument("source", help="a checkpoint, a LoRA adapter, or a run folder")
    argument("out", help="a new folder")
    argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    argument("--push", metavar="USER/NAME", help="also upload it to this repository of the hub, private if new")

    # Its options are in rollout/serve.py, --help among them.
    add(_serve, "a vLLM server for rollout.engine=vllm_server", add_help=False)
    add(_tasks, "list tasks and their options")
    add(_rules, "list advantage rules and their settings")

    argument = add(_doctor, "what this machine has, and what a config needs", config=CONFIG, nargs="?")
    argument("--gpus", type=int, help="plan for this many (default: those found here)")
    argument("--gpu-memory", type=float, metavar="GIB", help="memory of each (default: as found here)")
    argument("--parallel", choices=["multi_gpu", "fsdp2"], help="copies or shards (default: as the scripts do)")
    return parser


def _add_training(add: Callable[..., Any]) -> None:
    argument = add(_quickstart, "train the embedded model on this machine's CPU, in minutes")
    argument("overrides", nargs="*", metavar=OVERRIDE)
    argument("--overwrite", action="store_true", help="begin anew, with other settings perhaps")

    argument = add(_configs, "list the configs that come with mm-agrae, or print one")
    argument("name", nargs="?", help="print this one, as a start for one's own: > mine.yaml")

    raw: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    argument = add(_train, "train a model", config=CONFIG, epilog=legend(), **raw)
    argument("--overwrite", action="store_true", help="delete the run folder first if it holds a run")
    argument("--plan", action="store_true", help="print the plan and stop")
    argument("--launch-plan", action="store_true", help="print how the launch scripts start this, and stop")


def _add_evaluations(add: Callable[..., Any]) -> None:
    argument = add(_eval, "pass@k of one or more checkpoints")
    argument("overrides", nargs="+", metavar="MODEL|key=value")
    argument("--config", help="config with data.evaluate (default: the checkpoint's)")
    argument("--out", default="runs/eval", help="folder for results and all completions")
    argument("--launch-plan", action="store_true", help="print how the launch scripts start this, and stop")

    argument = add(_difficulty, "model ratings and failures against a human label; or D from rollouts")
    argument("overrides", nargs="*", metavar="MODEL|key=value")
    argument("--rollouts", type=Path, metavar="RUN", help="of no model, but from this run's completions")
    argument("--label", default="level", help="column or meta entry with the human difficulty (default: level)")
    argument("--rating", choices=["spoken", "uncertainty"], default="spoken", help="uncertainty: a stand-in")
    argument("--proficiency", default="none,low,average,high", help="any of these, joined by commas (default: all)")
    argument("--config", help="config with data.evaluate (default: the checkpoint's)")
    argument("--out", type=Path, help="a folder (default: runs/difficulty); with --rollouts, a file")

    argument = add(_study, "arms × seeds of one config, compared with intervals", config="a study file")
    argument("--jobs", type=int, default=1, help="runs at a time, one CPU thread each")
    argument("--quick", action="store_true", help="the small version that the file describes")
    argument("--arms", nargs="+", help="run only these")
    argument("--seeds", nargs="+", type=int, help="run only these")
    argument("--out", type=Path, default=Path("runs/studies"), help="folder of studies, which machines may share")
    argument("--tables", action="store_true", help="run nothing, make tables and figures of the records again")
    argument("--any-code", action="store_true", help="also take records that another version of the code made")


def _add_variants(add: Callable[..., Any]) -> None:
    what = "a problem's variants side by side; or other wordings and steps, by a chat model"
    argument = add(_variants, what, config=CONFIG)
    argument("-n", type=int, help="how many problems (default: 6; with --prepare, all)")
    argument("--out", type=Path, default="variants.html", help="an .html page")
    argument("--prepare", type=Path, metavar="FILE", help="write wordings and steps there")
    argument("--model", default="", help="the chat model of --prepare: a path, or its name at --address")
    argument("--address", default="", metavar="URL", help="OpenAI's chat completions, as http://127.0.0.1:8000/v1")


def _load(
    path: str, overrides: Sequence[str], *, to_run: bool = True, for_gpus: bool = False, quiet: bool = False
) -> Config:
    """The config, with its tasks, its rewards and its engine checked before a model is loaded.

    `to_run`: the engine is going to sample, so what it needs must be installed. `for_gpus`: see `config.load`, whose
    remarks the first process alone makes, unless `quiet`.
    """
    from mm_agrae import config as configs
    from mm_agrae import tasks
    from mm_agrae.rewards import Rewarder
    from mm_agrae.rollout.engine import engine_class

    def say(text: str) -> None:
        if not quiet and os.environ.get("RANK", "0") == "0":
            print(text, file=sys.stderr)

    config = configs.load(path, overrides, for_gpus=for_gpus, say=say)
    Rewarder(config.reward, config.rollout.max_new_tokens).close()
    for source in (*config.data.train, *config.data.evaluate):
        tasks.check(source)
    engine_class(config.rollout.engine, to_run=to_run)
    return config


def _require_model(what: str, name: str) -> None:
    """Refuse what cannot be a model, before anything that takes seconds to import."""
    if reason := no_model(found(name)):
        raise ConfigError(f"{what} {name!r}: {reason}")


def _require_suffix(out: Path | None, *suffixes: str) -> None:
    if out is not None and out.suffix.lower() not in suffixes:
        raise ConfigError(f"--out {out}: end the name in {' or '.join(suffixes)}, the formats that can be written")


def _show_launch_plan(config: Config) -> int:
    from mm_agrae.doctor import launch_plan

    print(*launch_plan(config, os.environ))
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    """Train the embedded model without a network; an interrupted quickstart goes on, a finished one is shown again."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return main(["train", "quickstart", *arguments.overrides, *["--overwrite"] * arguments.overwrite])


def _configs(arguments: argparse.Namespace) -> int:
    """The configs that every command takes by name. A file of one's own may begin with `base: NAME`."""
    if arguments.name:
        print(config_file(arguments.name).read_text(encoding="utf-8"), end="")
        return 0
    names = config_names()
    for name in names:
        comment = itertools.takewhile(lambda line: line[:2] == "# ", config_file(name).read_text("utf-8").split("\n"))
        sentence = " ".join(line[2:] for line in comment).split(". ")[0].split(": mm-agrae")[0]
        print(f"{name:{max(map(len, names))}}  {textwrap.shorten(sentence, 100, placeholder=' …')}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    """Train a model from a config; `key=value` changes one setting, FILE.yaml (or a shipped name) several."""
    planned = arguments.launch_plan  # by a launch script, which starts this command once more
    config = _load(arguments.config, arguments.overrides, to_run=not (arguments.plan or planned), quiet=planned)
    if not arguments.plan:
        _require_model("model.path", config.model.path)
    if planned:
        return _show_launch_plan(config)
    if arguments.plan:
        from mm_agrae import config as configs
        from mm_agrae.progress import Reporter
        from mm_agrae.tasks import load_all

        rows = len(load_all(config.data.train, on_bad_row=config.data.on_bad_row))
        Reporter().table(
            f"Plan of {config.run_dir}", ["what", "how much"], [list(line) for line in configs.plan(config, rows)]
        )
        return 0
    from mm_agrae.trainer import Trainer, delete_run
    from mm_agrae.view.report import write_report

    run_dir = Path(config.run_dir)
    if arguments.overwrite:
        delete_run(config)
    trainer = Trainer(config)
    summary = trainer.train()
    if trainer.is_main:
        trainer.reporter.say("")
        show_summary(trainer.reporter, summary)
        trainer.reporter.say(f"checkpoint  {trainer.newest_checkpoint()}")
        trainer.reporter.say(f"report      {write_report(run_dir)}")
        errors = summary["reward_errors"]
        for name, spans in summary["warnings"].items():
            steps = ", ".join(f"{first}-{last}" for first, last in spans)
            trainer.reporter.say(f"warning     {name} in steps {steps} (docs/warnings.md)")
        for kind, count in errors["kinds"].items():
            trainer.reporter.say(f"reward error, {count:,} times: {kind}")
        if errors["share"] > ERRORS_WITHOUT_NOTICE and not trainer.stop.exit_status:
            return 3
    return trainer.stop.exit_status


def _eval(arguments: argparse.Namespace) -> int:
    """Evaluate checkpoints side by side: pass@k with intervals, greedy accuracy, entropy, length.

    MODEL is a checkpoint folder, a run folder (its newest checkpoint), or a model id.
    """
    models, paths, config = _models(arguments, "eval", planned=arguments.launch_plan)
    if arguments.launch_plan:
        return _show_launch_plan(config)
    from mm_agrae.evaluation.evaluate import evaluate_checkpoints

    evaluate_checkpoints(models, paths, config, Path(arguments.out))
    return 0


def _models(
    arguments: argparse.Namespace, command: str, *, planned: bool = False
) -> tuple[list[str], list[str], Config]:
    """The models that a command names, what they stand for, and the config to evaluate them with.

    `planned`: a launch script asks, which starts the command once more.
    """
    given = arguments.overrides
    overrides = [item for item in given if "=" in item and not Path(item).exists()]
    models = [item for item in given if item not in overrides]
    if not models:
        raise ConfigError(f"{command}: name at least one model or checkpoint")
    for model in models:
        _require_model(command, model)
    from mm_agrae.evaluation.evaluate import checkpoints_and_config

    paths, config_path = checkpoints_and_config(models, arguments.config)
    return models, paths, _load(config_path, overrides, to_run=not planned, quiet=planned)


def _difficulty(arguments: argparse.Namespace) -> int:
    """Compare what models say of the difficulty of items, and whether they solve them, with a human label: Spearman,
    AUROC, Rasch abilities, saturation. MODEL is as for eval; several are examinees of one pool. With --rollouts RUN:
    how often each of a run's problems was solved, as a table that data.difficulty_from takes.
    """
    if arguments.rollouts:
        from mm_agrae.evaluation.alignment import from_rollouts

        out = arguments.out or arguments.rollouts / "problems.jsonl"
        return from_rollouts(arguments.rollouts, arguments.label, out)
    models, paths, config = _models(arguments, "difficulty")
    from mm_agrae.evaluation.alignment import measure

    out = arguments.out or Path("runs/difficulty")
    return measure(models, paths, config, out, arguments.label, arguments.rating, arguments.proficiency)


def _study(arguments: argparse.Namespace) -> int:
    """Train every arm of a study with every seed, evaluate, compare the arms, on OUT/NAME/index.html and results.md
    beside OUT. What is recorded is not done again, an interrupted run goes on; several machines may share OUT. Status
    1 if a run failed.
    """
    from mm_agrae.view.study import carry_out

    return carry_out(arguments)


def _data(arguments: argparse.Namespace) -> int:
    """Show what a data set is read as: format, columns, first rows, prompt lengths, bad rows, and gold answers that
    are graded as wrong. Of a path, `split=test` is an option of its task, and model.path=MODEL the model whose tokens
    are counted. Status 1 if a run would stop at a row.
    """
    _require_suffix(arguments.out, ".html", ".png")
    from mm_agrae.progress import Reporter
    from mm_agrae.view.sample import config_of, show_data

    config = config_of(arguments.config, arguments.overrides)
    return int(show_data(config, Reporter(), count=arguments.n, out=arguments.out) > 0)


def _sample(arguments: argparse.Namespace) -> int:
    """Show examples of a config's data: images, questions and gold answers."""
    _require_suffix(arguments.out, ".html", ".png")
    from mm_agrae.view.sample import write_samples

    config = _load(arguments.config, arguments.overrides, to_run=arguments.completions > 0)
    path = write_samples(
        config, split=arguments.split, count=arguments.n, completions=arguments.completions, out=arguments.out
    )
    print(path)
    return 0


def _variants(arguments: argparse.Namespace) -> int:
    """Show training problems beside all variants that keep their answer, for rollout.variants. With --prepare FILE:
    have a chat model word the problems otherwise and solve them in steps; what verifies is kept, for
    rollout.variants.prepared.
    """
    _require_suffix(arguments.out, ".html")
    config = _load(arguments.config, arguments.overrides, to_run=False)
    if arguments.prepare:
        from mm_agrae.evaluation.prepare import prepare

        chat = {"model": arguments.model, "address": arguments.address}
        return prepare(config, arguments.prepare, **chat, count=arguments.n)
    if arguments.model or arguments.address:
        raise ConfigError("variants: --model and --address ask a chat model; say by --prepare FILE where that is kept")
    from mm_agrae.view.variants import write_variants

    print(write_variants(config, count=arguments.n or 6, out=arguments.out))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    """Write RUN/report.html; of several runs, one page that compares them."""
    _require_suffix(arguments.out, ".html")
    from mm_agrae.view.report import write_report, write_runs_report

    if len(arguments.runs) == 1:
        print(write_report(Path(arguments.runs[0])))
    else:
        print(write_runs_report([Path(run) for run in arguments.runs], arguments.out))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    """Playground, run explorer, comparison and advantage lab in one local web page.

    Without arguments it opens on the embedded checkpoints and the example run.
    """
    from mm_agrae.view.demo_settings import require_address, settings_for

    require_address(arguments.host, arguments.port)
    settings = settings_for(
        arguments.paths,
        host=arguments.host,
        port=arguments.port,
        share=arguments.share,
        allow_model_paths=arguments.allow_model_paths,
        open_browser=not arguments.no_browser,
    )
    try:
        from mm_agrae_demo.app import launch
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "mm_agrae_demo"):
            raise
        raise ConfigError(f"demo: {error.name} is not installed; run {install('demo')}") from None
    launch(settings)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    """Write a trained policy as a checkpoint that transformers and vLLM load, LoRA merged."""
    _require_model("export", arguments.source)
    from mm_agrae.run.export import export

    made = export(Path(arguments.source), Path(arguments.out), arguments.dtype, push=arguments.push)
    print(f"{made.get('address', arguments.out)}  {made['parameters']:,} parameters, {made['dtype']}")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from mm_agrae.rollout.serve import serve

    return serve(arguments.options)


def _tasks(arguments: argparse.Namespace) -> int:
    from mm_agrae import tasks

    for name in tasks.TASKS:
        print(tasks.describe(name))
    return 0


def _rules(arguments: argparse.Namespace) -> int:
    from mm_agrae import advantage

    for name, rule in advantage.RULES.items():
        summary = (rule.__doc__ or "").strip().split("\n")[0]
        settings = ", ".join(advantage.accepted_settings(name)) or "no settings"
        print(f"{name:20} {summary}\n{'':20} {settings}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    """Print versions, devices and missing optional packages. With a config: whether this machine
    has its model, data and disk space, what the run will do, and an estimate of the GPU memory it
    needs, with settings that fit. Status 1 if something would stop the run.
    """
    from mm_agrae.doctor import examine, show_machine

    if arguments.config is None:
        show_machine()
        return 0
    for name in ("gpus", "gpu_memory"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= 1_000_000:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be above 0, and at most 1,000,000")
    for_gpus = bool(arguments.gpus or arguments.gpu_memory)
    config = _load(arguments.config, arguments.overrides, to_run=False, for_gpus=for_gpus)
    sharded = arguments.parallel == "fsdp2" if arguments.parallel else None
    problems = examine(config, gpus=arguments.gpus, gpu_memory=arguments.gpu_memory, sharded=sharded)
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
