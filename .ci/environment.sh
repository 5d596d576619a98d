# Sourced by run_tests.sh and run_demo.sh in the repository's root: makes .venv with everything in
# requirements.txt unless that has been done, and leaves its Python in $python.
# $PYTHON names the interpreter to build it with; the default is python3.11, else python3.

python=.venv/bin/python
wanted=$(cksum < requirements.txt)
if [ "$(cat .venv/installed 2>/dev/null || true)" != "$wanted" ]; then
  base=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
  if [ -z "$base" ] || ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed; found '${base:-none}'. Set PYTHON=/path/to/python3.11" >&2
    exit 1
  fi
  echo "Installing into .venv (once, a few minutes) ..." >&2
  [ -x "$python" ] || "$base" -m venv .venv
  "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
  echo "$wanted" > .venv/installed
fi
