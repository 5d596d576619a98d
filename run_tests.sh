#!/usr/bin/env bash
# Makes .venv if it is missing, and runs the tests. Three processes share two cores, since many tests
# wait for processes that they start. A process that dies is not restarted, since it would repeat the
# test that killed it. Arguments go to pytest:
#   bash run_tests.sh -k contrastive
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
requirements=(requirements.txt requirements-dev.txt)
source .ci/environment.sh
"$python" -m ruff check --quiet .
"$python" -m ruff format --quiet --check .
exec "$python" -m pytest -n 3 --max-worker-restart=0 --dist loadfile --no-loadscope-reorder "$@"
