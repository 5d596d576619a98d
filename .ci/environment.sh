# shellcheck shell=bash
# Sourced by run_tests.sh and run_demo.sh in the repository's root. Unless already done, makes .venv with
# all packages in the files of the array `requirements` (default: requirements.txt) and with the project
# itself: `import diht_jax` then works from any folder. Sets $python to the environment's Python.
# $PYTHON is the interpreter to build .venv with. The default is the first of python3.11, python3.12,
# python3.13 (the versions that requirements.txt supports) and python3 that runs.

python=.venv/bin/python
# Container images often set it. Every command would then compile all packages that it imports.
unset PYTHONDONTWRITEBYTECODE

# is_done FILE STATE: succeeds if .venv/FILE records that this state has been installed.
is_done() { [ "$(cat ".venv/$1" 2>/dev/null || true)" = "$2" ]; }

# version_of PYTHON: prints the version, such as 3.11; nothing if PYTHON cannot be run.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

find_python() {
  local name
  for name in python3.11 python3.12 python3.13 python3; do
    if [ -n "$(version_of "$name")" ]; then echo "$name"; return; fi
  done
}

if [ -n "${PYTHON:-}" ] && [ -f .venv/pyvenv.cfg ]; then
  # An environment keeps the Python that it was made with.
  present=$(sed -n 's/^version *= *\([0-9]*\.[0-9]*\).*/\1/p' .venv/pyvenv.cfg)
  requested=$(version_of "$PYTHON")
  if [ "$present" != "$requested" ]; then
    echo "error: .venv has Python $present, and PYTHON=$PYTHON is ${requested:-none}; rm -r .venv, or unset PYTHON" >&2
    exit 1
  fi
fi

requirements=("${requirements[@]:-requirements.txt}")
missing=
for file in "${requirements[@]}"; do
  is_done "installed_$file" "$(cksum < "$file")" || missing=yes
done
if [ -n "$missing" ]; then
  base=${PYTHON:-$(find_python)}
  if [ -z "$base" ] || ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed; found '${base:-none}'. Set PYTHON=/path/to/python3.11" >&2
    exit 1
  fi
  echo "Installing into .venv (once, a few minutes) ..." >&2
  [ -x "$python" ] || "$base" -m venv .venv || { rm -rf .venv; exit 1; }
  # Python compiles modules when they are imported, a small part of all installed files.
  "$python" -m pip install --quiet --no-compile --disable-pip-version-check "${requirements[@]/#/-r}" || {
    echo "error: ${requirements[*]} could not be installed. Meant for Python 3.11, 3.12 and 3.13; this is" \
      "$(version_of "$python"). For another one: rm -r .venv, and set PYTHON=/path/to/python3.13" >&2
    exit 1
  }
  for file in "${requirements[@]}"; do cksum < "$file" > ".venv/installed_$file"; done
fi

# Installs the project as a link to this folder, again if pyproject.toml or the folder's path changes.
# It needs no network, since hatchling is one of the requirements.
project_state="$(cksum < pyproject.toml) $PWD"
if ! is_done installed_project "$project_state"; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
  echo "$project_state" > .venv/installed_project
fi
