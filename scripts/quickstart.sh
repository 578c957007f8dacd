#!/usr/bin/env bash
# From a fresh clone to a trained vision-language checkpoint on a CPU: installs, trains the
# embedded default by A-GRAE, shows pass@k before and after. Arguments are config overrides:
#   ./scripts/quickstart.sh train.steps=20 advantage.rule=grpo --overwrite
# A finished quickstart is shown again, an interrupted one goes on; --overwrite begins anew.
source "$(dirname "$0")/environment.sh"
prepare_environment
exec mm-agrae quickstart "$@"
