#!/usr/bin/env bash
# Makes .venv where it is missing, then runs the tests, in three processes for two cores, since many
# tests wait for processes that they start. One that dies is not started again, since it would run the
# test that it died of once more. Arguments go to pytest:
#   bash run_tests.sh -k contrastive
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
requirements=(requirements.txt requirements-dev.txt)
source .ci/environment.sh
"$python" -m ruff check --quiet .
"$python" -m ruff format --quiet --check .
exec "$python" -m pytest -n 3 --max-worker-restart=0 --dist loadfile --no-loadscope-reorder "$@"
