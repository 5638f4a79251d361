#!/usr/bin/env bash
# Installs into a virtual environment ($VENV, default .venv) and runs the tests. Arguments go to pytest.
# $CONSTRAINTS is the file that pins versions, by default constraints-cpu.txt.
set -euo pipefail
cd "$(dirname "$0")"
venv="${VENV:-.venv}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "${CONSTRAINTS:-constraints-cpu.txt}" -e ".[test]"
# With it, every process that a test starts would compile the package anew.
unset PYTHONDONTWRITEBYTECODE
# One thread a worker: the models in the tests are tiny, and threads of several workers would fight for the cores.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" exec "$venv/bin/python" -m pytest -n "${WORKERS:-2}" "$@"
