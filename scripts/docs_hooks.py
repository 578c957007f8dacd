"""Pages of the documentation site that are made when it is built (`hooks` in mkdocs.yml).

The tables of docs/configuration.md come from `mm_agrae.config.schema`; CHANGELOG.md and CONTRIBUTING.md become pages.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- settings -->"
"""Where the tables stand in docs/configuration.md."""
WIDE = ("papers.md", "peers.md", "support.md")
"""Pages of wide tables, which get the place of the table of contents."""
PLAIN = {
    "run_dir": "The folder that the run leaves everything in.",
    "model.attn_implementation": "As in transformers. Shared prompts need sdpa.",
    "model.gradient_checkpointing": "Compute activations again in the backward pass instead of keeping them.",
    "model.trust_remote_code": "Run code that comes with the checkpoint.",
    "model.device": "auto: a GPU if there is one.",
    "model.lora.rank": "Inner width of an adapter.",
    "model.lora.alpha": "An adapter's output is scaled by alpha / rank.",
    "model.lora.dropout": "Of an adapter's input.",
    "data.shuffle": "A new order in each epoch, by train.seed.",
    "data.train.task": "A task by name, or a class of yours; its options stand beside it.",
    "data.evaluate.task": "As under data.train.",
    "train.seed": "All randomness of training follows from it and the step.",
    "rollout.top_p": "1 keeps every token.",
    "rollout.max_new_tokens": "A completion is cut off here.",
    "rollout.vllm.tensor_parallel": "GPUs that one engine spreads the model over.",
    "rollout.vllm.enforce_eager": "Without CUDA graphs: less memory, slower.",
    "rollout.mismatch.probe_prompts": "Prompts compared.",
    "rollout.correct.reflect_cue": "What is appended in the branch reflect.",
    "rollout.correct.solution_text": "What takes the completion's place in the branch solution.",
    "rollout.dynamic_sampling.max_draws": "Rounds at most.",
    "reward.workers": "Processes that score completions.",
    "reward.memory_limit_mb": "Of one of them.",
    "reward.overlong.buffer_tokens": "Where the penalty begins, counted back from max_new_tokens.",
    "reward.overlong.penalty": "At max_new_tokens.",
    "advantage.rule": "See the page on advantage rules.",
    "update.clip_low": "As clip_high, below 1.",
    "update.entropy_coef": "Weight of the entropy bonus.",
    "update.entropy_step": "By how much.",
    "update.learning_rate": "Of AdamW, as the next two.",
    "update.schedule": "Of the learning rate, over all optimiser steps of the run.",
    "update.warmup_steps": "Optimiser steps over which the learning rate rises from 0.",
    "update.max_grad_norm": "Gradients with a larger norm are scaled down to it.",
    "evaluate.top_p": "1 keeps every token.",
    "evaluate.max_new_tokens": "A completion is cut off here.",
    "evaluate.before": "Evaluate the model that training starts from.",
    "evaluate.after": "Evaluate at the end.",
    "evaluate.batch_completions": "Completions generated at once on one device.",
    "evaluate.seed": "Of the samples; the same for every checkpoint.",
    "log.project": "Name under which trackers file the run.",
}
"""What the schema leaves to the names of its settings."""


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    if page.file.src_uri == "configuration.md":
        return markdown.replace(MARK, settings())
    return markdown.replace("](../CONTRIBUTING.md)", "](contributing.md)")


def settings() -> str:
    """A heading and a table for each section of the schema, as Markdown."""
    if str(ROOT) not in sys.path:  # the site can be built where the package is not installed
        sys.path.insert(0, str(ROOT))
    from mm_agrae.config import Config

    return "\n\n".join(_section(path, section) for path, section in sections(Config))


def sections(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Each section of the schema with its dotted key, outer ones first."""
    yield path, section
    for name, field in section.model_fields.items():
        if inner := _section_in(field.annotation):
            yield from sections(inner, f"{path}.{name}".lstrip("."))


def meanings(section: type[BaseModel]) -> dict[str, str]:
    """The docstring below each setting, those of base classes too."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            match field, text:
                case ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(meaning))):
                    found[ast.unparse(field.target)] = " ".join(meaning.split())
    return found


def _section(path: str, section: type[BaseModel]) -> str:
    properties, text = section.model_json_schema()["properties"], meanings(section)
    own = vars(section).get("__doc__") or ""
    rows = [
        f"| `{name}` | {_kind(properties[name], field, key)} | {_default(field)} "
        f"| {_cell(text.get(name) or PLAIN.get(key, ''))} |"
        for name, field in section.model_fields.items()
        for key in [f"{path}.{name}".lstrip(".")]
    ]
    head = ["| setting | value | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## {path or 'The whole config'}", "", _cell(" ".join(own.split())), "", *head, *rows])


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation is, or holds as one of its alternatives or entries."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _kind(schema: dict[str, Any], field: FieldInfo, path: str) -> str:
    if _section_in(field.annotation):
        return f"[{'a list of sections' if schema.get('type') == 'array' else 'a section'}](#{path.replace('.', '')})"
    return _cell(_value(schema))


def _value(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(_value(each) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_value(schema.get('items', {}))}" if "prefixItems" not in schema else "list of numbers"
    if kind == "object":
        return "mapping"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " ".join([{"string": "text", "boolean": "true, false"}.get(kind, kind), ", ".join(bounds)]).strip()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    if field.default is PydanticUndefined or isinstance(field.default, BaseModel):
        return "its defaults"
    return f"`{json.dumps(field.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
