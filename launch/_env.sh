# shellcheck shell=bash
# Sourced by the scripts of this folder, in the root of the checkout:
#
#   environment [EXTRA[,EXTRA]]    makes .venv with this package and its extras, once
#
# The work is repeated when requirements.txt or pyproject.toml changed, when an earlier attempt was
# interrupted, and when the checkout moved. PYTHON=path chooses the interpreter.

# Each step of a CPU program takes fresh memory from the system. In pages of 2 MB instead of 4 kB
# (glibc 2.35 and later; ignored elsewhere) a training step takes two thirds of the time.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

find_python() {
  local name
  for name in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    # Running it also passes over version-manager shims that stand for no interpreter.
    if "$name" -c 'import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
      echo "$name"
      return
    fi
  done
  echo "error: needs Python 3.11, 3.12 or 3.13 with its venv module (Debian and Ubuntu: apt" \
    "install python3-venv), tried ${PYTHON:-python3.13 python3.12 python3.11 python3};" \
    "set PYTHON=/path/to/python3" >&2
  return 1
}

environment() {
  local extras="${1:-}" key name python
  key="$PWD $(cat requirements.txt pyproject.toml | cksum)"
  if [ -e .venv.unfinished ] || ! .venv/bin/python -c '' 2>/dev/null ||
    [ "$(cat .venv/checkout 2>/dev/null || pwd)" != "$PWD" ]; then
    python="$(find_python)"
    echo "Making .venv with $("$python" --version)"
    touch .venv.unfinished
    "$python" -m venv --clear .venv
    echo "$PWD" >.venv/checkout
  fi
  if [ "$(cat ".venv/installed-${extras:-base}" 2>/dev/null || true)" != "$key" ]; then
    echo "Installing requirements.txt${extras:+ and the extras $extras} into .venv (minutes, once)"
    touch .venv.unfinished
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location \
      --editable ".${extras:+[$extras]}"
    for name in base "${extras:-base}"; do
      echo "$key" >".venv/installed-$name"
    done
    rm -f .venv.unfinished
  fi
}
