# Sourced by run_tests.sh and run_demo.sh in the repository's root. Makes .venv with everything in
# requirements.txt and with the project itself, so that `import diht_jax` works from any folder, unless
# that has been done. Leaves the environment's Python in $python.
# $PYTHON names the interpreter to build it with; the default is python3.11, else python3.

python=.venv/bin/python

# is_done FILE STATE: whether .venv/FILE records that this state has been installed.
is_done() { [ "$(cat ".venv/$1" 2>/dev/null || true)" = "$2" ]; }

requirements_state=$(cksum < requirements.txt)
if ! is_done installed "$requirements_state"; then
  base=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
  if [ -z "$base" ] || ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed; found '${base:-none}'. Set PYTHON=/path/to/python3.11" >&2
    exit 1
  fi
  echo "Installing into .venv (once, a few minutes) ..." >&2
  [ -x "$python" ] || "$base" -m venv .venv
  "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
  echo "$requirements_state" > .venv/installed
fi

# The project, as a link to this folder: again where pyproject.toml or the folder's path has changed.
# It needs no network: setuptools is one of the requirements.
project_state="$(cksum < pyproject.toml) $PWD"
if ! is_done installed_project "$project_state"; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
  echo "$project_state" > .venv/installed_project
fi
