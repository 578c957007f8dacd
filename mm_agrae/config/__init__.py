"""Settings: YAML files and `key=value` overrides -> one validated `Config`.

In: paths and overrides. Out: `Config`, an immutable tree of sections that every stage reads. Begin
with `schema.py`, which lists every setting; `reading.py` parses, `plan.py` works out what a config
amounts to, `objective.py` what it gives rule and loss, `plugins.py` finds code that a config names,
`shipped.py` files that come with the package.
"""

from mm_agrae.config.objective import rule_settings, uses_entropy
from mm_agrae.config.plan import contradictions, plan, total_steps
from mm_agrae.config.reading import dump, load, parse, parse_as, public, read
from mm_agrae.config.schema import (
    Config,
    DataSource,
    EvaluateSection,
    LoraSection,
    ModelSection,
    PromptSection,
    RewardSection,
    RolloutSection,
    SamplingSection,
)
