#!/usr/bin/env bash
# bash run.sh          make .venv, install, run the four stages on the demo (extra words go to stage 01: bash run.sh --seed 7)
# bash run.sh test     the same set-up, then the tests (extra words go to pytest)
# bash run.sh setup    the set-up alone
# PYTHON=python3.12 chooses the interpreter (3.10 or newer), VENV=path the environment's folder.
set -euo pipefail
cd "$(dirname "$0")"
VENV=${VENV:-.venv}

if [ -z "${PYTHON:-}" ]; then
  for PYTHON in python3 python3.13 python3.12 python3.11 python3.10 python none; do
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
  done
fi
[ "$PYTHON" != none ] || { echo "error: no Python 3.10 or newer (on the PATH); install one, or name it with PYTHON=..." >&2; exit 2; }

wanted=$(cat requirements.txt requirements-dev.txt constraints.txt | cksum)
if [ "$(cat "$VENV/installed" 2>/dev/null)" != "$wanted" ]; then
  echo "setting up $VENV (once, a minute or more)"
  "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" -m pip install -q --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
  echo "$wanted" > "$VENV/installed"
fi

case "${1:-}" in
  setup) ;;
  test) shift; "$VENV/bin/python" -m pytest -n 2 --dist loadfile "$@" ;;  # two files at a time
  *)
    case " $* " in
      *" --run"* | *" --dataset"* | *" --help "* | *" -h "*)
        echo "error: run.sh runs the demo in runs/demo ($*); call the four scripts for another folder, data set or their --help" >&2; exit 2 ;;
    esac
    "$VENV/bin/python" 01_prepare_data.py "$@"
    "$VENV/bin/python" 02_infer_profiles.py
    "$VENV/bin/python" 03_quantize.py
    "$VENV/bin/python" 04_train_ctr.py
    ;;
esac
